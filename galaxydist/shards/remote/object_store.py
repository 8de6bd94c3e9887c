"""Object stores and web servers through fsspec: one file at a time, by its known name. Nothing is listed, nothing is written.

A ``Store`` makes one request for each attempt and never repeats one by itself: ``download.py`` decides whether to try again. What
goes wrong is sorted here: ``TransientError`` may be gone in a second, ``MissingError`` and any other ``UserError`` will not.
"""

import asyncio
import concurrent.futures
import errno
import hashlib
import importlib.util
import logging
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from galaxydist.errors import UserError

if TYPE_CHECKING:
    from tenacity import RetryCallState


# What an object store or a web server answers instead of a file: worth another attempt, or something the user must mend.
#
# The libraries have their own exceptions (botocore's, aiohttp's, gcsfs's, google-auth's); they are told apart here by HTTP
# status
# and by class name, so that nothing is imported that the store does not use.

# HTTP: too slow, too early, too many requests; and all 5xx.
TRANSIENT_STATUS = {408, 425, 429}
MISSING_STATUS = {404, 410}
FORBIDDEN_STATUS = {401, 403, 407}

# botocore's, aiohttp's, google-auth's and gcsfs's words for a network that failed; base classes count.
TRANSIENT_CLASSES = {
    "ChecksumError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionClosedError",
    "ConnectionError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "ProxyError",
    "ResponseParserError",
    "ServerDisconnectedError",
    "TimeoutError",
    "TransportError",
}
# A subclass of these that another attempt does not mend.
LASTING_CLASSES = {"ClientConnectorCertificateError"}
CREDENTIAL_CLASSES = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

WHAT_TO_SET = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true; for a "
    "server other than Amazon's also AWS_ENDPOINT_URL",
    "gs": "log in with `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
    "FSSPEC_GS_TOKEN=anon",
    "http": "give the server's password or token through fsspec, for example "
    """FSSPEC_HTTPS='{"headers": {"Authorization": "Bearer ..."}}'; for hf:// log in with `hf auth login` or set HF_TOKEN""",
    "file": "see to its permissions",
}


class TransientError(Exception):
    """An attempt that failed for a reason that may be gone at the next one."""


class MissingError(UserError):
    """The store has no such file."""


def classify_error(error: Exception, url: str, kind: str) -> Exception:
    """What an exception of a filesystem means.

    Args:
        error: as it came.
        url: of the file, for the message.
        kind: ``s3``, ``gs``, ``http`` or ``file``: what the user can set.

    Returns:
        ``TransientError``, ``MissingError``, another ``UserError``, or the error itself where the local disk is the reason.
    """
    names = {base.__name__ for base in type(error).__mro__}
    status = _status(error)
    reason = " ".join(f"{error}".split())[:300] or type(error).__name__
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS and status is None:
        return error
    if status in MISSING_STATUS or isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingError(f"{url} is not there")
    if names & CREDENTIAL_CLASSES:
        return UserError(f"no credentials for {url} ({reason}): {WHAT_TO_SET[kind]}")
    if status in FORBIDDEN_STATUS or isinstance(error, PermissionError) or reason.startswith("Forbidden"):
        return UserError(f"access to {url} is denied ({reason}): {WHAT_TO_SET[kind]}")
    if status is not None:
        is_transient = status in TRANSIENT_STATUS or status >= 500
    else:
        is_transient = bool(names & TRANSIENT_CLASSES) and not names & LASTING_CLASSES
    if is_transient:
        return TransientError(f"{type(error).__name__}: {reason}")
    return UserError(f"{url} cannot be read ({type(error).__name__}: {reason})")


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an exception, where there was an answer."""
    for name in ("status", "code"):  # aiohttp's; gcsfs's
        found = getattr(error, name, None)
        if isinstance(found, int | str) and str(found).isdecimal():
            return int(found)
    for one in (error, error.__cause__):  # botocore's; s3fs wraps it in one of Python's
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(found) if found else None
    return None


# Protocol -> (what it goes through, the package that brings that).
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

CONNECT_S = 20.0
# Seconds without a byte until an attempt is given up.
SILENCE_S = 60.0


class StoppedError(Exception):
    """Whoever waited for a file wants it no longer."""


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL (of any protocol) and not a path."""
    return isinstance(location, str) and "://" in location


