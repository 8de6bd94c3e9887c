"""Node-local cache of files from remote stores, shared by all processes and runs on a node.

<cache>/<first 16 hex of the manifest's hash>/train-000000.tar    a complete file; its users hold a shared lock on it
                                              .train-000000.tar.lock       locked by the process that fetches the file; holds the
                                                                           number of bytes that the file will take
                                              .train-000000.tar.partial    the part fetched so far
<cache>/.lock                                 locked by the process that evicts files and reserves space

All locks are ``flock`` locks, released when their process ends, so that a crash leaves only file names to clean up. A file with
its final name is complete: it is checked against the manifest's SHA-256 and synced to disk before it is renamed, and its size is
checked each time it is opened. (Later damage shows as an image that does not decode.) When space is needed, the shard that was
opened least recently is evicted first; a file that any process has open is never evicted.

``filelock`` is not used: it has no shared locks on the files themselves, does not report a file system without locks, and on
some of them falls back to lock files that outlive a killed process.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from galaxydist.atomic_files import NO_SPACE, fsync_file
from galaxydist.errors import UserError
from galaxydist.object_store import StoppedError, Store, check_version, download


class SharedFile:
    """An open file that is closed with its last reference, so that no thread reads from a closed descriptor.

    A lock on the descriptor is released with it. ``num_bytes`` is the size of the file when it was opened.

    Args:
        path: the file.
        flags: flags of ``os.open``; by default the file is opened for reading.
    """

    __slots__ = ("descriptor", "num_bytes")

    def __init__(self, path: Path | str, flags: int = os.O_RDONLY) -> None:
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self.num_bytes = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # missing if the file could not be opened
            os.close(self.descriptor)


logger = logging.getLogger(__name__)

LOCK, PARTIAL = ".lock", ".partial"


def try_claim(path: Path) -> SharedFile | None:
    """Return the lock that lets one process at a time fetch a file, or None if another process holds it."""
    while True:
        file = SharedFile(path, os.O_RDWR | os.O_CREAT)
        if not try_lock(file.descriptor, fcntl.LOCK_EX):
            return None
        if os.fstat(file.descriptor).st_nlink:
            os.ftruncate(file.descriptor, 0)
            return file


def reserved_bytes(lock: str) -> int:
    """Return the bytes reserved by the fetch that holds a lock file; if its process has ended, remove its files and return 0."""
    try:
        with Path(lock).open("r+b") as file:
            if not try_lock(file.fileno(), fcntl.LOCK_EX):
                text = file.read()
                return int(text) if text.isdigit() else 0
            if os.fstat(file.fileno()).st_nlink:
                Path(lock.removesuffix(LOCK) + PARTIAL).unlink(missing_ok=True)
                Path(lock).unlink()
    except FileNotFoundError:
        pass
    return 0


def evict(path: str) -> bool:
    """Remove a file unless a process has it open; return True if it is removed."""
    try:
        file = SharedFile(path, os.O_RDWR)
        if not try_lock(file.descriptor, fcntl.LOCK_EX):
            return False
        Path(path).unlink()
    except OSError:
        return False
    return True


def try_lock(descriptor: int, kind: int) -> bool:
    """Take a lock without waiting; return False if another process holds it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# Seconds between attempts at a lock that another process holds.
POLL_S = 0.05
# Disk space left free for other programs: this many bytes or this share of the disk, whichever is less.
SPARE_BYTES = 256 * 1024 * 1024
SPARE_SHARE = 0.01

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
SHARD_ENDING = ".tar"
# Each data set has a folder of its own, named by its manifest's hash.
OWN_FOLDER = re.compile(r"[0-9a-f]{16}")
COLUMNS_DIR = "columns"


