"""Which network interface the processes of several nodes reach one another by."""

import socket
from collections.abc import Sequence

import psutil

# Nothing is sent: connecting a datagram socket only asks the kernel for the route.
ANY_PORT = 9


def find_interface(hostnames: Sequence[str], own_name: str) -> str | None:
    """The interface of this node with the route to another node of the job.

    gloo takes the one that the node's own name resolves to, which on Debian is the loopback (127.0.1.1).

    Args:
        hostnames: the job's nodes.
        own_name: this node, as it is called there.

    Returns:
        Its name (``ib0``); None for a job of one node, or where it cannot be told.
    """
    others = [name for name in hostnames if name != own_name]
    if not others:
        return None
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(others[0], ANY_PORT, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as route:
            route.connect(address)
            own_address = route.getsockname()[0]
    except OSError:
        return None
    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if own_address in (found.address.partition("%")[0] for found in addresses)
        ),
        None,
    )
