"""What a training run says while it goes: metrics.jsonl, timing.jsonl, the tracker, the progress bar. Sums are kept, and divided
when told.

metrics.jsonl holds what the recipe determines, so that a run that was stopped and continued has the very same file; what depends
on the machine stands in timing.jsonl. The tracker gets both.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from galaxydist.distributed import World
from galaxydist.errors import UserError
from galaxydist.runs.folder import RunFolder
from galaxydist.training.step_sync import LossSums, StepResult
from galaxydist.training.throughput import StepTimer, Utilisation
from galaxydist.training.trackers import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLength:
    """How long the run is."""

    steps_per_epoch: int
    total_steps: int
    batch_size: int

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) that update number ``step`` belongs to."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is over once ``step`` steps are done."""
        return step % self.steps_per_epoch == 0


class RunningSums:
    """The sums of the steps since the last line: a part of the training state, so that a line is the same after a restart."""

    def __init__(self) -> None:
        self.sums = LossSums()

    def add(self, sums: LossSums) -> None:
        self.sums += sums

    def clear(self) -> None:
        self.sums = LossSums()

    def metrics(self) -> dict[str, float]:
        return {"train/loss": self.sums.loss, "train/accuracy": self.sums.accuracy}

    def state_dict(self) -> dict[str, Any]:
        return vars(self.sums)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = LossSums(**state)


class MetricLogger:
    """Rank 0 writes. Use as a context manager: the bar is closed at the end.

    Args:
        world: the processes.
        folder: of the run.
        tracker: of rank 0; null elsewhere.
        schedule: length of the run.
        window: the sums since the last line.
        timer: of the steps.
        utilisation: how much of its device the run uses.
        first_step: where this process starts.
        log_every: steps between two lines.
    """

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        tracker: Tracker,
        schedule: RunLength,
        *,
        window: RunningSums,
        timer: StepTimer,
        utilisation: Utilisation,
        first_step: int,
        log_every: int,
    ) -> None:
        self.world = world
        self.folder = folder
        self.tracker = tracker
        self.schedule = schedule
        self.log_every = log_every
        self.window = window
        self.timer = timer
        self.utilisation = utilisation
        self._stack = contextlib.ExitStack()
        self._timed_steps = 0
        self._error: Exception | None = None
        self._last: dict[str, float] = {}
        self._timing: dict[str, float] = {}
        self._bar = tqdm(
            total=schedule.total_steps, initial=first_step, unit="step", disable=not world.is_main or None, dynamic_ncols=True
        )

    def __enter__(self) -> "MetricLogger":
        if not self._bar.disable:  # log records are written above the bar
            self._stack.enter_context(logging_redirect_tqdm([logging.getLogger("galaxydist")]))
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._stack.close()

    def step_taken(self) -> None:
        """One more step that the timer has seen; what it was about is known later."""
        self._timed_steps += 1

    def step_done(self, agreed: StepResult, rate: float, counters: Mapping[str, float]) -> None:
        """Take in one step: ``rate`` is its learning rate, ``counters`` are written as they are. A line is written every
        ``log_every`` steps."""
        step = agreed.step + 1
        self.window.add(agreed.sums)
        self._bar.update()
        is_due = step % self.log_every == 0 or self.schedule.ends_epoch(step)
        if is_due:
            self._measure()
            self._last = {**self.window.metrics(), "train/lr": rate, **counters}
            self.record(step, self._last, self._timing)
            self._show(step)
            self.window.clear()

    def _measure(self) -> None:
        if self._timed_steps == 0:
            return  # steps are told one late: the last one was measured with the one before it
        timing = self.timer.window(self._timed_steps)
        self._timing = {**timing, **self.utilisation(timing["time/img_s_device"])}
        self._timed_steps = 0

    def record(self, step: int, metrics: Mapping[str, float | None], timing: Mapping[str, float] | None = None) -> None:
        """Write metrics of ``step`` to metrics.jsonl, its timing to timing.jsonl, both to the tracker.

        What goes wrong is kept for ``raise_failure``: the other ranks are not here.
        """
        if not self.world.is_main or self._error is not None:
            return
        try:
            self._write(step, metrics, timing)
        except (UserError, OSError) as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Something could not be written, and ``raise_failure`` would say what."""
        return self._error is not None

    def raise_failure(self) -> None:
        """Raise on every rank what could not be written on rank 0. Every rank calls it."""
        self.world.run_on_main(self._raise)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, step: int, metrics: Mapping[str, float | None], timing: Mapping[str, float] | None) -> None:
        epoch = step / self.schedule.steps_per_epoch
        self.folder.metrics.append(step, {"epoch": epoch, **metrics})
        if timing:
            self.folder.timing.append(step, timing)
        self.tracker.log({"epoch": epoch, **metrics, **(timing or {})}, step)

    def epoch_done(self, step: int, validation: Mapping[str, float | None]) -> None:
        """Say in one line how the epoch went."""
        epoch = step // self.schedule.steps_per_epoch
        parts = [f"train loss {self._last.get('train/loss', float('nan')):.4f}"]
        for name, value in validation.items():
            shown = "not finite" if value is None else f"{value:.4f}"
            parts.append(f"{name.removeprefix('val/').replace('_', ' ')} {shown} (val)")
        parts += [f"{self._timing.get('time/img_s', 0.0):,.0f} img/s"]
        logger.info("epoch %d/%d: %s", epoch, self._num_epochs, ", ".join(parts))

    def _show(self, step: int) -> None:
        self._bar.set_description(f"epoch {min(step // self.schedule.steps_per_epoch + 1, self._num_epochs)}/{self._num_epochs}")
        self._bar.set_postfix_str(
            f"loss {self._last['train/loss']:.3f}, acc {self._last['train/accuracy']:.3f}, "
            f"{self._timing['time/img_s']:,.0f} img/s, data wait {self._timing['time/data_wait']:.0%}"
        )

    @property
    def _num_epochs(self) -> int:
        return self.schedule.total_steps // self.schedule.steps_per_epoch
