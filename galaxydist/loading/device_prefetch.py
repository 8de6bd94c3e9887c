"""Copies between host and device: the next batch on a side stream, and results that are read late."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
        self._stream: Any = torch.cuda.Stream(device)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Start copying; the sources must not change until the event."""
        # Copies from unpinned memory would block the host.
        pinned = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            event = torch.cuda.Event()
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
    """A batch on the device, the copied tensors, their sources, and the event at the end of the copies."""

    batch: Batch
    copies: list[Tensor]
    sources: list[Tensor]
    event: torch.cuda.Event


class DevicePrefetcher(AbstractContextManager["DevicePrefetcher"], Iterator[Batch]):
    """Copies a loader's batches to the device; positions and sample numbers stay on the CPU.

    A GPU takes two copies a batch: the images, and all numbers in one. A batch is copied while the one before is in use if the
    loader has it ready by then, else when it is asked for: the current batch never waits for the next one. The loader's memory
    is released only after the copy. On a CPU the batches pass unchanged. An error of the loader is raised after the batches
    before it. Use as a context manager inside the loader's.

    Args:
        batches: from a loader, preferably one that decodes into pinned memory (``pin``); other iterators are always ready.
        device: target device.
        side_stream: the stream to copy on; None creates one if the device is a GPU.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, side_stream: CopyStream | None = None) -> None:
        self._batches, self._device = batches, device
        self._side_stream = side_stream or (CopyStream(device) if device.type == "cuda" else None)
        self._ahead: _Copying | None = None
        self._error: Exception | None = None
        self._in_flight: deque[_Copying] = deque()
        self._is_ready: Callable[[], bool] = getattr(batches, "is_ready", lambda: True)

    def __next__(self) -> Batch:
        if self._side_stream is None:
            batch = next(self._batches)
            if self._device.type == "cpu":
                return batch
            names = ["images_BHWC", *_copied_fields(batch)]
            return replace(batch, **{name: getattr(batch, name).to(self._device) for name in names})
        if self._ahead is None:
            self._fetch(self._side_stream)
        copying, self._ahead = self._ahead, None
        if copying is None:
            assert self._error is not None
            raise self._error
        self._side_stream.hand_over(copying.copies, copying.event)
        while self._in_flight and self._in_flight[0].event.query():
            self._in_flight.popleft()
        self._in_flight.append(copying)
        if self._is_ready():
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
            batch = next(self._batches)
        except Exception as error:  # raised after the batches before it
            self._error = error
            return
        sources = [batch.images_BHWC, _packed(batch, pin=self._device.type == "cuda")]
        copies, event = side_stream.start(sources)
        self._ahead = _Copying(_with(batch, copies), copies, sources, event)


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
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """Return the tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu()


def _copied_fields(batch: Batch) -> list[str]:
    """Return the names of the tensors that go to the device beside the images, the widest elements first."""
    names = ["labels_B", "draws_BN", "weights_B"]
    return names if batch.draws_BN is not None else [names[0], names[2]]


def _packed(batch: Batch, *, pin: bool) -> Tensor:
    """Return the bytes of all tensors beside the images in one, so that one copy takes them to the device."""
    parts = [getattr(batch, name).contiguous().view(-1).view(torch.uint8) for name in _copied_fields(batch)]
    memory = torch.empty(sum(map(len, parts)), dtype=torch.uint8, pin_memory=pin)
    return torch.cat(parts, out=memory)


def _with(batch: Batch, copies: Sequence[Tensor]) -> Batch:
    """Return the batch with images and packed tensors from the device."""
    images_BHWC, memory = copies
    on_device: dict[str, Any] = {}
    for name in _copied_fields(batch):
        tensor = getattr(batch, name)
        part, memory = memory[: tensor.nbytes], memory[tensor.nbytes :]
        on_device[name] = part.view(tensor.dtype).view(tensor.shape)
    return replace(batch, images_BHWC=images_BHWC, **on_device)
