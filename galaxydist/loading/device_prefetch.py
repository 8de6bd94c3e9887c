"""Copies between host and device: the next batch on a side stream, and results that are read late."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from galaxydist.loading.loader import Batch


class CopyStream:
    """Side stream of a CUDA device, whose copies run beside the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Start copying; the sources must not change until the event."""
        # Copies from unpinned memory would block the host.
        pinned = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return copies, event

    def hand_over(self, copies: Sequence[Tensor], event: torch.cuda.Event) -> None:
        """Make the current stream wait for the copies, and keep their memory from reuse until it has finished with them."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in copies:
            tensor.record_stream(current)


@dataclass(frozen=True)
class _Copying:
    """A batch on the device, its source batch, and the event at the end of the copy."""

    batch: Batch
    source: Batch
    event: torch.cuda.Event


class DevicePrefetcher(AbstractContextManager["DevicePrefetcher"], Iterator[Batch]):
    """Copies a loader's images, labels and weights to the device; positions and sample numbers stay on the CPU.

    On a GPU the next batch is copied while the current one is in use, and the loader's memory is released only after the copy.
    On a CPU the batches pass unchanged. An error of the loader is raised after the batches before it. Use as a context manager
    inside the loader's.

    Args:
        batches: from a loader, preferably one that decodes into pinned memory (``pin``).
        device: target device.
        side_stream: the stream to copy on; None creates one if the device is a GPU.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, side_stream: CopyStream | None = None) -> None:
        self._batches, self._device = batches, device
        self._side_stream = side_stream or (CopyStream(device) if device.type == "cuda" else None)
        self._ahead: _Copying | None = None
        self._error: Exception | None = None
        self._in_flight: deque[_Copying] = deque()

    def __next__(self) -> Batch:
        if self._side_stream is None:
            batch = next(self._batches)
            return batch if self._device.type == "cpu" else _with(batch, [tensor.to(self._device) for tensor in _tensors(batch)])
        if self._ahead is None:
            self._fetch(self._side_stream)
        copying, self._ahead = self._ahead, None
        if copying is None:
            assert self._error is not None
            raise self._error
        self._side_stream.hand_over(_tensors(copying.batch), copying.event)
        while self._in_flight and self._in_flight[0].event.query():  # type: ignore[no-untyped-call]
            self._in_flight.popleft()
        self._in_flight.append(copying)
        self._fetch(self._side_stream)
        return copying.batch

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error of the device every wait raises it again, later and without the place where it happened.
        with suppress(RuntimeError) if kind is not None else nullcontext():
            self.close()

    def close(self) -> None:
        """Wait for the copies in progress, and release the loader's memory."""
        if self._ahead is not None:
            self._in_flight.append(self._ahead)
            self._ahead = None
        self._error = self._error or StopIteration()
        try:
            for copying in self._in_flight:
                copying.event.synchronize()
        finally:
            self._in_flight.clear()

    def _fetch(self, side_stream: CopyStream) -> None:
        if self._error is not None:
            return
        try:
            source = next(self._batches)
        except Exception as error:  # raised after the batches before it
            self._error = error
            return
        copies, event = side_stream.start(_tensors(source))
        self._ahead = _Copying(_with(source, copies), source, event)


class HostCopy:
    """Copies a tensor to pinned memory behind the work that the device has so far; later work does not delay reading it.

    Args:
        tensor: on the CPU it is not copied; other devices than CUDA's have no such copies, and are waited for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            # A thread that waits for this event sleeps, where it would otherwise occupy a core.
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """Return the tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu()


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.images_BHWC, batch.labels_B, batch.weights_B]


def _with(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    images_BHWC, labels_B, weights_B = tensors
    return replace(batch, images_BHWC=images_BHWC, labels_B=labels_B, weights_B=weights_B)
