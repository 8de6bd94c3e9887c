"""When the training state is saved, and by whom."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from galaxydist.recipe.schema import TrainConfig
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock import RunLock
from galaxydist.runs.save_policy import SavePolicy, SaveTimer
from galaxydist.runs.saver import CheckpointSaver
from galaxydist.training.state import TrainingState
from galaxydist.training.world import World


class Saving:
    """Checkpoints of a run: rank 0 writes them, from a copy in memory, while the training goes on. A context manager: at its end
    what is being written is whole.

    Args:
        world: the processes.
        folder: of the run.
        lock: of the folder; on rank 0.
        state: what is saved.
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
        policy: SavePolicy,
        *,
        context: Mapping[str, Any],
        config: TrainConfig,
        clock: Callable[[], float],
    ) -> None:
        self.world, self.folder, self.state, self.policy = world, folder, state, policy
        self._context = context
        self._timer = SaveTimer(config.save_minutes, clock)
        self._writer: CheckpointSaver | None = None
        if world.is_main:
            assert lock is not None
            self._writer = CheckpointSaver(folder.checkpoints_dir, background=config.async_save, check=lock.check)

    def is_due(self, step: int) -> bool:
        """After so many steps; the same on every rank."""
        return self.policy.is_due(step)

    def flags(self) -> tuple[bool, bool]:
        """On rank 0: a save is due by ``train.save_minutes``; one in the background has failed."""
        if self._writer is None:
            return False, False
        return self._timer.is_up, self._writer.failed

    def save(self, *, is_best: bool) -> None:
        """Save the state as it is now. Every rank takes part."""
        tensors, state = self.state.snapshot(self.world)

        def write() -> None:
            assert self._writer is not None
            self.folder.metrics.sync()
            self._writer.save(self.state.step, tensors, {**state, **self._context}, best=is_best)

        self.world.on_main(write)
        self._timer.restart()

    def raise_failure(self) -> None:
        """Wait for what is being written; what went wrong is raised on every rank. Every rank calls it."""
        self.world.on_main(self._wait)

    finish = raise_failure

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
