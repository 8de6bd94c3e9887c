"""launch.py whose images are not finite in some steps: ``poisoned_launch.py RANK STEP[,STEP...] recipe=... key=value``."""

import math
import os
import sys
from typing import Any

from galaxydist.cli.train import main


def poison(rank: int, steps: set[int]) -> None:
    """Spoil one pixel of the images of one rank in these steps."""
    from galaxydist.training.update import Update

    images_of = Update._images

    def poisoned(self: Update, batch: Any, part: Any, mix: Any) -> Any:
        images_BCHW = images_of(self, batch, part, mix)
        if batch.step in steps and self.world.rank == rank:
            images_BCHW = images_BCHW.clone()
            images_BCHW[0, 0, 0, 0] = math.nan
        return images_BCHW

    Update._images = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    poison(int(sys.argv[1]), set(map(int, sys.argv[2].split(","))))
    sys.exit(main(sys.argv[3:], os.environ))
