"""Filter in front of gradio's server: requests of the page pass, all others are refused.

gradio serves more than this page needs. Its server fetches the URL in a request that names one as a file, hands on files of other
servers, and has routes for streams, logins and saved inputs. Here a request can name no file but one that was uploaded, and no
route but those of the page. Bad requests get a short answer and leave no traceback in the log.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

# Types of ASGI, the interface between a server and a Python application.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"
UPLOAD, JOIN, QUEUE_DATA, FILE = f"{API}/upload", f"{API}/queue/join", f"{API}/queue/data", f"{API}/file="
PROGRESS = f"{API}/upload_progress"
READ = {
    "/",
    "/config",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    "/theme.css",
    f"{API}/info",
    QUEUE_DATA,
    f"{API}/startup-events",
    PROGRESS,
}
READ_BELOW = ("/assets/", "/static/", f"{API}/heartbeat/", FILE)
WRITE = {UPLOAD, JOIN, f"{API}/cancel", f"{API}/reset"}
# Kinds of inputs of an event: one uploaded file or None, a list of them or None, a value that only the server knows, and a text
# of at most MAX_TEXT characters, a number, a truth value or None.
FILE_INPUT, FILES_INPUT, STATE_INPUT, VALUE_INPUT = "file", "files", "state", "value"
MAX_TEXT, MAX_FILES = 1000, 10_000
# A request without an upload is small: texts, numbers and names of uploaded files.
MAX_JSON_BYTES = 1 << 20
# Uploads of this many times the limit of one may lie on the disk at the same time.
STORED_UPLOADS = 20
# Time in seconds for one request. A part that gets nothing for this time is no longer being uploaded.
REQUEST_S = PART_KEPT_S = 600
# The browser itself asks no other host. gradio's page has inline scripts, and builds functions from templates.
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
BUSY = "Too many pictures are waiting at the moment. Try again in a minute."


@dataclass(frozen=True)
class FilterOptions:
    """Limits of the requests.

    Args:
        folder: of uploads and of the files that the page offers, absolute and without links.
        inputs: returns the kinds of the inputs of each event of the page, by its number: ``FILE_INPUT``, ``FILES_INPUT``,
            ``STATE_INPUT`` or ``VALUE_INPUT``.
        is_waiting: returns True for a session that waits for an answer.
        max_upload: bytes of one upload: a picture, a zip, or several pictures together.
        is_alone: no request of the browser leaves for another host; not so with a share link, whose page comes from there.
    """

    folder: Path
    inputs: Callable[[], Mapping[int, Sequence[str]]]
    is_waiting: Callable[[str], bool]
    max_upload: int
    is_alone: bool = True


class RefusedError(Exception):
    """Error of a request that is not answered, with the status of HTTP and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class RequestFilter:
    """ASGI middleware that lets the requests of the page pass.

    Args:
        app: the application behind it.
        options: limits.
    """

    def __init__(self, app: Application, options: FilterOptions) -> None:
        self._app, self._options = app, options
        self._arriving_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket, which the page does not use
            return
        answer = _Answer(send, is_alone=self._options.is_alone)
        try:
            receive = await self._check(scope, receive)
            with self._room_for(scope):
                senders = {JOIN: answer.hide_full_queue, PROGRESS: answer.hide_unknown_upload}
                await self._app(scope, receive, senders.get(scope["path"], answer.send))
        except RefusedError as error:
            await answer.refuse(error.status, str(error))
        except (TypeError, KeyError, ValueError):
            if scope["path"] != UPLOAD:
                raise
            await answer.refuse(400, "this is no upload of files")

    async def _check(self, scope: Scope, receive: Receive) -> Receive:
        """Return what the application reads the request from.

        Raises:
            RefusedError: the request is not one of the page.
        """
        path, method = str(scope["path"]), scope["method"]
        if method in ("GET", "HEAD"):
            if path not in READ and not path.startswith(READ_BELOW):
                raise RefusedError(404, "not found")
            if path.startswith(FILE) and not self._is_ours(path.removeprefix(FILE)):
                raise RefusedError(403, "only files of this page are served")
            if path == QUEUE_DATA and not self._options.is_waiting(_session(scope)):
                raise RefusedError(404, "nothing is waited for")
            return receive
        if method != "POST" or path not in WRITE:
            raise RefusedError(404, "not found")
        length = _content_length(scope["headers"])
        if path == UPLOAD:
            if length > self._options.max_upload:
                raise RefusedError(413, f"the upload is larger than the limit of {self._options.max_upload >> 20} MB")
            return _whole(receive)
        if length > MAX_JSON_BYTES:
            raise RefusedError(413, "the request is too large: files are uploaded, not sent in a request")
        content = self._check_json(await _read(_whole(receive)), is_event=path == JOIN)
        body = json.dumps(content).encode()
        scope["headers"] = [
            (name, str(len(body)).encode() if name.lower() == b"content-length" else value) for name, value in scope["headers"]
        ]
        return _replay(body, receive)

    @contextmanager
    def _room_for(self, scope: Scope) -> Iterator[None]:
        """Keep room on the disk for an upload while it arrives.

        Raises:
            RefusedError: the files on the disk and the uploads that arrive leave no room.
        """
        length = _content_length(scope["headers"]) if scope["path"] == UPLOAD else 0
        if length and _size_of(self._options.folder) + self._arriving_bytes + length > STORED_UPLOADS * self._options.max_upload:
            raise RefusedError(503, BUSY)
        self._arriving_bytes += length
        try:
            yield
        finally:
            self._arriving_bytes -= length

    def _check_json(self, body: bytes, *, is_event: bool) -> dict[str, Any]:
        """Return the content of a request, of an event only what the page sends."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "the request is not JSON") from error
        if not isinstance(content, dict):
            raise RefusedError(400, "the request is not an object of JSON")
        if not is_event:
            return content
        session, number, data = (content.get(key) for key in ("session_hash", "fn_index", "data"))
        if not isinstance(session, str) or not 0 < len(session) <= 100:
            raise RefusedError(400, "the request has no session_hash")
        kinds = self._options.inputs().get(number) if type(number) is int else None
        if kinds is None or not isinstance(data, list) or len(data) != len(kinds):
            raise RefusedError(400, "the page has no such event")
        checked = [self._check_input(kind, value) for kind, value in zip(kinds, data, strict=True)]
        return {"data": checked, "fn_index": number, "session_hash": session}

    def _check_input(self, kind: str, value: object) -> object:
        """Return an input of an event, as little as gradio needs of it."""
        if kind == STATE_INPUT or value is None:
            return None
        if kind == FILE_INPUT:
            return self._check_file(value)
        if kind == FILES_INPUT:
            if not isinstance(value, list) or len(value) > MAX_FILES:
                raise RefusedError(400, "files have to be given as a list")
            return [self._check_file(one) for one in value]
        if isinstance(value, str) and len(value) <= MAX_TEXT:
            return value
        if isinstance(value, bool | int | float):
            return value
        raise RefusedError(400, "a value has to be a text or a number")

    def _check_file(self, value: object) -> dict[str, Any]:
        """Return an uploaded file as gradio names it, without the address of the file, which nothing may open."""
        path = value.get("path") if isinstance(value, dict) else None
        name = value.get("orig_name") if isinstance(value, dict) else None
        if not self._is_ours(path):
            raise RefusedError(403, "a file has to be uploaded: no path and no URL is opened")
        name = name[-MAX_TEXT:] if isinstance(name, str) else None
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def _is_ours(self, path: object) -> bool:
        """Return True for the path of an existing file in the folder of uploads."""
        if not isinstance(path, str) or "\0" in path or not path.startswith("/"):
            return False
        try:
            real = Path(os.path.realpath(path))
            return real.is_relative_to(self._options.folder) and real.is_file()
        except OSError:  # a name that is too long
            return False


class _Answer:
    """The answer to one request, with the headers that keep the browser from asking other hosts."""

    def __init__(self, send: Send, *, is_alone: bool) -> None:
        self._send = send
        self._headers = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if is_alone:
            self._headers.append((b"content-security-policy", CONTENT_POLICY.encode()))
        self._is_started = self._is_replaced = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_started = True
            message["headers"] = [*message.get("headers", ()), *self._headers]
        await self._send(message)

    async def hide_full_queue(self, message: Message) -> None:
        """Send; where gradio tells the sizes of its full queue, a sentence for people instead."""
        if self._is_replaced:
            return
        if message["type"] == "http.response.start" and message["status"] == 503:
            self._is_replaced = True
            await self.refuse(503, BUSY)
            return
        await self.send(message)

    async def hide_unknown_upload(self, message: Message) -> None:
        """Send; where gradio has not seen an upload within three seconds, the end of its progress bar instead of an error."""
        if self._is_replaced:
            return
        if message["type"] == "http.response.start" and message["status"] == 404:
            self._is_replaced = True
            headers = [(b"content-type", b"text/event-stream")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
            await self.send({"type": "http.response.body", "body": b'data: {"msg": "done"}\n\n'})
            return
        await self.send(message)

    async def refuse(self, status: int, text: str) -> None:
        if self._is_started:
            return
        body = json.dumps({"detail": text}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the length of the body that the headers announce; the server reads no more.

    Raises:
        RefusedError: there is none, as where a body comes in chunks.
    """
    found = [value for name, value in headers if name.lower() == b"content-length"]
    if len(found) != 1 or not found[0].isdigit():
        raise RefusedError(411, "the request does not say how long it is")
    return int(found[0])


async def _read(receive: Receive) -> bytes:
    """Return the body of a request from :func:`_whole`."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _whole(receive: Receive) -> Receive:
    """Return a receiver that refuses a request that is slow, or that is broken off, where gradio would log a traceback."""
    is_done = False
    deadline = asyncio.get_running_loop().time() + REQUEST_S

    async def receive_part() -> Message:
        nonlocal is_done
        if is_done:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise RefusedError(408, "the request took too long") from None
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the request has ended early")
        is_done = not message.get("more_body")
        return message

    return receive_part


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that gives a body that was read already, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _session(scope: Scope) -> str:
    """Return the session that the query of a request names, or an empty text."""
    query = parse_qs(str(scope["query_string"], "ascii", "replace"))
    return query.get("session_hash", [""])[0]


def _size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, and delete the parts of uploads that were broken off long ago."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                facts = path.lstat()
                # A whole upload has a folder of its own.
                if parent == str(folder) and time.time() - facts.st_mtime > PART_KEPT_S:
                    path.unlink()
                else:
                    total += facts.st_size
            except OSError:  # deleted meanwhile
                continue
    return total
