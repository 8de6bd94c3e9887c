"""Values of each step that all ranks share: loss sums, stop signals, saves that are due or failed, unreadable images.

One small vector is reduced asynchronously each step and read while the next step runs, so that every rank acts on it at the same
step without waiting for the others. ``StepGates`` handles a signal within a long step.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from galaxydist.job_environment import STOP_SIGNALS
from galaxydist.loading.device_prefetch import HostCopy


@dataclass
class LossSums:
    """Sums of steps over all ranks and micro-batches; ``loss`` and ``accuracy`` divide them once (nan without samples).

    The sums since the last line of metrics.jsonl are part of the training state, so that a line is the same after a restart.
    """

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

    def add(self, other: "LossSums") -> None:
        self.load_state_dict({name: value + getattr(other, name) for name, value in vars(self).items()})

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class RankFlags:
    """Flags that a rank sends with a step.

    Args:
        stop_signal: number of the signal that asked this rank to stop (0: none).
        is_save_due: the time since the last save is up on this rank.
        has_failed: a write in the background has failed.
        num_unreadable: images that this rank could not read.
        is_long: this rank's last step took seconds.
    """

    stop_signal: int = 0
    is_save_due: bool = False
    has_failed: bool = False
    num_unreadable: int = 0
    is_long: bool = False


@dataclass(frozen=True)
class StepResult:
    """Values of one step, equal on all ranks.

    Args:
        step: optimizer steps done before it.
        flags: set if they are set on any rank; ``num_unreadable`` is the sum over the ranks.
        is_nonfinite: the loss or the gradient is not finite; the step was skipped.
        sums: zero if the step is not finite.
        loss_scale: scale of the loss after the step with fp16; 0 with another precision.
        grad_norm: Euclidean norm of the whole gradient before clipping; nan or inf if it is not finite.
    """

    step: int
    flags: RankFlags = field(default_factory=RankFlags)
    is_nonfinite: bool = False
    sums: LossSums = field(default_factory=LossSums)
    loss_scale: float = 0.0
    grad_norm: float = 0.0


class StepSync:
    """Sums one vector a step (four loss sums, a non-finite flag, loss scale, gradient norm, the rank's flags) over all ranks.

    Args:
        world_size: number of ranks; with one, nothing is sent.
        device: device of the sums.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size = world_size
        self._device = device
        self._posted: deque[tuple[int, HostCopy, Any]] = deque()

    def __len__(self) -> int:
        return len(self._posted)

    def post(self, step: int, sums: torch.Tensor, flags: RankFlags) -> None:
        """Send this rank's values of a step. All ranks call it once a step.

        Args:
            step: optimizer steps done before.
            sums: float64 of shape 7 on the device: loss numerator, loss weight, correct, counted, 1 if not finite, loss scale,
                gradient norm (0 on all ranks but one).
            flags: this rank's flags.
        """
        values = [float(flags.stop_signal == number) for number in STOP_SIGNALS]
        values += [float(flags.is_save_due), float(flags.has_failed), float(flags.num_unreadable), float(flags.is_long)]
        flags_vector = torch.tensor(values, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        vector = torch.cat([sums, flags_vector.to(self._device, non_blocking=True)])
        work = dist.all_reduce(vector, async_op=True) if self._world_size > 1 else None
        if work is not None and self._device.type == "cuda":
            work.wait()  # the stream waits, not the host
            work = None
        self._posted.append((step, HostCopy(vector), work))

    def read(self) -> StepResult:
        """Return the result of the oldest step that has not been read."""
        step, vector, work = self._posted.popleft()
        if work is not None:
            work.wait()
        numerator, weight, correct, count, nonfinite, scales, norm, *flags = vector.wait().tolist()
        *signals, save_due, failed, num_unreadable, long = flags
        stop_signal = next((number for number, ranks in zip(STOP_SIGNALS, signals, strict=True) if ranks), 0)
        is_nonfinite = nonfinite != 0.0  # true for nan too
        return StepResult(
            step,
            RankFlags(int(stop_signal), save_due > 0, failed > 0, int(num_unreadable), long > 0),
            is_nonfinite,
            LossSums() if is_nonfinite else LossSums(numerator, weight, correct, count),
            scales / self._world_size,  # equal on all ranks, and a power of two
            norm,
        )