@dataclass(frozen=True)
class CacheConfig:
    """Settings of the cache.

    Args:
        folder: folder of the cache.
        max_bytes: largest size of the cache.
        threads: number of concurrent fetches in each process.
    """

    folder: Path
    max_bytes: int = 100_000_000_000
    threads: int = 8


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache.

    Args:
        name: ``<folder>/<file>`` or ``<folder>/columns/<file>``.
        num_bytes: size of the whole file; None if it is not known in advance.
    """

    name: str
    num_bytes: int | None = None


class Cache:
    """Access of one process to the cache.

    Args:
        folder: folder of the cache; created if it does not exist.
        max_bytes: largest total size of the files in it.

    Raises:
        UserError: the folder cannot be created or written, or its file system has no locks.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._has_warned = False
        with self._explain():
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock(threading.Event()):
                self._scan()

    def get_or_fetch(
        self, entry: CacheEntry, fetch: Callable[[Path], object], *, stop: threading.Event, allow_over_limit: bool
    ) -> SharedFile | None:
        """Return a file, open and locked against eviction as long as the result lives; one process fetches a missing file.

        Args:
            entry: the file.
            fetch: writes the complete file to the given path, or raises.
            stop: ends waiting when it is set.
            allow_over_limit: exceed the size limit if all other files are in use.

        Returns:
            None if the file is missing and does not fit now.

        Raises:
            StoppedError: ``stop`` was set.
            UserError: the folder cannot be written, or its disk is full. Errors of ``fetch`` pass through.
        """
        with self._explain():
            while True:
                if (found := self.find(entry)) is not None:
                    return found
                with self._lock(stop):
                    claim = try_claim(self._hidden(entry, LOCK))
                    if claim is not None:
                        found, is_reserved = None, False
                        try:
                            found = self.find(entry)
                            is_reserved = found is None and self._reserve(claim, entry, allow_over_limit)
                        finally:
                            if not is_reserved:
                                self._release(entry)
                        if not is_reserved:
                            return found
                if claim is not None:
                    return self._fetch(entry, fetch, stop)
                if stop.wait(POLL_S):
                    raise StoppedError

    def find(self, entry: CacheEntry) -> SharedFile | None:
        """Return a complete file, open and locked against eviction, and mark it as used; None if there is none."""
        path = self.folder / entry.name
        while True:
            try:
                file = SharedFile(path)
            except FileNotFoundError:
                return None
            if not try_lock(file.descriptor, fcntl.LOCK_SH):
                continue  # is being evicted, which is quick
            status = os.fstat(file.descriptor)
            if status.st_nlink == 0:
                continue  # was evicted
            if entry.num_bytes not in (None, status.st_size):
                return None  # damaged: will be fetched again
            with suppress(PermissionError):  # the file may belong to another user
                os.utime(file.descriptor)
            return file

    @property
    def shard_capacity(self) -> int:
        """Bytes of shards that the cache may hold: its size limit without the columns in it, or less on a smaller disk."""
        with self._lock(threading.Event()):
            files, _ = self._scan()
        shards = sum(status.st_size for path, status in files.items() if path.endswith(SHARD_ENDING))
        columns = sum(status.st_size for status in files.values()) - shards
        return min(self.max_bytes - columns, _free_bytes(self.folder) + shards)

    def _fetch(self, entry: CacheEntry, fetch: Callable[[Path], object], stop: threading.Event) -> SharedFile:
        partial = self._hidden(entry, PARTIAL)
        try:
            fetch(partial)
            file = SharedFile(partial)
            try_lock(file.descriptor, fcntl.LOCK_SH)
            os.fsync(file.descriptor)
            with self._lock(stop):  # so that its bytes always count as reserved or as present
                partial.replace(self.folder / entry.name)
                self._release(entry)
        except BaseException:
            self._release(entry)
            raise
        fsync_file(partial.parent)
        return file

    def _release(self, entry: CacheEntry) -> None:
        """Remove a claim's partial file, then its lock file; in this order, so that each partial file has a lock file."""
        self._hidden(entry, PARTIAL).unlink(missing_ok=True)
        self._hidden(entry, LOCK).unlink(missing_ok=True)

    def _reserve(self, claim: SharedFile, entry: CacheEntry, allow_over_limit: bool) -> bool:
        """Evict shards until the file fits, and reserve its bytes; the caller holds the cache's lock."""
        (self.folder / entry.name).unlink(missing_ok=True)  # if it exists, it is damaged
        num_bytes = entry.num_bytes or 0
        files, reserved = self._scan()
        used = sum(status.st_size for status in files.values())
        free = min(self.max_bytes - reserved - used, _free_bytes(self.folder) - reserved)
        for path, status in sorted(files.items(), key=lambda item: item[1].st_mtime_ns):
            if free >= num_bytes:
                break
            if path.endswith(SHARD_ENDING) and evict(path):
                free += status.st_size
        if free < num_bytes and not allow_over_limit:
            return False
        if free < num_bytes and num_bytes and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the cache %s exceeds its limit (data.cache_size, or the free disk) by %s: all other files in it are in use",
                self.folder,
                show_bytes(num_bytes - free),
            )
        os.pwrite(claim.descriptor, str(num_bytes).encode(), 0)
        return True

    def _scan(self) -> tuple[dict[str, os.stat_result], int]:
        """Return the status of each complete file and the bytes reserved by running fetches; remove leftovers of crashed ones."""
        found, reserved = {}, 0
        for entry in self._entries():
            if not entry.name.startswith("."):
                found[entry.path] = entry.stat()
            elif entry.name.endswith(LOCK):
                reserved += reserved_bytes(entry.path)
            elif entry.name.endswith(PARTIAL) and not Path(entry.path.removesuffix(PARTIAL) + LOCK).exists():
                Path(entry.path).unlink(missing_ok=True)
        return found, reserved

    def _entries(self) -> Iterator["os.DirEntry[str]"]:
        """Yield the files in the cache's own subfolders; other files beside them are neither counted nor removed."""
        with os.scandir(self.folder) as entries:
            own = [entry.path for entry in entries if OWN_FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
        for folder in (path for name in own for path in (name, f"{name}/{COLUMNS_DIR}")):
            try:
                with os.scandir(folder) as entries:
                    files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
            except FileNotFoundError:
                continue
            yield from files

    def _hidden(self, entry: CacheEntry, ending: str) -> Path:
        path = self.folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f".{path.name}{ending}")

    @contextmanager
    def _lock(self, stop: threading.Event) -> Iterator[None]:
        """Let one process at a time evict files and reserve space."""
        file = SharedFile(self.folder / LOCK, os.O_RDWR | os.O_CREAT)
        while not try_lock(file.descriptor, fcntl.LOCK_EX):
            if stop.wait(POLL_S):
                raise StoppedError
        yield

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            elsewhere = "choose another folder with data.cache_dir=FOLDER"
            if error.errno in NO_SPACE:
                raise UserError(
                    f"the cache {self.folder} cannot grow: {NO_SPACE[error.errno]}. Free some space there, set a smaller "
                    f"data.cache_size, or {elsewhere}"
                ) from error
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"the cache {self.folder} is on a file system without locks ({error.strerror}): {elsewhere}, on a disk "
                    "of this machine"
                ) from error
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise UserError(
                    f"the cache {self.folder} cannot open more files ({error.strerror}): raise the limit with `ulimit -n 65536`, "
                    "or make larger shards (galaxydist data shard --shard-size N)"
                ) from error
            raise UserError(f"the cache {self.folder} cannot be written ({error.strerror or error}): {elsewhere}") from error


