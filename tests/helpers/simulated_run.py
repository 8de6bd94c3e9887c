"""A run on simulated galaxies for tests: the shipped network, trained on for some steps, in seconds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.galaxy import GALAXY10_CLASSES, Galaxy
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.simulate.survey import draw_image, plan_survey
from tests.helpers.runs import run_here

# Of a seed that the shipped network was not trained on.
SEED = 20_261_130


@dataclass(frozen=True)
class SimulatedSurvey:
    """Simulated galaxies, equally many of each class, 2 : 1 : 1 for train, val and test, drawn when they are read."""

    num_galaxies: int = 400
    name: str = "simulated"
    variant: str = "original"
    class_names: tuple[str, ...] = GALAXY10_CLASSES
    source_hash: str = "1" * 64
    slab_length: int = 16

    @property
    def labels(self) -> NDArray[np.int64]:
        return plan_survey(self.num_galaxies, SEED, balanced=True).labels

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        rows = np.arange(self.num_galaxies)
        return {"train": rows[rows % 4 < 2], "val": rows[rows % 4 == 2], "test": rows[rows % 4 == 3]}

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        plan = plan_survey(self.num_galaxies, SEED, balanced=True)
        for row in range(start, stop):
            pixels, _, pxscale = draw_image(plan, row)
            yield Galaxy(f"sim-{row:05d}", pixels, int(plan.labels[row]), extras={"pxscale": pxscale})


def train_simulated(folder: Path) -> tuple[Path, Path]:
    """Train on simulated galaxies in a new folder, and return the run folder and the manifest of the shards."""
    manifest = write_shards(SimulatedSurvey(), folder / "shards", encoding="jpeg", shard_size=64, workers=1).path
    changes = ("model.width=18", "model.pretrained=true", "train.epochs=1", "train.batch_size=20", "train.ema=0", "optim.lr=1e-4")
    settings = (*changes, "eval.figures=false", "tracker.name=none", f"data.manifest={manifest}", f"run.dir={folder / 'run'}")
    assert run_here(["recipe=simulated_start", *settings]) == 0
    return folder / "run", manifest
