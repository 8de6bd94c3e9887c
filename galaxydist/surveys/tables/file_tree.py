"""Folders of data files, on this machine or at a URL, read through fsspec; a data set on the Hub is pinned to a commit."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from galaxydist.errors import UserError
from galaxydist.object_store import ATTEMPTS, PROTOCOLS, RemoteFile, Store, is_url, retried
from galaxydist.store_errors import MissingError, classify_error
from galaxydist.surveys.folder_scan import natural_key
from galaxydist.surveys.image_files import hash_files

logger = logging.getLogger(__name__)

# Properties of a listed file that change with its contents, of all stores; those on the Hub hash the contents.
_FINGERPRINTS = ("size", "lfs", "blob_id", "xet_hash", "ETag", "etag", "md5Hash", "LastModified", "mtime", "updated")
_LARGEST_TEXT = 1 << 22
# Largest size of all files on this machine of which every byte is hashed; samples of the bytes of each larger one.
MOST_HASHED_BYTES = 16 << 30
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
# Bytes of a remote file that are read at a time.
_REQUEST_BYTES = 4 << 20


@dataclass(frozen=True)
class FileTree:
    """A folder of files; it can be pickled, and opens its own connections in each process.

    Args:
        location: path or URL, for messages; on the Hub with the commit.
        protocol: of fsspec; ``file`` for a folder on this machine.
        root: the folder in its file system, without a slash at its end.
        inside: path below ``root`` that the user gave, if it is a folder of a repository or a single file; else empty.
        revision: commit on the Hub; None elsewhere.
    """

    location: str
    protocol: str
    root: str
    inside: str = ""
    revision: str | None = None
    _stores: dict[tuple[str, int], Store] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open connections out of a pickle."""
        return vars(self) | {"_stores": {}}

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    def path(self, file: str) -> str:
        """Return a file's address for messages."""
        if file == self.inside:
            return self.location
        return f"{self.location.removesuffix(self.inside).rstrip('/')}/{file}"

    @cached_property
    def files(self) -> tuple[str, ...]:
        """All files that the user gave, relative to ``root``, in natural order; of a web server only a single file."""
        if self.protocol in ("http", "https"):
            return (self.inside,) if self.inside else ()
        system = self._system()
        start = system._strip_protocol(f"{self.root}/{self.inside}".rstrip("/"))

        def found() -> list[str]:
            with self.explained(""):
                return [start] if system.isfile(start) else system.find(start)

        prefix = f"{system._strip_protocol(self.root)}/"
        names = [name.removeprefix(prefix) for name in retried(found, self.location, threading.Event(), ATTEMPTS)]
        return tuple(sorted((name for name in names if not _is_hidden(name)), key=natural_key))

    def open(self, file: str) -> IO[bytes]:
        """Open a file for reading at any place; the caller closes it.

        Raises:
            UserError: there is no such file, no access to it, or its store cannot be read in several attempts.
        """
        if self.is_local:
            with self.explained(file):
                return Path(self.root, file).open("rb")
        return cast("IO[bytes]", io.BufferedReader(self._open_remote(file), _REQUEST_BYTES))

    def _open_remote(self, file: str) -> RemoteFile:
        # Only a web server's address may have a query; its root is a whole URL.
        name, mark, query = file.partition("?") if self.protocol in ("http", "https") else (file, "", "")
        root = self.root if "://" in self.root else f"{self.protocol}://{self.root}"
        folder = f"{root}{mark}{query}"
        key = folder, os.getpid()  # a forked process must not use its parent's connections
        store = self._stores[key] = self._stores.get(key) or Store(folder)
        return RemoteFile(store, name, threading.Event())

    def read_text(self, file: str) -> str | None:
        """Return the start of a text file (4 MB), or None if there is no such file."""
        try:
            with self.open(file) as stream:
                return stream.read(_LARGEST_TEXT).decode("utf-8", "replace")
        except MissingError:
            return None

    def digest(self, files: Sequence[str]) -> str:
        """Return a SHA-256 (hex) that changes when a file changes.

        It is that of :func:`hash_data` on this machine, of sizes and hashes on the Hub, and of sizes, etags and times in other
        stores.
        """
        if self.is_local:
            return hash_data([Path(self.root, file) for file in files], self.location)
        digest = hashlib.sha256()
        for file in files:
            if self.protocol in ("http", "https"):
                with self._open_remote(file) as remote:
                    version = [str(remote.num_bytes), remote.version]
            else:  # known from the listing
                with self.explained(file):
                    info = self._system().info(f"{self.root}/{file}")
                version = [str(info[key]) for key in _FINGERPRINTS if info.get(key) is not None]
            digest.update(f"{file} {version}\n".encode())
        return digest.hexdigest()

    @contextlib.contextmanager
    def explained(self, file: str) -> Iterator[None]:
        """Turn errors of the file system while a file is opened, or the files are listed, into those of ``classify_error``."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            kind = "http" if self.protocol == "hf" else PROTOCOLS[self.protocol][0]
            explained = classify_error(error, self.path(file) if file else self.location, kind)
            if explained is error:
                raise
            raise explained from error

    def _system(self) -> Any:
        """Return the file system, one for each process and thread."""
        import fsspec

        if self.protocol == "hf":
            from huggingface_hub import HfFileSystem

            return HfFileSystem()
        return fsspec.filesystem(self.protocol)


def is_hashed_whole(paths: Sequence[Path]) -> bool:
    """Return True if files are small enough in all to read every byte before the work begins."""
    return sum(path.stat().st_size for path in paths if path.is_file()) <= MOST_HASHED_BYTES


def hash_data(paths: Sequence[Path], name: str) -> str:
    """Return a SHA-256 (hex) of the bytes of files, or of their sizes and evenly spread samples of large ones.

    Args:
        paths: the files.
        name: of the progress bar.
    """
    if is_hashed_whole(paths):
        return hashlib.sha256(repr(hash_files(Path(), [str(path) for path in paths], name)).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.stat().st_size}\n".encode())
        sample_bytes(path, digest)
    return digest.hexdigest()


def sample_bytes(path: Path, digest: Any) -> None:
    """Add 64 evenly spread samples of a file's bytes to a hash."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        for number in range(_NUM_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))


