"""Servers for tests of remote stores, on loopback: one for HTTP that can be told to misbehave, and moto's S3 in a process of its
own. Both serve files of a folder and count what is asked for."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a request is answered with, instead of the file.
TROUBLES = ("unavailable", "cut", "corrupt", "refuse")


@dataclass
class Behaviour:
    """How a server answers.

    Args:
        delay_s: before each answer.
        trouble: (path, number of this request for it, from 1) -> one of ``TROUBLES``, an HTTP status, or None for the file.
        block_delay_s: after each 16 KiB of a file.
    """

    delay_s: float = 0.0
    trouble: Callable[[str, int], str | int | None] = field(default=lambda path, number: None)
    block_delay_s: float = 0.0


class FileServer:
    """The files of a folder over HTTP, from a thread.

    Attributes:
        gets: number of GETs by path below the folder, whatever came of them.
        failures: of them, those that were not given the whole right file.
        others: requests of any other kind, as "METHOD path".
        headers: of the last GET of each path.
    """

    def __init__(self, folder: Path, behaviour: Behaviour | None = None) -> None:
        self.folder, self.behaviour = folder, behaviour or Behaviour()
        self.gets: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.others: list[str] = []
        self.headers: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, name="file-server")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        """Of the manifest."""
        return f"{self.address}/manifest.json"

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, path: str) -> str | int | None:
        """Take in one GET; what trouble it gets."""
        with self._lock:
            self.gets[path] += 1
            trouble = self.behaviour.trouble(path, self.gets[path])
            self.failures[path] += trouble is not None
        return trouble

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path).lstrip("/")
                files.headers[path] = dict(self.headers) | {"path": self.path}
                trouble = files.count(path)
                time.sleep(files.behaviour.delay_s)
                with contextlib.suppress(ConnectionError):
                    self._answer(files.folder / path, trouble)

            def _answer(self, path: Path, trouble: str | int | None) -> None:
                if trouble == "refuse":
                    self._reset()
                elif isinstance(trouble, int):
                    self.send_error(trouble)
                elif trouble == "unavailable":
                    self.send_error(503)
                elif not path.is_file():
                    self.send_error(404)
                else:
                    data = bytearray(path.read_bytes())
                    if trouble == "corrupt":
                        data[len(data) // 2] ^= 1
                    self._send(data, len(data) // 2 if trouble == "cut" else len(data))

            def _send(self, data: bytearray, length: int) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for start in range(0, length, 16384):
                    self.wfile.write(data[start : min(start + 16384, length)])
                    if files.behaviour.block_delay_s:
                        time.sleep(files.behaviour.block_delay_s)
                self.close_connection |= length < len(data)

            def _reset(self) -> None:
                """Close the connection with a reset, as a server does that takes no more."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                self.close_connection = True

            def _other(self) -> None:
                files.others.append(f"{self.command} {self.path}")
                self.send_error(405)

            do_HEAD = do_POST = do_PUT = do_PROPFIND = _other

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def every(number: int) -> Callable[[str, int], str | None]:
    """Trouble of every kind in turn: each ``number``-th request fails, counted over all paths; the first of them soon."""
    seen = 0

    def trouble(path: str, count: int) -> str | None:
        nonlocal seen
        seen += 1
        turn, rest = divmod(seen, number)
        return TROUBLES[turn % len(TROUBLES)] if rest == number // 2 else None

    return trouble


@contextlib.contextmanager
def s3_server(folder: Path, log: Path) -> Iterator[str]:
    """moto's S3 server in a process of its own, with the files of ``folder`` in the bucket ``galaxies`` under ``shards/``.

    Yields:
        its address. ``log`` gets a line a request.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environ)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server)
        _fill_bucket(address, folder)
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "moto's server does not start"
            time.sleep(0.05)


def _fill_bucket(address: str, folder: Path) -> None:
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=address, aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="galaxies")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket="galaxies", Key=f"shards/{path.relative_to(folder)}", Body=path.read_bytes())
