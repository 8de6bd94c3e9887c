"""Dashboard without an account: trackio's page on this machine's loopback address, for the runs in trackio's folder."""

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from galaxydist.errors import UserError
from galaxydist.job_environment import tunnel_command
from galaxydist.tracking.push import INTERVAL_S, Push, PushOptions, PushReport
from galaxydist.tracking.trackio_sink import load_trackio

LOOPBACK = "127.0.0.1"
# The server may take this time to end.
STOPPING_S = 10.0


@dataclass(frozen=True)
class PageOptions:
    """Options of the dashboard.

    Args:
        folder: trackio's folder.
        environ: the environment of this process.
        port: of the page; None: trackio's, 7860, or the next free one.
        is_followed: store also what the runs gain while the page is served.
    """

    folder: Path
    environ: MutableMapping[str, str]
    port: int | None = None
    is_followed: bool = True


def show_runs(
    find_runs: Callable[[], Sequence[Path]], is_going: Callable[[Path], bool], options: PageOptions, log: Callable[[str], None]
) -> PushReport:
    """Store runs for trackio, and serve its page until Ctrl-C.

    Args:
        find_runs: returns the runs; it is asked again and again, since a sweep may get more.
        is_going: returns True for a run that runs or waits for its start.
        options: of the page.
        log: is called with lines for the user.

    Raises:
        UserError: trackio is not installed, its folder cannot be made or written, or the port is not free.
    """
    push = Push(PushOptions("trackio", options.environ, trackio_dir=options.folder), log=lambda _: None)
    told: set[Path] = set()

    def update() -> None:
        runs = find_runs()
        push.update(runs, {run for run in runs if is_going(run)})
        for run in push.report.failed.keys() - told:
            told.add(run)
            log(f"not stored: {push.report.failed[run]}")

    load_trackio(options.folder, options.environ)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"trackio's folder {options.folder} cannot be made ({error.strerror}): give another --dir") from error
    if not os.access(options.folder, os.W_OK):
        raise UserError(f"trackio's folder {options.folder} cannot be written: give another --dir")
    runs = find_runs()
    log(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} for trackio in {options.folder}")
    try:
        update()
        with serve_page(options.folder, options.environ, port=options.port) as port:
            log(f"trackio's page: http://{LOOPBACK}:{port}")
            log(f"to see it on another machine, type there: {tunnel_command(port)}")
            log("Ctrl-C ends it.")
            while True:
                time.sleep(INTERVAL_S)
                if options.is_followed:
                    update()
    except KeyboardInterrupt:
        log("ended; the same command goes on")
    finally:
        push.close()
    return push.report


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
        _stop(server)


def _stop(server: Any) -> None:
    """End the server and its thread: Python crashes at its exit if the thread still runs then."""
    inner = server._uvicorn_server  # trackio's own ``close`` does not wait
    inner.config.timeout_graceful_shutdown = 1  # for a page that is just being sent
    server.close()
    inner.thread.join(STOPPING_S)
