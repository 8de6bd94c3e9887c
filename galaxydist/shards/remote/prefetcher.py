"""Sources of a loader's shards: a local folder, or a remote store prefetched through the cache."""

import errno
import logging
import resource
import threading
import time
from collections import deque
from functools import lru_cache, partial
from itertools import chain

import numpy as np

from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest, shard_name
from galaxydist.shards.remote.cache import RemoteFolder, SharedFile, show_bytes
from galaxydist.shards.remote.object_store import MissingError, StoppedError
from galaxydist.shards.shard_usage import FetchQueue, Intervals, extend, peak_bytes

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
        return SharedFile(path)
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; make the shards anew with: galaxydist data shard") from None
    except OSError as error:
        hint = "; raise the limit with: ulimit -n 4096" if error.errno == errno.EMFILE else ""
        raise UserError(f"shard {path} cannot be opened ({error.strerror}){hint}") from None


def fetch_shard(folder: RemoteFolder, name: str, row: np.void, *, allow_over_limit: bool) -> SharedFile | None:
    """Return a remote shard from the cache, fetched if it is missing; None if it does not fit now.

    Args:
        folder: access to the data set's remote files.
        name: file name of the shard.
        row: the shard's row of the shard table.
        allow_over_limit: as in ``Cache.get_or_fetch``.

    Raises:
        UserError: the shard is missing in the store or cannot be fetched.
    """
    sha256, num_bytes = row["sha256"].tobytes(), int(row["bytes"])
    try:
        return folder.get(name, sha256=sha256, num_bytes=num_bytes, allow_over_limit=allow_over_limit)
    except MissingError:
        raise UserError(
            f"shard {folder.store.url(name)} is missing: copy the whole folder of shards again, manifest.json last"
        ) from None


