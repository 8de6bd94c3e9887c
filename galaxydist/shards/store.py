"""Object stores and web servers through fsspec: one file at a time, by its known name. Nothing is listed, nothing is written.

A ``Store`` makes one request for each attempt and never repeats one by itself: ``transfer.py`` decides whether to try again. What
goes wrong is sorted here: ``TransientError`` may be gone in a second, ``MissingError`` and any other ``UserError`` will not.
"""

import asyncio
import concurrent.futures
import importlib.util
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from galaxydist.errors import UserError
from galaxydist.shards.failures import explain

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
            explained = explain(error, self.url(name), self._kind)
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
