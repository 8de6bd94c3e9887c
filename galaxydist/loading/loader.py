"""Loaders of training and evaluation batches, decoded ahead by a pool of threads.

A loader starts no processes: positioned reads and the decoders release the GIL. Batches come in the order of
``shards/order.py`` and are never taken from the order in which the threads finish.
"""

import contextlib
import math
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.loading.decode import ImageDecoder, reduction
from galaxydist.recipe.schema import DataConfig
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
from galaxydist.shards.remote.prefetcher import ShardSource, open_shard_source
from galaxydist.shards.shard_usage import (
    Intervals,
    extend,
    shift,
    usage_of_evaluation,
    usage_of_rank,
    usage_of_resampling,
)


class BufferPool:
    """Reuses the memory of arrays once nothing refers to them, tensors made from them included. Any thread may call it.

    Memory of fresh pages for each batch would take a fifth of the decoding time. No Python code runs when an array is freed: in
    such code an exception is ignored, also the KeyboardInterrupt of a Ctrl-C.

    Args:
        keep: number of free buffers that are kept; further ones are freed.
        pin: allocate pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(self, keep: int, *, pin: bool = False) -> None:
        self._keep, self._pin = keep, pin
        self._free: list[NDArray[np.uint8]] = []
        # The memory that is in use, with a weak reference to its array, by the reference's id.
        self._used: dict[int, tuple[weakref.ref[NDArray[Any]], NDArray[np.uint8]]] = {}
        # Weak references to arrays that are gone.
        self._gone: deque[weakref.ref[NDArray[Any]]] = deque()

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array with arbitrary contents."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._collect()
        try:
            memory = self._free.pop()
        except IndexError:  # asking first would not do: another thread may take it meanwhile
            memory = None
        if memory is None or memory.nbytes < num_bytes:
            memory = (
                torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy() if self._pin else np.empty(num_bytes, np.uint8)
            )
        array = memory[:num_bytes].view(dtype).reshape(shape)
        reference = weakref.ref(array, self._gone.append)
        self._used[id(reference)] = reference, memory
        return array

    def _collect(self) -> None:
        """Take back the memory of the arrays that are gone."""
        with contextlib.suppress(IndexError):  # another thread may take the last one meanwhile
            while self._gone:
                _, memory = self._used.pop(id(self._gone.popleft()))
                if len(self._free) < self._keep:
                    self._free.append(memory)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a batch, on the CPU; ``DevicePrefetcher`` copies images, labels, weights and draws to the device.

    Args:
        images_BHWC: uint8, at the stored size or decoded smaller by an exact 2, 4 or 8.
        labels_B: int64 class numbers; 0 where the weight is 0.
        weights_B: float32, 1; 0 for an image that could not be read (it is black) or has no label, and for padding.
        positions_B: int64 positions in the epoch's order (evaluation: in storage order).
        samples_B: int64 stored sample numbers; -1 for padding.
        epoch: training epoch; 0 in evaluation.
        step: training step; in evaluation the number of the batch.
        errors: errors of the images that could not be read, by stored sample number.
        draws_BN: float64, the random numbers that the training step needs; None if the loader draws none.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    weights_B: Tensor
    positions_B: Tensor
    samples_B: Tensor
    epoch: int
    step: int
    errors: Mapping[int, UserError] = field(default_factory=dict)
    draws_BN: Tensor | None = None

    @property
    def draws(self) -> Tensor:
        """The random numbers of a batch that has some."""
        assert self.draws_BN is not None, "the loader was opened without ``draw``"
        return self.draws_BN


@dataclass(frozen=True)
class DecodeOptions:
    """Options of decoding; ``image_size``, ``crop`` and ``max_zoom`` decide how much smaller JPEGs are decoded.

    Args:
        image_size: width that the model sees, in pixels; None: the stored width.
        crop: central fraction of the stored width that the model sees.
        max_zoom: largest magnification of the augmentation; in evaluation the training loader's, for equal scales.
        threads: decoding threads; 0: this process's share of the cores.
        prefetch: number of batches decoded ahead.
        pin: decode into pinned memory, from which a GPU copies asynchronously.
    """

    image_size: int | None = None
    crop: float = 1.0
    max_zoom: float = 1.0
    threads: int = 0
    prefetch: int = 4
    pin: bool = False

    @classmethod
    def of(cls, data: DataConfig, *, threads: int, pin: bool) -> Self:
        """Return the options of a recipe; ``threads`` is used if the recipe leaves the number open."""
        return cls(data.image_size, data.crop, data.augment.zoom, data.threads or threads, data.prefetch, pin)


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks of a run.

    Args:
        rank, world_size: the rank gets the offsets o of a global batch with o mod W == rank.
        ranks_on_node: processes that share this machine's cores and cache; ranks are assigned to machines in blocks.
    """

    rank: int = 0
    world_size: int = 1
    ranks_on_node: int = 1

    @classmethod
    def from_torch(cls) -> Self:
        """Return this process among those of ``torch.distributed``'s default group; all of them must call it.

        Without a group, this process is the only one.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        return cls(dist.get_rank(), len(hosts), hosts.count(socket.gethostname()))

    def node_offsets(self, batch_size: int) -> Int64:
        """Return the offsets in a global batch of all processes on this machine."""
        first = self.rank - self.rank % self.ranks_on_node
        ranks = range(first, min(first + self.ranks_on_node, self.world_size))
        return np.concatenate([rank_offsets(batch_size, rank, self.world_size) for rank in ranks])


# Defaults of the loaders.
ONE_RANK = RankInfo()
DECODE_DEFAULTS = DecodeOptions()


@dataclass(frozen=True)
class BatchPlan:
    """Samples of a batch before it is decoded; -1 is padding. ``ends_step`` is False if another batch has the same step."""

    samples: Int64
    positions: Int64
    epoch: int
    step: int
    ends_step: bool = True


@dataclass(frozen=True)
class _Pending:
    plan: BatchPlan
    pixels: NDArray[np.uint8]
    tasks: list["Future[dict[int, UserError]]"]
    draws: "Future[NDArray[np.float64]] | None"


# Draws random numbers, B x N, from an epoch, B positions in its order, and the width of the decoded images.
Draw: TypeAlias = Callable[[int, Int64, int], NDArray[np.float64]]

# Positions of the order that are looked up at a time: one batch alone takes as long as ten, and decoding waits meanwhile.
POSITIONS_AT_A_TIME = 1024


class _Loader(Iterator[Batch]):
    """Iterates over batches, at most ``prefetch`` of which are decoded ahead, in the order of their plans."""

    def __init__(self, manifest: Manifest, split: str, source: ShardSource, ranks: RankInfo, decode: DecodeOptions) -> None:
        """Start the threads; ``source`` is closed with the loader."""
        factor = reduction(manifest.image_size, decode.image_size or manifest.image_size, decode.crop, decode.max_zoom)
        self._images = ImageDecoder(manifest, split, factor, source)
        self._labels = manifest.labels(split)
        self._prefetch, self._threads = decode.prefetch, decode.threads or available_cores(ranks.ranks_on_node)
        self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="galaxydist-decode")
        self._buffers = BufferPool(decode.prefetch + 3, pin=decode.pin)
        self._pending: deque[_Pending] = deque()
        self._plans: Iterator[BatchPlan] = iter(())
        self._draw: Draw | None = None
        self._raises = True
        self._closed = False
        # Seconds that the caller has waited for batches.
        self.wait_s = 0.0

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        started = time.perf_counter()
        try:
            while len(self._pending) <= self._prefetch and (plan := next(self._plans, None)) is not None:
                self._pending.append(self._submit(plan))
            if not self._pending:
                raise StopIteration
            pending = self._pending.popleft()
            batch = self._finish(pending, dict(failure for task in pending.tasks for failure in task.result().items()))
            self.wait_s += time.perf_counter() - started
            if pending.plan.ends_step:
                self._images.advance(batch.step)
            if batch.errors and self._raises:
                raise next(iter(batch.errors.values()))
        except BaseException:
            self.close()
            raise
        return batch

    def is_ready(self) -> bool:
        """Return True if the next batch can be had without waiting."""
        return bool(self._pending) and all(task.done() for task in (*self._pending[0].tasks, self._pending[0].draws) if task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files; batches decoded ahead are dropped."""
        if not self._closed:
            self._closed = True
            self._images.close()  # first: a thread may be waiting for a shard
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()

    def _submit(self, plan: BatchPlan) -> _Pending:
        size = self._images.size
        pixels = self._buffers.take((plan.samples.size, size, size, 3), np.uint8)
        samples = plan.samples[plan.samples >= 0]
        pixels[samples.size :] = 0
        share = self._share(samples.size)
        tasks = [
            self._executor.submit(self._images.read, samples[first : first + share], pixels, first)
            for first in range(0, samples.size, share)
        ]
        draws = self._executor.submit(self._draw, plan.epoch, plan.positions, size) if self._draw is not None else None
        return _Pending(plan, pixels, tasks, draws)

    def _share(self, num_images: int) -> int:
        """Return the number of images that a thread decodes at a time: larger shares wake threads and the caller less often."""
        if not self._pending:  # the first batch is wanted soon
            return max(1, math.ceil(num_images / self._threads))
        return max(1, math.ceil(num_images * (self._prefetch + 1) / (2 * self._threads)))

    def _finish(self, pending: _Pending, failed: Mapping[int, UserError]) -> Batch:
        plan = pending.plan
        labels = self._labels[plan.samples].astype(np.int64)
        is_labelled = (plan.samples >= 0) & (labels >= 0)
        if failed:
            is_labelled[[*failed]] = False
        return Batch(
            images_BHWC=torch.from_numpy(pending.pixels),
            labels_B=torch.from_numpy(labels * is_labelled),
            weights_B=torch.from_numpy(is_labelled.astype(np.float32)),
            positions_B=torch.from_numpy(plan.positions),
            samples_B=torch.from_numpy(plan.samples),
            epoch=plan.epoch,
            step=plan.step,
            errors={int(plan.samples[row]): error for row, error in failed.items()},
            draws_BN=torch.from_numpy(pending.draws.result()) if pending.draws is not None else None,
        )


