"""The Hugging Face Hub on loopback: the part of its API that reads the files of one data set."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print nothing about a client that closed its connection."""


class HubServer:
    """Serves a folder as the data set ``zoo/galaxies`` at the revisions ``main`` and ``v1``; use as a context manager.

    Its files can also be read as those of any web server, at ``<address>/datasets/zoo/galaxies/resolve/main/``.

    Args:
        folder: its files.
        refusal: status and error code of every answer (``GatedRepo``, ``RepoNotFound``), unless the token is given; None: none.
        token: that lets a request through.

    Attributes:
        ranges: number of requests for a part of each file.
        failing: number of requests for parts of files that fail with status 503 from now on.
        commit: to which the revisions point.
    """

    def __init__(self, folder: Path, refusal: tuple[int, str] | None = None, token: str = "hf_right") -> None:
        self.folder, self.refusal, self.token = folder, refusal, token
        self.ranges: Counter[str] = Counter()
        self.failing = 0
        self.commit = COMMIT
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def tree(self, path: str, *, recursive: bool) -> list[dict[str, object]]:
        """The entries of a folder, as the Hub lists them."""
        found = sorted((self.folder / path).rglob("*") if recursive else (self.folder / path).iterdir())
        entries: list[dict[str, object]] = []
        for one in found:
            name = one.relative_to(self.folder).as_posix()
            data = one.read_bytes() if one.is_file() else b""
            kind = "file" if one.is_file() else "directory"
            entries.append({"type": kind, "path": name, "size": len(data), "oid": hashlib.sha1(data + name.encode()).hexdigest()})
        return entries

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                path = unquote(url.path).strip("/")
                if hub.refusal is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._send(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
                    return
                for revision in ("main", "v1", hub.commit):
                    api, files = f"api/datasets/zoo/galaxies/tree/{revision}", f"datasets/zoo/galaxies/resolve/{revision}/"
                    if path in ("api/datasets/zoo/galaxies", f"api/datasets/zoo/galaxies/revision/{revision}"):
                        self._send_json({"id": "zoo/galaxies", "sha": hub.commit, "siblings": []})
                        return
                    if path == api or path.startswith(f"{api}/"):
                        folder = path.removeprefix(api).strip("/")
                        if (hub.folder / folder).is_dir():
                            self._send_json(hub.tree(folder, recursive="recursive=true" in url.query.lower()))
                        else:
                            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                        return
                    if path.startswith(files) and (file := hub.folder / path.removeprefix(files)).is_file():
                        self._send_part(path.removeprefix(files), file.read_bytes())
                        return
                code = "RevisionNotFound" if "zoo/galaxies" in path else "RepoNotFound"
                self._send(404, b"{}", {"X-Error-Code": code})

            def do_HEAD(self) -> None:
                self.do_GET()

            def _send_part(self, name: str, data: bytes) -> None:
                if self.command == "HEAD":
                    self._send(200, data, {"ETag": '"x"', "Accept-Ranges": "bytes"})
                    return
                hub.ranges[name] += 1
                if hub.failing:
                    hub.failing -= 1
                    self._send(503, b"")
                    return
                first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1 if last else None]
                shown = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                self._send(206 if "Range" in self.headers else 200, part, {"Content-Range": shown, "ETag": '"x"'})

            def _send_json(self, content: object) -> None:
                self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        return Handler
