"""Node-local cache of files from remote stores, shared by all processes and runs on a node.

<cache>/<first 16 hex of the manifest's hash>/train-000000.tar    a complete file; its users hold a shared lock on it
                                              .train-000000.tar.lock       locked by the process that fetches the file; holds the
                                                                           number of bytes that the file will take
                                              .train-000000.tar.partial    the part fetched so far
<cache>/.lock                                 locked by the process that makes and reserves room

All locks are ``flock`` locks, released when their process ends, so that a crash leaves only file names to clean up. A file with
its final name is complete: it is checked against the manifest's SHA-256 and synced to disk before it is renamed, and its size is
checked each time it is opened. (Later damage shows as an image that does not decode.) When room is needed, the shard that was
opened least recently is evicted first; a file that any process has open is never evicted.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from galaxydist.atomic_files import NO_SPACE, fsync_file
from galaxydist.errors import UserError
from galaxydist.shards.remote.object_store import StoppedError


class SharedFile:
    """An open file that is closed with its last reference, so that no thread reads from a closed descriptor.

    A lock on the descriptor is released with it. ``num_bytes`` is the size of the file when it was opened.

    Args:
        descriptor: is owned by this object from now on.
    """

    __slots__ = ("descriptor", "num_bytes")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = os.fstat(descriptor).st_size

    @classmethod
    def at(cls, path: str) -> "SharedFile":
        """Open a file for reading."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def __del__(self) -> None:
        os.close(self.descriptor)


_log = logging.getLogger(__name__)

LOCK, PARTIAL = ".lock", ".partial"


def try_claim(path: Path) -> SharedFile | None:
    """Return the lock that lets one process at a time fetch a file, or None if another process holds it."""
    while True:
        file = SharedFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
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
        file = SharedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if not try_lock(file.descriptor, fcntl.LOCK_EX):
            return False
        Path(path).unlink()
    except OSError as error:
        _log.debug("%s stays: %s", path, error)
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


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    size: int
    used_ns: int


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
        self._said_over = False
        with self._explain():
            folder.mkdir(parents=True, exist_ok=True)
            with self._guard(threading.Event()):
                self._scan()

    def obtain(
        self, wanted: CacheEntry, fetch: Callable[[Path], None], *, stop: threading.Event, must: bool
    ) -> SharedFile | None:
        """Return a file, open and locked against eviction as long as the result lives; one process fetches a missing file.

        Args:
            wanted: the file.
            fetch: writes the right file to the path that it is given, or raises.
            stop: ends waiting when it is set.
            must: exceed the size limit if all other files are in use.

        Returns:
            None if the file is missing and there is no room for it now.

        Raises:
            StoppedError: ``stop`` was set.
            UserError: the folder cannot be written, or its disk is full. Errors of ``fetch`` pass through.
        """
        with self._explain():
            while True:
                if (found := self.find(wanted)) is not None:
                    return found
                with self._guard(stop):
                    claim = try_claim(self._hidden(wanted, LOCK))
                    if claim is not None:
                        found, has_room = None, False
                        try:
                            found = self.find(wanted)
                            has_room = found is None and self._make_room(claim, wanted, must)
                        finally:
                            if not has_room:
                                self._give_up(claim, wanted)
                        if not has_room:
                            return found
                if claim is not None:
                    return self._fetch(claim, wanted, fetch, stop)
                if stop.wait(POLL_S):
                    raise StoppedError

    def find(self, wanted: CacheEntry) -> SharedFile | None:
        """Return a complete file, open and locked against eviction, and mark it as used; None if there is none."""
        path = self.folder / wanted.name
        while True:
            try:
                file = SharedFile.at(str(path))
            except FileNotFoundError:
                return None
            if not try_lock(file.descriptor, fcntl.LOCK_SH):
                continue  # is being evicted, which is quick
            status = os.fstat(file.descriptor)
            if status.st_nlink == 0:
                continue  # was evicted
            if wanted.num_bytes not in (None, status.st_size):
                return None  # damaged: will be fetched again
            try:
                os.utime(file.descriptor)
            except PermissionError:
                _log.debug("%s belongs to another user", path)
            return file

    @property
    def room(self) -> int:
        """Bytes of shards that the cache may hold: its size limit without the columns in it, or less on a smaller disk."""
        with self._guard(threading.Event()):
            files, _ = self._scan()
        shards = sum(file.size for file in files if file.path.endswith(SHARD_ENDING))
        columns = sum(file.size for file in files) - shards
        return min(self.max_bytes - columns, _free_bytes(self.folder) + shards)

    def _fetch(self, claim: SharedFile, wanted: CacheEntry, fetch: Callable[[Path], None], stop: threading.Event) -> SharedFile:
        partial = self._hidden(wanted, PARTIAL)
        try:
            fetch(partial)
            file = SharedFile.at(str(partial))
            try_lock(file.descriptor, fcntl.LOCK_SH)
            os.fsync(file.descriptor)
            with self._guard(stop):  # so that its bytes always count as reserved or as present
                partial.replace(self.folder / wanted.name)
                self._give_up(claim, wanted)
        except BaseException:
            self._give_up(claim, wanted)
            raise
        fsync_file(partial.parent)
        return file

    def _give_up(self, claim: SharedFile, wanted: CacheEntry) -> None:
        """Remove a claim's partial file, then its lock file; in this order, so that each partial file has a lock file."""
        assert claim.descriptor >= 0
        self._hidden(wanted, PARTIAL).unlink(missing_ok=True)
        self._hidden(wanted, LOCK).unlink(missing_ok=True)

    def _make_room(self, claim: SharedFile, wanted: CacheEntry, must: bool) -> bool:
        """Evict shards until the file fits, and reserve its bytes; the caller holds the guard."""
        (self.folder / wanted.name).unlink(missing_ok=True)  # if it exists, it is damaged
        num_bytes = wanted.num_bytes or 0
        files, reserved = self._scan()
        room = min(self.max_bytes - reserved - sum(file.size for file in files), _free_bytes(self.folder) - reserved)
        for file in sorted(files, key=lambda file: file.used_ns):
            if room >= num_bytes:
                break
            if file.path.endswith(SHARD_ENDING) and evict(file.path):
                room += file.size
        if room < num_bytes and not must:
            return False
        if room < num_bytes and num_bytes and not self._said_over:
            self._said_over = True
            _log.warning(
                "the cache %s goes over its limit (data.cache_size, or the free disk) by %s: all else in it is in use",
                self.folder,
                show_bytes(num_bytes - room),
            )
        os.pwrite(claim.descriptor, str(num_bytes).encode(), 0)
        return True

    def _scan(self) -> tuple[list["_Found"], int]:
        """Return the complete files and the bytes reserved by running fetches; remove what crashed fetches left."""
        found, reserved = [], 0
        for entry in self._entries():
            if not entry.name.startswith("."):
                status = entry.stat()
                found.append(_Found(entry.path, status.st_size, status.st_mtime_ns))
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

    def _hidden(self, wanted: CacheEntry, ending: str) -> Path:
        path = self.folder / wanted.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f".{path.name}{ending}")

    @contextmanager
    def _guard(self, stop: threading.Event) -> Iterator[None]:
        """Let one process at a time make room."""
        file = SharedFile(os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
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
                    f"the cache {self.folder} cannot take more: {NO_SPACE[error.errno]}. Free some space there, set a smaller "
                    f"data.cache_size, or {elsewhere}"
                ) from error
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"the cache {self.folder} lies on a file system without locks ({error.strerror}): {elsewhere}, on a disk "
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
