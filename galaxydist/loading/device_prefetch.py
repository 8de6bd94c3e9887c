"""Batches on their way to the device: copied from pinned memory on a stream of their own, one ahead of the batch in use."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from galaxydist.loading.loader import Batch


class Event(Protocol):
    """The end of a copy."""

    def query(self) -> bool:
        """Whether it has come."""
        ...

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class CopyStream(Protocol):
    """A queue of copies beside the stream that computes."""

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Begin to copy; the sources must stay as they are until the event."""
        ...

    def hand_over(self, copies: Sequence[Tensor], event: Event) -> None:
        """Let the current stream wait for the copies, and keep their memory from being used again before it is done with them."""
        ...


class CudaCopyStream:
    """A side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        # From memory that is not pinned the host would wait for each copy.
        pinned = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return copies, event

    def hand_over(self, copies: Sequence[Tensor], event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in copies:
            tensor.record_stream(current)


@dataclass(frozen=True)
class _Copying:
    """A batch on the device, where it comes from, and the end of the copy."""

    batch: Batch
    source: Batch
    event: Event


class DevicePrefetcher:
    """A reader's batches with images, labels and weights on the device; positions and sample numbers stay on the CPU.

    On a GPU the next batch is being copied while the current one is in use, and a reader's memory goes back to it only when the
    copy from it has ended. On a CPU the batches are passed on as they are. An error of the reader is raised in its turn, after
    the batches before it. Use as a context manager, within the reader's.

    Args:
        batches: from a reader; best one that decodes into pinned memory (``pin``).
        device: where to.
        side_stream: the stream to copy on; None: a new one, where the device is a GPU.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, side_stream: CopyStream | None = None) -> None:
        self._batches, self._device = batches, device
        self._side_stream = side_stream or (CudaCopyStream(device) if device.type == "cuda" else None)
        self._ahead: _Copying | None = None
        self._error: Exception | None = None
        self._in_flight: deque[_Copying] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._side_stream is None:
            return self._moved(next(self._batches))
        if self._ahead is None:
            self._fetch(self._side_stream)
        copying, self._ahead = self._ahead, None
        if copying is None:
            assert self._error is not None
            raise self._error
        self._side_stream.hand_over(_moving(copying.batch), copying.event)
        while self._in_flight and self._in_flight[0].event.query():
            self._in_flight.popleft()
        self._in_flight.append(copying)
        self._fetch(self._side_stream)
        return copying.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the copies that are under way, and let go of the reader's memory."""
        if self._ahead is not None:
            self._in_flight.append(self._ahead)
            self._ahead = None
        for copying in self._in_flight:
            copying.event.synchronize()
        self._in_flight.clear()
        self._error = self._error or StopIteration()

    def _fetch(self, side_stream: CopyStream) -> None:
        if self._error is not None:
            return
        try:
            source = next(self._batches)
        except Exception as error:  # in its turn
            self._error = error
            return
        copies, event = side_stream.start(_moving(source))
        self._ahead = _Copying(_with(source, copies), source, event)

    def _moved(self, batch: Batch) -> Batch:
        return batch if self._device.type == "cpu" else _with(batch, [tensor.to(self._device) for tensor in _moving(batch)])


def _moving(batch: Batch) -> list[Tensor]:
    return [batch.images_BHWC, batch.labels_B, batch.weights_B]


def _with(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    images_BHWC, labels_B, weights_B = tensors
    return replace(batch, images_BHWC=images_BHWC, labels_B=labels_B, weights_B=weights_B)
