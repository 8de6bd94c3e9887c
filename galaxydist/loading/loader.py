"""Shards to batches: a pool of threads decodes ahead into uint8 batches, in the order of ``order``. No worker processes.

Train and evaluation readers share the pool (``DecodePool``); they differ only in which samples make up a batch.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.loading.decode import ImageDecoder, StoredImage, reduction
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.order import (
    ByClass,
    EpochOrder,
    Int64,
    Order,
    ResampledOrder,
    evaluation_batches,
    rank_offsets,
    steps_per_epoch,
)
from galaxydist.shards.remote.prefetcher import open_shard_source
from galaxydist.shards.shard_usage import Uses, evaluation_uses, extend, resampled_uses, shift, usage_of_rank

# Memory of batches, used again: a batch of fresh pages costs a fifth of the time that decoding it does.


class BufferPool:
    """Arrays whose memory comes back by itself once nothing refers to them any more, tensors made from them included.

    Args:
        keep: how many are kept for the next taker; more are freed.
        pin: whether a GPU is to copy from them while the host goes on: then their pages are locked.
    """

    def __init__(self, keep: int, *, pin: bool = False) -> None:
        self._keep, self._pin = keep, pin
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array with arbitrary contents."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._free.pop() if self._free else self._allocate(num_bytes)
        if memory.nbytes < num_bytes:
            memory = self._allocate(num_bytes)
        array = memory[:num_bytes].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _allocate(self, num_bytes: int) -> NDArray[np.uint8]:
        if not self._pin:
            return np.empty(num_bytes, np.uint8)
        memory: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        if len(self._free) < self._keep:
            self._free.append(memory)


# A pool of threads that decodes batches ahead into uint8 memory. No worker processes, nothing to drain.


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a batch: as a reader gives it on the CPU; ``DeviceFeed`` moves images, labels and weights.

    Args:
        images_BHWC: uint8, at the stored size or decoded smaller by an exact 2, 4 or 8.
        labels_B: int64 class numbers; 0 where the weight is 0.
        weights_B: float32, 1; 0 for an image that could not be read (it is black), has no label, or only fills up the batch.
        positions_B: int64 positions in the epoch's order (evaluation: in storage order).
        samples_B: int64 stored sample numbers; -1 for what only fills up the batch.
        epoch: of training; 0 in evaluation.
        step: of the run in training; in evaluation the batch's number.
        errors: of the images that could not be read, by stored sample number.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    weights_B: Tensor
    positions_B: Tensor
    samples_B: Tensor
    epoch: int
    step: int
    errors: Mapping[int, UserError] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchPlan:
    """What a batch will hold; samples of -1 fill it up."""

    samples: Int64
    positions: Int64
    epoch: int
    step: int


@dataclass(frozen=True)
class _Pending:
    plan: BatchPlan
    pixels: NDArray[np.uint8]
    tasks: list["Future[list[tuple[int, UserError]]]"]


class DecodePool:
    """Batches decoded ahead by threads, at most ``prefetch`` of them; handed out in the order of their plans.

    ``pin``: into memory that a GPU copies from while the host goes on.
    """

    def __init__(
        self,
        images: ImageDecoder,
        labels: NDArray[np.int32],
        plans: Iterator[BatchPlan],
        threads: int,
        prefetch: int,
        *,
        pin: bool = False,
    ) -> None:
        self._images, self._labels, self._plans, self._prefetch = images, labels, plans, prefetch
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-decode")
        self._buffers = BufferPool(prefetch + 3, pin=pin)
        self._pending: deque[_Pending] = deque()
        self._closed = False
        self.wait_s = 0.0

    def next(self) -> Batch:
        """The next batch; images that could not be read have weight 0."""
        if self._closed:
            raise StopIteration
        started = time.perf_counter()
        while len(self._pending) <= self._prefetch and (plan := next(self._plans, None)) is not None:
            self._pending.append(self._submit(plan))
        if not self._pending:
            self.close()
            raise StopIteration
        pending = self._pending.popleft()
        try:
            failed = [failure for task in pending.tasks for failure in task.result()]
        except BaseException:
            self.close()
            raise
        batch = self._finish(pending, dict(failed))
        self.wait_s += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop the threads and close the files; what was decoded ahead is dropped."""
        if not self._closed:
            self._closed = True
            self._images.close()  # first: a thread may be waiting for a shard
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()

    def _submit(self, plan: BatchPlan) -> _Pending:
        size = self._images.size
        pixels = self._buffers.take((plan.samples.size, size, size, 3), np.uint8)
        real = np.flatnonzero(plan.samples >= 0)
        pixels[real.size :] = 0
        images = self._images.locate(plan.samples[real])
        share = max(1, -(-len(images) // self._threads))
        tasks = [
            self._executor.submit(self._decode, images[first : first + share], pixels, first)
            for first in range(0, len(images), share)
        ]
        return _Pending(plan, pixels, tasks)

    def _decode(self, images: list[StoredImage], pixels: NDArray[np.uint8], first: int) -> list[tuple[int, UserError]]:
        failures = []
        for row, image in enumerate(images, first):
            try:
                self._images.read_into(image, pixels[row])
            except UserError as error:
                pixels[row] = 0
                failures.append((row, error))
        return failures

    def _finish(self, pending: _Pending, failed: Mapping[int, UserError]) -> Batch:
        plan = pending.plan
        labels = np.where(plan.samples >= 0, self._labels[plan.samples], -1).astype(np.int64)
        weights = (labels >= 0).astype(np.float32)
        weights[[*failed]] = 0.0
        return Batch(
            images_BHWC=torch.from_numpy(pending.pixels),
            labels_B=torch.from_numpy(np.where(weights > 0, labels, 0)),
            weights_B=torch.from_numpy(weights),
            positions_B=torch.from_numpy(plan.positions),
            samples_B=torch.from_numpy(plan.samples),
            epoch=plan.epoch,
            step=plan.step,
            errors={int(plan.samples[row]): error for row, error in failed.items()},
        )


__all__ = ["Batch", "EvalLoader", "TrainLoader", "steps_per_epoch"]

# Places of the order that are looked up in one go: a batch alone costs as much as ten, and decoding waits meanwhile.
POSITIONS_TOGETHER = 1024


class _Reader:
    """What the two readers share: iteration, closing, the time spent waiting."""

    _pool: DecodePool
    _images: ImageDecoder
    _raises = True

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has spent in ``next`` so far."""
        return self._pool.wait_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self._pool.next()
        self._images.advance(batch.step)
        if batch.errors and self._raises:
            self.close()
            raise next(iter(batch.errors.values()))
        return batch

    def close(self) -> None:
        """Stop reading; leaves no thread behind."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class TrainLoader(_Reader):
    """Endless batches of the training split, on across the ends of epochs; step s of the run is batch s mod (N div G) of epoch
    s div (N div G).

    Args:
        manifest: the shards.
        seed: of the run.
        batch_size: G, the global batch.
        rank, world_size: this process; it gets the offsets o of a global batch with o mod W == rank.
        num_streams: canonical streams of the order.
        image_size, crop, max_zoom: what the model will see of an image: says how much smaller it may be decoded.
        balance: ``none``, or ``resample`` for even classes.
        on_error: ``raise`` what cannot be read; or ``report``: such an image keeps its position with weight 0, its error
            stands in the batch's ``errors``, and the caller decides, with the other processes, whether to go on.
        threads: that decode; 0: this process's share of the cores.
        ranks_on_node: processes that share the cores and the cache of this machine: those of rank div ranks_on_node.
        prefetch: batches decoded ahead.
        pin: decode into memory that a GPU copies from while the host goes on.
        start_step: the first step; what comes before is not read.

    Raises:
        UserError: G over N, W over G, no training split, a cache that is too small; while iterating with ``raise``, naming shard
            and galaxy, what cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_streams: int = 192,
        image_size: int | None = None,
        crop: float = 1.0,
        max_zoom: float = 1.0,
        balance: Literal["none", "resample"] = "none",
        on_error: Literal["raise", "report"] = "raise",
        threads: int = 0,
        ranks_on_node: int = 1,
        prefetch: int = 4,
        pin: bool = False,
        start_step: int = 0,
        split: str = "train",
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(manifest.split(split).num_samples, batch_size)
        self._offsets = rank_offsets(batch_size, rank, world_size)
        self._manifest, self._split, self._seed, self._batch_size = manifest, split, seed, batch_size
        self._num_streams = num_streams
        self._by_class = ByClass(manifest.labels(split)) if balance == "resample" else None
        self._raises = on_error == "raise"
        factor = reduction(manifest.image_size, image_size or manifest.image_size, crop, max_zoom)
        source = open_shard_source(
            manifest,
            split,
            self._uses(start_step, self._offsets),
            (
                extend(uses, prefetch + 1)
                for uses in self._uses(start_step, _node_offsets(batch_size, rank, world_size, ranks_on_node))
            ),
            step=start_step,
            steps_ahead=prefetch + 1,
            ranks_on_node=ranks_on_node,
            why=f"data.num_streams={num_streams}" if self._by_class is None else "data.balance=resample draws from all shards",
        )
        self._images = ImageDecoder(manifest, split, factor, source)
        self._pool = DecodePool(
            self._images,
            manifest.labels(split),
            self._plans(start_step),
            threads or available_cores(ranks_on_node),
            prefetch,
            pin=pin,
        )

    def epoch_order(self, epoch: int) -> Order:
        """The order of an epoch."""
        if self._by_class is not None:
            return ResampledOrder(self._manifest.labels(self._split), seed=self._seed, epoch=epoch, by_class=self._by_class)
        sizes = self._manifest.shards(self._split)["samples"]
        return EpochOrder(sizes, seed=self._seed, epoch=epoch, num_streams=self._num_streams)

    def _plans(self, step: int) -> Iterator[BatchPlan]:
        while True:
            epoch, batch = divmod(step, self.steps_per_epoch)
            order = self.epoch_order(epoch)
            together = max(1, POSITIONS_TOGETHER // self._offsets.size)
            for first in range(batch, self.steps_per_epoch, together):
                numbers = np.arange(first, min(first + together, self.steps_per_epoch))
                positions_SB = numbers[:, None] * self._batch_size + self._offsets
                for positions, samples in zip(positions_SB, order.samples(positions_SB), strict=True):
                    yield BatchPlan(samples, positions, epoch, step)
                    step += 1

    def _uses(self, step: int, offsets: Int64) -> Uses:
        """The shards of these offsets, epoch after epoch from the one of ``step``."""
        epoch = step // self.steps_per_epoch
        while True:
            order = self.epoch_order(epoch)
            if isinstance(order, EpochOrder):
                uses = usage_of_rank(order, self._batch_size, offsets)
            else:
                uses = resampled_uses(self._manifest.split(self._split).num_shards, self.steps_per_epoch)
            yield shift(uses, epoch * self.steps_per_epoch)
            epoch += 1


class EvalLoader(_Reader):
    """The evaluation batches of one process: batch j holds stored samples j E ... (j + 1) E - 1 and goes to rank j mod W.
    The last is filled up to E with weight 0. What cannot be read raises: an evaluation never counts fewer.

    Args:
        manifest, split: which galaxies.
        batch_size: E, fixed in the recipe.
        rank, world_size: this process.
        image_size, crop: what the model will see of an image.
        max_zoom: the training reader's, so that both decode at the same scale.
        threads, ranks_on_node, prefetch, pin: as in :class:`TrainReader`.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        image_size: int | None = None,
        crop: float = 1.0,
        max_zoom: float = 1.0,
        threads: int = 0,
        ranks_on_node: int = 1,
        prefetch: int = 4,
        pin: bool = False,
    ) -> None:
        self.num_samples = manifest.split(split).num_samples
        self._batches = evaluation_batches(self.num_samples, batch_size, rank, world_size)
        self._batch_size = batch_size
        factor = reduction(manifest.image_size, image_size or manifest.image_size, crop, max_zoom)
        sizes, num_nodes = manifest.shards(split)["samples"], -(-world_size // ranks_on_node)
        source = open_shard_source(
            manifest,
            split,
            iter([evaluation_uses(sizes, batch_size, rank, world_size)]),
            iter([extend(evaluation_uses(sizes, batch_size * ranks_on_node, 0, 1), (prefetch + 1) * num_nodes)]),
            steps_ahead=(prefetch + 1) * world_size,
            ranks_on_node=ranks_on_node,
            why=f"evaluation by {ranks_on_node} processes",
        )
        self._images = ImageDecoder(manifest, split, factor, source)
        self._pool = DecodePool(
            self._images,
            manifest.labels(split),
            self._plans(),
            threads or available_cores(ranks_on_node),
            prefetch,
            pin=pin,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def _plans(self) -> Iterator[BatchPlan]:
        for number in self._batches:
            positions = number * self._batch_size + np.arange(self._batch_size)
            yield BatchPlan(np.where(positions < self.num_samples, positions, -1), positions, 0, number)


def _node_offsets(batch_size: int, rank: int, world_size: int, ranks_on_node: int) -> Int64:
    """The offsets of all processes of this one's machine; ranks are dealt to machines in blocks."""
    first = rank - rank % ranks_on_node
    ranks = range(first, min(first + ranks_on_node, world_size))
    return np.concatenate([rank_offsets(batch_size, rank, world_size) for rank in ranks])
