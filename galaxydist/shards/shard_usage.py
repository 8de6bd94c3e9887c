"""Shard access intervals: for each shard, the first and last batch that reads it.

They tell a cache in advance what it must hold. Batches are whole global batches, numbered from 0 within one epoch (training) or
one split (evaluation). Pure: no files, no threads.
"""

from collections import deque
from collections.abc import Iterator
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.shards.order import EpochOrder

Int64 = NDArray[np.int64]

# One row per interval of batches that read a shard: the shard's number in storage order, the first batch and the last batch.
# A shard may have several rows; they neither overlap nor touch.
INTERVAL = np.dtype([("shard", "<i8"), ("first_step", "<i8"), ("last_step", "<i8")])


def usage_of_rank(order: EpochOrder, batch_size: int, offsets: ArrayLike) -> NDArray[np.void]:
    """Return the shard access intervals of one training epoch, in O(shards + C) for any number of samples.

    The part of a shard in a stream counts from the first batch of its first sample's window to the last batch of its last
    sample's window. An interval is never too narrow, and too wide by less than a window (times C / G batches) at each end.

    Args:
        order: the epoch.
        batch_size: G, the global batch size.
        offsets: offsets in the global batch, 0 ... G-1, of one process or of all processes that share a cache.

    Returns:
        rows of ``INTERVAL``, sorted by (first_step, shard), without the incomplete last batch.
    """
    return _usage_of_streams(order, batch_size, _streams_of_offsets(order.num_streams, batch_size, offsets))


def usage_of_nodes(order: EpochOrder, batch_size: int, num_nodes: int, ranks_per_node: int) -> list[NDArray[np.void]]:
    """Return each node's shard access intervals for one training epoch; ranks are assigned to nodes in blocks.

    Nodes that read the same streams share one array, so that a large world size costs little more than a small one.

    Args:
        order, batch_size: as in ``usage_of_rank``.
        num_nodes, ranks_per_node: the world; at most one rank per sample of a batch.

    Returns:
        the result of ``usage_of_rank`` for the offsets of each node.
    """
    offsets = np.arange(batch_size)
    node_of = offsets % (num_nodes * ranks_per_node) // ranks_per_node
    by_node = np.split(np.argsort(node_of, kind="stable"), np.cumsum(np.bincount(node_of, minlength=num_nodes))[:-1])
    streams = [_streams_of_offsets(order.num_streams, batch_size, own) for own in by_node]
    different = {hit.tobytes(): hit for hit in streams}
    usage = {key: _usage_of_streams(order, batch_size, hit) for key, hit in different.items()}
    return [usage[hit.tobytes()] for hit in streams]


def usage_of_evaluation(shard_samples: ArrayLike, batch_size: int, batches: Int64 | None = None) -> NDArray[np.void]:
    """Return the shard access intervals of a process that evaluates some batches of a split.

    Args:
        shard_samples: number of samples in each shard, in storage order.
        batch_size: E: batch j holds stored samples j E ... (j + 1) E - 1.
        batches: numbers of the process's batches, ascending; None: all.

    Returns:
        rows of ``INTERVAL``, sorted by (first_step, shard); a step is the number j of a batch of this process.
    """
    size = np.asarray(shard_samples, np.int64)
    stop = np.cumsum(size)
    first, last = (stop - size) // batch_size, (stop - 1) // batch_size
    if batches is None:
        shard = np.flatnonzero(size)
        return _sorted_intervals(shard, first[shard], last[shard])
    before, after = np.searchsorted(batches, first, side="left"), np.searchsorted(batches, last, side="right")
    shard = np.flatnonzero((size > 0) & (before < after))
    return _sorted_intervals(shard, batches[before[shard]], batches[after[shard] - 1])


def usage_of_resampling(num_shards: int, num_steps: int) -> NDArray[np.void]:
    """Return one interval per shard over all batches: with ``data.balance=resample`` any batch may read any shard."""
    shard = np.arange(num_shards if num_steps else 0)
    return _sorted_intervals(shard, np.zeros_like(shard), np.full_like(shard, num_steps - 1))


def peak_bytes(intervals: NDArray[np.void], bytes_per_shard: ArrayLike) -> int:
    """Return the largest size of the shards in use at any one batch, in bytes.

    Args:
        intervals: rows of ``INTERVAL``.
        bytes_per_shard: size of each shard, in storage order, or one size for all.
    """
    size = np.asarray(bytes_per_shard, np.int64)
    size = size[intervals["shard"]] if size.ndim else np.full(intervals.size, size)
    step = np.concatenate([intervals["first_step"], intervals["last_step"] + 1])
    change = np.concatenate([size, -size])
    by_step = np.lexsort((change, step))
    return int(np.cumsum(change[by_step]).max(initial=0))


