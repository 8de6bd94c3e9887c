"""Training order of samples: a pure function of (seed, epoch, position) for any number of processes.

``order_version`` 1. An epoch's order is a permutation of the split's N stored samples, made of C streams:

1. the shards are permuted (sorted by a hash) and laid end to end;
2. this line is cut into C segments, segment i of ceil((N - i) / C) samples;
3. inside each segment, disjoint windows of ``WINDOW`` samples are permuted by a keyed Feistel network.

Position p is index p div C of stream p mod C, so positions are dense in 0 ... N-1 and no sample is dropped. Opening an epoch
costs O(shards), and each position then O(log shards), for any N.

Global batch b is positions b G ... (b + 1) G - 1; offset o in it belongs to rank o mod W.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.counter_rng import GAMMA, Stream, hash64, mix64
from galaxydist.errors import UserError

Int64 = NDArray[np.int64]
Integers = NDArray[np.uint64]

WINDOW = 4096
ROUNDS = 6


def permute(indexes: ArrayLike, sizes: ArrayLike, keys: ArrayLike) -> Int64:
    """Map each index through the permutation of 0 ... size-1 that its key selects, without a table.

    A Feistel network over mixed radices (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5): n is covered
    by a x b >= n, a number is split into its two digits, and each round adds a hash of one digit to the other. Results in
    n ... ab-1 are permuted again until they are below n (cycle walking), which is rare because ab - n < a.

    Args:
        indexes: integers, each >= 0 and below its size.
        sizes: length of the permutation, per index or one for all; at least 1.
        keys: uint64 hashes, per index or one for all.

    Returns:
        int64 of the broadcast shape.
    """
    value, size, key = np.broadcast_arrays(
        np.asarray(indexes).astype(np.uint64), np.asarray(sizes).astype(np.uint64), np.asarray(keys, np.uint64)
    )
    shape = value.shape
    value, size, key = value.reshape(-1), size.reshape(-1), key.reshape(-1)
    first = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    second = (size + first - np.uint64(1)) // first
    value = _rounds(value, first, second, key)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _rounds(value[outside], first[outside], second[outside], key[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64).reshape(shape)


def _rounds(value: Integers, first: Integers, second: Integers, key: Integers) -> Integers:
    left, right = value // second, value % second
    with np.errstate(over="ignore"):
        for number in range(ROUNDS):
            constant = np.uint64(number + 1) * GAMMA
            if number % 2 == 0:
                left = (left + mix64((key ^ right) + constant) % first) % first
            else:
                right = (right + mix64((key ^ left) + constant) % second) % second
        return left * second + right


class EpochOrder:
    """Permutation of the stored samples in one epoch.

    Args:
        shard_samples: number of samples in each shard, in storage order.
        seed, epoch: select the permutation.
        num_streams: C, the number of streams; fixed for a run, never derived from the number of processes.
        window: number of samples that are permuted together.
    """

    def __init__(self, shard_samples: ArrayLike, *, seed: int, epoch: int, num_streams: int = 192, window: int = WINDOW) -> None:
        sizes = np.asarray(shard_samples, np.int64)
        self.num_positions = int(sizes.sum())
        self.num_streams = num_streams
        self._seed, self._epoch, self._window = seed, epoch, window
        self._length, self._longer = divmod(self.num_positions, num_streams)
        self._shards = np.argsort(hash64(seed, epoch, np.arange(sizes.size), Stream.SHARDS), kind="stable")
        self._stored_starts = np.cumsum(sizes) - sizes
        laid = sizes[self._shards]
        self._laid_starts = np.cumsum(laid) - laid

    def samples(self, positions: ArrayLike) -> Int64:
        """Return the stored sample numbers at these positions.

        Args:
            positions: integers in 0 ... N-1, of any shape.

        Returns:
            int64 of the same shape.

        Raises:
            IndexError: a position is outside the epoch.
        """
        position = _check_range(positions, self.num_positions)
        stream, index = position % self.num_streams, position // self.num_streams
        start, size, key = self._windows(stream, index)
        line = start + permute(index % self._window, size, key)
        laid = np.searchsorted(self._laid_starts, line, side="right") - 1
        return np.asarray(self._stored_starts[self._shards[laid]] + line - self._laid_starts[laid])

    def pieces(self, streams: ArrayLike) -> tuple[Int64, Int64, Int64, Int64]:
        """Return the parts of shards that these streams consist of.

        Args:
            streams: distinct integers in 0 ... C-1.

        Returns:
            (shard, stream, first_index, last_index): one row for each part of a shard in one of the streams. Its samples lie at
            indexes first_index ... last_index of the stream. This range covers whole windows, so it also holds samples of other
            shards.
        """
        stream = np.asarray(streams, np.int64)
        length = self._length + (stream < self._longer)
        stream, length = stream[length > 0], length[length > 0]
        start = self._segment_start(stream)
        first = np.searchsorted(self._laid_starts, start, side="right") - 1
        count = np.searchsorted(self._laid_starts, start + length, side="left") - first
        row = np.repeat(np.arange(stream.size), count)
        laid = np.arange(row.size) + (first - np.cumsum(count) + count)[row]
        laid_stops = np.append(self._laid_starts[1:], self.num_positions)
        filled = laid_stops[laid] > self._laid_starts[laid]
        row, laid = row[filled], laid[filled]
        first_index = np.maximum(self._laid_starts[laid] - start[row], 0)
        last_index = np.minimum(laid_stops[laid] - start[row], length[row]) - 1
        first_index -= first_index % self._window
        last_index = np.minimum((last_index // self._window + 1) * self._window, length[row]) - 1
        return self._shards[laid], stream[row], first_index, last_index

    def _segment_start(self, stream: Int64) -> Int64:
        return stream * self._length + np.minimum(stream, self._longer)

    def _windows(self, stream: Int64, index: Int64) -> tuple[Int64, Int64, NDArray[np.uint64]]:
        """Return the window of each stream index: its start on the line of shards, its length and its permutation's key."""
        window = index // self._window
        segment_length = self._length + (stream < self._longer)
        size = np.minimum(self._window, segment_length - window * self._window)
        key = hash64(self._seed, self._epoch, stream, window, Stream.WINDOW)
        return self._segment_start(stream) + window * self._window, size, key


