"""When a checkpoint is due: by steps, by the clock, at the ends of epochs."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SavePolicy:
    """A function of the step, and of whether time is up: the same on every rank that is told the same.

    Args:
        steps_per_epoch, total_steps: length of an epoch and of the run, in optimizer steps.
        every_steps: save after every so many steps, counted from the start of the run (0: not).
        every_epochs: save at the end of every so many epochs.
    """

    steps_per_epoch: int
    total_steps: int
    every_steps: int = 0
    every_epochs: int = 1

    def is_due(self, step: int, *, time_is_up: bool = False) -> bool:
        """A checkpoint is due.

        Args:
            step: optimizer steps done.
            time_is_up: ``SaveTimer.is_up`` of one rank, told to all.
        """
        epoch, rest = divmod(step, self.steps_per_epoch)
        at_steps = self.every_steps > 0 and step > 0 and step % self.every_steps == 0
        at_epochs = rest == 0 and epoch > 0 and epoch % self.every_epochs == 0
        return time_is_up or at_steps or at_epochs or step >= self.total_steps


class SaveTimer:
    """Whether the last save is too long ago. For one rank, which tells the others: clocks differ.

    Args:
        minutes: between saves (0: time is never up).
        clock: seconds that only go up.
    """

    def __init__(self, minutes: float, clock: Callable[[], float]) -> None:
        self._seconds = minutes * 60
        self._clock = clock
        self._since = clock()

    @property
    def is_up(self) -> bool:
        return self._seconds > 0 and self._clock() - self._since >= self._seconds

    def restart(self) -> None:
        """Whenever a save begins, for whatever reason."""
        self._since = self._clock()
