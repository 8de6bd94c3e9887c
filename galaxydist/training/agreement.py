"""What all ranks must agree on each step: whether somebody was asked to stop, whether the loss is still a number, and how many
galaxies could not be read.

A signal handler sets a flag and nothing else. One small vector is reduced asynchronously each step and read one step later, so
that every rank acts on it at the same step without waiting for the others.
"""

import signal
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGUSR2 while the context is open. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


@dataclass(frozen=True)
class Agreed:
    """What holds for one step on all ranks: the signal that asks to stop (0: none), whether the loss of any rank was not finite,
    galaxies that could not be read."""

    stop_signal: int = 0
    is_nonfinite: bool = False
    num_unreadable: int = 0


class Agreement:
    """One vector (each stop signal, non-finite losses, unreadable galaxies), its sum over all ranks, a step late.

    Args:
        world_size: number of ranks; with one, nothing is sent.
        device: where the vector lives.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size = world_size
        self._device = device
        self._vector: torch.Tensor | None = None
        self._work: Any = None

    def post(self, stop_signal: int, nonfinite: torch.Tensor, num_unreadable: int) -> None:
        """Send this step's flags and counts. Every rank calls it once a step."""
        known = [float(stop_signal == number) for number in STOP_SIGNALS]
        counted = torch.tensor([*known, float(num_unreadable)], device=self._device)
        self._vector = torch.cat([counted, nonfinite.float().to(self._device).reshape(1)])
        if self._world_size > 1:
            self._work = dist.all_reduce(self._vector, async_op=True)

    def read(self) -> Agreed:
        """What all ranks posted for the last step."""
        if self._vector is None:
            return Agreed()
        if self._work is not None:
            self._work.wait()
        *asked, num_unreadable, num_nonfinite = self._vector.tolist()
        self._vector = self._work = None
        stop_signal = next((number for number, count in zip(STOP_SIGNALS, asked, strict=True) if count), 0)
        return Agreed(int(stop_signal), num_nonfinite > 0, int(num_unreadable))
