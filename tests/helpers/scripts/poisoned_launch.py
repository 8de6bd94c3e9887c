"""launch.py whose images are not finite in some steps, or which hangs in one."""

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from galaxydist.cli.train import main


def poison(rank: int, steps: set[int], hang_at: int | None = None, what: str = "image") -> None:
    """Spoil one pixel of the images of one rank, or only its loss, in these steps, and let all hang in another."""
    from galaxydist.training.loss import WeightedCrossEntropy
    from galaxydist.training.step import TrainStep

    images_of, loss_of = TrainStep.augmented, WeightedCrossEntropy.summed_loss
    is_now = False

    def poisoned(self: TrainStep, batch: Any, part: Any, mix: Any) -> Any:
        nonlocal is_now
        images_BCHW = images_of(self, batch, part, mix)
        if batch.step == hang_at:
            time.sleep(1000)
        is_now = batch.step in steps and self.world.rank == rank
        if is_now and what == "image":
            images_BCHW = images_BCHW.clone()
            images_BCHW[0, 0, 0, 0] = math.nan
        return images_BCHW

    def inflated(self: WeightedCrossEntropy, logits_BK: Any, targets: Any) -> Any:
        return loss_of(self, logits_BK, targets) + (math.inf if is_now and what == "loss" else 0.0)  # its gradient is finite

    TrainStep.augmented = poisoned  # type: ignore[method-assign]
    WeightedCrossEntropy.summed_loss = inflated  # type: ignore[method-assign]


def train_poisoned(rank: int, steps: set[int], settings: Sequence[str], hang_at: int | None = None, what: str = "image") -> int:
    """Train as launch.py does, with images or the loss of one rank spoilt in these steps, and a step in which it hangs."""
    poison(rank, steps, hang_at, what)
    sys.argv[1:] = settings  # wandb sends the command line
    return main(settings, os.environ)
