"""The training loop: the order of things. Each part decides for itself what it does."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from galaxydist.errors import RunFailedError
from galaxydist.shards.reader import Batch
from galaxydist.training.agreement import Agreement, StopFlag
from galaxydist.training.journal import Journal, Schedule
from galaxydist.training.state import TrainingState
from galaxydist.training.update import Update
from galaxydist.training.world import World


class Saver(Protocol):
    """Saves the training state; every rank calls it."""

    def __call__(self, *, is_best: bool) -> None: ...


@dataclass
class Loop:
    """What the loop moves.

    Args:
        world: the processes.
        schedule: length of the run.
        state: what a checkpoint holds.
        update: one optimizer step.
        journal: what is written and shown.
        save: writes a checkpoint of ``state``.
        validate: numbers of the validation split (every rank calls it), or None where there is no such split.
        validate_every, save_every: in epochs.
    """

    world: World
    schedule: Schedule
    state: TrainingState
    update: Update
    journal: Journal
    save: Saver
    validate: Callable[[], dict[str, float]] | None
    validate_every: int
    save_every: int

    def run(self, batches: Iterator[Batch], stop: StopFlag) -> int:
        """Train to the last step, to early stopping, or to a signal.

        Args:
            batches: this rank's, from the step of the state on, on the device.
            stop: set by a signal.

        Returns:
            The signal's number after a signal (the state is saved), else 0.

        Raises:
            RunFailedError, EveryRankError: on every rank at the same step; nothing is saved.
        """
        agreement = Agreement(self.world.size, self.world.device)
        while not self.is_done:
            asked = time.monotonic()
            batch = next(batches)
            wait_s = time.monotonic() - asked
            if stop_signal := self._agreed(agreement):
                return self._stop(stop_signal)
            sums = self.update(batch, self.state.step)
            agreement.post(stop.signal_number, ~sums[0].isfinite(), self.state.skipped.take(batch))
            rate = self.update.rate.at(self.state.step)
            self.journal.step_done(self.state.step + 1, sums, wait_s, rate, self.state.skipped.metrics())
            self.state.step += 1
            if self.state.step % self.schedule.steps_per_epoch == 0:
                stop_signal = self._agreed(agreement)
                self._end_epoch()
                if stop_signal:
                    return self._stop(stop_signal)
        return 0

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.schedule.total_steps or self.state.stopping.should_stop

    def _agreed(self, agreement: Agreement) -> int:
        """The stop signal that all ranks know of, after refusing to go on from a loss that is not a number, or without too many
        galaxies."""
        agreed = agreement.read()
        if agreed.is_nonfinite:
            raise RunFailedError(
                f"The loss of step {self.state.step} is not a number. The last checkpoint is from before it and stays. "
                "Lower optim.lr, lengthen optim.warmup, or use train.precision=no."
            )
        if agreed.num_unreadable:
            for text in self.state.skipped.settle(self.world):
                self.journal.say(f"warning: {text}")
        return agreed.stop_signal

    def _end_epoch(self) -> None:
        epoch = self.state.step // self.schedule.steps_per_epoch
        is_last = self.state.step >= self.schedule.total_steps
        validation: dict[str, float] = {}
        is_best = False
        if self.validate is not None and (is_last or epoch % self.validate_every == 0):
            validation = self.validate()
            is_best = self.state.stopping.update(validation[f"val/{self.state.stopping.metric}"], self.state.step)
            self.journal.record(self.state.step, validation)
        if is_best or is_last or epoch % self.save_every == 0 or self.state.stopping.should_stop:
            self.save(is_best=is_best)
        self.journal.epoch_done(self.state.step, validation)
        self.journal.restart_clock()

    def _stop(self, stop_signal: int) -> int:
        self.save(is_best=False)
        return stop_signal
