"""HTTP server on loopback that delays and fails as configured, serves ranges, and counts its requests."""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

# Failures: a status, half of the body, a wrong byte in it, a reset connection.
TROUBLES = (503, "cut", "corrupt", "reset")
BLOCK_BYTES = 16384

Trouble = int | str | None


@dataclass
class Behaviour:
    """Delays and failures of a server.

    Args:
        delay_s: delay before each answer.
        trouble: (path, number of this request for it, from 1) -> one of ``TROUBLES`` or another status; None: the file.
        block_delay_s: delay after each ``BLOCK_BYTES`` of a file.
    """

    delay_s: float = 0.0
    trouble: Callable[[str, int], Trouble] = lambda _path, _number: None
    block_delay_s: float = 0.0


class FileServer:
    """Serves the files of a folder over HTTP from a thread; use as a context manager.

    Args:
        folder: the served files.
        behaviour: delays and failures.
        prefix: of the addresses, before a file's name.

    Attributes:
        gets: number of GETs by path below the folder, with their failures.
        heads: number of HEADs by path below the folder, which never fail.
        failures: number of GETs by path that did not get the complete, correct file.
        others: requests of any other kind or outside the prefix, as "METHOD address".
        asked: address (with its query) and headers of the last GET of each path.
    """

    def __init__(self, folder: Path, behaviour: Behaviour | None = None, *, prefix: str = "/") -> None:
        self.folder, self.behaviour, self.prefix = folder, behaviour or Behaviour(), prefix
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.others: list[str] = []
        self.asked: dict[str, tuple[str, dict[str, str]]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, name="file-server")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        """URL of the manifest."""
        return f"{self.address}{self.prefix}manifest.json"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, path: str) -> Trouble:
        """Count one GET; return its failure."""
        with self._lock:
            self.gets[path] += 1
            trouble = self.behaviour.trouble(path, self.gets[path])
            if trouble is not None:
                self.failures[path] += 1
        return trouble

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("_BoundHandler", (_Handler,), {"files": self})


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests for the files of a server."""

    protocol_version = "HTTP/1.1"
    files: "FileServer"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith(self.files.prefix):
            self._other()
            return
        path = path.removeprefix(self.files.prefix)
        self.files.asked[path] = self.path, dict(self.headers)
        trouble = self.files.count(path)
        time.sleep(self.files.behaviour.delay_s)
        with contextlib.suppress(ConnectionError):
            self._answer(self.files.folder / path, trouble)

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith(self.files.prefix):
            self._other()
            return
        path = path.removeprefix(self.files.prefix)
        with self.files._lock:
            self.files.heads[path] += 1
        if not (self.files.folder / path).is_file():
            self.send_error(404)
            return
        self._start(200, self.files.folder / path, (self.files.folder / path).stat().st_size)

    def _answer(self, path: Path, trouble: Trouble) -> None:
        if trouble == "reset":
            self._reset()
        elif isinstance(trouble, int):
            self.send_error(trouble)
        elif not path.is_file():
            self.send_error(404)
        else:
            data = bytearray(path.read_bytes())
            if trouble == "corrupt":
                data[len(data) // 2] ^= 1
            total, unit = len(data), self.headers.get("Range", "").partition("=")
            if unit[0] == "bytes":
                first, _, last = unit[2].partition("-")
                data = data[int(first) : int(last) + 1]
                self._start(206, path, len(data), f"bytes {first}-{last}/{total}")
            else:
                self._start(200, path, len(data))
            self._send(data, len(data) // 2 if trouble == "cut" else len(data))

    def _start(self, status: int, path: Path, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def _send(self, data: bytearray, length: int) -> None:
        for start in range(0, length, BLOCK_BYTES):
            self.wfile.write(data[start : min(start + BLOCK_BYTES, length)])
            if self.files.behaviour.block_delay_s:
                time.sleep(self.files.behaviour.block_delay_s)
        self.close_connection |= length < len(data)

    def _reset(self) -> None:
        """Reset the connection: SO_LINGER of 0 s."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.close_connection = True

    def _other(self) -> None:
        self.files.others.append(f"{self.command} {self.path}")
        self.send_error(405)

    do_POST = do_PUT = do_PROPFIND = _other

    def log_message(self, format: str, *args: Any) -> None:
        pass


def every(number: int) -> Callable[[str, int], Trouble]:
    """Return a behaviour in which one request in ``number`` fails, counted over all paths, with every kind of failure in turn.

    The manifest, which holds the checksums and has none itself, gets no wrong byte.
    """
    seen = 0

    def trouble(path: str, _number: int) -> Trouble:
        nonlocal seen
        seen += 1
        turn, rest = divmod(seen, number)
        if rest != number // 2:
            return None
        kind = TROUBLES[turn % len(TROUBLES)]
        return "cut" if kind == "corrupt" and path.endswith("manifest.json") else kind

    return trouble
