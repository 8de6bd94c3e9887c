"""Downloads from object stores and web servers through fsspec, one file at a time by its name.

Nothing is written, and only ``list_files`` lists. A ``Store`` makes one request per attempt and never repeats it; ``download``
and ``RemoteFile`` decide about retries.
"""

import asyncio
import importlib.util
import io
import logging
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from galaxydist.atomic_files import file_sha256
from galaxydist.errors import UserError
from galaxydist.store_errors import TransientError, classify_error

if TYPE_CHECKING:
    from tenacity import RetryCallState

# Protocol -> (kind of filesystem, package that provides it).
PROTOCOLS = {
    "s3": ("s3", "s3fs"),
    "s3a": ("s3", "s3fs"),
    "gs": ("gs", "gcsfs"),
    "gcs": ("gs", "gcsfs"),
    "https": ("http", "aiohttp"),
    "http": ("http", "aiohttp"),
    "hf": ("http", "aiohttp"),
    "file": ("file", None),
}

# Keys of fsspec's file information that tell versions of a file apart.
_VERSIONS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime")

CONNECT_S = 20.0
# Seconds without data after which an attempt is given up.
SILENCE_S = 60.0


T = TypeVar("T")


class StoppedError(Exception):
    """The caller stopped waiting for a file."""


def is_url(location: str | Path) -> bool:
    """Return True for a URL (of any protocol), False for a path."""
    return isinstance(location, str) and "://" in location


