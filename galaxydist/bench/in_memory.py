"""Training on images in memory, by the trainer and by plain PyTorch, for benchmarks without reading."""

import contextlib
import hashlib
import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galaxydist.distributed import World
from galaxydist.galaxy import GALAXY10_CLASSES, Galaxy
from galaxydist.loading.loader import Batch, Draw
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.order import rank_offsets
from galaxydist.shards.writer.writer import write_shards
from galaxydist.training.trainer import Trainer

# Number of different batches; they are repeated, with other augmentation.
HELD = 4
# Width of the images on the disk, which are not read.
STORED_SIZE = 16

# Called before each step with its number; returns True if the run shall end.
Watch = Callable[[int], bool]


@dataclass(frozen=True)
class NoiseSurvey:
    """Survey of noise in ten classes, all in the training split: the trainer needs a data set on the disk to start."""

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
    """Write shards of noise, which set the length of an epoch; return the path of their manifest."""
    return write_shards(NoiseSurvey(num_galaxies), folder, encoding="raw", shard_size=num_galaxies, workers=1).path


def write_recipe(folder: Path, model: str, settings: Mapping[str, object]) -> list[str]:
    """Write a recipe of the schema's defaults for a run without validation; return the arguments for ``load_recipe``.

    Args:
        folder: for the recipe's file, which is named after the model.
        model: name in the schema.
        settings: by key.
    """
    path = folder / f"{model}.yaml"
    path.write_text(f"model: {{name: {model}}}\n")
    return [f"{key}={value}" for key, value in {"recipe": path, "eval.checkpoint": "last", **settings}.items()]


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    clip_norm: float = 0.0,
    bf16: bool = False,
) -> Tensor:
    """Take one training step in plain PyTorch; return the loss, detached, on the device."""
    optimizer.zero_grad()
    with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=bf16):
        loss = nn.functional.cross_entropy(model(images_BCHW), labels_B, label_smoothing=label_smoothing)
    torch.autograd.backward(loss)
    if clip_norm > 0:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()


class MemoryBatches:
    """Batches of one rank: noise that is drawn once, at the positions of the epochs.

    Args:
        recipe: gives the seed, the batch size and the width of the images.
        rank, world_size: of the process.
        num_samples: of an epoch.
        num_classes: of the labels.
        draw: draws the random numbers of a training step.
        pin: use pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self, recipe: Recipe, rank: int, world_size: int, *, num_samples: int, num_classes: int, draw: Draw, pin: bool = False
    ) -> None:
        self._batch_size, self._steps_per_epoch = recipe.train.batch_size, num_samples // recipe.train.batch_size
        self._offsets, self._draw = rank_offsets(self._batch_size, rank, world_size), draw
        size, rows = recipe.data.image_size, len(self._offsets)
        generator = torch.Generator().manual_seed(recipe.seed + rank)
        images = torch.randint(256, (HELD, rows, size, size, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(num_classes, (HELD, rows), generator=generator)
        weights = torch.ones(rows)
        self._images, self._labels, self._weights = (t.pin_memory() if pin else t for t in (images, labels, weights))

    def at(self, step: int) -> Batch:
        """Return the batch of a step of the run."""
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        positions = epoch_step * self._batch_size + self._offsets
        images_BHWC, labels_B, positions_B = self._images[step % HELD], self._labels[step % HELD], torch.from_numpy(positions)
        draws_BN = torch.from_numpy(self._draw(epoch, positions, images_BHWC.shape[1]))
        return Batch(images_BHWC, labels_B, self._weights, positions_B, positions_B, epoch, step, draws_BN=draws_BN)


class MemoryTrainer(Trainer):
    """Trainer on batches in memory; it stops as on a signal when the watch returns True.

    Args:
        resolved, world, environ: as for ``Trainer``.
        watch: builds the watch from the trainer and the batches.
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

    def open_loader(self) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        batches = MemoryBatches(
            self.recipe,
            self.world.rank,
            self.world.size,
            num_samples=self.manifest.split("train").num_samples,
            num_classes=self.manifest.num_classes,
            draw=self.step.draw,
            pin=self.world.device.type == "cuda",
        )
        return contextlib.nullcontext(self._watched(batches, self._watch(self, batches)))

    def _watched(self, batches: MemoryBatches, is_over: Watch) -> Iterator[Batch]:
        """Yield the batches in order, and call the watch once before each step: a batch may be requested ahead of its step."""
        begun = -1
        for step in itertools.count(self.state.step):
            if self.state.step != begun:
                begun = self.state.step
                if is_over(begun):
                    self.stop.signal_number = signal.SIGTERM
            yield batches.at(step)
