"""A node's own host name and view of /etc/hosts, so that nodes' names resolve inside of jobs and nowhere else.

Rendezvous of several nodes connect to the first node by its name. Each slurmd, and with it all that its jobs run, gets a mount
namespace, in which a file of the bed lies over /etc/hosts, and a UTS namespace with the node's name: nothing of the machine is
changed, and nothing has to be put back. Where no namespaces can be made, names that resolve anyway will do.
"""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bed_files import BedError

BECOME_NODE = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def as_node(command: Sequence[str], node: str, hosts: Path) -> list[str]:
    """The command in the namespaces of a node; as it is where none can be made."""
    if not _can_unshare():
        return list(command)
    # In there, an ordinary user becomes the user again: slurmd believes of a root that it may do anything.
    user = [] if os.geteuid() == 0 else ["unshare", f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
    return ["unshare", *_namespaces(), "sh", "-c", BECOME_NODE, "sh", str(hosts), node, *user, *command]


def check_names(nodes: Sequence[str]) -> None:
    """Raises ``BedError`` where the nodes' names would not resolve."""
    if not _can_unshare() and not all(_is_loopback(node) for node in nodes):
        raise BedError(
            f"the names {' '.join(nodes)} would not resolve: no namespaces can be made here ('unshare {' '.join(_namespaces())}' "
            f"fails). Run as root, a container with --cap-add SYS_ADMIN; or add a line to /etc/hosts: 127.0.0.1 {' '.join(nodes)}"
        )


def _namespaces() -> list[str]:
    """Options of unshare; to make the others, an ordinary user has to be root of a namespace of users."""
    return ["--mount", "--uts", "--propagation=slave", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def _can_unshare() -> bool:
    probe = ["unshare", *_namespaces(), "mount", "--bind", "/etc/hosts", "/etc/hosts"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _is_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False
