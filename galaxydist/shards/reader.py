"""Shards to batches: a pool of threads decodes ahead into uint8 batches, in the order of ``order``. No worker processes.

Train and evaluation readers share the pool (``BatchPool``); they differ only in which samples make up a batch.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self

import numpy as np

from galaxydist.cpus import available_cores
from galaxydist.shards.batches import Batch, BatchPool, Plan
from galaxydist.shards.decode import PictureReader, reduction
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
from galaxydist.shards.remote.prefetcher import open_source
from galaxydist.shards.shard_usage import Uses, evaluation_uses, lengthened, resampled_uses, shard_uses, shifted

__all__ = ["Batch", "EvalReader", "TrainReader", "steps_per_epoch"]

# Places of the order that are looked up in one go: a batch alone costs as much as ten, and decoding waits meanwhile.
POSITIONS_TOGETHER = 1024


class _Reader:
    """What the two readers share: iteration, closing, the time spent waiting."""

    _pool: BatchPool
    _pictures: PictureReader
    _raises = True

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has spent in ``next`` so far."""
        return self._pool.wait_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self._pool.next()
        self._pictures.advance(batch.step)
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


class TrainReader(_Reader):
    """Endless batches of the training split, on across the ends of epochs; step s of the run is batch s mod (N div G) of epoch
    s div (N div G).

    Args:
        manifest: the shards.
        seed: of the run.
        batch_size: G, the global batch.
        rank, world_size: this process; it gets the offsets o of a global batch with o mod W == rank.
        num_streams: canonical streams of the order.
        image_size, crop, max_zoom: what the model will see of a picture: says how much smaller it may be decoded.
        balance: ``none``, or ``resample`` for even classes.
        on_error: ``raise`` what cannot be read; or ``report``: such a picture keeps its position with weight 0, its error
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
        source = open_source(
            manifest,
            split,
            self._uses(start_step, self._offsets),
            (
                lengthened(uses, prefetch + 1)
                for uses in self._uses(start_step, _node_offsets(batch_size, rank, world_size, ranks_on_node))
            ),
            step=start_step,
            steps_ahead=prefetch + 1,
            ranks_on_node=ranks_on_node,
            why=f"data.num_streams={num_streams}" if self._by_class is None else "data.balance=resample draws from all shards",
        )
        self._pictures = PictureReader(manifest, split, factor, source)
        self._pool = BatchPool(
            self._pictures,
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

    def _plans(self, step: int) -> Iterator[Plan]:
        while True:
            epoch, batch = divmod(step, self.steps_per_epoch)
            order = self.epoch_order(epoch)
            together = max(1, POSITIONS_TOGETHER // self._offsets.size)
            for first in range(batch, self.steps_per_epoch, together):
                numbers = np.arange(first, min(first + together, self.steps_per_epoch))
                positions_SB = numbers[:, None] * self._batch_size + self._offsets
                for positions, samples in zip(positions_SB, order.samples(positions_SB), strict=True):
                    yield Plan(samples, positions, epoch, step)
                    step += 1

    def _uses(self, step: int, offsets: Int64) -> Uses:
        """The shards of these offsets, epoch after epoch from the one of ``step``."""
        epoch = step // self.steps_per_epoch
        while True:
            order = self.epoch_order(epoch)
            if isinstance(order, EpochOrder):
                uses = shard_uses(order, self._batch_size, offsets)
            else:
                uses = resampled_uses(self._manifest.split(self._split).num_shards, self.steps_per_epoch)
            yield shifted(uses, epoch * self.steps_per_epoch)
            epoch += 1


class EvalReader(_Reader):
    """The evaluation batches of one process: batch j holds stored samples j E ... (j + 1) E - 1 and goes to rank j mod W.
    The last is filled up to E with weight 0. What cannot be read raises: an evaluation never counts fewer.

    Args:
        manifest, split: which galaxies.
        batch_size: E, fixed in the recipe.
        rank, world_size: this process.
        image_size, crop: what the model will see of a picture.
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
        source = open_source(
            manifest,
            split,
            iter([evaluation_uses(sizes, batch_size, rank, world_size)]),
            iter([lengthened(evaluation_uses(sizes, batch_size * ranks_on_node, 0, 1), (prefetch + 1) * num_nodes)]),
            steps_ahead=(prefetch + 1) * world_size,
            ranks_on_node=ranks_on_node,
            why=f"evaluation by {ranks_on_node} processes",
        )
        self._pictures = PictureReader(manifest, split, factor, source)
        self._pool = BatchPool(
            self._pictures,
            manifest.labels(split),
            self._plans(),
            threads or available_cores(ranks_on_node),
            prefetch,
            pin=pin,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def _plans(self) -> Iterator[Plan]:
        for number in self._batches:
            positions = number * self._batch_size + np.arange(self._batch_size)
            yield Plan(np.where(positions < self.num_samples, positions, -1), positions, 0, number)


def _node_offsets(batch_size: int, rank: int, world_size: int, ranks_on_node: int) -> Int64:
    """The offsets of all processes of this one's machine; ranks are dealt to machines in blocks."""
    first = rank - rank % ranks_on_node
    ranks = range(first, min(first + ranks_on_node, world_size))
    return np.concatenate([rank_offsets(batch_size, rank, world_size) for rank in ranks])
