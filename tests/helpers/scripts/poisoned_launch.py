"""launch.py whose images are not finite in some steps."""

import math
import os
from collections.abc import Sequence
from typing import Any

from galaxydist.cli.train import main


def poison(rank: int, steps: set[int]) -> None:
    """Spoil one pixel of the images of one rank in these steps."""
    from galaxydist.training.step import TrainStep

    images_of = TrainStep.augmented

    def poisoned(self: TrainStep, batch: Any, part: Any, mix: Any) -> Any:
        images_BCHW = images_of(self, batch, part, mix)
        if batch.step in steps and self.world.rank == rank:
            images_BCHW = images_BCHW.clone()
            images_BCHW[0, 0, 0, 0] = math.nan
        return images_BCHW

    TrainStep.augmented = poisoned  # type: ignore[method-assign]


def train_poisoned(rank: int, steps: set[int], settings: Sequence[str]) -> int:
    """Train as launch.py does, with images of one rank spoilt in these steps."""
    poison(rank, steps)
    return main(settings, os.environ)
