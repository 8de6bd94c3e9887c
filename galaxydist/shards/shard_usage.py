"""Which shards a process needs, from which batch to which: what a cache must hold, known before anything is read.

A batch number counts the whole global batches of one epoch (training) or of one split (evaluation), from 0.
"""

from collections import deque
from collections.abc import Iterator
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.shards.order import EpochOrder

Int64 = NDArray[np.int64]

# A row for each stretch of batches in which a shard is needed: the shard's number in storage order, the first batch and the last.
# A shard may have several rows; they neither overlap nor touch.
USE = np.dtype([("shard", "<i8"), ("first_step", "<i8"), ("last_step", "<i8")])


def usage_of_rank(order: EpochOrder, batch_size: int, offsets: ArrayLike) -> NDArray[np.void]:
    """The shards that one epoch of training needs. Costs O(shards + C) whatever the number of samples.

    A part of a shard in a stream counts from the first batch of the window of its first sample to the last batch of the window of
    its last sample: never too narrow, and too wide by less than a window (times C / G batches) at each end.

    Args:
        order: the epoch.
        batch_size: G.
        offsets: in 0 ... G-1, those of a process, or of all processes that share a cache.

    Returns:
        rows of ``USE``, sorted by (first_step, shard); the incomplete last batch does not count.
    """
    return _stream_uses(order, batch_size, _streams_hit(order.num_streams, batch_size, offsets))


def usage_of_nodes(order: EpochOrder, batch_size: int, num_nodes: int, ranks_per_node: int) -> list[NDArray[np.void]]:
    """The shards that each node needs in one epoch of training; ranks are dealt to nodes in blocks.

    Nodes that read the same streams share one array, so that large worlds cost little more than small ones.

    Args:
        order, batch_size: as in ``usage_of_rank``.
        num_nodes, ranks_per_node: with no more ranks than the batch holds.

    Returns:
        what ``usage_of_rank`` gives for the offsets of each node.
    """
    offsets = np.arange(batch_size)
    node_of = offsets % (num_nodes * ranks_per_node) // ranks_per_node
    by_node = np.split(np.argsort(node_of, kind="stable"), np.cumsum(np.bincount(node_of, minlength=num_nodes))[:-1])
    known: dict[bytes, NDArray[np.void]] = {}
    uses = []
    for own in by_node:
        streams = _streams_hit(order.num_streams, batch_size, own)
        if (key := streams.tobytes()) not in known:
            known[key] = _stream_uses(order, batch_size, streams)
        uses.append(known[key])
    return uses


def evaluation_uses(shard_samples: ArrayLike, batch_size: int, rank: int, world_size: int) -> NDArray[np.void]:
    """The shards that a process needs to evaluate a split: batch j holds stored samples j E ... (j + 1) E - 1, rank j mod W.

    Args:
        shard_samples: number of samples in each shard, in storage order.
        batch_size: E.
        rank, world_size: the process.

    Returns:
        rows of ``USE``, sorted by (first_step, shard); a step is the number j of a batch of this process.
    """
    size = np.asarray(shard_samples, np.int64)
    stop = np.cumsum(size)
    first, last = (stop - size) // batch_size, (stop - 1) // batch_size
    first += (rank - first) % world_size
    last -= (last - rank) % world_size
    shard = np.flatnonzero((size > 0) & (first <= last))
    return _rows(shard, first[shard], last[shard])


def resampled_uses(num_shards: int, num_steps: int) -> NDArray[np.void]:
    """With ``data.balance=resample`` any batch may draw from any shard: all shards, for all batches."""
    shard = np.arange(num_shards if num_steps else 0)
    return _rows(shard, np.zeros_like(shard), np.full_like(shard, num_steps - 1))


