"""What all ranks must agree on each step: whether somebody was asked to stop, and whether the loss is still a number.

A signal handler sets a flag and nothing else. One small vector is reduced asynchronously each step and read one step later, so
that every rank acts on it at the same step without waiting for the others.
"""

import signal
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


class Agreement:
    """One vector (stop signal, non-finite loss), its maximum over all ranks, a step late.

    Args:
        world_size: number of ranks; with one, nothing is sent.
        device: where the vector lives.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size = world_size
        self._device = device
        self._vector: torch.Tensor | None = None
        self._work: Any = None

    def post(self, stop_signal: int, nonfinite: torch.Tensor) -> None:
        """Send this step's flags. Every rank calls it once a step."""
        vector = torch.stack([torch.tensor(float(stop_signal), device=self._device), nonfinite.float().to(self._device)])
        self._vector = vector
        if self._world_size > 1:
            self._work = dist.all_reduce(vector, op=dist.ReduceOp.MAX, async_op=True)

    def read(self) -> tuple[int, bool]:
        """The last posted step's (signal number or 0, whether the loss was not finite anywhere)."""
        if self._vector is None:
            return 0, False
        if self._work is not None:
            self._work.wait()
        stop, nonfinite = self._vector.tolist()
        self._vector = self._work = None
        return int(stop), bool(nonfinite)
