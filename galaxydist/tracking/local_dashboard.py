"""Dashboard without an account: trackio's page on this machine's loopback address, for the runs in trackio's folder."""

import contextlib
import io
import shlex
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from galaxydist.errors import UserError
from galaxydist.tracking.trackio_sink import load_trackio

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServedPage:
    """A page that is served.

    Args:
        port: on the loopback address.
        project: shown first; None: the first of all.
    """

    port: int
    project: str | None

    @property
    def address(self) -> str:
        """Address on this machine."""
        query = f"?project={quote(self.project)}" if self.project else ""
        return f"http://{LOOPBACK}:{self.port}/{query}"

    def tunnel(self, user: str, host: str) -> str:
        """Return the command that makes the page visible under the same address on another machine."""
        return shlex.join(["ssh", "-N", "-L", f"{self.port}:localhost:{self.port}", f"{user}@{host}"])


@contextmanager
def serve_page(folder: Path, project: str | None, environ: MutableMapping[str, str], *, port: int | None) -> Iterator[ServedPage]:
    """Serve trackio's page inside, on the loopback address only.

    Args:
        folder: trackio's folder.
        project: shown first.
        environ: the environment of this process.
        port: None: trackio's, 7860, or the next free one.

    Raises:
        UserError: trackio is not installed, or the port is not free.
    """
    trackio = load_trackio(folder, environ)
    from trackio.utils import canonical_project_name

    try:
        # trackio prints an address with which anybody may delete runs; ours only shows them.
        with contextlib.redirect_stdout(io.StringIO()):
            server, address, _, _ = trackio.show(
                open_browser=False, block_thread=False, host=LOOPBACK, server_port=port, share=False, mcp_server=False
            )
    except OSError as error:
        given = "no port is free" if port is None else f"--port {port} is not free: another program uses it, or it is reserved"
        raise UserError(f"{given}; give another one with --port") from error
    try:
        yield ServedPage(urlsplit(address).port or 0, canonical_project_name(project) if project else None)
    finally:
        server.close()
