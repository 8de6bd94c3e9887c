"""Sources of a loader's shards: a local folder, or a remote store prefetched through the cache."""

import errno
import logging
import resource
import threading
import time
from collections import OrderedDict, deque
from itertools import chain
from pathlib import Path
from typing import Protocol

from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest, Remote, shard_name
from galaxydist.shards.remote.cache import Cache, CacheEntry, SharedFile, show_bytes
from galaxydist.shards.remote.object_store import MissingError, StoppedError, Store, download
from galaxydist.shards.shard_usage import FetchQueue, Uses, extend, peak_bytes

# Local shards that are kept open; fewer than the 1,024 open files that a process is usually allowed.
MAX_OPEN = 384


class ShardSource(Protocol):
    """Source of the shards of one split."""

    def open(self, shard: int) -> SharedFile:
        """Open a shard, waiting until it is complete and local; may be called from any thread.

        Raises:
            UserError: names the shard that is missing or cannot be fetched.
        """
        ...

    def advance(self, step: int) -> None:
        """Report that all batches up to this step have been read."""
        ...

    def close(self) -> None:
        """Release all shards and end waiting calls of ``open`` with an error; may be called twice."""
        ...


class LocalShards:
    """Shards in the manifest's own folder; the most recently used ones are kept open."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._manifest, self._split = manifest, split
        self._files: OrderedDict[int, SharedFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, shard: int) -> SharedFile:
        """Open a shard, or return it if it is still open."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        file = self._open(shard)
        with self._lock:
            self._files[shard] = file
            if len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
        return file

    def advance(self, step: int) -> None:
        """Do nothing: only the number of open files is limited."""

    def close(self) -> None:
        """Release all shards."""
        with self._lock:
            self._files.clear()

    def _open(self, shard: int) -> SharedFile:
        path = self._manifest.shard_path(self._split, shard)
        try:
            return SharedFile.at(str(path))
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing; make the shards anew with: galaxydist data shard") from None
        except OSError as error:
            hint = "; raise the limit with: ulimit -n 4096" if error.errno == errno.EMFILE else ""
            raise UserError(f"shard {path} cannot be opened ({error.strerror}){hint}") from None


_log = logging.getLogger(__name__)

# Share of the cache that shards fetched ahead may fill; the rest is for other reading (validation).
AHEAD_SHARE = 7 / 8
# Open files that a process may need besides shards, and the highest limit that it requests.
SPARE_FILES, MOST_FILES = 256, 65_536
# Seconds before a shard that found no room, and is not needed yet, is tried again.
PAUSE_S = 0.25


