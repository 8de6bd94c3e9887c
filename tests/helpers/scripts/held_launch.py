"""launch.py whose first checkpoint is written until saves at the ends of two epochs were left out."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from galaxydist.cli.train import main


def train_held(settings: Sequence[str]) -> int:
    """Train as launch.py does; print the steps that this rank saved and left out."""
    from galaxydist.checkpoints import store
    from galaxydist.training.checkpointer import Checkpointer

    write, is_skipped, save = store.save, Checkpointer.is_skipped, Checkpointer.save
    released = threading.Event()
    saved: list[int] = []
    skipped: list[int] = []

    def held(*arguments: Any, **named: Any) -> Any:
        released.wait(120)  # a run that does not leave out any save goes on, and fails the test
        return write(*arguments, **named)

    def counted(self: Checkpointer, step: int) -> bool:
        if answer := is_skipped(self, step):
            skipped.append(step)
        if len(skipped) == 2:
            released.set()
        return answer

    def recorded(self: Checkpointer, *, is_best: bool) -> None:
        saved.append(self.state.step)
        save(self, is_best=is_best)

    store.save = held
    Checkpointer.is_skipped = counted  # type: ignore[method-assign]
    Checkpointer.save = recorded  # type: ignore[method-assign]
    code = main(settings, os.environ)
    print(f"saved {saved}, left out {skipped}", flush=True)
    return code
