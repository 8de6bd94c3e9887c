"""Training on images in memory, by the trainer and by plain PyTorch, for benchmarks without reading."""

import contextlib
import functools
import hashlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galaxydist.distributed import World
from galaxydist.galaxy import GALAXY10_CLASSES, EncodedImage, Galaxy
from galaxydist.loading.loader import Batch
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.shards.order import rank_offsets
from galaxydist.shards.writer.writer import write_shards
from galaxydist.training.loop import TrainLoop
from galaxydist.training.resume import Prune
from galaxydist.training.trainer import Trainer

# Number of different batches; they are repeated, with other augmentation.
HELD = 4
# Width of a noise image in independent pixels, and number of different ones.
GRAIN, NUM_DRAWN = 16, 64

# Called before each step with the number of steps done; returns True if the run shall end.
Watch = Callable[[int], bool]


@dataclass(frozen=True)
class NoiseSurvey:
    """Survey of noise in ten classes, all in the training split: the trainer needs a data set on the disk to start.

    Args:
        num_galaxies: number of images.
        jpeg_size: width of JPEGs, which take a loader about as long as a survey's; None: tiny images that are not read.
    """

    num_galaxies: int
    jpeg_size: int | None = None
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
        return hashlib.sha256(f"noise {self.num_galaxies} {self.jpeg_size}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row in range(start, stop):
            yield Galaxy(f"noise-{row}", self._image(row % NUM_DRAWN), int(self.labels[row]))

    def _image(self, number: int) -> EncodedImage | NDArray[np.uint8]:
        pixels = np.random.default_rng(number).integers(256, size=(GRAIN, GRAIN, 3), dtype=np.uint8)
        return pixels if self.jpeg_size is None else EncodedImage(_enlarged_jpeg(pixels.tobytes(), self.jpeg_size), "jpg")


@functools.cache
def _enlarged_jpeg(pixels: bytes, size: int) -> bytes:
    """Return a JPEG of GRAIN x GRAIN x 3 pixels enlarged to ``size``: at 256 pixels 14 kB, as large as a galaxy's."""
    import cv2
    import simplejpeg

    grain = np.frombuffer(pixels, np.uint8).reshape(GRAIN, GRAIN, 3)
    return bytes(simplejpeg.encode_jpeg(cv2.resize(grain, (size, size), interpolation=cv2.INTER_CUBIC), 90, "RGB", "420"))


def write_noise(folder: Path, num_galaxies: int, jpeg_size: int | None = None) -> Path:
    """Write shards of noise, which set the length of an epoch; return the path of their manifest."""
    encoding: Literal["raw", "jpeg"] = "raw" if jpeg_size is None else "jpeg"
    survey = NoiseSurvey(num_galaxies, jpeg_size)
    return write_shards(survey, folder, encoding=encoding, shard_size=min(num_galaxies, 1024), workers=1).path


def write_recipe(folder: Path, model: str, settings: Mapping[str, object]) -> list[str]:
    """Write a recipe of the schema's defaults for a run without validation; return the arguments for ``load_recipe``.

    Args:
        folder: for the recipe's file.
        model: name in the schema.
        settings: by key.
    """
    path = folder / "bench.yaml"
    path.write_text(json.dumps({"model": {"name": model}}))  # a name may have characters that are YAML's
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
        trainer: gives the seed, the ranks, the batch size, the width of the images, the classes and the length of an epoch; on a
            GPU the images are in pinned memory, from which it copies asynchronously.
    """

    def __init__(self, trainer: Trainer) -> None:
        recipe, world, manifest = trainer.recipe, trainer.world, trainer.manifest
        self._batch_size = recipe.train.batch_size
        self._steps_per_epoch = manifest.split("train").num_samples // self._batch_size
        self._offsets, self._draw = rank_offsets(self._batch_size, world.rank, world.size), trainer.step.draw
        size, rows = recipe.data.image_size, len(self._offsets)
        generator = torch.Generator().manual_seed(recipe.seed + world.rank)
        images = torch.randint(256, (HELD, rows, size, size, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(manifest.num_classes, (HELD, rows), generator=generator)
        held = images, labels, torch.ones(rows)
        self._images, self._labels, self._weights = (t.pin_memory() if world.device.type == "cuda" else t for t in held)

    def at(self, step: int) -> Batch:
        """Return the batch of a step of the run."""
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        positions, held = epoch_step * self._batch_size + self._offsets, step % HELD
        images_BHWC, positions_B = self._images[held], torch.from_numpy(positions)
        draws_BN = torch.from_numpy(self._draw(epoch, positions, images_BHWC.shape[1]))
        return Batch(images_BHWC, self._labels[held], self._weights, positions_B, positions_B, epoch, step, draws_BN=draws_BN)


class WatchedTrainer(Trainer):
    """Trainer that calls a watch before each step, and stops as on a signal when the watch returns True.

    Args:
        resolved, world, environ: as for ``Trainer``.
        build_watch: builds the watch from the trainer, before the first step.
    """

    def __init__(
        self,
        resolved: ResolvedRecipe,
        world: World,
        environ: MutableMapping[str, str],
        build_watch: Callable[[Trainer], Watch],
    ) -> None:
        super().__init__(resolved, world, environ)
        self._build_watch = build_watch
        self._is_over = False

    def run(self, prune: Prune | None = None) -> int:
        """Train until the watch returns True.

        Raises:
            KeyboardInterrupt: a signal has stopped the training before.
        """
        stop_signal = super().run(prune)
        if stop_signal and not self._is_over:
            raise KeyboardInterrupt
        return stop_signal

    def _build_loop(self, stack: contextlib.ExitStack) -> TrainLoop:
        loop = super()._build_loop(stack)
        is_over, step_done = self._build_watch(self), loop.step_done

        def watch(step: int) -> None:
            step_done(step)
            if is_over(step):
                self._is_over = True
                self.stop.signal_number = signal.SIGTERM

        loop.step_done = watch
        is_over(self.state.step)
        return loop


class MemoryTrainer(WatchedTrainer):
    """``WatchedTrainer`` on batches in memory."""

    def open_loader(self) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        return contextlib.nullcontext(map(MemoryBatches(self).at, itertools.count(self.state.step)))
