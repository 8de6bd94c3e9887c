"""Sources of a loader's shards: a local folder, or a remote store prefetched through the cache."""

import errno
import logging
import os
import resource
import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from galaxydist.atomic_files import file_sha256
from galaxydist.errors import UserError
from galaxydist.object_store import StoppedError
from galaxydist.shards.manifest import Manifest, cached_name
from galaxydist.shards.remote.cache import RemoteFolder, SharedFile, show_bytes
from galaxydist.shards.shard_usage import FetchQueue, Intervals, extend, peak_bytes
from galaxydist.store_errors import MissingError

# Local shards that are kept open; fewer than the 1,024 open files that a process is usually allowed.
MAX_OPEN = 384


class LocalShards:
    """Shards in the manifest's own folder; the most recently used ones are kept open."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._open = lru_cache(MAX_OPEN)(partial(_open_local, manifest, split))

    def open(self, shard: int) -> SharedFile:
        """Open a shard, or return it if it is still open; may be called from any thread.

        Raises:
            UserError: the shard is missing or cannot be opened.
        """
        return self._open(shard)

    def advance(self, step: int) -> None:
        """Do nothing: only the number of open files is limited."""

    def close(self) -> None:
        """Release all shards; may be called twice."""
        self._open.cache_clear()


def _open_local(manifest: Manifest, split: str, shard: int) -> SharedFile:
    path = manifest.shard_path(split, shard)
    try:
        file = SharedFile(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; {_missing_remedy(manifest)}") from None
    except OSError as error:
        hint = "; raise the limit with: ulimit -n 4096" if error.errno == errno.EMFILE else ""
        raise UserError(f"shard {path} cannot be opened ({error.strerror}){hint}") from None
    if manifest.tars is not None:
        _check_unchanged(manifest, split, shard, file)
    return file


def _missing_remedy(manifest: Manifest) -> str:
    if manifest.tars is None:
        return "make the shards anew with: galaxydist data shard"
    return f"put it back, or index the tars again: {manifest.location} names it"


def _check_unchanged(manifest: Manifest, split: str, shard: int, file: SharedFile) -> None:
    """Refuse a foreign tar that was replaced after it was indexed; only one with another time of change is hashed.

    Raises:
        UserError: names the tar.
    """
    path, status = manifest.shard_path(split, shard), os.fstat(file.descriptor)
    is_known = str(status.st_mtime_ns) == manifest.shard_version(split, shard)
    if status.st_size == manifest.shards(split)["bytes"][shard] and (
        is_known or _hash_file(path, status.st_size, status.st_mtime_ns) == manifest.shard_sha256(split, shard)
    ):
        return
    raise UserError(f"{path} was replaced or truncated after it was indexed in {manifest.location}: {manifest.remedy}")


@lru_cache(1 << 17)
def _hash_file(path: Path, num_bytes: int, changed: int) -> bytes:
    """Return the SHA-256 of a file, once for each state of it; the file was copied, or changed."""
    logger.info("%s has another time of change than when it was indexed: comparing its %d bytes (%d)", path, num_bytes, changed)
    return bytes.fromhex(file_sha256(path))


def fetch_shard(
    manifest: Manifest, folder: RemoteFolder, split: str, number: int, *, allow_over_limit: bool
) -> SharedFile | None:
    """Return a remote shard from the cache, fetched if it is missing; None if it does not fit now.

    Args:
        manifest: the data set.
        folder: access to its remote shards.
        split, number: the shard.
        allow_over_limit: as in ``Cache.get_or_fetch``.

    Raises:
        UserError: the shard is missing in the store, was replaced, or cannot be fetched.
    """
    name = manifest.shard_name(split, number)
    # The error is raised outside the handler: as its context, the first one would keep the cache's frames, and so their locks.
    with suppress(MissingError):
        return folder.get(
            name,
            sha256=manifest.shard_sha256(split, number),
            num_bytes=int(manifest.shards(split)["bytes"][number]),
            version=manifest.shard_version(split, number),
            entry=cached_name(name),
            allow_over_limit=allow_over_limit,
        )
    remedy = "copy the whole folder of shards again, manifest.json last" if manifest.tars is None else manifest.remedy
    raise UserError(f"shard {folder.store.url(name)} is missing: {remedy}")


logger = logging.getLogger(__name__)

# Share of the cache that shards fetched ahead may fill; the rest is for other reading (validation).
AHEAD_SHARE = 7 / 8
# Open files that a process may need besides shards, and the highest limit that it requests.
SPARE_FILES, MOST_FILES = 256, 65_536
# Seconds before a shard that did not fit into the cache, and is not needed yet, is tried again.
PAUSE_S = 0.25


def open_shard_source(
    manifest: Manifest,
    split: str,
    intervals: Intervals,
    node_intervals: Intervals,
    *,
    step: int = 0,
    steps_ahead: int = 0,
    ranks_on_node: int = 1,
    why: str,
) -> "ShardSource":
    """Return the source of a split's shards: local shards are read in place, remote ones fetched ahead.

    Args:
        manifest, split: the data set and its split.
        intervals: shard access intervals of this process.
        node_intervals: intervals of all processes on this node together, with their read-ahead; only the first epoch is used.
        step: the first step that is read.
        steps_ahead: number of steps that reading may be ahead of ``ShardSource.advance``.
        ranks_on_node: number of processes that share the cache.
        why: text for the error: the setting that makes the loader read these shards at a time.

    Raises:
        UserError: the cache or the limit on open files is too small for the shards read at the same time, or the cache cannot
            be used.
    """
    if not manifest.has_remote_shards:
        return LocalShards(manifest, split)
    folder, sizes = manifest.remote_shards(threading.Event()), manifest.shards(split)["bytes"]
    cache = folder.cache
    capacity, needed = cache.shard_capacity, peak_bytes(next(node_intervals), sizes)
    if needed > capacity:
        raise UserError(
            f"data.cache_size={cache.max_bytes / 1e9:g} and the disk of {cache.folder} leave {show_bytes(capacity)} for shards, "
            f"but {show_bytes(needed)} of {manifest.location} are read at the same time ({why}): set data.cache_size="
            f"{needed * 1.5 / 1e9:.2g} or more, on a disk with that much space (data.cache_dir=FOLDER)"
        )
    first = next(intervals)
    ahead = max(int(capacity * AHEAD_SHARE) // ranks_on_node, peak_bytes(extend(first, steps_ahead), sizes))
    num_open = peak_bytes(extend(first, steps_ahead), 1)
    if num_open + SPARE_FILES > (limit := _raise_file_limit()):
        raise UserError(
            f"{num_open} shards of {manifest.location} are read at the same time ({why}), and this process may have {limit} "
            f"files open: raise that with `ulimit -n {2 * (num_open + SPARE_FILES)}`, or make larger shards "
            "(galaxydist data shard --shard-size N)"
        )
    queue = FetchQueue(chain([first], intervals), steps_ahead)
    return PrefetchedShards(manifest, split, folder, queue, step=step, ahead_bytes=ahead, max_held=limit // 3)


class PrefetchedShards:
    """Shards of a remote store, fetched ahead of use by a few threads.

    The access intervals are taken in order. Each shard is fetched (or found in the cache) and held open, and so safe from
    eviction, until the loader has passed the interval's last step.

    Args:
        manifest, split: the data set and its split.
        folder: access to its remote files; its event ``stop`` is set by ``close``.
        queue: access intervals of this process.
        step: the first step that is read.
        ahead_bytes, max_held: largest size and number of the shards held at a time; exceeded only if ``open`` waits for one.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        folder: RemoteFolder,
        queue: FetchQueue,
        *,
        step: int,
        ahead_bytes: int,
        max_held: int,
    ) -> None:
        self._manifest, self._folder, self._split = manifest, folder, split
        self._sizes = manifest.shards(split)["bytes"].tolist()
        self._queue, self._step, self._ahead_bytes, self._max_held = queue, step - 1, ahead_bytes, max_held
        self._stop = folder.stop
        self._lock = threading.RLock()
        self._until: dict[int, int] = {}  # shard held, being fetched or postponed -> the step after which it is released
        self._files: dict[int, Future[SharedFile | None]] = {}  # shards held, being fetched, or failed when ``open`` waited
        self._postponed: deque[int] = deque()  # shards that did not fit, to be tried again
        self._pause_until = 0.0
        self._num_fetching, self._num_threads = 0, manifest.cache_config.threads
        self._executor = ThreadPoolExecutor(self._num_threads, thread_name_prefix="galaxydist-fetch")
        with self._lock:  # a fetch that fails at once would be noted as failed before it is noted as begun
            self._fetch_ahead()

    def open(self, shard: int) -> SharedFile:
        """Return a shard, waiting until it has been fetched; may be called from any thread.

        Raises:
            UserError: the shard is missing or cannot be fetched.
            StoppedError: the source was closed.
        """
        while True:
            with self._lock:
                if self._stop.is_set():
                    raise StoppedError
                future = self._files.get(shard) or self._submit(shard, is_awaited=True)
            try:
                file = future.result()
            except CancelledError:
                raise StoppedError from None
            if file is not None:
                return file

    def advance(self, step: int) -> None:
        """Release the shards that are not needed after ``step``; all batches up to it have been read."""
        with self._lock:
            self._step = step
            for shard in [shard for shard, last in self._until.items() if last <= step]:
                del self._until[shard]
                self._files.pop(shard, None)
                self._pause_until = 0.0
            self._fetch_ahead()  # even if none is released: the queue may now load a new epoch

    def close(self) -> None:
        """Stop the threads, end waiting calls of ``open`` with an error, and release all shards; may be called twice."""
        with self._lock:
            self._stop.set()
        self._executor.shutdown(cancel_futures=True)
        self._files.clear()

    def _submit(self, shard: int, *, is_awaited: bool) -> "Future[SharedFile | None]":
        """Start fetching a shard; the caller holds the lock."""
        if shard in self._postponed:
            self._postponed.remove(shard)
        if shard not in self._until:
            self._until[shard] = self._queue.take(shard, self._step)
        self._num_fetching += 1
        self._files[shard] = future = self._executor.submit(self._fetch, shard, is_awaited)
        future.add_done_callback(self._continue)
        return future

    def _fetch(self, shard: int, is_awaited: bool) -> SharedFile | None:
        """Return the shard; None if it did not fit or failed while ``open`` did not wait for it: ``open`` will try again."""
        try:
            file = fetch_shard(self._manifest, self._folder, self._split, shard, allow_over_limit=is_awaited)
            does_not_fit = file is None
        except StoppedError:
            raise
        except BaseException as error:
            if is_awaited:
                raise error.with_traceback(None) from error.__cause__  # its frames would keep files and locks
            logger.warning("fetching ahead: %s (it is tried again when it is needed)", error)
            file, does_not_fit = None, False
        if file is None:
            with self._lock:
                self._files.pop(shard, None)
                if does_not_fit:
                    self._postponed.append(shard)
                    self._pause_until = time.monotonic() + PAUSE_S
        return file

    def _continue(self, _: "Future[SharedFile | None]") -> None:
        with self._lock:
            self._num_fetching -= 1
            self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        """Start fetching the next shards, as long as a thread is free; the caller holds the lock."""
        while not self._stop.is_set() and self._num_fetching < self._num_threads and (shard := self._next()) is not None:
            self._submit(shard, is_awaited=False)

    def _next(self) -> int | None:
        """Return the next shard to fetch ahead; None if there is none now."""
        if time.monotonic() < self._pause_until:
            return None
        while self._postponed:
            if (shard := self._postponed.popleft()) in self._until:
                return shard
        while (first := self._queue.first(self._step)) is not None:
            if first not in self._until:
                num_bytes = sum(self._sizes[held] for held in self._until) + self._sizes[first]
                return first if num_bytes <= self._ahead_bytes and len(self._until) < self._max_held else None
            self._until[first] = max(self._until[first], self._queue.take(first, self._step))
        return None


# Source of the shards of one split.
ShardSource = LocalShards | PrefetchedShards


def _raise_file_limit() -> int:
    """Raise the limit on open files as far as allowed and return it: each shard in use is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        return target
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
