"""launch.py whose images are not finite in some steps, or which hangs in one."""

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from galaxydist.cli.train import main


def poison(rank: int, steps: set[int], hang_at: int | None = None) -> None:
    """Spoil one pixel of the images of one rank in these steps, and let all hang in another."""
    from galaxydist.training.step import TrainStep

    images_of = TrainStep.augmented

    def poisoned(self: TrainStep, batch: Any, part: Any, mix: Any) -> Any:
        images_BCHW = images_of(self, batch, part, mix)
        if batch.step == hang_at:
            time.sleep(1000)
        if batch.step in steps and self.world.rank == rank:
            images_BCHW = images_BCHW.clone()
            images_BCHW[0, 0, 0, 0] = math.nan
        return images_BCHW

    TrainStep.augmented = poisoned  # type: ignore[method-assign]


def train_poisoned(rank: int, steps: set[int], settings: Sequence[str], hang_at: int | None = None) -> int:
    """Train as launch.py does, with images of one rank spoilt in these steps, and a step in which it hangs."""
    poison(rank, steps, hang_at)
    sys.argv[1:] = settings  # wandb sends the command line
    return main(settings, os.environ)
