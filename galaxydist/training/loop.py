"""The training loop: the order of things. Each part decides for itself what it does."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from galaxydist.distributed import World
from galaxydist.loading.loader import Batch
from galaxydist.training.metric_logger import MetricLogger, RunLength
from galaxydist.training.state import TrainState
from galaxydist.training.step import TrainStep
from galaxydist.training.step_sync import RankFlags, StepResult, StepSync
from galaxydist.training.stop_signals import LONG_STEP_S, StepAbandoned, StopSignal
from galaxydist.training.throughput import StepTimer

logger = logging.getLogger(__name__)


class Saver(Protocol):
    """Saves the training state when it is due."""

    def is_due(self, step: int, *, time_is_up: bool = False) -> bool:
        """After so many steps, or as a clock says that all ranks know of; the same on every rank."""
        ...

    def flags(self) -> tuple[bool, bool]:
        """What this rank alone knows: a save is due by its clock, and one in the background has failed."""
        ...

    def save(self, *, is_best: bool) -> None:
        """Every rank calls it."""
        ...

    def raise_failure(self) -> None:
        """Raise what went wrong in the background, on every rank. Every rank calls it."""
        ...


class Watcher(Protocol):
    """Sees that the loop goes on."""

    def beat(self, step: int, phase: str) -> None: ...


@dataclass
class TrainLoop:
    """What the loop moves.

    Args:
        world: the processes.
        schedule: length of the run.
        state: what a checkpoint holds.
        update: one optimizer step.
        journal: what is written and shown.
        saver: checkpoints of ``state``.
        validate: numbers of the validation split (every rank calls it), or None where there is no such split.
        validate_every: in epochs.
        timer: told where the time goes.
        watch: told that it goes on.
        step_done: called after each step, with the number of steps done.
        clock: seconds, monotonic.
    """

    world: World
    schedule: RunLength
    state: TrainState
    update: TrainStep
    journal: MetricLogger
    saver: Saver
    validate: Callable[[], dict[str, float | None]] | None
    validate_every: int
    timer: StepTimer
    watch: Watcher
    step_done: Callable[[int], None]
    clock: Callable[[], float] = time.monotonic
    agreement: StepSync = field(init=False)

    def __post_init__(self) -> None:
        self.agreement = StepSync(self.world.size, self.world.device)
        self._saved_step = self.state.step
        self._last_step_s = math.inf  # not known yet

    def run(self, batches: Iterator[Batch], stop: StopSignal) -> int:
        """Train to the last step, to early stopping, or to a signal.

        What the ranks agree on is known one step late, so that the next step is under way meanwhile; before an epoch ends or the
        state is saved all of it is. A step that takes seconds is left in the middle, and taken anew when the run goes on.

        Args:
            batches: this rank's, from the step of the state on, on the device.
            stop: set by a signal.

        Returns:
            The signal's number after a signal (the state is saved), else 0.

        Raises:
            RunFailedError, EveryRankError: on every rank at the same step; nothing is saved.
        """
        while not self.is_done:
            started = self.clock()
            try:
                self._take_step(batches, stop)
            except StepAbandoned as abandoned:
                self._settle(leave=0)
                self._save_changes()
                return abandoned.signal_number
            asked = self._settle(leave=1)
            self._last_step_s = self.clock() - started
            is_end = self.schedule.ends_epoch(self.state.step)
            is_save_due = self.saver.is_due(self.state.step, time_is_up=asked.is_save_due)
            if is_end or is_save_due or asked.stop_signal:
                asked = _either(asked, self._settle(leave=0))
                if is_end:
                    self._end_epoch()
                if is_save_due or asked.stop_signal:
                    self._save_changes()
            if asked.stop_signal:
                return asked.stop_signal
        return 0

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.schedule.total_steps or self.state.stopping.should_stop

    def _take_step(self, batches: Iterator[Batch], stop: StopSignal) -> None:
        step = self.state.step
        self.watch.beat(step, "data")
        with self.timer.part("data_wait"):
            batch = next(batches)
        self.watch.beat(step, "forward and backward")
        sums = self.update(batch, step)
        self.state.nonfinite.record(step, batch)
        is_save_due, has_failed = self.saver.flags()
        has_failed = has_failed or self.journal.has_failed
        unreadable = self.state.skipped.record(step, batch)
        is_long = self._last_step_s >= LONG_STEP_S
        self.agreement.post(step, sums, RankFlags(stop.signal_number, is_save_due, has_failed, unreadable, is_long))
        self.state.step += 1
        self.journal.step_taken()
        self.step_done(self.state.step)

    def _settle(self, leave: int) -> RankFlags:
        """Act on what the ranks have agreed on, of all steps but the last ``leave``; what is asked of the loop."""
        asked = RankFlags()
        self.watch.beat(self.state.step, "agreement")
        while len(self.agreement) > leave:
            agreed = self.agreement.read()
            asked = _either(asked, agreed.flags)
            if agreed.flags.has_failed:
                self.journal.raise_failure()
                self.saver.raise_failure()
            self._take_in(agreed)
        return asked

    def _take_in(self, agreed: StepResult) -> None:
        self.update.gates.is_open = not agreed.flags.is_long
        if agreed.flags.num_unreadable:
            for text in self.state.skipped.sync(self.world, agreed.step):
                logger.warning("%s", text)
        if agreed.is_nonfinite:
            logger.warning("%s", self.state.nonfinite.sync(self.world, agreed.step))
        elif warning := self.state.spikes.update(agreed.step, agreed.sums.loss):
            logger.warning("%s", warning)
        counters = {**self.state.skipped.metrics(), **self.state.nonfinite.metrics()}
        self.journal.step_done(agreed, self.update.rate(agreed.step), counters)

    def _end_epoch(self) -> None:
        """Validate and save where it is due."""
        epoch = self.state.step // self.schedule.steps_per_epoch
        is_last = self.state.step >= self.schedule.total_steps
        validation: dict[str, float | None] = {}
        is_best = False
        if self.validate is not None and (is_last or epoch % self.validate_every == 0):
            self.watch.beat(self.state.step, "validation")
            with self.timer.part("validation"):
                validation = self.validate()
            is_best = self.state.stopping.update(validation[f"val/{self.state.stopping.metric}"], self.state.step)
            self.journal.record(self.state.step, validation)
        self.journal.raise_failure()
        if is_best or self.state.stopping.should_stop or self.saver.is_due(self.state.step):
            self._save(is_best=is_best)
        self.journal.epoch_done(self.state.step, validation)

    def _save_changes(self) -> None:
        if self.state.step != self._saved_step:
            self._save(is_best=False)

    def _save(self, *, is_best: bool) -> None:
        self.watch.beat(self.state.step, "saving")
        with self.timer.part("checkpoint"):
            self.saver.save(is_best=is_best)
        self._saved_step = self.state.step


def _either(first: RankFlags, second: RankFlags) -> RankFlags:
    """What is asked by any of both."""
    return RankFlags(first.stop_signal or second.stop_signal, first.is_save_due or second.is_save_due)
