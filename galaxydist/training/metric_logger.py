"""Metrics of a training run: metrics.jsonl, validation.jsonl, timing.jsonl and the progress bar.

metrics.jsonl and validation.jsonl hold what the recipe determines, so that a run that was stopped and continued has the same
files; timing.jsonl holds what depends on the machine. The tracker reads them all.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from galaxydist.distributed import World
from galaxydist.errors import UserError
from galaxydist.runs.events import EventLog
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_file import TIME_KEY
from galaxydist.tracking.run_tracker import Tracker
from galaxydist.training.health.anomalies import DataWaits
from galaxydist.training.step_sync import LossSums, StepResult
from galaxydist.training.throughput import StepTimer, Utilisation

logger = logging.getLogger(__name__)

# Metrics of a validation in the log.
SHOWN_METRICS = ("loss", "accuracy", "balanced_accuracy")


@dataclass(frozen=True)
class RunLength:
    """Length of a run: steps of an epoch and of the run, and galaxies of a step."""

    steps_per_epoch: int
    total_steps: int
    batch_size: int

    @property
    def num_epochs(self) -> int:
        return self.total_steps // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Return True if ``step`` steps are whole epochs."""
        return step % self.steps_per_epoch == 0


@dataclass
class MetricLogger:
    """Writes the metrics on rank 0. A context manager: the progress bar is closed at the end.

    Args:
        world: the processes.
        folder: the run folder.
        tracker: the run's tracker on rank 0; a null tracker elsewhere.
        length: length of the run.
        sums: loss sums since the last line, restored from a checkpoint.
        timer: times the steps.
        utilisation: computes the device utilisation from the images per second.
        first_step: steps done when this process starts.
        log_every: steps between two lines.
        events: of the run.
        data_waits: watches the share of waiting for data.
    """

    world: World
    folder: RunFolder
    tracker: Tracker
    length: RunLength
    sums: LossSums
    timer: StepTimer
    utilisation: Utilisation
    first_step: int
    log_every: int
    events: EventLog
    data_waits: DataWaits

    def __post_init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._timed_steps = 0
        self._error: Exception | None = None
        self._last: dict[str, float] = {}
        self._timing: dict[str, float] = {}
        self._bar = tqdm(
            total=self.length.total_steps,
            initial=self.first_step,
            unit="step",
            disable=not self.world.is_main or None,  # None: if stderr is not a terminal
            dynamic_ncols=True,
        )

    def __enter__(self) -> "MetricLogger":
        if not self._bar.disable:  # log records are written above the bar
            self._stack.enter_context(logging_redirect_tqdm([logging.getLogger("galaxydist")]))
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._stack.close()

    def step_taken(self) -> None:
        """Count a step that the timer has measured; ``step_done`` follows a step later."""
        self._timed_steps += 1

    def step_done(self, result: StepResult, rate: float, counters: Mapping[str, float]) -> None:
        """Add the sums of a step, and write a line every ``log_every`` steps.

        Args:
            result: values of the step, over all ranks.
            rate: learning rate of the step.
            counters: further metrics, written as they are.
        """
        step = result.step + 1
        self.sums.add(result.sums)
        self._bar.update()
        is_due = step % self.log_every == 0 or self.length.ends_epoch(step)
        if is_due:
            self._measure()
            if self.world.is_main and (warning := self.data_waits.update(self._timing["time/data_wait"])):
                logger.warning("%s", warning)
                self.events.write("data_wait", warning, step)
            means = {"train/loss": self.sums.loss, "train/accuracy": self.sums.accuracy}
            self._last = {**means, "train/lr": rate, "train/grad_norm": result.grad_norm, **counters}
            self.record(step, self._last, self._timing)
            self._show(step)
            self.sums.load_state_dict(LossSums().state_dict())

    def _measure(self) -> None:
        if self._timed_steps == 0:
            return  # ``step_done`` comes a step late: the last step was measured together with the one before it
        timing = self.timer.window(self._timed_steps)
        self._timing = {**timing, **self.utilisation(timing["time/img_s_device"])}
        self._timed_steps = 0

    def record(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        timing: Mapping[str, float] | None = None,
        *,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Write metrics of ``step`` to metrics.jsonl, its timing to timing.jsonl, and wake the tracker.

        An error is kept for ``raise_failure``, since only rank 0 knows of it here.

        Args:
            step: optimizer steps done.
            metrics: what the recipe determines.
            timing: what the machine determines; the time of the call is added.
            details: of a validation, for validation.jsonl.
        """
        if not self.world.is_main or self._error is not None:
            return
        epoch = {"epoch": step / self.length.steps_per_epoch}
        values = {**epoch, **metrics}
        try:
            if details:
                self.folder.validations.append(step, {**epoch, **details})
            self.folder.metrics.append(step, values)
            if timing:
                self.folder.timing.append(step, {**timing, TIME_KEY: round(time.time(), 3)})
            self.tracker.wake()
        except (UserError, OSError) as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """True if ``raise_failure`` would raise the error of a failed write."""
        return self._error is not None

    def raise_failure(self) -> None:
        """Raise the error of a failed write of rank 0 on all ranks. All ranks call it."""
        self.world.run_on_main(self._raise)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def epoch_done(self, step: int, validation: Mapping[str, float | None]) -> None:
        """Log one line about an epoch."""
        epoch = step // self.length.steps_per_epoch
        parts = [f"train loss {self._last.get('train/loss', float('nan')):.4f}"]
        for name in SHOWN_METRICS if validation else ():
            value = validation[f"val/{name}"]
            parts.append(f"{name.replace('_', ' ')} {'not finite' if value is None else f'{value:.4f}'} (val)")
        parts += [f"{self._timing.get('time/img_s', 0.0):,.0f} img/s"]
        logger.info("epoch %d/%d: %s", epoch, self.length.num_epochs, ", ".join(parts))

    def _show(self, step: int) -> None:
        num_epochs = self.length.num_epochs
        self._bar.set_description(f"epoch {min(step // self.length.steps_per_epoch + 1, num_epochs)}/{num_epochs}")
        self._bar.set_postfix_str(
            f"loss {self._last['train/loss']:.3f}, acc {self._last['train/accuracy']:.3f}, "
            f"{self._timing['time/img_s']:,.0f} img/s, data wait {self._timing['time/data_wait']:.0%}"
        )