def show_bytes(num_bytes: float) -> str:
    """Return a size as text in GB, the unit of ``data.cache_size``."""
    return f"{num_bytes / 1e9:.3g} GB"


def _free_bytes(folder: Path) -> int:
    usage = shutil.disk_usage(folder)
    return usage.free - min(SPARE_BYTES, int(usage.total * SPARE_SHARE))


class RemoteFolder:
    """Files of one data set in a remote store, fetched into this node's cache.

    Args:
        store: the store's folder.
        cache: cache of this node.
        name: name of the data set's folder in the cache.
        stop: ends fetching and waiting when it is set.
    """

    def __init__(self, store: Store, cache: Cache, name: str, stop: threading.Event) -> None:
        self.store, self.cache, self.stop, self._name = store, cache, stop, name

    def get(
        self,
        name: str,
        *,
        sha256: bytes | None,
        num_bytes: int | None = None,
        version: str = "",
        entry: str | None = None,
        allow_over_limit: bool = True,
    ) -> SharedFile | None:
        """Return a verified file, as ``Cache.get_or_fetch`` does; errors are those of ``download``.

        Args:
            name: of the file in the store.
            sha256, num_bytes: digest and size of the file, if known.
            version: without a digest, the version that the store must have (``Store.stat``); empty: any.
            entry: name of the file in the cache; None: the same.
            allow_over_limit: as in ``Cache.get_or_fetch``.
        """

        def check() -> None:
            if sha256 is None:
                check_version(self.store, name, num_bytes, version, stop=self.stop)

        def fetch(path: Path) -> None:
            check()
            download(self.store, name, path, stop=self.stop, num_bytes=num_bytes, sha256=sha256)
            check()  # it may have been replaced meanwhile

        return self.cache.get_or_fetch(
            CacheEntry(f"{self._name}/{entry or name}", num_bytes), fetch, stop=self.stop, allow_over_limit=allow_over_limit
        )