def open_shard_source(
    manifest: Manifest,
    split: str,
    uses: Uses,
    node_uses: Uses,
    *,
    step: int = 0,
    steps_ahead: int = 0,
    ranks_on_node: int = 1,
    why: str,
) -> ShardSource:
    """Return the source of a split's shards: local shards are read in place, remote ones fetched ahead.

    Args:
        manifest, split: the data set and its split.
        uses: shard access intervals of this process.
        node_uses: intervals of all processes on this node together, with their read-ahead; only the first epoch is used.
        step: the first step that is read.
        steps_ahead: number of steps that reading may be ahead of ``ShardSource.advance``.
        ranks_on_node: number of processes that share the cache.
        why: text for the error: why so many shards are needed at a time, and other remedies.

    Raises:
        UserError: the cache or the limit on open files is too small for the shards read at the same time, or the cache cannot
            be used.
    """
    if manifest.remote is None:
        return LocalShards(manifest, split)
    cache = Cache(manifest.remote.cache.folder, manifest.remote.cache.max_bytes)
    sizes = manifest.shards(split)["bytes"]
    room, needed = cache.room, peak_bytes(next(node_uses), sizes)
    if needed > room:
        raise UserError(
            f"data.cache_size={cache.max_bytes / 1e9:g} and the disk of {cache.folder} leave {show_bytes(room)} for shards, but "
            f"{show_bytes(needed)} of {manifest.location} are read at the same time ({why}): set data.cache_size="
            f"{needed * 1.5 / 1e9:.2g} or more, on a disk that has it (data.cache_dir=FOLDER)"
        )
    first = next(uses)
    ahead = max(int(room * AHEAD_SHARE) // ranks_on_node, peak_bytes(extend(first, steps_ahead), sizes))
    num_open = peak_bytes(extend(first, steps_ahead), 1)
    if num_open + SPARE_FILES > (limit := _raise_file_limit()):
        raise UserError(
            f"{num_open} shards of {manifest.location} are read at the same time ({why}), and this process may have {limit} "
            f"files open: raise that with `ulimit -n {2 * (num_open + SPARE_FILES)}`, or make larger shards "
            "(galaxydist data shard --shard-size N)"
        )
    schedule = FetchQueue(chain([first], uses), steps_ahead)
    return PrefetchedShards(manifest, split, manifest.remote, cache, schedule, step=step, ahead_bytes=ahead, max_held=limit // 3)


class PrefetchedShards:
    """Shards of a remote store, fetched ahead of use.

    A few threads take the access intervals in order, fetch each shard (or find it in the cache) and hold it open, and so safe
    from eviction, until the loader has passed the interval's last step.

    Args:
        manifest, split, remote: the data set, its split and its store.
        cache: cache of this node.
        schedule: access intervals of this process.
        step: the first step that is read.
        ahead_bytes, max_held: largest size and number of the shards held at a time; exceeded only if ``open`` waits for one.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        remote: Remote,
        cache: Cache,
        schedule: FetchQueue,
        *,
        step: int,
        ahead_bytes: int,
        max_held: int,
    ) -> None:
        self._manifest, self._split, self._cache = manifest, split, cache
        self._store = Store(remote.url)
        table = manifest.shards(split)
        self._sizes, self._sums = table["bytes"].tolist(), table["sha256"]
        self._schedule, self._step, self._ahead_bytes, self._max_held = schedule, step - 1, ahead_bytes, max_held
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)  # wakes callers of ``open``: a shard has arrived or failed
        self._work_due = threading.Condition(self._lock)  # wakes a fetching thread; the one that takes work wakes the next
        self._stop = threading.Event()
        self._until: dict[int, int] = {}  # shard held, being fetched or put off -> the step after which it is released
        self._held: dict[int, SharedFile] = {}
        self._busy: set[int] = set()
        self._put_off: deque[int] = deque()  # shards that found no room, to be tried again
        self._wanted: dict[int, None] = {}  # shards that a caller of ``open`` waits for
        self._failed: dict[int, BaseException] = {}
        self._broken: BaseException | None = None  # unexpected error that ended a thread: ``open`` raises it
        self._pause_until = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"galaxydist-fetch-{number}", daemon=True)
            for number in range(remote.cache.threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, shard: int) -> SharedFile:
        """Return a shard, waiting until it has been fetched."""
        with self._lock:
            try:
                while not self._stop.is_set():
                    if (file := self._held.get(shard)) is not None:
                        return file
                    if (error := self._failed.get(shard) or self._broken) is not None:
                        raise error
                    if shard not in self._wanted:
                        self._wanted[shard] = None
                        self._work_due.notify()
                    self._news.wait()
            finally:
                self._wanted.pop(shard, None)
        raise StoppedError

    def advance(self, step: int) -> None:
        """Release the shards that are not needed after ``step``."""
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
        """Stop the threads, end waiting calls of ``open`` with an error, and release all shards."""
        self._stop.set()
        with self._lock:
            self._news.notify_all()
            self._work_due.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        with self._lock:
            self._held.clear()

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                self._carry_out(*task)
        except StoppedError:
            return
        except BaseException as error:
            with self._lock:
                self._broken = error
                self._news.notify_all()

    def _carry_out(self, shard: int, must: bool) -> None:
        try:
            self._arrived(shard, self._obtain(shard, must))  # no variable: it would keep the file open while this thread waits
        except StoppedError:
            raise
        except BaseException as error:
            self._failed_with(shard, must, error)

    def _obtain(self, shard: int, must: bool) -> SharedFile | None:
        wanted = CacheEntry(f"{self._manifest.dir.name}/{shard_name(self._split, shard)}", self._sizes[shard])
        return self._cache.obtain(wanted, lambda path: self._fetch(shard, path), stop=self._stop, must=must)

    def _next(self) -> tuple[int, bool] | None:
        """Wait for the next shard to fetch; return it with True if ``open`` waits for it, or None at the end."""
        with self._lock:
            while not self._stop.is_set():
                now = time.monotonic()
                task = self._waited_for() or self._ahead(now)
                if task is not None:
                    self._busy.add(task[0])
                    self._work_due.notify()
                    return task
                pause = self._pause_until - now
                self._work_due.wait(pause if pause > 0 else None)
        return None

    def _waited_for(self) -> tuple[int, bool] | None:
        for shard in self._wanted:
            if shard in self._busy or shard in self._held or shard in self._failed:
                continue
            if shard in self._put_off:
                self._put_off.remove(shard)
            if shard not in self._until:
                self._until[shard] = self._schedule.take(shard, self._step)
            return shard, True
        return None

    def _ahead(self, now: float) -> tuple[int, bool] | None:
        if now < self._pause_until:
            return None
        while self._put_off:
            shard = self._put_off.popleft()
            if shard in self._until:
                return shard, False
        while (first := self._schedule.first(self._step)) is not None:
            if first in self._until:
                self._until[first] = max(self._until[first], self._schedule.take(first, self._step))
                continue
            if sum(self._sizes[shard] for shard in self._until) + self._sizes[first] > self._ahead_bytes:
                return None
            if len(self._until) >= self._max_held:
                return None
            self._until[first] = self._schedule.take(first, self._step)
            return first, False
        return None

    def _arrived(self, shard: int, file: SharedFile | None) -> None:
        with self._lock:
            self._busy.discard(shard)
            if file is None:
                self._put_off.append(shard)
                self._pause_until = time.monotonic() + PAUSE_S
            elif shard in self._until:
                self._held[shard] = file
            self._news.notify_all()

    def _failed_with(self, shard: int, must: bool, error: BaseException) -> None:
        """Record a failed fetch; a shard that ``open`` does not wait for yet is tried again when it is needed."""
        if not must:
            _log.warning("fetching ahead: %s (it is tried again when it is needed)", error)
        with self._lock:
            self._busy.discard(shard)
            if must:
                self._failed[shard] = error.with_traceback(None)  # its frames would keep files and locks
            self._news.notify_all()

    def _fetch(self, shard: int, path: Path) -> None:
        name = shard_name(self._split, shard)
        try:
            download(self._store, name, path, stop=self._stop, num_bytes=self._sizes[shard], sha256=self._sums[shard].tobytes())
        except MissingError:
            raise UserError(
                f"shard {self._store.url(name)} is missing: copy the whole folder of shards there again, manifest.json last"
            ) from None


def _raise_file_limit() -> int:
    """Raise the limit on open files as far as allowed and return it: each shard in use is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
