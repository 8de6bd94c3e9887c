"""The way to the device: the reader's batches in their order, and no memory used again before a copy from it has ended."""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.errors import UserError
from galaxydist.loading.device_prefetch import DevicePrefetcher, HostCopy
from galaxydist.loading.loader import Batch, BufferPool, DecodeOptions, EvalLoader, TrainLoader
from galaxydist.shards.manifest import read_manifest

CPU = torch.device("cpu")
Ints, Floats = NDArray[np.int64], NDArray[np.float64]


class LateEvent:
    """The end of copies that a ``LateStream`` makes when it comes to them."""

    def __init__(self, stream: "LateStream") -> None:
        self.has_come = False
        self._stream = stream

    def query(self) -> bool:
        return self.has_come

    def synchronize(self) -> None:
        while not self.has_come:
            self._stream.copy_one()


class LateStream:
    """Copies as late as it may: ``delay`` batches after the consumer could queue work on them.

    It copies from an address, as a device does, so nothing keeps the memory from being used for something else.
    """

    def __init__(self, delay: int) -> None:
        self._delay = delay
        self._queue: deque[tuple[list[int], list[Tensor], LateEvent]] = deque()
        self.log: list[str] = []
        self.most_waiting = 0

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], LateEvent]:
        copies = [torch.full_like(tensor, 77) for tensor in tensors]
        event = LateEvent(self)
        self._queue.append(([tensor.data_ptr() for tensor in tensors], copies, event))
        self.most_waiting = max(self.most_waiting, len(self._queue))
        self.log.append("start")
        return copies, event

    def hand_over(self, copies: Sequence[Tensor], event: LateEvent) -> None:
        self.log.append("hand over")
        assert len(copies) == 2 and not event.query()
        if len(self._queue) > self._delay:
            self.copy_one()

    def copy_one(self) -> None:
        addresses, copies, event = self._queue.popleft()
        for address, copy in zip(addresses, copies, strict=True):
            ctypes.memmove(copy.data_ptr(), address, copy.nbytes)
        event.has_come = True


def draw(epoch: int, positions: Ints, width: int) -> Floats:
    return np.stack([positions + 0.1, np.full(positions.shape, epoch + width / 3)], axis=1)


