"""``galaxydist bench trainer``: the trainer's loop against a bare PyTorch loop, in turn within one process."""

import contextlib
import copy
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from galaxydist.bench.in_memory import MemoryBatches, MemorySession, write_noise, write_recipe
from galaxydist.distributed import World, init_distributed, shutdown_distributed
from galaxydist.errors import UserError
from galaxydist.models.build import build_model
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.training.optimizer import LRSchedule
from galaxydist.training.trainer import Parts

# Training as one would write it in plain PyTorch, to compare the trainer with.


class BareLoop:
    """The same start, batches, changes to the images and optimizer as a run of the trainer, and nothing around them.

    Args:
        world: the device and the precision.
        recipe: of the run.
        parts: of the run, before its first step.
        batches: of the run.
        num_classes: K.
    """

    def __init__(self, world: World, recipe: Recipe, parts: Parts, batches: MemoryBatches, num_classes: int) -> None:
        self.device, self.is_mixed = world.device, world.precision == "bf16"
        self.augment, self.batches = parts.augment, batches
        self.rate = LRSchedule(recipe.optim, parts.schedule.total_steps)
        self.clip_norm, self.label_smoothing = recipe.train.clip_norm, recipe.train.label_smoothing
        theirs = parts.strategy.model
        self.model = build_model(recipe.model, num_classes, recipe.data.image_size).to(world.device, world.dtype)
        self.model.load_state_dict(theirs.state_dict())
        ours = {id(old): new for old, new in zip(theirs.parameters(), self.model.parameters(), strict=True)}
        self.optimizer: torch.optim.Optimizer = copy.deepcopy(parts.state.optimizer.optimizer, ours)
        self.losses: list[Tensor] = []

    def run(self, steps: range) -> None:
        """Take these steps; the loss of each is kept, on the device."""
        for step in steps:
            batch = self.batches.at(step)
            images_BCHW = self.augment(batch.images_BHWC.to(self.device, non_blocking=True), batch.epoch, batch.positions_B)
            labels_B = batch.labels_B.to(self.device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate.at(step)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
                loss = functional.cross_entropy(self.model(images_BCHW), labels_B, label_smoothing=self.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            self.losses.append(loss.detach())


MODELS = ("custom_cnn", "resnet18")
HAVE_WIDTH = ("custom_cnn", "d4_cnn")
# The rounds before them only warm up.
WARM_ROUNDS = 1
# Images in a batch, by device and model.
BATCH_SIZES = {"cpu": {"custom_cnn": 48, "resnet18": 32}, "cuda": {"custom_cnn": 192, "resnet18": 192}}
IMAGE_SIZES = {"cpu": 64, "cuda": 224}
# Both loops sum the same numbers in another order, and what is rounded otherwise grows from step to step.
FIRST_TOLERANCE, TOLERANCE = 1e-4, 0.05


@dataclass(frozen=True)
class Sizes:
    """What is trained; None: as suits the device.

    Args:
        width: of the models that have one.
        image_size: of the images, stored and seen, in pixels.
        batch_size: of a step.
    """

    width: int = 24
    image_size: int | None = None
    batch_size: int | None = None


@dataclass
class Turns:
    """Lets the bare loop take its steps before some of the trainer's, and takes the time of both: A B B A A B B A ...

    Called before each step of the trainer with its number.

    Args:
        bare: the other loop.
        steps: of a turn.
        rounds: turns of each.
    """

    bare: BareLoop
    steps: int
    rounds: int
    ours: list["Lap"] = field(default_factory=list)
    theirs: list["Lap"] = field(default_factory=list)
    _started: "Lap | None" = None

    def __call__(self, step: int) -> bool:
        if step % self.steps:
            return False
        now = Lap.now(self.bare.device)
        if self._started is not None:
            self.ours.append(now - self._started)
        turn = step // self.steps
        for number in bare_turns(turn, self.rounds):
            before = Lap.now(self.bare.device)
            self.bare.run(range(number * self.steps, (number + 1) * self.steps))
            self.theirs.append(Lap.now(self.bare.device) - before)
        self._started = Lap.now(self.bare.device)
        return turn == self.rounds


@dataclass(frozen=True)
class Lap:
    """Seconds by the clock, and of processor time of this process."""

    wall_s: float
    cpu_s: float

    def __sub__(self, other: "Lap") -> "Lap":
        return Lap(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)

    @classmethod
    def now(cls, device: torch.device) -> "Lap":
        """When what the device was given is done."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cls(time.perf_counter(), time.process_time())


def bare_turns(turn: int, rounds: int) -> list[int]:
    """The turns of the bare loop before the trainer's turn number ``turn`` (from 0; ``rounds``: after the last)."""
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
        steps: of a turn.
        rounds: turns of each loop that count; medians over them are given.
        precision: as in the recipe.

    Returns:
        What the lines of JSON hold.

    Raises:
        UserError: settings that the trainer does not take; fp16, for which a bare loop would need a scaler too.
        AssertionError: the two did not do the same.
    """
    world = init_distributed(precision, dict(environ))
    try:
        if world.precision == "fp16":
            raise UserError("here train.precision=auto is fp16, which the bare loop does not do: give --precision no")
        results = [
            _measure(world, environ, model, sizes or Sizes(), steps=steps, rounds=WARM_ROUNDS + rounds) for model in models
        ]
    finally:
        shutdown_distributed()
    for result in results:
        print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}))
    return results


def _measure(
    world: World, environ: MutableMapping[str, str], model: str, sizes: Sizes, *, steps: int, rounds: int
) -> dict[str, Any]:
    image_size = sizes.image_size or IMAGE_SIZES[world.device.type]
    batch_size = sizes.batch_size or BATCH_SIZES[world.device.type].get(model, 32)
    turns: list[Turns] = []
    with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name:
        folder = RunFolder(Path(name) / "run")
        settings = {
            "data.manifest": write_noise(Path(name) / "shards", steps * batch_size),
            "run.dir": folder.path,
            "data.image_size": image_size,
            "train.batch_size": batch_size,
            "train.precision": world.precision,
            "train.epochs": rounds + 1,  # one turn each, and room to stop in
            "train.save_every": rounds + 1,
            "tracker.name": "wandb",
            "tracker.mode": "offline",
        }
        if model in HAVE_WIDTH:
            settings["model.width"] = sizes.width
        resolved = load_recipe(write_recipe(Path(name), model, settings))

        def watch(parts: Parts, batches: MemoryBatches) -> Turns:
            turns.append(Turns(BareLoop(world, resolved.recipe, parts, batches, num_classes=10), steps, rounds))
            return turns[0]

        # The trainer's figures count our pauses.
        with contextlib.redirect_stdout(io.StringIO()) as quiet, contextlib.redirect_stderr(quiet):
            MemorySession(resolved, world, environ, watch).run()
        world.accelerator.free_memory()
        lines = [line for line in folder.metrics.read() if line["step"] <= steps * rounds]
        has_tracker = "run_id" in folder.read_tracker()
    (both,) = turns
    difference = compare_losses(lines, [float(loss) for loss in both.bare.losses])
    result = {"task": "trainer", "model": model, **_speeds(both, steps * batch_size), "loss_difference": difference}
    result |= {"image_size": image_size, "batch_size": batch_size, "steps": steps, "rounds": rounds - WARM_ROUNDS}
    result |= {"device": world.device.type, "precision": world.precision, "threads": world.cores}
    result |= {"tracker": "wandb offline" if has_tracker else "none"}
    _show(result)
    return result


def _speeds(both: Turns, num_images: int) -> dict[str, Any]:
    ours, bare = both.ours[WARM_ROUNDS:], both.theirs[WARM_ROUNDS:]
    ratios = [theirs.wall_s / mine.wall_s for mine, theirs in zip(ours, bare, strict=True)]
    return {
        "ours": statistics.median(num_images / lap.wall_s for lap in ours),
        "bare": statistics.median(num_images / lap.wall_s for lap in bare),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "ratio_cpu": statistics.median(theirs.cpu_s / mine.cpu_s for mine, theirs in zip(ours, bare, strict=True)),
    }


def compare_losses(lines: Sequence[Mapping[str, Any]], bare: Sequence[float]) -> float:
    """The trainer's log against the bare loop's losses, step by step: both must have done the same.

    Args:
        lines: of metrics.jsonl: ``train/loss`` is the mean since the line before.
        bare: loss of each step.

    Returns:
        The greatest relative difference.
    """
    assert lines and lines[-1]["step"] == len(bare), "the two loops did not take equally many steps"
    differences: list[float] = []
    for before, line in pairwise([{"step": 0}, *lines]):
        theirs = statistics.fmean(bare[before["step"] : line["step"]])
        differences.append(abs(line["train/loss"] - theirs) / theirs)
    is_same = differences[0] < FIRST_TOLERANCE and max(differences) < TOLERANCE
    assert is_same, f"the two loops have other losses: relative differences {differences}"
    return max(differences)


def _show(result: Mapping[str, Any]) -> None:
    print(
        f"{result['model']}, {result['image_size']} px, batches of {result['batch_size']}, {result['device']}, "
        f"{result['threads']} threads, precision {result['precision']}: trainer {result['ours']:,.0f} img/s, bare PyTorch "
        f"{result['bare']:,.0f} img/s; ratio {result['ratio']:.3f} ({result['ratio_least']:.3f} ... "
        f"{result['ratio_greatest']:.3f}), of processor time {result['ratio_cpu']:.3f}; losses alike within "
        f"{result['loss_difference']:.1e}",
        flush=True,
    )