class ResampledOrder:
    """Order of one epoch with balanced classes, in N positions.

    Each of the K classes is drawn floor(N / K) or ceil(N / K) times; the galaxies of a class are drawn equally often, up to one.
    Needs the labels in memory and reads shards in random order: for local or cached shards.

    Args:
        labels: N class numbers; galaxies with a negative label are never drawn.
        seed, epoch: select the draw.
        by_class: ``ByClass`` of the labels, if it exists already.
    """

    def __init__(self, labels: ArrayLike, *, seed: int, epoch: int, by_class: "ByClass | None" = None) -> None:
        self._by_class = by_class or ByClass(labels)
        self.num_positions = int(np.asarray(labels).size)
        self._seed, self._epoch = seed, epoch
        num_classes = self._by_class.counts.size
        few, more = divmod(self.num_positions, num_classes)
        rank = np.argsort(np.argsort(hash64(seed, epoch, np.arange(num_classes), Stream.CLASS_DRAWS), kind="stable"))
        draws = few + (rank < more)
        self._starts = np.cumsum(draws) - draws

    def samples(self, positions: ArrayLike) -> Int64:
        """Return the stored sample numbers at these positions; a galaxy may occur at several."""
        position = _check_range(positions, self.num_positions)
        drawn = permute(position, self.num_positions, hash64(self._seed, self._epoch, 0, Stream.POSITIONS))
        number = np.searchsorted(self._starts, drawn, side="right") - 1
        count = self._by_class.counts[number]
        turn, index = np.divmod(drawn - self._starts[number], count)
        galaxy = permute(index, count, hash64(self._seed, self._epoch, number, turn, Stream.GALAXY_DRAWS))
        return np.asarray(self._by_class.samples[self._by_class.starts[number] + galaxy])


class ByClass:
    """Stored samples by class, without empty classes; made once per run for the ``ResampledOrder`` of every epoch."""

    def __init__(self, labels: ArrayLike) -> None:
        label = np.asarray(labels)
        order = np.argsort(label, kind="stable")
        self.samples: Int64 = order[np.count_nonzero(label < 0) :].astype(np.int64)
        counts = np.bincount(label[label >= 0])
        self.counts: Int64 = counts[counts > 0].astype(np.int64)
        self.starts: Int64 = np.cumsum(self.counts) - self.counts
        if self.counts.size == 0:
            raise UserError("data.balance=resample needs labelled galaxies, and the training split has none")


# The order of one epoch.
Order = EpochOrder | ResampledOrder


def _check_range(numbers: ArrayLike, size: int) -> Int64:
    number = np.asarray(numbers, np.int64)
    if number.size and (number.min() < 0 or number.max() >= size):
        raise IndexError(f"{number.min()} ... {number.max()} is not in 0 ... {size - 1}")
    return number


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return the number of whole global batches in an epoch; the incomplete last one, of other samples each epoch, is dropped.

    Raises:
        UserError: there are fewer samples than one batch.
    """
    if not num_samples:
        raise UserError("these shards have no training galaxies: all are in other splits, or have no labels; train on others")
    if num_samples < batch_size:
        raise UserError(
            f"train.batch_size={batch_size} is more than the {num_samples} training galaxies; use {num_samples} or fewer"
        )
    return num_samples // batch_size


def rank_offsets(batch_size: int, rank: int, world_size: int) -> Int64:
    """Return the offsets o in a global batch that belong to a rank: o mod W == rank.

    Raises:
        UserError: there are more processes than samples in a batch.
    """
    if world_size > batch_size:
        raise UserError(
            f"{world_size} processes are more than the global batch holds (train.batch_size={batch_size}): "
            f"start {batch_size} or fewer, or set train.batch_size to {world_size} or more"
        )
    return np.arange(rank, batch_size, world_size, dtype=np.int64)


def evaluation_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return a rank's evaluation batches: batch j holds stored samples j E ... (j + 1) E - 1 and goes to rank j mod W."""
    return range(rank, -(-num_samples // batch_size), world_size)
