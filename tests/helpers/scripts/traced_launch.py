"""launch.py that also writes down what each step was made of.

A line of FOLDER/rank-0-PID.jsonl: step, rank, world size, the sample number and a checksum of the
augmented image at each position of the rank's part of the batch, the learning rate, this process's number.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galaxydist.cli.train import main


def trace(folder: Path) -> None:
    """Let every step of this process write its line."""
    from galaxydist.training.mixup import take
    from galaxydist.training.step import TrainStep

    take_step, augmented = TrainStep.__call__, TrainStep.augmented
    images: dict[int, int] = {}

    def traced_images(self: TrainStep, batch: Any, part: Any, mix: Any) -> Any:
        images_BCHW = augmented(self, batch, part, mix)
        for position, image in zip(take(batch.positions_B, part).tolist(), images_BCHW.numpy(), strict=True):
            images[position] = zlib.crc32(np.ascontiguousarray(image))
        return images_BCHW

    def traced_step(self: TrainStep, batch: Any, step: int) -> Any:
        images.clear()
        sums = take_step(self, batch, step)
        world = self.world
        line = {
            "step": step,
            "rank": world.rank,
            "world_size": world.size,
            "samples": dict(zip(batch.positions_B.tolist(), batch.samples_B.tolist(), strict=True)),
            "images": images,
            "rate": self.schedule(step),
            "pid": os.getpid(),
        }
        with (folder / f"rank-{world.rank}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return sums

    TrainStep.__call__ = traced_step  # type: ignore[method-assign]
    TrainStep.augmented = traced_images  # type: ignore[method-assign]


def train_traced(folder: Path, settings: Sequence[str]) -> int:
    """Train as launch.py does, with a line for each step."""
    folder.mkdir(parents=True, exist_ok=True)
    trace(folder)
    return main(settings, os.environ)
