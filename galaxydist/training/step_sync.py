"""What all ranks must know alike of each step: its loss, whether somebody was asked to stop, whether a save is due or one has
failed, whether the numbers are still finite, and how many galaxies could not be read.

One small vector is reduced asynchronously each step and read while the next step is already under way, so that every rank acts
on it at the same step without waiting for the others. A signal within a long step: ``step_gates.py``.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from galaxydist.job_environment import STOP_SIGNALS


@dataclass(frozen=True)
class LossSums:
    """The sums of one step over all ranks and micro-batches; ``loss`` is divided once (nan of nothing)."""

    numerator: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    count: float = 0.0

    @property
    def loss(self) -> float:
        return self.numerator / self.weight if self.weight > 0 else math.nan

    @property
    def accuracy(self) -> float:
        return self.correct / self.count if self.count > 0 else math.nan

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(
            self.numerator + other.numerator,
            self.weight + other.weight,
            self.correct + other.correct,
            self.count + other.count,
        )


@dataclass(frozen=True)
class RankFlags:
    """What one rank has to tell of a step.

    Args:
        stop_signal: that asks to stop (0: none).
        is_save_due: its clock says so.
        has_failed: a save in the background has.
        num_unreadable: galaxies that could not be read.
        is_long: its last steps took seconds.
    """

    stop_signal: int = 0
    is_save_due: bool = False
    has_failed: bool = False
    num_unreadable: int = 0
    is_long: bool = False


@dataclass(frozen=True)
class StepResult:
    """What holds for one step on all ranks.

    Args:
        step: optimizer steps done before it.
        flags: of any rank; ``num_unreadable`` of all together.
        is_nonfinite: the loss or the gradient is not finite; the step was left out.
        sums: zero where it is not finite.
    """

    step: int
    flags: RankFlags = field(default_factory=RankFlags)
    is_nonfinite: bool = False
    sums: LossSums = LossSums()


class StepSync:
    """One vector a step (four sums, whether they are finite, and the flags), its sum over all ranks.

    Args:
        world_size: number of ranks; with one, nothing is sent.
        device: where the sums are.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size = world_size
        self._device = device
        self._posted: deque[_Posted] = deque()

    def __len__(self) -> int:
        return len(self._posted)

    def post(self, step: int, sums: torch.Tensor, flags: RankFlags) -> None:
        """Send what this rank knows of a step. Every rank calls it once a step.

        Args:
            step: optimizer steps done before.
            sums: float64 of shape 5: loss numerator, loss weight, correct, counted, 1 where something is not finite; on the
                device.
            flags: of this rank.
        """
        known = [float(flags.stop_signal == number) for number in STOP_SIGNALS]
        known += [float(flags.is_save_due), float(flags.has_failed), float(flags.num_unreadable), float(flags.is_long)]
        told = torch.tensor(known, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        vector = torch.cat([sums, told.to(self._device, non_blocking=True)])
        work = dist.all_reduce(vector, async_op=True) if self._world_size > 1 else None
        self._posted.append(_Posted(step, vector, work))

    def read(self) -> StepResult:
        """What all ranks posted for the oldest step that has not been read."""
        posted = self._posted.popleft()
        numerator, weight, correct, count, nonfinite, *flags = posted.read()
        *asked, save_due, failed, num_unreadable, long = flags
        stop_signal = next((number for number, ranks in zip(STOP_SIGNALS, asked, strict=True) if ranks), 0)
        is_nonfinite = nonfinite != 0.0  # also where it is nan itself
        return StepResult(
            posted.step,
            RankFlags(int(stop_signal), save_due > 0, failed > 0, int(num_unreadable), long > 0),
            is_nonfinite,
            LossSums() if is_nonfinite else LossSums(numerator, weight, correct, count),
        )


class _Posted:
    """A vector under way. From a GPU it is copied as soon as it is there: to read it must not wait for the steps after it."""

    def __init__(self, step: int, vector: torch.Tensor, work: Any) -> None:
        self.step = step
        self._work = work
        self._copied: Any = None
        self._values = vector
        if vector.device.type == "cuda":
            if work is not None:
                work.wait()  # the stream waits, not the host
            self._values = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._values.copy_(vector, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        values: list[float] = self._values.tolist()
        return values