def _usage_of_streams(order: EpochOrder, batch_size: int, streams: Int64) -> NDArray[np.void]:
    num_steps = order.num_positions // batch_size
    shard, stream, first_index, last_index = order.pieces(streams)
    first = (first_index * order.num_streams + stream) // batch_size
    last = (last_index * order.num_streams + stream) // batch_size
    read = first < num_steps
    return _merge_intervals(shard[read], first[read], np.minimum(last[read], num_steps - 1))


def _streams_of_offsets(num_streams: int, batch_size: int, offsets: ArrayLike) -> Int64:
    """Return the streams (b G + o) mod C over all batches b: those congruent to an offset o modulo gcd(G, C)."""
    period = gcd(batch_size, num_streams)
    hit = np.zeros(period, bool)
    hit[np.asarray(offsets, np.int64) % period] = True
    return np.flatnonzero(np.tile(hit, num_streams // period))


def _merge_intervals(shard: Int64, first: Int64, last: Int64) -> NDArray[np.void]:
    """Return rows of ``INTERVAL`` in which overlapping or touching intervals of a shard are merged."""
    order = np.lexsort((first, shard))
    shard, first, last = shard[order], first[order], last[order]
    # Shift each shard's steps above those of the shards before it, so that one running maximum serves all shards.
    base = shard * (last.max(initial=0) + 1)
    reached = np.maximum.accumulate(base + last) - base
    begins = np.ones(shard.size, bool)
    begins[1:] = (shard[1:] != shard[:-1]) | (first[1:] > reached[:-1] + 1)
    start = np.flatnonzero(begins)
    stop = np.append(start[1:], shard.size)[: start.size]
    return _sorted_intervals(shard[start], first[start], reached[stop - 1])


def _sorted_intervals(shard: Int64, first: Int64, last: Int64) -> NDArray[np.void]:
    order = np.lexsort((shard, first))
    intervals = np.empty(shard.size, INTERVAL)
    intervals["shard"], intervals["first_step"], intervals["last_step"] = shard[order], first[order], last[order]
    return intervals


# Rows of ``INTERVAL``, one array per epoch; the step numbers continue from epoch to epoch.
Intervals = Iterator[NDArray[np.void]]


class FetchQueue:
    """Queue of the shard access intervals that have not been taken yet; looks one epoch ahead.

    Args:
        intervals: the intervals of epoch after epoch, or of one evaluation.
        steps_ahead: number of steps that a loader may be ahead of the last step that it has finished.
    """

    def __init__(self, intervals: Intervals, steps_ahead: int = 1) -> None:
        self._intervals, self._steps_ahead = intervals, steps_ahead
        self._epochs: deque[tuple[NDArray[np.void], NDArray[np.bool_]]] = deque()
        self._row = 0
        self._newest_begins = -1  # the step at which the newest of these epochs begins

    def first(self, step: int) -> int | None:
        """Return the shard that is needed first after ``step``; None if the current and the next epoch are taken."""
        while self._epochs or (step >= self._newest_begins and self._load()):
            rows, taken = self._epochs[0]
            while self._row < rows.size and (taken[self._row] or rows["last_step"][self._row] <= step):
                self._row += 1
            if self._row < rows.size:
                return int(rows["shard"][self._row])
            self._epochs.popleft()
            self._row = 0
        return None

    def take(self, shard: int, step: int) -> int:
        """Take the shard's first interval that ends after ``step`` and return the interval's last step."""
        number = 0
        while number < len(self._epochs) or (self._newest_begins <= step + self._steps_ahead and self._load()):
            rows, taken = self._epochs[number]
            fits = np.flatnonzero((rows["shard"] == shard) & ~taken & (rows["last_step"] > step))
            if fits.size:
                taken[fits[0]] = True
                return int(rows["last_step"][fits[0]])
            number += 1
        raise AssertionError(f"shard {shard} is read, but is in none of its access intervals")

    def _load(self) -> bool:
        rows = next(self._intervals, None)
        if rows is None:
            return False
        self._epochs.append((rows, np.zeros(rows.size, bool)))
        if rows.size:
            self._newest_begins = int(rows["first_step"].min())
        return True


def shift(intervals: NDArray[np.void], steps: int) -> NDArray[Any]:
    """Return the intervals moved later by ``steps`` steps."""
    later = extend(intervals, steps)
    later["first_step"] += steps
    return later


def extend(intervals: NDArray[np.void], steps: int) -> NDArray[Any]:
    """Return the intervals lengthened at the end by ``steps`` steps."""
    longer = intervals.copy()
    longer["last_step"] += steps
    return longer
