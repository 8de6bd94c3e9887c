"""``galaxydist bench trainer``: the trainer's loop against a plain PyTorch loop, in one process."""

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from galaxydist.bench.common import Lap, show, show_json, spread
from galaxydist.bench.in_memory import MemoryBatches, MemoryTrainer, plain_step, write_noise, write_recipe
from galaxydist.distributed import World, open_world
from galaxydist.errors import UserError
from galaxydist.models.build import build_model
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.training.optimizer import LRSchedule
from galaxydist.training.trainer import Trainer

MODELS = ("custom_cnn", "resnet18")
HAVE_WIDTH = ("custom_cnn", "d4_cnn")
# Rounds of warm-up before the timed ones.
WARM_ROUNDS = 1
# Images in a batch, by device and model.
BATCH_SIZES = {"cpu": {"custom_cnn": 48, "resnet18": 32}, "cuda": {"custom_cnn": 192, "resnet18": 192}}
IMAGE_SIZES = {"cpu": 64, "cuda": 224}
# Both loops sum the same numbers in different orders, and the rounding differences grow from step to step.
FIRST_TOLERANCE, TOLERANCE = 1e-4, 0.05


class BareLoop:
    """Plain PyTorch loop with the same initial weights, batches, augmentation and optimizer as a run of the trainer.

    Args:
        world: gives the device and the precision.
        recipe: of the run.
        trainer: of the run, before its first step.
        batches: of the run.
        num_classes: K.
    """

    def __init__(self, world: World, recipe: Recipe, trainer: Trainer, batches: MemoryBatches, num_classes: int) -> None:
        self.device, self.batches, self.augment = world.device, batches, trainer.augment
        self.schedule = LRSchedule(recipe.optim, trainer.length.total_steps)
        self.options: dict[str, Any] = {
            "label_smoothing": recipe.train.label_smoothing,
            "clip_norm": recipe.train.clip_norm,
            "bf16": world.precision == "bf16",
        }
        trained = trainer.model
        self.model = build_model(recipe.model, num_classes, recipe.data.image_size, trust_code=True).to(world.device, world.dtype)
        self.model.load_state_dict(trained.state_dict())
        copies = {id(old): new for old, new in zip(trained.parameters(), self.model.parameters(), strict=True)}
        self.optimizer: torch.optim.Optimizer = copy.deepcopy(trainer.state.optimizer.optimizer, copies)
        self.losses: list[Tensor] = []

    def run(self, steps: range) -> None:
        """Take these steps; the loss of each stays on the device."""
        for step in steps:
            batch = self.batches.at(step)
            images_BCHW = self.augment(batch.images_BHWC.to(self.device, non_blocking=True), batch.epoch, batch.positions_B)
            labels_B = batch.labels_B.to(self.device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule(step)
            self.losses.append(plain_step(self.model, self.optimizer, images_BCHW, labels_B, **self.options))


@dataclass(frozen=True)
class Sizes:
    """Sizes of model and images; None: the default of the device.

    Args:
        width: of the models that have one.
        image_size: width of the images, stored and seen, in pixels.
        batch_size: of a step.
    """

    width: int = 24
    image_size: int | None = None
    batch_size: int | None = None


def read_clocks(device: torch.device) -> Lap:
    """Return the times when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Lap(time.perf_counter(), time.process_time())


@dataclass
class Turns:
    """Interleaves turns of the bare loop with those of the trainer, in the order A B B A A B B A ..., and times both.

    Called before each step of the trainer with its number.

    Args:
        bare: the bare loop.
        steps: steps in a turn.
        rounds: turns of each loop.
    """

    bare: BareLoop
    steps: int
    rounds: int
    trainer_laps: list[Lap] = field(default_factory=list)
    bare_laps: list[Lap] = field(default_factory=list)
    _started: Lap | None = None

    def __call__(self, step: int) -> bool:
        if step % self.steps:
            return False
        device, turn = self.bare.device, step // self.steps
        now = read_clocks(device)
        if self._started is not None:
            self.trainer_laps.append(now - self._started)
        for number in bare_turns(turn, self.rounds):
            before = read_clocks(device)
            self.bare.run(range(number * self.steps, (number + 1) * self.steps))
            self.bare_laps.append(read_clocks(device) - before)
        self._started = read_clocks(device)
        return turn == self.rounds


def bare_turns(turn: int, rounds: int) -> list[int]:
    """Return the turns of the bare loop before the trainer's turn number ``turn`` (from 0; ``rounds``: after the last)."""
    return [number for number in (turn - 1, turn) if number < rounds] if turn % 2 else []


def measure_trainer(
    environ: MutableMapping[str, str],
    *,
    models: Sequence[str] = MODELS,
    sizes: Sizes | None = None,
    steps: int = 20,
    rounds: int = 10,
    precision: Literal["auto", "no", "bf16"] = "auto",
) -> list[dict[str, Any]]:
    """Print a line and, last, a line of JSON for each model.

    Args:
        environ: environment variables.
        models: names in the recipe.
        sizes: of model, images and batch.
        steps: steps in a turn.
        rounds: timed turns of each loop; their medians are reported.
        precision: as in the recipe.

    Returns:
        The content of the lines of JSON.

    Raises:
        UserError: settings that the trainer refuses; fp16, for which the bare loop has no gradient scaler.
        AssertionError: the losses of the two loops differ.
    """
    with open_world(precision, dict(environ)) as world:
        if world.precision == "fp16":
            raise UserError("train.precision=auto is fp16 here, which the bare loop does not support: give --precision no")
        results = [
            _measure(world, environ, model, sizes or Sizes(), steps=steps, rounds=WARM_ROUNDS + rounds) for model in models
        ]
    show_json(*results)
    return results


def _measure(
    world: World, environ: MutableMapping[str, str], model: str, sizes: Sizes, *, steps: int, rounds: int
) -> dict[str, Any]:
    device = world.device.type
    image_size = sizes.image_size or IMAGE_SIZES[device]
    batch_size = sizes.batch_size or BATCH_SIZES[device].get(model, 32)
    turns: list[Turns] = []
    with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name:
        folder = RunFolder(Path(name) / "run")
        settings = {
            "data.manifest": write_noise(Path(name) / "shards", steps * batch_size),
            "run.dir": folder.path,
            "data.image_size": image_size,
            "train.batch_size": batch_size,
            "train.precision": world.precision,
            "train.epochs": rounds + 1,  # one turn each, and one in which the run stops
            "train.save_every": rounds + 1,
            "tracker.name": "wandb",
            "tracker.mode": "offline",
        }
        if model in HAVE_WIDTH:
            settings["model.width"] = sizes.width
        resolved = load_recipe(write_recipe(Path(name), model, settings))

        def watch(trainer: Trainer, batches: MemoryBatches) -> Turns:
            turns.append(Turns(BareLoop(world, resolved.recipe, trainer, batches, num_classes=10), steps, rounds))
            return turns[0]

        # The trainer's own figures include the turns of the bare loop.
        with contextlib.redirect_stdout(io.StringIO()) as quiet, contextlib.redirect_stderr(quiet):
            MemoryTrainer(resolved, world, environ, watch).run()
        world.accelerator.free_memory()
        lines = [line for line in folder.metrics.read() if line["step"] <= steps * rounds]
        has_tracker = "run_id" in folder.read_tracker()
    difference = compare_losses(lines, [float(loss) for loss in turns[0].bare.losses])
    laps = list(zip(turns[0].trainer_laps[WARM_ROUNDS:], turns[0].bare_laps[WARM_ROUNDS:], strict=True))
    ours, bare = (steps * batch_size / median(lap.wall_s for lap in one) for one in zip(*laps, strict=True))
    ratios = [plain.wall_s / own.wall_s for own, plain in laps]
    conditions = {"image_size": image_size, "batch_size": batch_size, "steps": steps, "rounds": rounds - WARM_ROUNDS}
    ratio_cpu = median(plain.cpu_s / own.cpu_s for own, plain in laps)
    show(
        f"{model}, {image_size} px, batches of {batch_size}, {device}, {world.cores} threads, precision {world.precision}: "
        f"trainer {ours:,.0f} img/s, plain PyTorch {bare:,.0f} img/s; ratio {spread(ratios)}, of CPU time {ratio_cpu:.3f}; "
        f"relative difference of the losses at most {difference:.1e}"
    )
    return {
        "task": "trainer",
        "model": model,
        "ours": ours,
        "bare": bare,
        "ratio": median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "ratio_cpu": ratio_cpu,
        "loss_difference": difference,
        **conditions,
        "device": device,
        "precision": world.precision,
        "threads": world.cores,
        "tracker": "wandb offline" if has_tracker else "none",
    }


def compare_losses(lines: Sequence[Mapping[str, Any]], bare: Sequence[float]) -> float:
    """Compare the trainer's logged losses with those of the bare loop.

    Args:
        lines: of metrics.jsonl: ``train/loss`` is the mean since the line before.
        bare: loss of each step.

    Returns:
        The greatest relative difference.

    Raises:
        AssertionError: the numbers of steps or the losses differ.
    """
    assert lines and lines[-1]["step"] == len(bare), "the two loops took different numbers of steps"
    differences: list[float] = []
    for before, line in pairwise([{"step": 0}, *lines]):
        expected = fmean(bare[before["step"] : line["step"]])
        differences.append(abs(line["train/loss"] - expected) / expected)
    is_same = differences[0] < FIRST_TOLERANCE and max(differences) < TOLERANCE
    assert is_same, f"the losses of the two loops differ: relative differences {differences}"
    return max(differences)
