"""Training on images in memory: the trainer's own session, all but the reader. For benchmarks that are not about reading."""

import hashlib
import signal
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from galaxydist.distributed import World
from galaxydist.galaxy import GALAXY10_CLASSES, Galaxy
from galaxydist.loading.loader import Batch
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.order import rank_offsets
from galaxydist.shards.writer.writer import write_shards
from galaxydist.training.state import TrainState
from galaxydist.training.trainer import Trainer

# Different batches that are held; after them the first comes again, turned otherwise.
HELD = 4
# Width of the images on the disk, which nobody reads.
STORED_SIZE = 16

# Called before each step with its number; whether the run is to end.
Watch = Callable[[int], bool]


@dataclass(frozen=True)
class NoiseSurvey:
    """Noise in ten classes, all of it to train on: what the trainer wants to find on the disk before it starts."""

    num_galaxies: int
    name: str = "noise"
    variant: str = "original"
    class_names: tuple[str, ...] = GALAXY10_CLASSES
    slab_length: int = 256

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(self.num_galaxies) % len(self.class_names)

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {"train": np.arange(self.num_galaxies)}

    @property
    def source_hash(self) -> str:
        return hashlib.sha256(f"noise {self.num_galaxies}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row in range(start, stop):
            pixels = np.random.default_rng(row).integers(256, size=(STORED_SIZE, STORED_SIZE, 3), dtype=np.uint8)
            yield Galaxy(f"noise-{row}", pixels, int(self.labels[row]))


def write_noise(folder: Path, num_galaxies: int) -> Path:
    """Shards of noise; their manifest. An epoch of a run on them is as long as they say."""
    return write_shards(NoiseSurvey(num_galaxies), folder, encoding="raw", shard_size=num_galaxies, workers=1).path


def write_recipe(folder: Path, model: str, settings: Mapping[str, object]) -> list[str]:
    """A recipe of the schema's defaults for a run without validation; what ``load_recipe`` is told.

    Args:
        folder: for its file, which is named by the model.
        model: name in the schema.
        settings: by key.
    """
    path = folder / f"{model}.yaml"
    path.write_text(f"model: {{name: {model}}}\n")
    return [f"{key}={value}" for key, value in {"recipe": path, "eval.checkpoint": "last", **settings}.items()]


class MemoryBatches:
    """One rank's batches: noise that was drawn once, at the positions of the epochs.

    Args:
        recipe: seed, batch and width of the images.
        rank, world_size: of the process.
        num_samples: of an epoch.
        num_classes: of the labels.
        pin: in memory that a GPU copies from while the host goes on.
    """

    def __init__(
        self, recipe: Recipe, rank: int, world_size: int, *, num_samples: int, num_classes: int, pin: bool = False
    ) -> None:
        self._batch_size, self._steps_per_epoch = recipe.train.batch_size, num_samples // recipe.train.batch_size
        self._offsets = torch.from_numpy(rank_offsets(self._batch_size, rank, world_size))
        size, rows = recipe.data.image_size, len(self._offsets)
        chance = torch.Generator().manual_seed(recipe.seed + rank)
        images = torch.randint(256, (HELD, rows, size, size, 3), dtype=torch.uint8, generator=chance)
        labels = torch.randint(num_classes, (HELD, rows), generator=chance)
        weights = torch.ones(rows)
        self._images, self._labels, self._weights = (t.pin_memory() if pin else t for t in (images, labels, weights))

    def at(self, step: int) -> Batch:
        """The batch of a step of the run."""
        epoch, place = divmod(step, self._steps_per_epoch)
        positions_B = place * self._batch_size + self._offsets
        held = step % HELD
        return Batch(self._images[held], self._labels[held], self._weights, positions_B, positions_B, epoch, step)


class MemoryReader:
    """The batches one after the other, in a reader's place.

    Args:
        batches: of this rank.
        start_step: whose batch is the first.
        state: says which step is taken: a batch may be asked for ahead of its step.
        before_step: called once before each step.
    """

    def __init__(self, batches: MemoryBatches, start_step: int, state: TrainState, before_step: Callable[[int], None]) -> None:
        self._batches, self._state, self._before_step = batches, state, before_step
        self._next, self._begun = start_step, -1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._state.step != self._begun:
            self._begun = self._state.step
            self._before_step(self._begun)
        self._next += 1
        return self._batches.at(self._next - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class MemoryTrainer(Trainer):
    """Trains as ``launch.py`` does, but on batches in memory, and stops as after a signal when ``Watch`` returns True.

    Args:
        resolved, world, environ: as for ``Trainer``.
        watch: makes the function that is called before each step, from the trainer and the batches.
    """

    def __init__(
        self,
        resolved: ResolvedRecipe,
        world: World,
        environ: MutableMapping[str, str],
        watch: Callable[[Trainer, MemoryBatches], Watch],
    ) -> None:
        super().__init__(resolved, world, environ)
        self._watch = watch

    def open_loader(self) -> MemoryReader:
        batches = MemoryBatches(
            self.recipe,
            self.world.rank,
            self.world.size,
            num_samples=self.manifest.split("train").num_samples,
            num_classes=self.manifest.num_classes,
            pin=self.world.device.type == "cuda",
        )
        is_over = self._watch(self, batches)

        def before_step(step: int) -> None:
            if is_over(step):
                self.stop.signal_number = signal.SIGTERM

        return MemoryReader(batches, self.state.step, self.state, before_step)