def read_plainly(blobs: Path, steps: int) -> list[Batch]:
    with TrainLoader(read_manifest(blobs), seed=3, batch_size=8, draw=draw) as reader:
        return list(islice(reader, steps))


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("images_BHWC", "labels_B", "weights_B", "positions_B", "samples_B", "draws_BN"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert (found.epoch, found.step) == (expected.epoch, expected.step)


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_prefetcher_releases_a_buffer_only_after_its_copy_has_ended(blobs: Path, delay: int) -> None:
    """Copies that come late read what the reader has decoded there, not what it decodes into the same memory next."""
    stream = LateStream(delay)
    with (
        TrainLoader(read_manifest(blobs), seed=3, batch_size=8, decode=DecodeOptions(prefetch=1), draw=draw) as reader,
        DevicePrefetcher((batch for batch in reader), CPU, stream) as feed,
    ):
        fed = list(islice(feed, 60))
    for batch, expected in zip(fed, read_plainly(blobs, 60), strict=True):
        assert_same(batch, expected)
    assert stream.most_waiting == delay + 1


class SlowLoader:
    """Batches that are ready when the test wants it."""

    def __init__(self, batches: Iterator[Batch], log: list[str]) -> None:
        self._batches, self._log = batches, log
        self.ready = True

    def is_ready(self) -> bool:
        return self.ready

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._log.append("read")
        return next(self._batches)


def test_prefetcher_copies_ahead_if_the_loader_is_ready_and_never_waits_for_the_next_batch(blobs: Path) -> None:
    stream = LateStream(0)
    loader = SlowLoader(iter(read_plainly(blobs, 5)), stream.log)
    with DevicePrefetcher(loader, CPU, stream) as feed:
        assert stream.log == []
        next(feed)
        assert stream.log == ["read", "start", "hand over", "read", "start"]
        loader.ready = False
        stream.log.clear()
        assert next(feed).step == 1
        assert stream.log == ["hand over"]
        assert next(feed).step == 2
        assert stream.log == ["hand over", "read", "start", "hand over"]
        loader.ready = True
        assert [next(feed).step, next(feed).step] == [3, 4]


def test_loader_is_ready_when_its_next_batch_is_decoded(blobs: Path) -> None:
    gate = threading.Event()

    def slow_draw(epoch: int, positions: Ints, width: int) -> Floats:
        if epoch == 0 and positions[0] == 8:
            gate.wait(60)
        return draw(epoch, positions, width)

    with TrainLoader(read_manifest(blobs), seed=3, batch_size=8, draw=slow_draw, decode=DecodeOptions(threads=2)) as reader:
        assert not reader.is_ready()
        next(reader)
        assert not reader.is_ready()
        gate.set()
        deadline = time.monotonic() + 60
        while not reader.is_ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reader.is_ready() and next(reader).step == 1


def test_prefetcher_reuses_a_bounded_number_of_buffers(blobs: Path) -> None:
    with TrainLoader(read_manifest(blobs), seed=3, batch_size=8, decode=DecodeOptions(prefetch=2)) as reader:
        places = set()

        def watched() -> Iterator[Batch]:
            for batch in reader:
                places.add(batch.images_BHWC.data_ptr())
                yield batch

        with DevicePrefetcher(watched(), CPU, LateStream(1)) as feed:
            for _ in islice(feed, 60):
                pass
    assert len(places) <= 8


def test_prefetcher_on_a_cpu_passes_batches_unchanged(blobs: Path) -> None:
    batches = read_plainly(blobs, 3)
    with DevicePrefetcher(iter(batches), CPU) as feed:
        assert [id(batch) for batch in feed] == [id(batch) for batch in batches]


@pytest.mark.parametrize("stream", [None, LateStream(0)], ids=["cpu", "side stream"])
def test_prefetcher_raises_errors_and_stops_after_the_batches_before_them(blobs: Path, stream: LateStream | None) -> None:
    batches = read_plainly(blobs, 2)

    def failing() -> Iterator[Batch]:
        yield from batches
        raise UserError("the third is lost")

    with DevicePrefetcher(failing(), CPU, stream) as feed:
        assert [next(feed).step, next(feed).step] == [0, 1]
        with pytest.raises(UserError, match="the third is lost"):
            next(feed)
    manifest = read_manifest(blobs)
    with EvalLoader(manifest, "val", batch_size=7) as reader, DevicePrefetcher(reader, CPU, stream) as feed:
        assert sum(int((batch.weights_B > 0).sum()) for batch in feed) == manifest.splits["val"].num_samples
        with pytest.raises(StopIteration):
            next(feed)


def test_closing_the_prefetcher_waits_for_copies_and_ends_iteration(blobs: Path) -> None:
    batches = read_plainly(blobs, 4)
    stream = LateStream(9)
    feed = DevicePrefetcher(iter(batches), CPU, stream)
    first = next(feed)
    feed.close()
    assert_same(first, batches[0])
    with pytest.raises(StopIteration):
        next(feed)


class BrokenStream(LateStream):
    """Raises the same error in every wait, as CUDA does after an error of a kernel."""

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], LateEvent]:
        copies, event = super().start(tensors)
        event.synchronize = self.fail  # type: ignore[method-assign]
        return copies, event

    def fail(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_closing_after_a_device_error_raises_the_error_of_the_loop(blobs: Path) -> None:
    """The first error names the operation; the wait at the end would replace it by one of the same text from elsewhere."""
    feed = DevicePrefetcher(iter(read_plainly(blobs, 4)), CPU, BrokenStream(9))
    with pytest.raises(RuntimeError, match="in the step"), feed:
        next(feed)
        raise RuntimeError("CUDA error in the step")
    with pytest.raises(StopIteration):
        next(feed)
    with (
        pytest.raises(RuntimeError, match="illegal memory access"),
        DevicePrefetcher(iter(read_plainly(blobs, 4)), CPU, BrokenStream(9)) as feed,
    ):
        next(feed)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
def test_buffers_are_pinned() -> None:
    array = BufferPool(2, pin=True).take((3, 5), np.uint8)
    assert torch.from_numpy(array).is_pinned()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pin", [True, False])
def test_prefetched_gpu_batches_equal_plain_copies(blobs: Path, pin: bool) -> None:
    """Over many batches, with the host far ahead of the device, few buffers, and the device's memory in demand."""
    device = torch.device("cuda")
    expected = read_plainly(blobs, 200)
    sums = []
    with (
        TrainLoader(read_manifest(blobs), seed=3, batch_size=8, decode=DecodeOptions(prefetch=1, pin=pin), draw=draw) as reader,
        DevicePrefetcher(reader, device) as feed,
    ):
        for batch in islice(feed, 200):
            torch.cuda._sleep(2_000_000)
            assert batch.images_BHWC.device.type == batch.labels_B.device.type == batch.weights_B.device.type == "cuda"
            assert batch.positions_B.device.type == "cpu"
            # Work that is still queued when the batch is let go of, and memory for its results.
            weighted = batch.images_BHWC.double() * batch.weights_B[:, None, None, None]
            sums.append((weighted.sum(), (weighted**2).sum(), batch.labels_B.sum(), batch.draws.clone()))
    for (*found, draws_BN), batch in zip(sums, expected, strict=True):
        images = batch.images_BHWC.double()
        assert [value.item() for value in found] == [images.sum(), (images**2).sum(), batch.labels_B.sum()]
        assert draws_BN.device.type == "cuda" and torch.equal(draws_BN.cpu(), batch.draws)


@pytest.mark.gpu
@needs_gpu
def test_result_of_a_gpu_is_read_while_later_work_still_runs() -> None:
    values = torch.arange(1000, device="cuda").square()
    copied = HostCopy(values)
    torch.cuda._sleep(2_000_000_000)  # about a second
    values.zero_()
    assert torch.equal(copied.wait(), torch.arange(1000).square())
    assert not torch.cuda.current_stream().query(), "the wait was for all of the work"