class Store:
    """A folder of files somewhere else.

    Args:
        url: of the folder; what follows a ``?`` is added to the address of each file (and shown in no message).

    Raises:
        UserError: an unknown protocol, or the package that speaks it is missing.
    """

    def __init__(self, url: str) -> None:
        folder, question_mark, query = url.partition("?")
        self._folder, self._query = folder.rstrip("/"), question_mark + query
        protocol = url.partition("://")[0].lower()
        if protocol not in PROTOCOLS:
            raise UserError(
                f"{self.url()}: shards cannot be read through {protocol}://, only through "
                f"{', '.join(f'{name}://' for name in PROTOCOLS)} or from a folder on this machine"
            )
        self._kind, package = PROTOCOLS[protocol]
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{self.url()}: {protocol}:// needs {package}, which is not installed: pip install 'galaxydist[remote]'"
            )
        self._headers: dict[str, str] = {}
        if protocol == "hf":
            self._address, self._headers = _hub_address(self._folder)
        else:  # fsspec takes the path of a file:// URL as it is written
            self._address = unquote(self._folder) if protocol == "file" else self._folder
        self._files = _open_filesystem(self._kind)

    def url(self, name: str = "") -> str:
        """The URL of a file for a message: without the query, which may hold a secret, and without a password."""
        protocol, _, rest = self._folder.partition("://")
        host, slash, path = rest.partition("/")
        shown = f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"
        return f"{shown}/{name}" if name else shown

    def get(self, name: str, path: Path, stop: threading.Event) -> None:
        """Copy a file of the store to ``path``, in one attempt.

        Args:
            name: relative to the folder.
            path: is written over; after an error it may hold a part, or be gone.
            stop: when it is set, the attempt ends.

        Raises:
            StoppedError: ``stop`` was set.
            TransientError: worth another attempt.
            MissingError: the store has no such file.
            UserError: not allowed, no credentials, or another reason that stays.
            OSError: the local file cannot be written.
        """
        with path.open("wb"):
            pass  # what is wrong here is not the store's fault
        try:
            if self._kind == "file":
                self._files.get_file(f"{self._address}/{name}", str(path))
            else:
                _wait(self._get(name, str(path)), self._files.loop, stop)
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
            # gcsfs repeats a request six times by itself: this is the function under that.
            once = getattr(self._files._get_file_request, "__wrapped__", None)
            if once is None:
                await self._files._get_file(f"{self._address}/{name}", path, concurrency=1)
            else:
                await once(self._files, f"{self._address}/{name}", path)
        else:
            await self._files._get_file(f"{self._address}/{name}", path)


def _open_filesystem(kind: str) -> Any:
    """A filesystem of our own (not fsspec's shared one, which others may have set up), that does not repeat what fails and does
    not wait for ever. The user's fsspec configuration (files, ``FSSPEC_...``) still counts, and goes first."""
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
        # The class that gcsfs registers asks over gRPC what kind of bucket it is, for a minute where that port is closed.
        from gcsfs.core import GCSFileSystem

        own = {**fsspec.config.conf.get("gcs", {}), **fsspec.config.conf.get("gs", {})}
        session = {"timeout": patience, **own.get("session_kwargs", {})}
        return GCSFileSystem(skip_instance_cache=True, requests_timeout=patience, session_kwargs=session)
    own = {**fsspec.config.conf.get("http", {}), **fsspec.config.conf.get("https", {})}
    client = {"timeout": patience, **own.get("client_kwargs", {})}
    return fsspec.filesystem("https", skip_instance_cache=True, client_kwargs=client)