def open_tree(location: str | Path) -> FileTree:
    """Return the files at a path or URL: those of a folder, or a single file.

    Raises:
        UserError: nothing is there, no access, or the protocol or its package is unknown.
    """
    if is_url(location):
        return _remote_tree(str(location).rstrip("/"))
    path = Path(location)
    if not path.exists():
        raise MissingError(f"there is no file or folder {path}")
    if path.is_dir():
        return FileTree(str(path), "file", str(path))
    return FileTree(str(path), "file", str(path.parent), path.name)


def _remote_tree(url: str) -> FileTree:
    protocol, _, path = url.partition("://")
    if protocol == "hf":
        return _hub_tree(url, path)
    if protocol not in PROTOCOLS:
        names = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise UserError(f"{url} cannot be read through {protocol}://; use {names} or a folder on this machine")
    package = PROTOCOLS[protocol][1]
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{url} needs {package}, which is not installed: pip install 'galaxydist[remote]'")
    root = path if protocol not in ("http", "https") else url
    shown = url.partition("?")[0]  # a query may hold a secret
    if Path(shown).suffix:
        root, _, name = root.partition("?")[0].rpartition("/")
        return FileTree(shown, protocol, root, name + url.removeprefix(shown))
    return FileTree(shown, protocol, root)


def _hub_tree(url: str, path: str) -> FileTree:
    """Return a data set on the Hugging Face Hub, at the commit to which its revision points now."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    parts = path.split("/")
    if parts[0] != "datasets" or len(parts) < 3:
        raise UserError(f"{url} names no data set: give hf://datasets/OWNER/NAME, with @REVISION and a folder or file if wanted")
    name, _, revision = parts[2].partition("@")
    if revision == "refs" and len(parts) > 4:  # refs/convert/parquet, refs/pr/1
        revision, parts = "/".join([revision, *parts[3:5]]), parts[:3] + parts[5:]
    repository, inside = f"{parts[1]}/{name}", "/".join(parts[3:])
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        found = HfApi().dataset_info(repository, revision=revision.replace("%2F", "/") or None, timeout=30)
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/datasets/{repository}"
        raise UserError(f"{url} is gated: accept its terms at {page}, then {login} as that user") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{url}: the data set {repository} has no revision {revision!r}; leave it out for the newest") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{url}: there is no data set {repository}, or it is private: {login}") from error
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        if status in (401, 403):
            raise UserError(f"access to {url} is denied ({status}): {login}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url} cannot be read ({reason}); see that {constants.ENDPOINT} can be reached from here") from error
    commit = found.sha or revision or "main"
    pinned = f"datasets/{repository}@{commit}"
    return FileTree(f"hf://{pinned}/{inside}".rstrip("/"), "hf", pinned, inside, commit)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
