"""Checkpoints of a training run: when they are due, and saving the training state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.distributed import World
from galaxydist.runs.folder import RunFolder
from galaxydist.training.state import TrainState


@dataclass(frozen=True)
class SaveSchedule:
    """Decides from the step whether a checkpoint is due; equal arguments give equal answers on all ranks.

    Args:
        steps_per_epoch, total_steps: length of an epoch and of the run, in optimizer steps.
        every_steps: save when the step is a multiple of it (0: never).
        every_epochs: save at the ends of the epochs that are multiples of it.
    """

    steps_per_epoch: int
    total_steps: int
    every_steps: int = 0
    every_epochs: int = 1

    def is_due(self, step: int, *, time_is_up: bool = False) -> bool:
        """Return True if a checkpoint is due.

        Args:
            step: optimizer steps done.
            time_is_up: ``SaveTimer.is_up`` of rank 0, as all ranks received it.
        """
        epoch, rest = divmod(step, self.steps_per_epoch)
        at_epochs = rest == 0 and epoch > 0 and epoch % self.every_epochs == 0
        return time_is_up or at_epochs or not self.may_skip(step)

    def may_skip(self, step: int) -> bool:
        """Return False if ``every_steps`` asks for a checkpoint, or at the end of the run."""
        at_steps = self.every_steps > 0 and step > 0 and step % self.every_steps == 0
        return not at_steps and step < self.total_steps


class SaveTimer:
    """Measures the time since the last save. Only rank 0's counts, since clocks differ.

    Args:
        minutes: largest time between two saves (0: no limit).
        clock: returns monotonic seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float]) -> None:
        self._seconds = minutes * 60
        self._clock = clock
        self._since = clock()

    @property
    def is_up(self) -> bool:
        return self._seconds > 0 and self._clock() - self._since >= self._seconds

    def restart(self) -> None:
        """Start again from 0, because a save begins."""
        self._since = self._clock()


@dataclass
class Checkpointer:
    """Saves the training state through the strategy's writer.

    Args:
        world: the processes.
        folder: the run folder.
        state: the training state.
        writer: writes a checkpoint, by default from a copy in memory while the training continues.
        is_collective: all ranks write a checkpoint together; else rank 0 alone.
        schedule, timer: decide when a checkpoint is due.
        context: further plain values that are saved with the state.
    """

    world: World
    folder: RunFolder
    state: TrainState
    writer: CheckpointWriter
    is_collective: bool
    schedule: SaveSchedule
    timer: SaveTimer
    context: Mapping[str, Any]

    def flags(self) -> tuple[bool, bool]:
        """Return whether a save is due by rank 0's timer, and whether a write in the background has failed."""
        return self.world.is_main and self.timer.is_up and not self.writer.is_writing, self.writer.failed

    def is_skipped(self, step: int) -> bool:
        """Return True, on all ranks, if a save that is due would wait for an earlier write and may be skipped. All take part."""
        return self.schedule.may_skip(step) and any(self.world.all_gather(self.writer.is_writing))

    def save(self, *, is_best: bool) -> None:
        """Save the current state. All ranks take part."""
        tensors, state = self.state.to_checkpoint(self.world)

        def write() -> None:
            if self.world.is_main:
                self.folder.metrics.sync()
                self.folder.validations.sync()
            self.writer.save(self.state.step, tensors, {**state, **self.context}, best=is_best)

        self._run(write)
        self.timer.restart()

    def wait(self) -> None:
        """Wait for the write in progress, and raise its error on all ranks. All ranks take part."""
        self._run(self.writer.wait)

    def _run(self, work: Callable[[], None]) -> None:
        """Run a function on the ranks that write; an error is raised on all ranks."""
        if self.is_collective:
            self.world.run_on_all(work)
        else:
            self.world.run_on_main(work)