def peak_bytes(uses: NDArray[np.void], bytes_per_shard: ArrayLike) -> int:
    """The most bytes of shards in use at one batch.

    Args:
        uses: rows of ``USE``.
        bytes_per_shard: of all shards, in storage order; or one number for all.
    """
    size = np.asarray(bytes_per_shard, np.int64)
    size = size[uses["shard"]] if size.ndim else np.full(uses.size, size)
    step = np.concatenate([uses["first_step"], uses["last_step"] + 1])
    change = np.concatenate([size, -size])
    by_step = np.lexsort((change, step))
    return int(np.cumsum(change[by_step]).max(initial=0))


def _stream_uses(order: EpochOrder, batch_size: int, streams: Int64) -> NDArray[np.void]:
    num_steps = order.num_positions // batch_size
    shard, stream, first_place, last_place = order.pieces(streams)
    first = (first_place * order.num_streams + stream) // batch_size
    last = (last_place * order.num_streams + stream) // batch_size
    read = first < num_steps
    return _joined(shard[read], first[read], np.minimum(last[read], num_steps - 1))


def _streams_hit(num_streams: int, batch_size: int, offsets: ArrayLike) -> Int64:
    """The streams (b G + o) mod C over all batches b: those that leave an offset's remainder modulo gcd(G, C)."""
    period = gcd(batch_size, num_streams)
    hit = np.zeros(period, bool)
    hit[np.asarray(offsets, np.int64) % period] = True
    return np.flatnonzero(np.tile(hit, num_streams // period))


def _joined(shard: Int64, first: Int64, last: Int64) -> NDArray[np.void]:
    """Rows of ``USE`` in which what overlaps or touches is one."""
    order = np.lexsort((first, shard))
    shard, first, last = shard[order], first[order], last[order]
    # Shards in sequence, each above all before it: one running maximum serves all.
    base = shard * (last.max(initial=0) + 1)
    reached = np.maximum.accumulate(base + last) - base
    begins = np.ones(shard.size, bool)
    begins[1:] = (shard[1:] != shard[:-1]) | (first[1:] > reached[:-1] + 1)
    start = np.flatnonzero(begins)
    stop = np.append(start[1:], shard.size)[: start.size]
    return _rows(shard[start], first[start], reached[stop - 1])


def _rows(shard: Int64, first: Int64, last: Int64) -> NDArray[np.void]:
    order = np.lexsort((shard, first))
    uses = np.empty(shard.size, USE)
    uses["shard"], uses["first_step"], uses["last_step"] = shard[order], first[order], last[order]
    return uses


# Which shard is needed next: the uses of a run, epoch after epoch, taken one by one. Pure: no files, no threads.

# Rows of ``USE``, one epoch after another; their steps count on from epoch to epoch.
Uses = Iterator[NDArray[np.void]]


class FetchQueue:
    """The uses that nobody has taken yet; of the coming epochs one is looked at.

    Args:
        uses: epoch after epoch, or the one of an evaluation.
        steps_ahead: that a reader may be of the last step that it has finished.
    """

    def __init__(self, uses: Uses, steps_ahead: int = 1) -> None:
        self._uses, self._steps_ahead = uses, steps_ahead
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
        while number < len(self._epochs) or (self._newest_begins <= step + self._steps_ahead and self._load()):
            rows, taken = self._epochs[number]
            fits = np.flatnonzero((rows["shard"] == shard) & ~taken & (rows["last_step"] > step))
            if fits.size:
                taken[fits[0]] = True
                return int(rows["last_step"][fits[0]])
            number += 1
        raise AssertionError(f"shard {shard} is read, but was not said to be used")

    def _load(self) -> bool:
        rows = next(self._uses, None)
        if rows is None:
            return False
        self._epochs.append((rows, np.zeros(rows.size, bool)))
        if rows.size:
            self._newest_begins = int(rows["first_step"].min())
        return True


def shift(uses: NDArray[np.void], steps: int) -> NDArray[Any]:
    """The same uses, so many steps later."""
    later = extend(uses, steps)
    later["first_step"] += steps
    return later


def extend(uses: NDArray[np.void], steps: int) -> NDArray[Any]:
    """The same uses, each so many steps longer."""
    longer = uses.copy()
    longer["last_step"] += steps
    return longer
