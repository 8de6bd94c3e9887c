"""When the training state is saved, and by whom."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from galaxydist.distributed import World
from galaxydist.recipe.schema import TrainConfig
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock import RunLock
from galaxydist.runs.save_policy import SavePolicy, SaveTimer
from galaxydist.training.state import TrainingState
from galaxydist.training.strategy import Strategy


class Saving:
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
        state: TrainingState,
        *,
        strategy: Strategy,
        policy: SavePolicy,
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
            self.world.together(work)
        else:
            self.world.on_main(work)

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
