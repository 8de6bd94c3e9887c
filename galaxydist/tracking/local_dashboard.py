"""Dashboard without an account: trackio's page on this machine's loopback address, for the runs in trackio's folder."""

import contextlib
import getpass
import io
import shlex
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from galaxydist.errors import UserError
from galaxydist.tracking.trackio_sink import load_trackio

LOOPBACK = "127.0.0.1"


@contextmanager
def serve_page(folder: Path, environ: MutableMapping[str, str], *, port: int | None) -> Iterator[int]:
    """Serve trackio's page inside, on the loopback address only; it shows runs, and cannot change them.

    Args:
        folder: trackio's folder.
        environ: the environment of this process (see ``load_trackio``).
        port: None: trackio's, 7860, or the next free one.

    Yields:
        The port.

    Raises:
        UserError: trackio is not installed, or the port is not free.
    """
    trackio = load_trackio(folder, environ)
    try:
        # It prints an address with which anybody may delete runs.
        with contextlib.redirect_stdout(io.StringIO()):
            server, address, _, _ = trackio.show(
                open_browser=False, block_thread=False, host=LOOPBACK, server_port=port, share=False, mcp_server=False
            )
    except OSError as error:
        given = "no port is free" if port is None else f"--port {port} is not free: another program uses it, or it is reserved"
        raise UserError(f"{given}; give another one with --port") from error
    try:
        yield urlsplit(address).port or 0
    finally:
        server.close()


def page_address(port: int) -> str:
    """Return the address of a page on this machine."""
    return f"http://{LOOPBACK}:{port}"


def tunnel_command(port: int) -> str:
    """Return the command that makes a page of this machine visible under the same port of a user's own one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = "USER"
    return shlex.join(["ssh", "-N", "-L", f"{port}:localhost:{port}", f"{user}@{socket.gethostname()}"])