class TrainLoader(_Loader):
    """Endless batches of the training split.

    Step s of a run is batch s mod (N div G) of epoch s div (N div G); the incomplete last batch of an epoch is dropped.

    Args:
        manifest: the shards.
        seed: seed of the run.
        batch_size: G, the global batch size.
        num_streams: number of streams of the order.
        balance: ``none``, or ``resample`` for even classes.
        ranks: this process among the ranks of the run.
        decode: options of decoding.
        on_error: ``raise`` the error of an image that cannot be read, or ``report`` it in ``Batch.errors``: the image keeps its
            position with weight 0, and the ranks decide together whether to go on.
        draw: draws ``Batch.draws_BN`` in the decoding threads; None: no numbers.
        start_step: the first step; no image of earlier steps is read.

    Raises:
        UserError: G > N, W > G, no training split, a cache that is too small; while iterating with ``raise``, the shard and
            galaxy that cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        batch_size: int,
        num_streams: int = 192,
        balance: Literal["none", "resample"] = "none",
        ranks: RankInfo = ONE_RANK,
        decode: DecodeOptions = DECODE_DEFAULTS,
        on_error: Literal["raise", "report"] = "raise",
        draw: Draw | None = None,
        start_step: int = 0,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(manifest.split("train").num_samples, batch_size)
        self._offsets = rank_offsets(batch_size, ranks.rank, ranks.world_size)
        self._manifest, self._seed, self._batch_size, self._num_streams = manifest, seed, batch_size, num_streams
        self._by_class = ByClass(manifest.labels("train")) if balance == "resample" else None
        steps_ahead = decode.prefetch + 1
        of_node = self._intervals(start_step, ranks.node_offsets(batch_size))
        source = open_shard_source(
            manifest,
            "train",
            self._intervals(start_step, self._offsets),
            (extend(epoch, steps_ahead) for epoch in of_node),
            step=start_step,
            steps_ahead=steps_ahead,
            ranks_on_node=ranks.ranks_on_node,
            why=f"data.num_streams={num_streams}" if self._by_class is None else "data.balance=resample draws from all shards",
        )
        super().__init__(manifest, "train", source, ranks, decode)
        self._plans, self._raises, self._draw = self._plan_batches(start_step), on_error == "raise", draw

    def epoch_order(self, epoch: int) -> Order:
        """Return the order of an epoch."""
        if self._by_class is not None:
            return ResampledOrder(self._manifest.labels("train"), seed=self._seed, epoch=epoch, by_class=self._by_class)
        sizes = self._manifest.shards("train")["samples"]
        return EpochOrder(sizes, seed=self._seed, epoch=epoch, num_streams=self._num_streams)

    def _plan_batches(self, step: int) -> Iterator[BatchPlan]:
        at_a_time = max(1, POSITIONS_AT_A_TIME // self._offsets.size)
        while True:
            epoch, batch = divmod(step, self.steps_per_epoch)
            order = self.epoch_order(epoch)
            for first in range(batch, self.steps_per_epoch, at_a_time):
                numbers = np.arange(first, min(first + at_a_time, self.steps_per_epoch))
                positions_SB = numbers[:, None] * self._batch_size + self._offsets
                for positions, samples in zip(positions_SB, order.samples(positions_SB), strict=True):
                    yield BatchPlan(samples, positions, epoch, step)
                    step += 1

    def _intervals(self, step: int, offsets: Int64) -> Intervals:
        """Yield the access intervals of these offsets, epoch after epoch from that of ``step``."""
        epoch = step // self.steps_per_epoch
        while True:
            order = self.epoch_order(epoch)
            if isinstance(order, EpochOrder):
                intervals = usage_of_rank(order, self._batch_size, offsets)
            else:
                intervals = usage_of_resampling(self._manifest.split("train").num_shards, self.steps_per_epoch)
            yield shift(intervals, epoch * self.steps_per_epoch)
            epoch += 1


@dataclass(frozen=True)
class Chunks:
    """Chosen chunks of a split: chunk j has the evaluation batches j ``length`` ... (j + 1) ``length`` - 1.

    Args:
        length: number of batches.
        numbers: of the chunks that a process reads, ascending.
    """

    length: int
    numbers: Int64


class EvalLoader(_Loader):
    """The evaluation batches of one process: batch j holds stored samples j E ... (j + 1) E - 1 and goes to rank j mod W.

    The last batch is padded to E with weight 0. An image that cannot be read raises an error: an evaluation counts all galaxies.

    Args:
        manifest, split: the data set and its split.
        batch_size: E, fixed in the recipe.
        ranks: this process among the ranks of the run.
        decode: options of decoding.
        chunks: read the batches of these chunks instead; ``Batch.step`` is then the number of the chunk.
        on_error: ``raise`` the error of an image that cannot be read, or ``report`` it in ``Batch.errors``.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        batch_size: int,
        ranks: RankInfo = ONE_RANK,
        decode: DecodeOptions = DECODE_DEFAULTS,
        chunks: Chunks | None = None,
        on_error: Literal["raise", "report"] = "raise",
    ) -> None:
        self.num_samples = manifest.split(split).num_samples
        if chunks is None:
            own = evaluation_batches(self.num_samples, batch_size, ranks.rank, ranks.world_size)
            chunks = Chunks(1, np.asarray(own, np.int64))
        self._chunks, self._batch_size = chunks, batch_size
        size, ahead = batch_size * chunks.length, math.ceil((decode.prefetch + 1) / chunks.length)
        sizes, num_nodes = manifest.shards(split)["samples"], math.ceil(ranks.world_size / ranks.ranks_on_node)
        of_node = usage_of_evaluation(sizes, size * ranks.ranks_on_node)
        source = open_shard_source(
            manifest,
            split,
            iter([usage_of_evaluation(sizes, size, chunks.numbers)]),
            iter([extend(of_node, ahead * num_nodes)]),
            steps_ahead=ahead * ranks.world_size,
            ranks_on_node=ranks.ranks_on_node,
            why=f"evaluation by {ranks.ranks_on_node} processes",
        )
        super().__init__(manifest, split, source, ranks, decode)
        self._plans, self._raises = self._plan_batches(), on_error == "raise"

    def __len__(self) -> int:
        return sum(1 for _ in self._numbers())

    def _numbers(self) -> Iterator[tuple[int, int]]:
        """Yield the numbers of the chunk and of the batch."""
        length, num_batches = self._chunks.length, math.ceil(self.num_samples / self._batch_size)
        for chunk in self._chunks.numbers.tolist():
            for number in range(chunk * length, min((chunk + 1) * length, num_batches)):
                yield chunk, number

    def _plan_batches(self) -> Iterator[BatchPlan]:
        for chunk, number in self._numbers():
            positions = number * self._batch_size + np.arange(self._batch_size)
            ends_chunk = (number + 1) % self._chunks.length == 0 or (number + 1) * self._batch_size >= self.num_samples
            yield BatchPlan(np.where(positions < self.num_samples, positions, -1), positions, 0, chunk, ends_chunk)