_log = logging.getLogger(__name__)

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
    if manifest.remote is None:
        return LocalShards(manifest, split)
    stop = threading.Event()
    folder, sizes = manifest.remote_folder(stop), manifest.shards(split)["bytes"]
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
    return PrefetchedShards(manifest, split, folder, stop, queue, step=step, ahead_bytes=ahead, max_held=limit // 3)


class PrefetchedShards:
    """Shards of a remote store, fetched ahead of use.

    A few threads take the access intervals in order, fetch each shard (or find it in the cache) and hold it open, and so safe
    from eviction, until the loader has passed the interval's last step.

    Args:
        manifest, split, folder: the data set, its split and the access to its remote files.
        stop: the folder's event, which ``close`` sets.
        queue: access intervals of this process.
        step: the first step that is read.
        ahead_bytes, max_held: largest size and number of the shards held at a time; exceeded only if ``open`` waits for one.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        folder: RemoteFolder,
        stop: threading.Event,
        queue: FetchQueue,
        *,
        step: int,
        ahead_bytes: int,
        max_held: int,
    ) -> None:
        assert manifest.remote is not None
        self._folder, self._split, self._table = folder, split, manifest.shards(split)
        self._sizes = self._table["bytes"].tolist()
        self._queue, self._step, self._ahead_bytes, self._max_held = queue, step - 1, ahead_bytes, max_held
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # wakes callers of ``open``: a shard was fetched or failed
        self._work_due = threading.Condition(self._lock)  # wakes a fetching thread; the one that takes work wakes the next
        self._stop = stop
        self._until: dict[int, int] = {}  # shard held, being fetched or postponed -> the step after which it is released
        self._held: dict[int, SharedFile] = {}
        self._busy: set[int] = set()
        self._postponed: deque[int] = deque()  # shards that did not fit, to be tried again
        self._awaited: dict[int, None] = {}  # shards that a caller of ``open`` waits for
        self._failed: dict[int, BaseException] = {}
        self._broken: BaseException | None = None  # unexpected error that ended a thread: ``open`` raises it
        self._pause_until = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"galaxydist-fetch-{number}", daemon=True)
            for number in range(manifest.remote.cache.threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, shard: int) -> SharedFile:
        """Return a shard, waiting until it has been fetched; may be called from any thread.

        Raises:
            UserError: the shard is missing or cannot be fetched.
            StoppedError: the source was closed.
        """
        with self._lock:
            try:
                while not self._stop.is_set():
                    if (file := self._held.get(shard)) is not None:
                        return file
                    if (error := self._failed.get(shard) or self._broken) is not None:
                        raise error
                    if shard not in self._awaited:
                        self._awaited[shard] = None
                        self._work_due.notify()
                    self._changed.wait()
            finally:
                self._awaited.pop(shard, None)
        raise StoppedError

    def advance(self, step: int) -> None:
        """Release the shards that are not needed after ``step``; all batches up to it have been read."""
        with self._lock:
            self._step = step
            over = [shard for shard, last in self._until.items() if last <= step]
            for shard in over:
                del self._until[shard]
                self._held.pop(shard, None)
                self._failed.pop(shard, None)
            if over:
                self._pause_until = 0.0
            self._work_due.notify()  # even if none is released: the queue may now load a new epoch

    def close(self) -> None:
        """Stop the threads, end waiting calls of ``open`` with an error, and release all shards; may be called twice."""
        self._stop.set()
        with self._lock:
            self._changed.notify_all()
            self._work_due.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        with self._lock:
            self._held.clear()

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                self._fetch_task(*task)
        except StoppedError:
            return
        except BaseException as error:
            with self._lock:
                self._broken = error
                self._changed.notify_all()

    def _fetch_task(self, shard: int, is_awaited: bool) -> None:
        try:
            name, row = shard_name(self._split, shard), self._table[shard]
            # Without a variable for the file, which would keep it open while this thread waits.
            self._hold(shard, fetch_shard(self._folder, name, row, allow_over_limit=is_awaited))
        except StoppedError:
            raise
        except BaseException as error:
            self._record_failure(shard, is_awaited, error)

    def _next(self) -> tuple[int, bool] | None:
        """Wait for the next shard to fetch; return it with True if ``open`` waits for it, or None at the end."""
        with self._lock:
            while not self._stop.is_set():
                now = time.monotonic()
                task = self._next_awaited() or self._next_ahead(now)
                if task is not None:
                    self._busy.add(task[0])
                    self._work_due.notify()
                    return task
                pause = self._pause_until - now
                self._work_due.wait(pause if pause > 0 else None)
        return None

    def _next_awaited(self) -> tuple[int, bool] | None:
        for shard in self._awaited:
            if shard in self._busy or shard in self._held or shard in self._failed:
                continue
            if shard in self._postponed:
                self._postponed.remove(shard)
            if shard not in self._until:
                self._until[shard] = self._queue.take(shard, self._step)
            return shard, True
        return None

    def _next_ahead(self, now: float) -> tuple[int, bool] | None:
        if now < self._pause_until:
            return None
        while self._postponed:
            shard = self._postponed.popleft()
            if shard in self._until:
                return shard, False
        while (first := self._queue.first(self._step)) is not None:
            if first in self._until:
                self._until[first] = max(self._until[first], self._queue.take(first, self._step))
                continue
            if sum(self._sizes[shard] for shard in self._until) + self._sizes[first] > self._ahead_bytes:
                return None
            if len(self._until) >= self._max_held:
                return None
            self._until[first] = self._queue.take(first, self._step)
            return first, False
        return None

    def _hold(self, shard: int, file: SharedFile | None) -> None:
        with self._lock:
            self._busy.discard(shard)
            if file is None:
                self._postponed.append(shard)
                self._pause_until = time.monotonic() + PAUSE_S
            elif shard in self._until:
                self._held[shard] = file
            self._changed.notify_all()

    def _record_failure(self, shard: int, is_awaited: bool, error: BaseException) -> None:
        """Record a failed fetch; a shard that ``open`` does not wait for yet is tried again when it is needed."""
        if not is_awaited:
            _log.warning("fetching ahead: %s (it is tried again when it is needed)", error)
        with self._lock:
            self._busy.discard(shard)
            if is_awaited:
                self._failed[shard] = error.with_traceback(None)  # its frames would keep files and locks
            self._changed.notify_all()


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
