"""Where the time of training goes: waiting for data, forward and backward, optimizer, checkpoint; images per second; memory."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import psutil
import torch

PARTS = ("data_wait", "forward_backward", "optimizer", "checkpoint")
OTHER = "other"
# Not training: left out of the shares and of the images per second.
OUTSIDE = "validation"
NOT_TRAINING = frozenset({"checkpoint", OUTSIDE})
GB = 1e9
# Marks that may wait to be read.
MOST_PENDING = 64


class Clock(Protocol):
    """Points in time, which may lie ahead: a GPU comes to them when it has done what it was given before."""

    def stamp(self) -> Any:
        """The point after all work given so far."""

    def is_past(self, stamp: Any) -> bool:
        """Whether it has come there."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two points that are past."""


class HostClock:
    """The processor's: what was called is done when the call returns."""

    def stamp(self) -> float:
        return time.perf_counter()

    def is_past(self, _stamp: float) -> bool:
        return True

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


class CudaClock:
    """Events on the current stream, which nothing waits for. Time counts as the GPU spends it: a wait for data during which it
    still computes is none.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_past(self, stamp: torch.cuda.Event) -> bool:
        return bool(stamp.query())  # type: ignore[no-untyped-call]

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) / 1000


class StepTimer:
    """Divides the time of a loop into parts, without gaps: each mark ends one part and begins the next.

    Args:
        device: where the model is.
        batch_size: global, in images.
        world_size: number of processes, each with a device of its own.
        clock: else the device's.
    """

    def __init__(self, device: torch.device, *, batch_size: int, world_size: int, clock: Clock | None = None) -> None:
        self._device = device
        self._batch_size = batch_size
        self._world_size = world_size
        self._clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())
        self._process = psutil.Process()
        self._part = OTHER
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._since = self._clock.stamp()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._host_since = time.perf_counter()
        self._training_s = 0.0

    def mark(self, part: str) -> None:
        """From now on time belongs to ``part``: one of PARTS, ``validation`` or ``other``."""
        stamp = self._clock.stamp()
        self._pending.append((self._part, self._since, stamp))
        host = time.perf_counter()
        if self._part not in NOT_TRAINING:
            self._training_s += host - self._host_since
        self._part, self._since, self._host_since = part, stamp, host
        if len(self._pending) > MOST_PENDING:
            self._settle()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to part ``name``, what comes after to what it was before."""
        before = self._part
        self.mark(name)
        try:
            yield
        finally:
            self.mark(before)

    def window(self, num_steps: int) -> dict[str, float]:
        """Numbers of the time since the last call (or the start), for the log.

        Args:
            num_steps: optimizer steps taken in it.

        Returns:
            ``time/<part>`` and ``time/other``: shares of the time without validations, 1 together; on a GPU of the time that it
            has come to. ``time/img_s`` and ``time/img_s_device``: images a second, without validations and checkpoints.
            ``gpu/memory_gb`` (largest allocated in the window), ``gpu/memory_reserved_gb``; without a GPU ``memory/rss_gb``.
        """
        self.mark(self._part)
        self._settle()
        self._seconds.pop(OUTSIDE, None)
        total = sum(self._seconds.values())
        shares = {f"time/{part}": self._seconds[part] / total if total > 0 else 0.0 for part in PARTS}
        shares[f"time/{OTHER}"] = max(0.0, 1.0 - sum(shares.values()))
        img_s = num_steps * self._batch_size / max(self._training_s, 1e-9)
        self._seconds.clear()
        self._training_s = 0.0
        return {**shares, "time/img_s": img_s, "time/img_s_device": img_s / self._world_size, **self._memory()}

    def _settle(self) -> None:
        """Add up what is past; the rest counts in the next window."""
        while self._pending and self._clock.is_past(self._pending[0][2]):
            part, start, stop = self._pending.popleft()
            self._seconds[part] += self._clock.seconds(start, stop)

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {"memory/rss_gb": self._process.memory_info().rss / GB}
        used = {
            "gpu/memory_gb": torch.cuda.max_memory_allocated(self._device) / GB,
            "gpu/memory_reserved_gb": torch.cuda.memory_reserved(self._device) / GB,
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        return used
