"""When the training state is saved, and by whom."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from galaxydist.distributed import World
from galaxydist.recipe.schema import TrainConfig
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock import RunLock
from galaxydist.training.ddp import Strategy
from galaxydist.training.state import TrainState

# When a checkpoint is due: by steps, by the clock, at the ends of epochs.


@dataclass(frozen=True)
class SaveSchedule:
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


class Checkpointer:
    """Checkpoints of a run, written from a copy in memory while the training goes on. A context manager: at its end what is being
    written is whole.

    Args:
        world: the processes.
        folder: of the run.
        lock: of the folder; on rank 0.
        state: what is saved.
        strategy: who writes it.
        policy: when, by the step.
        context: further plain values to save with it.
        config: when and how.
        clock: seconds, of rank 0; monotonic.
    """

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        lock: RunLock | None,
        state: TrainState,
        *,
        strategy: Strategy,
        policy: SaveSchedule,
        context: Mapping[str, Any],
        config: TrainConfig,
        clock: Callable[[], float],
    ) -> None:
        self.world, self.folder, self.state, self.policy = world, folder, state, policy
        self._context = context
        self._timer = SaveTimer(config.save_minutes, clock)
        self._is_collective = strategy.is_collective
        check = lock.check if lock is not None else _nothing
        self._writer = strategy.open_saver(folder.checkpoints_dir, background=config.async_save, check=check)

    def is_due(self, step: int, *, time_is_up: bool = False) -> bool:
        """After so many steps, or as rank 0's clock says; the same on every rank."""
        return self.policy.is_due(step, time_is_up=time_is_up)

    def flags(self) -> tuple[bool, bool]:
        """A save is due by ``train.save_minutes``, on rank 0; one in the background has failed."""
        return self.world.is_main and self._timer.is_up, self._writer is not None and self._writer.failed

    def save(self, *, is_best: bool) -> None:
        """Save the state as it is now. Every rank takes part."""
        tensors, state = self.state.snapshot(self.world)

        def write() -> None:
            assert self._writer is not None
            if self.world.is_main:
                self.folder.metrics.sync()
            self._writer.save(self.state.step, tensors, {**state, **self._context}, best=is_best)

        self._by_writers(write)
        self._timer.restart()

    def raise_failure(self) -> None:
        """Wait for what is being written; what went wrong is raised on every rank. Every rank calls it."""
        self._by_writers(self._wait)

    finish = raise_failure

    def _by_writers(self, work: Callable[[], None]) -> None:
        """Those that write do the work; an error is raised on every rank."""
        if self._is_collective:
            self.world.run_on_all(work)
        else:
            self.world.run_on_main(work)

    def _wait(self) -> None:
        assert self._writer is not None
        self._writer.wait()

    def __enter__(self) -> Self:
        if self._writer is not None:
            self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)


def _nothing() -> None:
    """The lock is rank 0's."""
