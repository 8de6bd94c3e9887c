"""Server of the page: gradio on one address, with limits, behind the filter of its requests, until it is stopped."""

import errno
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .request_filter import FilterOptions, RequestFilter

if TYPE_CHECKING:
    from .model import ServedModel

LOOPBACK = "127.0.0.1"
# Looks of the page, beside this module.
STYLE = "page.css"
# Variables with which the surroundings could open folders, start other servers or hand out addresses.
IGNORED = (
    "GRADIO_ALLOWED_PATHS",
    "GRADIO_LOCAL_DEV_MODE",
    "GRADIO_MCP_SERVER",
    "GRADIO_NUM_WORKERS",
    "GRADIO_RUN_HISTORY",
    "GRADIO_SHARE",
    "GRADIO_SSR_MODE",
    "GRADIO_VIBE_MODE",
    "GRADIO_WATCH_DIRS",
)
# Uploads are deleted after this time; it is looked every DELETE_EVERY_S seconds.
KEPT_S, DELETE_EVERY_S = 600, 60
# Pictures that are labelled at the same time, and sessions that are remembered.
AT_THE_SAME_TIME, SESSIONS = 2, 1000
# Ports that are tried without a choice: gradio's own.
FIRST_PORT, NUM_PORTS = 7860, 100
# Time for answers that are just being sent, and for the server's thread to end.
GRACE_S, STOPPING_S = 1, 10.0


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Args:
        host: address of this machine that it listens on.
        port: None: 7860, or the next free one.
        is_shared: also make a public link, through gradio's own servers.
        max_upload_mb: limit of one upload: a picture, a zip, or several pictures together.
        max_waiting: requests that may wait; further ones get a message.
    """

    host: str = LOOPBACK
    port: int | None = None
    is_shared: bool = False
    max_upload_mb: int = 100
    max_waiting: int = 32


@dataclass(frozen=True)
class RunningServer:
    """A page that is being served.

    Args:
        port: port of the page.
        share_url: public link; None without one.
    """

    port: int
    share_url: str | None


@contextmanager
def serve(
    models: Mapping[str, "ServedModel"], options: ServerOptions, environ: MutableMapping[str, str]
) -> Iterator[RunningServer]:
    """Serve the page of some models inside; uploads lie in a folder of their own, which is deleted at the end.

    Args:
        models: by the names that users choose from; not empty.
        options: of the server.
        environ: the environment of this process. What would make gradio serve more than the page is taken out.

    Raises:
        ImportError: gradio is not installed.
        OSError: the port is not free, or the address is not one of this machine.
        PublishedFolderError: the stored galaxies of a model are damaged.
    """
    port = find_port(options.host, options.port)
    folder = Path(tempfile.mkdtemp(prefix="galaxydist-app-")).resolve()
    try:
        page_module = import_page(environ, folder, options.host)
        page = page_module.build_page(models)
        page.queue(api_open=False, max_size=options.max_waiting, default_concurrency_limit=AT_THE_SAME_TIME)
        page.delete_cache = (DELETE_EVERY_S, KEPT_S)
        limits = FilterOptions(
            folder=folder,
            inputs=lambda: page_module.input_kinds(page),
            is_waiting=lambda session: session in page._queue.pending_messages_per_session,
            max_upload=options.max_upload_mb << 20,
            is_alone=not options.is_shared,
        )
        try:
            page.launch(
                **_launch_arguments(options, port),
                # Starlette takes a class with its arguments.
                app_kwargs={"middleware": [(RequestFilter, (), {"options": limits})]},
                theme=page_module.build_theme(),
                css_paths=Path(__file__).with_name(STYLE),
            )
            yield RunningServer(page.server_port, page.share_url)
        finally:
            _stop(page)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def import_page(environ: MutableMapping[str, str], folder: Path, host: str = LOOPBACK) -> Any:
    """Import gradio, which takes seconds, and return the module of the page.

    Args:
        environ: the environment of this process. It gets no analytics, and no proxy to the page itself, which gradio asks at its
            start.
        folder: for gradio's files; it makes some already when it is imported.
        host: that the page will be served on.

    Raises:
        ImportError: gradio is not installed.
    """
    for name in IGNORED:
        environ.pop(name, None)
    environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    environ["GRADIO_TEMP_DIR"] = str(folder)
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [*filter(None, environ.get(name, "").split(",")), LOOPBACK, "localhost", host]
        environ[name] = ",".join(dict.fromkeys(hosts))
    from . import page

    return page


def find_port(host: str, port: int | None) -> int:
    """Return a port that is free: this one, or without one the first free one from ``FIRST_PORT`` on.

    Raises:
        OSError: it is not free, or the address is not one of this machine.
    """
    candidates = [port] if port is not None else [*range(FIRST_PORT, FIRST_PORT + NUM_PORTS)]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in candidates:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: a port that was just left is free
            try:
                probe.bind((host, number))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or number == candidates[-1]:
                    raise
                continue
            return number
    raise AssertionError("the last candidate is returned or raised")


def _launch_arguments(options: ServerOptions, port: int) -> dict[str, Any]:
    return {
        "server_name": options.host,
        "server_port": port,
        "share": options.is_shared,
        "max_file_size": options.max_upload_mb << 20,
        "allowed_paths": [],
        "state_session_capacity": SESSIONS,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": False,
        "footer_links": [],
        "inbrowser": False,
        "inline": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "node_port": None,
        "num_workers": 0,
        "pwa": False,
        "run_history": False,
        "ssr_mode": False,
        "strict_cors": True,
    }


def _stop(page: Any) -> None:
    """End the server and its thread: Python crashes at its exit if the thread still runs then."""
    server = getattr(page, "server", None)
    if server is None:  # it has not started
        return
    server.config.timeout_graceful_shutdown = GRACE_S
    page.close(verbose=False)
    server.thread.join(STOPPING_S)
