"""A Hugging Face hub on loopback with the repositories that a test gives it."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files and model card of a repository.

    Args:
        files: content by name.
        card: the metadata of its README, such as ``{"license": "mit"}``.
        is_gated: files are refused until a licence is accepted.
        hashes: the SHA-256 that the hub states, where it is not the file's.
    """

    files: dict[str, bytes]
    card: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    hashes: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    repositories: dict[str, Repository]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = [part for part in urllib.parse.urlsplit(self.path).path.split("/") if part]
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        repository = self.repositories.get(name)
        if repository is None:
            self._send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif is_api and parts[4:] not in ([], ["revision", "main"], ["revision", COMMIT]):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body=with_body)
        elif is_api:
            self._send(200, json.dumps(self._info(name, repository)).encode(), {}, with_body=with_body)
        elif repository.is_gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body=with_body)
        else:
            content = repository.files[parts[-1]]
            etag = repository.hashes.get(parts[-1], hashlib.sha256(content).hexdigest())
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body=with_body)

    def _info(self, name: str, repository: Repository) -> dict[str, object]:
        siblings = []
        for file, content in repository.files.items():
            stated = repository.hashes.get(file, hashlib.sha256(content).hexdigest())
            large = {"lfs": {"sha256": stated, "size": len(content), "pointerSize": 100}} if not file.endswith(".json") else {}
            siblings.append({"rfilename": file, "size": len(content), "blobId": "0", **large})
        return {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings, "cardData": repository.card}

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def mini_hub(repositories: dict[str, Repository]) -> Iterator[str]:
    """Serve repositories by ``OWNER/NAME``, each at one revision (``main``, ``COMMIT``); yield the hub's address."""
    handler = type("_Repositories", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
