"""Shards fetched from a store ahead of use, in the order of use, through the node's cache."""

import logging
import resource
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.shards.cache import Cache, Wanted, show_bytes
from galaxydist.shards.failures import MissingError
from galaxydist.shards.manifest import Manifest, Remote, shard_name
from galaxydist.shards.openfile import OpenFile
from galaxydist.shards.source import FolderSource, Source
from galaxydist.shards.store import StoppedError, Store
from galaxydist.shards.transfer import transfer
from galaxydist.shards.uses import working_set

_log = logging.getLogger(__name__)

# Rows of ``USE``, one epoch after another; their steps count on from epoch to epoch.
Uses = Iterator[NDArray[np.void]]

# Of the cache, what shards fetched ahead may fill; the rest is for what is read beside (validation).
AHEAD_SHARE = 7 / 8
# Seconds until room is looked for again, where there was none for a shard that is not needed yet.
PAUSE_S = 0.25


def open_source(
    manifest: Manifest,
    split: str,
    uses: Uses,
    node_uses: Uses,
    *,
    step: int = 0,
    steps_ahead: int = 0,
    ranks_on_node: int = 1,
    why: str,
) -> Source:
    """The shards of a split: in place where they lie on this machine, else fetched ahead.

    Args:
        manifest, split: which.
        uses: what this process needs.
        node_uses: what the processes of this machine need together; only the first epoch is looked at.
        step: the first that is read.
        steps_ahead: by which reading may be ahead of ``Source.advance``.
        ranks_on_node: processes that share the cache.
        why: says in the error why so much is needed at a time, and what else would help.

    Raises:
        UserError: the cache is too small for what is read at the same time, or cannot be used.
    """
    if manifest.remote is None:
        return FolderSource(manifest, split)
    cache = Cache(manifest.remote.cache.folder, manifest.remote.cache.max_bytes)
    sizes = manifest.shards(split)["bytes"]
    room, needed = cache.room, working_set(_lengthened(next(node_uses), steps_ahead), sizes)
    if needed > room:
        raise UserError(
            f"data.cache_size={cache.max_bytes / 1e9:g} and the disk of {cache.folder} leave {show_bytes(room)} for shards, but "
            f"{show_bytes(needed)} of {manifest.location} are read at the same time ({why}): set data.cache_size="
            f"{needed * 1.5 / 1e9:.2g} or more, on a disk that has it (data.cache_dir=FOLDER)"
        )
    first = next(uses)
    ahead = max(int(room * AHEAD_SHARE) // ranks_on_node, working_set(_lengthened(first, steps_ahead), sizes))
    return FetchedSource(manifest, split, manifest.remote, cache, chain([first], uses), step=step, ahead_bytes=ahead)


class Schedule:
    """The uses that nobody has taken yet; of the coming epochs one is looked at.

    Args:
        uses: epoch after epoch, or the one of an evaluation.
    """

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._epochs: deque[tuple[NDArray[np.void], NDArray[np.bool_]]] = deque()
        self._place = 0
        self._newest_begins = -1  # the step at which the newest of these epochs begins

    def first(self, step: int) -> int | None:
        """The shard that is needed first of all after ``step``; None where the current epoch and the next are taken."""
        while self._epochs or (step >= self._newest_begins and self._load()):
            rows, taken = self._epochs[0]
            while self._place < rows.size and (taken[self._place] or rows["last_step"][self._place] <= step):
                self._place += 1
            if self._place < rows.size:
                return int(rows["shard"][self._place])
            self._epochs.popleft()
            self._place = 0
        return None

    def take(self, shard: int, step: int) -> int:
        """Take the shard's first use that is not over: the step after which it is no longer needed."""
        number = 0
        while number < len(self._epochs) or self._load():
            rows, taken = self._epochs[number]
            fits = np.flatnonzero((rows["shard"] == shard) & ~taken & (rows["last_step"] > step))
            if fits.size:
                taken[fits[0]] = True
                return int(rows["last_step"][fits[0]])
            number += 1
            assert number < 4, f"shard {shard} is read, but was not said to be used"
        raise AssertionError(f"shard {shard} is read, but was not said to be used")

    def _load(self) -> bool:
        rows = next(self._uses, None)
        if rows is None:
            return False
        self._epochs.append((rows, np.zeros(rows.size, bool)))
        self._newest_begins = int(rows["first_step"].min())
        return True


class FetchedSource:
    """See ``Source``. A few threads take the uses in order, fetch each shard (or find it in the cache) and hold it open, and so
    safe from eviction, until the reader has passed its last step.

    Args:
        manifest, split, remote: which shards.
        cache: of this node.
        uses: what this process needs.
        step: the first that is read.
        ahead_bytes: of shards held at a time; more only where a reader waits for one.
    """

    def __init__(
        self, manifest: Manifest, split: str, remote: Remote, cache: Cache, uses: Uses, *, step: int, ahead_bytes: int
    ) -> None:
        self._manifest, self._split, self._cache = manifest, split, cache
        self._store = Store(remote.url)
        table = manifest.shards(split)
        self._sizes, self._sums = table["bytes"].tolist(), table["sha256"]
        self._schedule, self._step, self._ahead_bytes = Schedule(uses), step - 1, ahead_bytes
        self._max_held = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._until: dict[int, int] = {}  # all that is held, fetched or put off: the step after which it is let go
        self._held: dict[int, OpenFile] = {}
        self._busy: set[int] = set()
        self._put_off: deque[int] = deque()  # no room: tried again
        self._wanted: dict[int, None] = {}  # a reader waits
        self._failed: dict[int, BaseException] = {}
        self._pause_until = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"galaxydist-fetch-{number}", daemon=True)
            for number in range(remote.cache.threads)
        ]
        for thread in self._threads:
            thread.start()

    def open(self, shard: int) -> OpenFile:
        """See ``Source``."""
        with self._changed:
            while not self._stop.is_set():
                if (file := self._held.get(shard)) is not None:
                    return file
                if (error := self._failed.get(shard)) is not None:
                    raise error
                self._wanted[shard] = None
                self._changed.notify_all()
                self._changed.wait()
        raise StoppedError

    def advance(self, step: int) -> None:
        """See ``Source``."""
        with self._changed:
            self._step = step
            over = [shard for shard, last in self._until.items() if last <= step]
            for shard in over:
                del self._until[shard]
                self._held.pop(shard, None)
                self._failed.pop(shard, None)
            if over:
                self._pause_until = 0.0
                self._changed.notify_all()

    def close(self) -> None:
        """See ``Source``."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        with self._changed:
            self._held.clear()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                self._arrived(task[0], self._obtain(*task))  # no name here: while this thread waits, it would hold the file
            except StoppedError:
                return
            except BaseException as error:
                self._failed_with(*task, error)

    def _obtain(self, shard: int, must: bool) -> OpenFile | None:
        wanted = Wanted(f"{self._manifest.dir.name}/{shard_name(self._split, shard)}", self._sizes[shard])
        return self._cache.obtain(wanted, lambda path: self._fetch(shard, path), stop=self._stop, must=must)

    def _next(self) -> tuple[int, bool] | None:
        """The next shard to fetch, and whether a reader waits for it; waits until there is one. None at the end."""
        with self._changed:
            while not self._stop.is_set():
                task = self._waited_for() or self._ahead()
                if task is not None:
                    self._busy.add(task[0])
                    return task
                pause = self._pause_until - time.monotonic()
                self._changed.wait(pause if pause > 0 else None)
        return None

    def _waited_for(self) -> tuple[int, bool] | None:
        for shard in self._wanted:
            if shard not in self._busy:
                del self._wanted[shard]
                if shard in self._held:
                    return self._waited_for()
                if shard in self._put_off:
                    self._put_off.remove(shard)
                if shard not in self._until:
                    self._until[shard] = self._schedule.take(shard, self._step)
                return shard, True
        return None

    def _ahead(self) -> tuple[int, bool] | None:
        if time.monotonic() < self._pause_until:
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

    def _arrived(self, shard: int, file: OpenFile | None) -> None:
        with self._changed:
            self._busy.discard(shard)
            if file is None:
                self._put_off.append(shard)
                self._pause_until = time.monotonic() + PAUSE_S
            elif shard in self._until:
                self._held[shard] = file
            self._changed.notify_all()

    def _failed_with(self, shard: int, must: bool, error: BaseException) -> None:
        """A shard that nobody waits for yet is tried once more when it is needed."""
        if not must:
            _log.warning("fetching ahead: %s (it is tried again when it is needed)", error)
        with self._changed:
            self._busy.discard(shard)
            if must:
                self._failed[shard] = error
            self._changed.notify_all()

    def _fetch(self, shard: int, path: Path) -> None:
        name = shard_name(self._split, shard)
        try:
            transfer(self._store, name, path, stop=self._stop, num_bytes=self._sizes[shard], sha256=self._sums[shard].tobytes())
        except MissingError:
            raise UserError(
                f"shard {self._store.url(name)} is missing: copy the whole folder of shards there again, manifest.json last"
            ) from None


def shifted(uses: NDArray[np.void], steps: int) -> NDArray[Any]:
    """The same uses, so many steps later."""
    later = _lengthened(uses, steps)
    later["first_step"] += steps
    return later


def _lengthened(uses: NDArray[np.void], steps: int) -> NDArray[Any]:
    longer = uses.copy()
    longer["last_step"] += steps
    return longer