def _hub_address(url: str) -> tuple[str, dict[str, str]]:
    """Where the Hugging Face Hub serves the files of ``hf://[datasets/|spaces/|buckets/]NAMESPACE/NAME[@REVISION][/FOLDER]``,
    and the headers that a private one asks for. (Its own filesystem looks up each file before it is read.)"""
    from huggingface_hub import constants, get_token

    parts = url.removeprefix("hf://").strip("/").split("/")
    kind = parts.pop(0) if parts[0] in ("datasets", "spaces", "buckets", "models") else "models"
    if len(parts) < 2:
        raise UserError(f"{url} names no repository: give hf://datasets/NAMESPACE/NAME/FOLDER/manifest.json")
    name, _, revision = parts[1].partition("@")
    repository = "/".join(([] if kind == "models" else [kind]) + [parts[0], name])
    place = "resolve" if kind == "buckets" else f"resolve/{quote(revision or constants.DEFAULT_REVISION, safe='')}"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return "/".join([constants.ENDPOINT, repository, place, *map(quote, parts[2:])]), headers


def _wait(work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
    """Run on fsspec's own thread until it is done, or cancel it when ``stop`` is set."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    while not concurrent.futures.wait([future], timeout=0.1).done:
        if stop.is_set():
            future.cancel()
            raise StoppedError
    future.result()


# One file from a store to the disk, for certain: attempts with growing pauses until it is what the manifest says.

_log = logging.getLogger(__name__)

# The pause before attempt n + 1 is drawn from 0 to FIRST_PAUSE_S x 2^n, so that a thousand readers do not come back at once.
ATTEMPTS = 10
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
# Whole files that are not what the manifest says, until that is believed.
WRONG_CONTENTS = 4
QUIET_ATTEMPTS = 3


class WrongContentError(TransientError):
    """A file came, but not the one that the manifest names."""


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
    """Copy a file of a store to ``path`` and see that it is the right one. The number of requests is 1 plus the failures.

    Args:
        store, name: which file.
        path: is written over; after an error it may hold a part, or be gone.
        stop: when it is set, attempts and pauses end.
        num_bytes, sha256: what the file must be, where that is known.
        attempts: until a network that fails is given up.

    Raises:
        StoppedError: ``stop`` was set.
        MissingError: the store has no such file.
        UserError: it cannot be had, or stays another file than the manifest says.
        OSError: the local disk.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
    from tenacity.nap import sleep_using_event

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
                f"{store.url(name)} is not what its manifest says: {error} (fetched {wrong} times). "
                "Copy the whole folder of shards there again, manifest.json last."
            ) from None

    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=stop_after_attempt(attempts),
        sleep=sleep_using_event(stop),
        before_sleep=lambda state: _tell(store.url(name), state),
        reraise=True,
    )
    try:
        retrying(attempt)
    except TransientError as error:
        raise UserError(
            f"{store.url(name)} could not be read in {attempts} attempts; the last one: {error}. See that the server can be "
            "reached from this machine and give the command again: what was fetched stays in the cache."
        ) from error


def _verify(path: Path, num_bytes: int | None, sha256: bytes | None) -> None:
    found = path.stat().st_size
    if num_bytes is not None and found != num_bytes:
        raise WrongContentError(f"{found} bytes where {num_bytes} belong")
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        if digest != sha256:
            raise WrongContentError(f"its SHA-256 is {digest.hex()[:16]}..., not {sha256.hex()[:16]}...")


def _tell(url: str, state: "RetryCallState") -> None:
    level = logging.INFO if state.attempt_number <= QUIET_ATTEMPTS else logging.WARNING
    error = state.outcome.exception() if state.outcome is not None else None
    _log.log(level, "%s: attempt %d failed (%s); it is tried again", url, state.attempt_number, error)
