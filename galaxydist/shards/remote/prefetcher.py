"""Shards fetched from a store ahead of use, in the order of use, through the node's cache."""

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

# Where a reader's shards come from: a folder on this machine, read in place, or a store, through the node's cache.

# Shards that are held open; fewer than the 1,024 files that a process may usually have.
MAX_OPEN = 384


class ShardSource(Protocol):
    """The shards of one split."""

    def open(self, shard: int) -> SharedFile:
        """A shard, whole and on this machine; waits until it is. Any thread may call.

        Raises:
            UserError: naming it, if it is missing or cannot be had.
        """
        ...

    def advance(self, step: int) -> None:
        """All batches up to this one have been read."""
        ...

    def close(self) -> None:
        """Let go of everything; whoever waits in ``open`` is sent away with an error. May be called twice."""
        ...


class LocalShards:
    """Shards that lie in the manifest's own folder: the last used are kept open, and there is nothing else to do."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._manifest, self._split = manifest, split
        self._files: OrderedDict[int, SharedFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, shard: int) -> SharedFile:
        """See ``ShardSource``."""
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
        """See ``ShardSource``."""

    def close(self) -> None:
        """See ``ShardSource``."""
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

# Of the cache, what shards fetched ahead may fill; the rest is for what is read beside (validation).
AHEAD_SHARE = 7 / 8
# Files that a process may need beside shards, and the most that it asks the system for.
SPARE_FILES, MOST_FILES = 256, 65_536
# Seconds until room is looked for again, where there was none for a shard that is not needed yet.
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
    """The shards of a split: in place where they lie on this machine, else fetched ahead.

    Args:
        manifest, split: which.
        uses: what this process needs.
        node_uses: what the processes of this machine hold together, with what they read ahead; only the first epoch is looked at.
        step: the first that is read.
        steps_ahead: by which reading may be ahead of ``ShardSource.advance``.
        ranks_on_node: processes that share the cache.
        why: says in the error why so much is needed at a time, and what else would help.

    Raises:
        UserError: the cache is too small for what is read at the same time, or cannot be used.
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
    """Shards of a remote store. A few threads take the uses in order, fetch each shard (or find it in the cache) and hold it
    open, and so safe from eviction, until the reader has passed its last step.

    Args:
        manifest, split, remote: which shards.
        cache: of this node.
        schedule: what this process needs.
        step: the first that is read.
        ahead_bytes, max_held: of shards held at a time, and how many; more only where a reader waits for one.
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
        self._news = threading.Condition(self._lock)  # for readers: a shard is there, or never will be
        self._work_due = threading.Condition(self._lock)  # for fetching threads; who takes work wakes the next
        self._stop = threading.Event()
        self._until: dict[int, int] = {}  # all that is held, fetched or put off: the step after which it is let go
        self._held: dict[int, SharedFile] = {}
        self._busy: set[int] = set()
        self._put_off: deque[int] = deque()  # no room: tried again
        self._wanted: dict[int, None] = {}  # a reader waits
        self._failed: dict[int, BaseException] = {}
        self._broken: BaseException | None = None  # a thread died of an error of ours: no reader may wait for it
        self._pause_until = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"galaxydist-fetch-{number}", daemon=True)
            for number in range(remote.cache.threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, shard: int) -> SharedFile:
        """See ``ShardSource``."""
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
        """See ``ShardSource``."""
        with self._lock:
            self._step = step
            over = [shard for shard, last in self._until.items() if last <= step]
            for shard in over:
                del self._until[shard]
                self._held.pop(shard, None)
                self._failed.pop(shard, None)
            if over:
                self._pause_until = 0.0
            self._work_due.notify()  # even if none is over: a new epoch may be looked at

    def close(self) -> None:
        """See ``ShardSource``."""
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
            self._arrived(shard, self._obtain(shard, must))  # no name here: while this thread waits, it would hold the file
        except StoppedError:
            raise
        except BaseException as error:
            self._failed_with(shard, must, error)

    def _obtain(self, shard: int, must: bool) -> SharedFile | None:
        wanted = CacheEntry(f"{self._manifest.dir.name}/{shard_name(self._split, shard)}", self._sizes[shard])
        return self._cache.obtain(wanted, lambda path: self._fetch(shard, path), stop=self._stop, must=must)

    def _next(self) -> tuple[int, bool] | None:
        """The next shard to fetch, and whether a reader waits for it; waits until there is one. None at the end."""
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
        """A shard that nobody waits for yet is tried once more when it is needed."""
        if not must:
            _log.warning("fetching ahead: %s (it is tried again when it is needed)", error)
        with self._lock:
            self._busy.discard(shard)
            if must:
                self._failed[shard] = error.with_traceback(None)  # its frames would hold files and locks
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
    """Files that this process may have open: as many as it may allow itself, since each shard in use is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