class Store:
    """A remote folder of files.

    Args:
        url: URL of the folder; its query (``?...``) is added to the address of each file and shown in no message.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        folder, question_mark, query = url.partition("?")
        self._folder, self._query = folder.rstrip("/"), question_mark + query
        protocol = url.partition("://")[0].lower()
        if protocol not in PROTOCOLS:
            raise UserError(
                f"{self.url()}: shards cannot be read through {protocol}://; use "
                f"{', '.join(f'{name}://' for name in PROTOCOLS)} or a folder on this machine"
            )
        self._kind, package = PROTOCOLS[protocol]
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{self.url()}: {protocol}:// needs {package}, which is not installed: pip install 'galaxydist[remote]'"
            )
        self._headers: dict[str, str] = {}
        if protocol == "hf":
            self._address, self._headers = _hub_address(self._folder)
        else:  # fsspec does not unquote the path of a file:// URL
            self._address = unquote(self._folder) if protocol == "file" else self._folder
        self._files = _open_filesystem(self._kind)

    def url(self, name: str = "") -> str:
        """Return the URL of a file for messages, without the query, which may hold a secret, and without a password."""
        protocol, _, rest = self._folder.partition("://")
        host, slash, path = rest.partition("/")
        shown = f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"
        return f"{shown}/{name}" if name else shown

    def get(self, name: str, path: Path, stop: threading.Event) -> None:
        """Copy a file of the store to ``path``, in one attempt.

        Args:
            name: file name relative to the folder.
            path: is overwritten; after an error it may be incomplete or missing.
            stop: ends the attempt when it is set.

        Raises:
            StoppedError: ``stop`` was set.
            TransientError: another attempt may succeed.
            MissingError: the store has no such file.
            UserError: access denied, no credentials, or another lasting error.
            OSError: the local file cannot be written.
        """
        with path.open("wb"):
            pass  # an error here is the local disk's, not the store's
        if self._kind == "file":
            self._explained(name, lambda: self._files.get_file(f"{self._address}/{name}", str(path)))
        else:
            self._explained(name, lambda: _wait(self._get(name, str(path)), self._files.loop, stop))

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes ``start`` ... ``stop - 1`` of a file, fewer at its end, in one attempt; raises as :meth:`get` does."""
        address = f"{self._address}/{name}"
        if self._kind == "http":
            options = {"headers": self._headers} if self._headers else {}
            address = f"{self._address}/{quote(name)}{self._query}"
            found = self._explained(name, lambda: self._files.cat_file(address, start=start, end=stop, **options))
        else:
            found = self._explained(name, lambda: self._files.cat_file(address, start=start, end=stop))
        if len(found) > stop - start:
            raise UserError(f"{self.url(name)}: the server sends whole files only; copy it to this machine")
        return bytes(found)

    def stat(self, name: str) -> tuple[int, str]:
        """Return the size of a file and its version: an ETag or a time of change, empty if the store has neither.

        Raises:
            TransientError, UserError: as :meth:`get`.
        """
        info = self._explained(name, lambda: self._info(name))
        if info.get("size") is None:
            raise UserError(f"{self.url(name)}: the server does not give its size; copy it to this machine")
        version = next((info[key] for key in _VERSIONS if info.get(key)), "")
        return int(info["size"]), str(version).strip('"')

    def _info(self, name: str) -> Any:
        if self._kind != "http":
            return self._files.info(f"{self._address}/{name}")
        from fsspec.asyn import sync
        from fsspec.implementations.http import _file_info

        # The filesystem's own method reports every error, a denied access too, as a missing file.
        async def head() -> Any:
            session = await self._files.set_session()
            address = self._files.encode_url(f"{self._address}/{quote(name)}{self._query}")
            options = {**self._files.kwargs, **({"headers": self._headers} if self._headers else {})}
            return await _file_info(address, session, size_policy="head", **options)

        return sync(self._files.loop, head)

    def _explained(self, name: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except StoppedError:
            raise
        except Exception as error:
            explained = classify_error(error, self.url(name), self._kind)
            if explained is error:
                raise
            raise explained from error

    async def _get(self, name: str, path: str) -> None:
        if self._kind == "http":
            address = f"{self._address}/{quote(name)}{self._query}"
            await self._files._get_file(address, path, **({"headers": self._headers} if self._headers else {}))
        elif self._kind == "gs":
            # gcsfs repeats a failed request six times; call the function beneath the retries.
            once = getattr(self._files._get_file_request, "__wrapped__", None)
            if once is None:
                await self._files._get_file(f"{self._address}/{name}", path, concurrency=1)
            else:
                await once(self._files, f"{self._address}/{name}", path)
        else:
            await self._files._get_file(f"{self._address}/{name}", path)


def _open_filesystem(kind: str) -> Any:
    """Return a new fsspec filesystem without retries and with timeouts.

    fsspec's shared instance is not used, since other code may have configured it. The user's fsspec configuration (files,
    ``FSSPEC_...``) takes precedence.
    """
    import fsspec

    if kind == "file":
        return fsspec.filesystem("file")
    if kind == "s3":
        config = {"retries": {"total_max_attempts": 1}, "connect_timeout": CONNECT_S, "read_timeout": SILENCE_S}
        own = fsspec.config.conf.get("s3", {})
        files = fsspec.filesystem(
            "s3", skip_instance_cache=True, max_concurrency=1, config_kwargs={**config, **own.get("config_kwargs", {})}
        )
        files.retries = 1
        return files
    import aiohttp

    patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
    if kind == "gs":
        # The class that gcsfs registers asks for the kind of bucket over gRPC, which takes a minute if that port is closed.
        from gcsfs.core import GCSFileSystem

        own = {**fsspec.config.conf.get("gcs", {}), **fsspec.config.conf.get("gs", {})}
        session = {"timeout": patience, **own.get("session_kwargs", {})}
        return GCSFileSystem(skip_instance_cache=True, requests_timeout=patience, session_kwargs=session)
    own = {**fsspec.config.conf.get("http", {}), **fsspec.config.conf.get("https", {})}
    client = {"timeout": patience, **own.get("client_kwargs", {})}
    return fsspec.filesystem("https", skip_instance_cache=True, client_kwargs=client)


def _hub_address(url: str) -> tuple[str, dict[str, str]]:
    """Return the HTTP address and headers of a folder on the Hugging Face Hub.

    The URL is ``hf://[datasets/|spaces/|buckets/]NAMESPACE/NAME[@REVISION][/FOLDER]``. The Hub's own fsspec filesystem is not
    used, since it looks up each file before reading it.
    """
    from huggingface_hub import constants, get_token

    parts = url.removeprefix("hf://").strip("/").split("/")
    kind = parts.pop(0) if parts[0] in ("datasets", "spaces", "buckets", "models") else "models"
    if len(parts) < 2:
        raise UserError(f"{url} names no repository: give hf://datasets/NAMESPACE/NAME/FOLDER/manifest.json")
    name, _, revision = parts[1].partition("@")
    repository = "/".join(([] if kind == "models" else [kind]) + [parts[0], name])
    view = "resolve" if kind == "buckets" else f"resolve/{quote(revision or constants.DEFAULT_REVISION, safe='')}"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return "/".join([constants.ENDPOINT, repository, view, *map(quote, parts[2:])]), headers


def _wait(work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
    """Run a coroutine on fsspec's own thread; when ``stop`` is set, cancel it, and return only once it has ended."""

    async def run() -> None:
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait([task], timeout=0.1))[0]:
            if stop.is_set():
                task.cancel()
                await asyncio.wait([task])
        if task.cancelled() and stop.is_set():
            raise StoppedError
        task.result()

    asyncio.run_coroutine_threadsafe(run(), loop).result()


logger = logging.getLogger(__name__)

# The pause before attempt n + 1 is drawn from 0 to FIRST_PAUSE_S x 2^n, so that a thousand processes do not retry at once.
ATTEMPTS = 10
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
# Number of complete files with wrong contents after which a download fails.
WRONG_CONTENTS = 4
QUIET_ATTEMPTS = 3


class WrongContentError(TransientError):
    """A downloaded file differs from the manifest."""


def download(
    store: Store,
    name: str,
    path: Path,
    *,
    stop: threading.Event,
    num_bytes: int | None = None,
    sha256: bytes | None = None,
    attempts: int = ATTEMPTS,
) -> None:
    """Copy a file of a store to ``path`` and verify it, with growing pauses between attempts.

    The number of requests is 1 plus the failures.

    Args:
        store, name: the file.
        path: is overwritten; after an error it may be incomplete or missing.
        stop: ends attempts and pauses when it is set.
        num_bytes, sha256: expected size and digest of the file, if known.
        attempts: largest number of attempts.

    Raises:
        StoppedError: ``stop`` was set.
        MissingError: the store has no such file.
        UserError: the file cannot be fetched, or keeps differing from the manifest.
        OSError: the local file cannot be written.
    """
    wrong = 0

    def attempt() -> None:
        nonlocal wrong
        if stop.is_set():
            raise StoppedError
        store.get(name, path, stop)
        try:
            _verify(path, num_bytes, sha256)
        except WrongContentError as error:
            wrong += 1
            if wrong < WRONG_CONTENTS:
                raise
            raise UserError(
                f"{store.url(name)} differs from its manifest: {error} (fetched {wrong} times). "
                "Copy the whole folder of shards there again, manifest.json last."
            ) from None

    retried(attempt, store.url(name), stop, attempts)


def retried(attempt: Callable[[], T], url: str, stop: threading.Event, attempts: int) -> T:
    """Call a function until it raises no ``TransientError``, with growing pauses; raises as :func:`download` does."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
    from tenacity.nap import sleep_using_event

    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=stop_after_attempt(attempts),
        sleep=sleep_using_event(stop),
        before_sleep=lambda state: _log_retry(url, state),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except TransientError as error:
        raise UserError(
            f"{url} could not be read in {attempts} attempts; the last one: {error}. See that the server can be "
            "reached from this machine and give the command again: files fetched so far stay in the cache."
        ) from error


def check_version(store: Store, name: str, num_bytes: int | None, version: str, *, stop: threading.Event) -> None:
    """Check that a file of a store is the one that was seen earlier, by its size and version.

    Args:
        store, name: the file.
        num_bytes, version: as ``Store.stat`` returned them; None and empty: not known.
        stop: ends attempts when it is set.

    Raises:
        UserError: the file was replaced; or as :func:`download`.
    """
    size, found = retried(lambda: store.stat(name), store.url(name), stop, ATTEMPTS)
    if (num_bytes is not None and size != num_bytes) or (version and found != version):
        raise UserError(
            f"{store.url(name)} was replaced after it was indexed ({num_bytes} bytes of version {version or 'unknown'} then, "
            f"{size} bytes of version {found or 'unknown'} now): index it again"
        )


def _verify(path: Path, num_bytes: int | None, sha256: bytes | None) -> None:
    found = path.stat().st_size
    if num_bytes is not None and found != num_bytes:
        raise WrongContentError(f"{found} bytes instead of {num_bytes}")
    if sha256 is not None and (digest := file_sha256(path)) != sha256.hex():
        raise WrongContentError(f"its SHA-256 is {digest[:16]}..., not {sha256.hex()[:16]}...")


def _log_retry(url: str, state: "RetryCallState") -> None:
    level = logging.DEBUG if state.attempt_number <= QUIET_ATTEMPTS else logging.WARNING
    error = state.outcome.exception() if state.outcome is not None else None
    logger.log(level, "%s: attempt %d failed (%s); it is tried again", url, state.attempt_number, error)


# Reading parts of files, and finding files.


class RemoteFile(io.RawIOBase):
    """A file of a store that is read by ranges; wrap it in ``io.BufferedReader``, whose buffer is the size of a request.

    Args:
        store, name: the file.
        stop: ends pauses between attempts when it is set.

    Attributes:
        num_bytes, version: as ``Store.stat`` returns them.

    Raises:
        UserError: as :func:`download`.
    """

    def __init__(self, store: Store, name: str, stop: threading.Event) -> None:
        self._store, self._name, self._stop, self._position = store, name, stop, 0
        self.num_bytes, self.version = self._retry(lambda: store.stat(name))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the current position; return the number of bytes, 0 at the end of the file."""
        start, stop = self._position, min(self._position + len(buffer), self.num_bytes)
        if stop <= start:
            return 0
        found = self._retry(lambda: self._store.read(self._name, start, stop))
        if len(found) < stop - start:
            raise UserError(f"{self._store.url(self._name)} became shorter while it was read; give the command again")
        buffer[: len(found)] = found
        self._position = stop
        return len(found)

    def _retry(self, attempt: Callable[[], T]) -> T:
        return retried(attempt, self._store.url(self._name), self._stop, ATTEMPTS)


def list_files(pattern: str) -> list[str]:
    """Return the URLs that a pattern with ``*``, ``?``, ``[...]`` or ``**`` matches; ``s3://``, ``gs://`` and ``hf://`` only.

    Raises:
        UserError: the store cannot list files, or as :func:`download`.
    """
    protocol = pattern.partition("://")[0].lower()
    store = Store(pattern.rpartition("/")[0])
    kind = PROTOCOLS[protocol][0]
    if protocol == "hf":
        from huggingface_hub import HfFileSystem

        files: Any = HfFileSystem()
    elif kind == "http":
        raise UserError(f"{store.url()}: a web server does not list its files; name them with braces, like name-{{000..099}}.tar")
    else:
        files = store._files
    try:
        return sorted(f"{protocol}://{name.removeprefix(f'{protocol}://')}" for name in files.glob(pattern))
    except Exception as error:
        explained = classify_error(error, store.url(), kind)
        raise explained if isinstance(explained, UserError) else UserError(f"{store.url()} cannot be listed ({error})") from error
