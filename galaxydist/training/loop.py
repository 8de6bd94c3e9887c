"""The training loop: steps, validation, checkpoints and stop signals in their order."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from galaxydist.distributed import World
from galaxydist.loading.loader import Batch
from galaxydist.runs.events import EventKind, EventLog
from galaxydist.training.checkpointer import Checkpointer
from galaxydist.training.health.anomalies import check_loss_scale
from galaxydist.training.health.watchdog import SAVING, VALIDATION, Watchdog
from galaxydist.training.metric_logger import MetricLogger, RunLength
from galaxydist.training.resume import Pruning
from galaxydist.training.state import TrainState
from galaxydist.training.step import TrainStep
from galaxydist.training.step_sync import RankFlags, StepResult, StepSync
from galaxydist.training.stop_signals import LONG_STEP_S, StepAbandoned, StopSignal

logger = logging.getLogger(__name__)


@dataclass
class TrainLoop:
    """Trains from the current step to the end of the run, early stopping, pruning or a signal.

    Args:
        world: the processes.
        length: length of the run.
        state: the training state.
        step: one optimizer step.
        metrics: writes and shows the metrics.
        checkpointer: saves ``state``.
        validate: returns the metrics of the validation split and, on rank 0, the details for validation.jsonl; all ranks call it.
            None if there is no such split.
        validate_every: epochs between validations.
        watchdog: ends the run if it hangs.
        pruning: asks after each validation whether to end the run.
        events: of the run.
        step_done: called after each step with the number of steps done.
    """

    world: World
    length: RunLength
    state: TrainState
    step: TrainStep
    metrics: MetricLogger
    checkpointer: Checkpointer
    validate: Callable[[], tuple[dict[str, float | None], dict[str, Any]]] | None
    validate_every: int
    watchdog: Watchdog
    pruning: Pruning
    events: EventLog
    step_done: Callable[[int], None]
    sync: StepSync = field(init=False)

    def __post_init__(self) -> None:
        self.sync = StepSync(self.world.size, self.world.device)
        self._saved_step = self.state.step
        self._last_step_s = math.inf  # unknown before the first step

    def run(self, batches: Iterator[Batch], stop: StopSignal) -> int:
        """Train to the last step, to early stopping or pruning, or to a signal.

        Ranks read the shared values of a step one step late, while the next step runs; before an epoch ends or the state is saved
        they read all of them. A step that takes seconds is abandoned on a signal, and repeated when the run continues.

        Args:
            batches: this rank's batches on the device, from the step of the state on.
            stop: set by a signal.

        Returns:
            The number of the signal that stopped the run (its state is saved), or 0.

        Raises:
            RunFailedError, EveryRankError: on all ranks at the same step; nothing is saved.
        """
        while not self.is_done:
            started = time.monotonic()
            try:
                self._step(batches, stop)
            except StepAbandoned as abandoned:
                self._sync(leave=0)
                self._save_changes()
                return abandoned.signal_number
            flags = self._sync(leave=1)
            self._last_step_s = time.monotonic() - started
            is_end = self.length.ends_epoch(self.state.step)
            is_save_due = self.checkpointer.schedule.is_due(self.state.step, time_is_up=flags.is_save_due)
            if is_end or is_save_due or flags.stop_signal:
                flags = _either(flags, self._sync(leave=0))
                if is_end:
                    self._end_epoch(is_save_due=is_save_due)
                if flags.stop_signal or (is_save_due and not is_end):
                    self._save_changes()
            if flags.stop_signal:
                return flags.stop_signal
        return 0

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.length.total_steps or self.state.stopping.should_stop or self.pruning.is_pruned

    def _step(self, batches: Iterator[Batch], stop: StopSignal) -> None:
        """Take one step, and send this rank's values of it to the others."""
        step = self.state.step
        self.watchdog.beat(step, "data")
        with self.step.timer.part("data_wait"):
            batch = next(batches)
        self.watchdog.beat(step, "forward and backward")
        sums = self.step(batch, step)
        self.state.nonfinite.record(step, batch)
        is_save_due, has_failed = self.checkpointer.flags()
        has_failed = has_failed or self.metrics.has_failed
        num_unreadable = self.state.skipped.record(step, batch)
        is_long = self._last_step_s >= LONG_STEP_S
        self.sync.post(step, sums, RankFlags(stop.signal_number, is_save_due, has_failed, num_unreadable, is_long))
        self.state.step += 1
        self.metrics.step_taken()
        self.step_done(self.state.step)

    def _sync(self, leave: int) -> RankFlags:
        """Handle the shared values of all steps but the last ``leave``, and return the flags that the loop must act on."""
        flags = RankFlags()
        self.watchdog.beat(self.state.step, "agreement")
        while len(self.sync) > leave:
            result = self.sync.read()
            flags = _either(flags, result.flags)
            if result.flags.has_failed:
                self.metrics.raise_failure()
                self.checkpointer.wait()
            self._handle(result)
        return flags

    def _handle(self, result: StepResult) -> None:
        """Log the result of a step, and fail on all ranks if it must not be skipped."""
        self.step.gates.is_open = not result.flags.is_long
        if result.flags.num_unreadable:
            for text in self.state.skipped.sync(self.world, result.step):
                logger.warning("%s", text)
        if result.is_nonfinite:
            self._warn("nonfinite", self.state.nonfinite.sync(self.world, result.step), result.step)
        elif warning := self.state.spikes.update(result.step, result.sums.loss):
            self._warn("loss_spike", warning, result.step)
        counters = {**self.state.skipped.metrics(), **self.state.nonfinite.metrics()}
        if result.loss_scale:
            check_loss_scale(result.step, result.loss_scale)
            counters["train/loss_scale"] = result.loss_scale
        self.metrics.step_done(result, self.step.schedule(result.step), counters)

    def _warn(self, kind: EventKind, text: str, step: int) -> None:
        logger.warning("%s", text)
        if self.world.is_main:
            self.events.write(kind, text, step + 1)

    def _end_epoch(self, *, is_save_due: bool) -> None:
        """Validate and save if either is due."""
        epoch = self.state.step // self.length.steps_per_epoch
        is_last = self.state.step >= self.length.total_steps
        validation: dict[str, float | None] = {}
        is_best = False
        if self.validate is not None and (is_last or epoch % self.validate_every == 0):
            self.watchdog.beat(self.state.step, VALIDATION)
            with self.step.timer.part("validation"):
                validation, details = self.validate()
            value = validation[f"val/{self.state.stopping.metric}"]
            is_best = self.state.stopping.update(value, self.state.step)
            self.metrics.record(self.state.step, validation, details=details)
            self.pruning.update(epoch, value, is_last=is_last or self.state.stopping.should_stop)
        is_needed = is_best or self.state.stopping.should_stop or self.pruning.is_pruned
        if is_needed or (is_save_due and not self.checkpointer.is_skipped(self.state.step)):
            self._save(is_best=is_best)
        self.metrics.epoch_done(self.state.step, validation)

    def _save_changes(self) -> None:
        if self.state.step != self._saved_step:
            self._save(is_best=False)

    def _save(self, *, is_best: bool) -> None:
        self.watchdog.beat(self.state.step, SAVING)
        self.metrics.raise_failure()  # a line that the checkpoint counts as written would be missing for ever
        with self.step.timer.part("checkpoint"):
            self.checkpointer.save(is_best=is_best)
        self._saved_step = self.state.step


def _either(first: RankFlags, second: RankFlags) -> RankFlags:
    """Return the flags that the loop must act on, set if they are set in either."""
    return RankFlags(first.stop_signal or second.stop_signal, first.is_save_due or second.is_save_due)
