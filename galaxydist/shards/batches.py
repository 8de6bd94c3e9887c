"""A pool of threads that decodes batches ahead into uint8 memory. No worker processes, nothing to drain."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.errors import UserError
from galaxydist.shards.decode import Picture, PictureReader
from galaxydist.shards.memory import Buffers

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a batch: as a reader gives it on the CPU; ``DeviceFeed`` moves images, labels and weights.

    Args:
        images_BHWC: uint8, at the stored size or decoded smaller by an exact 2, 4 or 8.
        labels_B: int64 class numbers; 0 where the weight is 0.
        weights_B: float32, 1; 0 for a picture that could not be read (it is black), has no label, or only fills up the batch.
        positions_B: int64 positions in the epoch's order (evaluation: in storage order).
        samples_B: int64 stored sample numbers; -1 for what only fills up the batch.
        epoch: of training; 0 in evaluation.
        step: of the run in training; in evaluation the batch's number.
        errors: of the pictures that could not be read, by stored sample number.
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
class Plan:
    """What a batch will hold; samples of -1 fill it up."""

    samples: Int64
    positions: Int64
    epoch: int
    step: int


@dataclass(frozen=True)
class _Pending:
    plan: Plan
    pixels: NDArray[np.uint8]
    tasks: list["Future[list[tuple[int, UserError]]]"]


class BatchPool:
    """Batches decoded ahead by threads, at most ``prefetch`` of them; handed out in the order of their plans.

    ``pin``: into memory that a GPU copies from while the host goes on.
    """

    def __init__(
        self,
        pictures: PictureReader,
        labels: NDArray[np.int32],
        plans: Iterator[Plan],
        threads: int,
        prefetch: int,
        *,
        pin: bool = False,
    ) -> None:
        self._pictures, self._labels, self._plans, self._prefetch = pictures, labels, plans, prefetch
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-decode")
        self._buffers = Buffers(prefetch + 3, pin=pin)
        self._pending: deque[_Pending] = deque()
        self._closed = False
        self.wait_s = 0.0

    def next(self) -> Batch:
        """The next batch; pictures that could not be read have weight 0."""
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
            self._pictures.close()  # first: a thread may be waiting for a shard
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()

    def _submit(self, plan: Plan) -> _Pending:
        size = self._pictures.size
        pixels = self._buffers.take((plan.samples.size, size, size, 3), np.uint8)
        real = np.flatnonzero(plan.samples >= 0)
        pixels[real.size :] = 0
        pictures = self._pictures.locate(plan.samples[real])
        share = max(1, -(-len(pictures) // self._threads))
        tasks = [
            self._executor.submit(self._decode, pictures[first : first + share], pixels, first)
            for first in range(0, len(pictures), share)
        ]
        return _Pending(plan, pixels, tasks)

    def _decode(self, pictures: list[Picture], pixels: NDArray[np.uint8], first: int) -> list[tuple[int, UserError]]:
        failures = []
        for row, picture in enumerate(pictures, first):
            try:
                self._pictures.read_into(picture, pixels[row])
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
