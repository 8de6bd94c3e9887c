"""``galaxydist bench trainer``: the trainer's loop against a bare PyTorch loop, in one process.

The bare loop trains on augmented images that are on the device already, in the trainer's memory format and with its optimizer: it
neither reads, copies nor augments. The trainer takes turns with it, once on batches in memory and once with its loader.
"""

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from galaxydist.bench.common import Lap, show, show_json, spread
from galaxydist.bench.in_memory import MemoryBatches, MemoryTrainer, WatchedTrainer, plain_step, write_noise, write_recipe
from galaxydist.distributed import World, open_world
from galaxydist.errors import UserError
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.models.build import build_model
from galaxydist.models.performance import compile_model, set_memory_format
from galaxydist.recipe.resolve import load_recipe
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
# Steps at the beginning of a turn with the loader that are not timed: it has decoded their batches (data.prefetch=4) during the
# turn of the bare loop.
UNTIMED_STEPS = 6
# Largest relative difference of the losses, of the first line and of any, by precision: both loops sum the same numbers in
# different orders, and the rounding differences grow from step to step. bfloat16 rounds to 8 bits, TensorFloat-32 to 11. On a GPU
# cuDNN also times its kernels for each loop, and may choose others: tf32 and bf16 only show a gross mistake (not yet run there).
TOLERANCES = {"fp64": (1e-10, 1e-4), "no": (1e-4, 0.05), "tf32": (1e-2, 0.5), "bf16": (0.05, 0.5)}


class BareLoop:
    """Plain PyTorch loop with the initial weights, batches, memory format and optimizer of a run of the trainer.

    Args:
        trainer: of the run, before its first step.

    Attributes:
        losses: of the steps, on the device.
    """

    def __init__(self, trainer: Trainer) -> None:
        recipe, world, trained = trainer.recipe, trainer.world, trainer.model
        self.device, self._augmented = world.device, trainer.step.augmented
        self._batches = MemoryBatches(trainer)
        self._schedule = LRSchedule(recipe.optim, trainer.length.total_steps)
        self._options: dict[str, Any] = {
            "label_smoothing": recipe.train.label_smoothing,
            "clip_norm": recipe.train.clip_norm,
            "bf16": world.precision == "bf16",
        }
        model = build_model(recipe.model, trainer.manifest.num_classes, recipe.data.image_size, trust_code=True)
        self._model = model.to(world.device, world.dtype)
        set_memory_format(model, trainer.memory_format)
        model.load_state_dict(trained.state_dict())
        copies = {id(old): new for old, new in zip(trained.parameters(), model.parameters(), strict=True)}
        self._optimizer: torch.optim.Optimizer = copy.deepcopy(trainer.state.optimizer.optimizer, copies)
        if recipe.train.compile:
            compile_model(model, world.device)
        self._ready: list[tuple[Tensor, Tensor]] = []
        self.losses: list[Tensor] = []

    def prepare(self, steps: range) -> Lap:
        """Augment the images of these steps and keep them on the device; return the time that an augmentation of all takes."""
        with DevicePrefetcher(map(self._batches.at, steps), self.device) as prefetcher:
            batches = [*prefetcher]
        before = read_clocks(self.device)
        for batch in batches:  # as in the trainer, where the memory of one batch is reused for the next
            self._augmented(batch, slice(None), None)
        augmentation = read_clocks(self.device) - before
        self._ready = [(self._augmented(batch, slice(None), None), batch.labels_B) for batch in batches]
        return augmentation

    def run(self, steps: range) -> Lap:
        """Take these steps, which are prepared, and return their time."""
        before = read_clocks(self.device)
        for step, (images_BCHW, labels_B) in zip(steps, self._ready, strict=True):
            for group in self._optimizer.param_groups:
                group["lr"] = self._schedule(step)
            self.losses.append(plain_step(self._model, self._optimizer, images_BCHW, labels_B, **self._options))
        lap = read_clocks(self.device) - before
        self._ready.clear()
        return lap


@dataclass(frozen=True)
class Sizes:
    """Sizes of model and images; None: the default of the device.

    Args:
        width: of the models that have one.
        image_size: width of the images in pixels.
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

    Called before each step of the trainer with the number of steps done.

    Args:
        bare: the bare loop.
        steps: timed steps in a turn.
        rounds: turns of each loop.
        untimed: steps of the trainer at the beginning of a turn that are not timed.
    """

    bare: BareLoop
    steps: int
    rounds: int
    untimed: int = 0
    trainer_laps: list[Lap] = field(default_factory=list)
    bare_laps: list[Lap] = field(default_factory=list)
    augment_laps: list[Lap] = field(default_factory=list)
    _started: Lap | None = None

    def __call__(self, step: int) -> bool:
        turn, place = divmod(step, self.untimed + self.steps)
        if place == 0:
            if self._started is not None:
                self.trainer_laps.append(read_clocks(self.bare.device) - self._started)
            for number in bare_turns(turn, self.rounds):
                steps = range(number * self.steps, (number + 1) * self.steps)
                self.augment_laps.append(self.bare.prepare(steps))
                self.bare_laps.append(self.bare.run(steps))
        if place == self.untimed:
            self._started = read_clocks(self.bare.device)
        return turn == self.rounds

    def seconds(self, laps: list[Lap], *, cpu: bool = False) -> list[float]:
        """Return the times of the timed rounds, of the wall clock or of the CPU."""
        return [lap.cpu_s if cpu else lap.wall_s for lap in laps[WARM_ROUNDS:]]

    def shares(self, *, augmented: bool, cpu: bool = False) -> list[float]:
        """Return the speed of the trainer relative to the bare loop, by round.

        Args:
            augmented: the time of the augmentation is added to that of the bare loop.
            cpu: of CPU time.
        """
        laps = (self.trainer_laps, self.bare_laps, self.augment_laps)
        rounds = zip(*(self.seconds(one, cpu=cpu) for one in laps), strict=True)
        return [(bare + augment * augmented) / ours for ours, bare, augment in rounds]


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
    precision: Literal["auto", "no", "bf16", "fp64"] = "auto",
    settings: Mapping[str, object] | None = None,
) -> list[dict[str, Any]]:
    """Print a line and, last, a line of JSON for each model.

    Args:
        environ: environment variables.
        models: names in the recipe.
        sizes: of model, images and batch.
        steps: steps in a turn.
        rounds: timed turns of each loop; their medians are reported.
        precision: as in the recipe.
        settings: further keys of the recipe, such as ``train.compile``.

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
            TrainerBench(world, environ, model, sizes or Sizes(), steps, WARM_ROUNDS + rounds, settings or {}).measure()
            for model in models
        ]
    show_json(*results)
    return results


@dataclass(frozen=True)
class TrainerBench:
    """Measurement of one model.

    Args:
        world, environ, model, sizes, steps, settings: as for ``measure_trainer``.
        rounds: with the rounds of warm-up.
    """

    world: World
    environ: MutableMapping[str, str]
    model: str
    sizes: Sizes
    steps: int
    rounds: int
    settings: Mapping[str, object]

    @property
    def image_size(self) -> int:
        return self.sizes.image_size or IMAGE_SIZES[self.world.device.type]

    @property
    def batch_size(self) -> int:
        return self.sizes.batch_size or BATCH_SIZES[self.world.device.type].get(self.model, 32)

    def measure(self) -> dict[str, Any]:
        """Run the trainer from memory and with its loader, each in turn with the bare loop, and print a line."""
        world, images = self.world, self.steps * self.batch_size
        with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name:
            run, other_run = RunFolder(Path(name) / "memory" / "run"), RunFolder(Path(name) / "loader" / "run")
            memory = self._train(run, MemoryTrainer, untimed=0, jpeg_size=None)
            lines = [line for line in run.metrics.read() if line["step"] <= self.steps * self.rounds]
            precision = "tf32" if world.device.type == "cuda" and world.precision == "no" else world.precision
            difference = compare_losses(lines, [float(loss) for loss in memory.bare.losses], precision)
            has_tracker = "run_id" in run.read_tracker()
            loader = self._train(other_run, WatchedTrainer, untimed=UNTIMED_STEPS, jpeg_size=self.image_size * 8 // 7)
        ratios, ratios_cpu = memory.shares(augmented=True), memory.shares(augmented=True, cpu=True)
        bare, augment_s = median(memory.seconds(memory.bare_laps)), median(memory.seconds(memory.augment_laps)) / self.steps
        ratio_loader = median(loader.shares(augmented=False)) / median(memory.shares(augmented=False))
        ours = images / median(memory.seconds(memory.trainer_laps))
        show(
            f"{self.model}, {self.image_size} px, batches of {self.batch_size}, {world.device.type}, {world.cores} threads, "
            f"precision {world.precision}: bare loop {images / bare:,.0f} img/s, augmentation {1000 * augment_s:.1f} ms a batch, "
            f"trainer {ours:,.0f} img/s; (bare + augmentation) / trainer {spread(ratios)}, of CPU time {median(ratios_cpu):.3f}; "
            f"with the loader {ratio_loader:.3f} of that; relative difference of the losses at most {difference:.1e}"
        )
        return {
            "task": "trainer",
            "model": self.model,
            "bare": images / bare,
            "augment_s": augment_s,
            "ours": ours,
            "ratio": median(ratios),
            "ratio_least": min(ratios),
            "ratio_greatest": max(ratios),
            "ratio_cpu": median(ratios_cpu),
            "ratio_to_bare": median(memory.shares(augmented=False)),
            "ratio_loader": ratio_loader,
            "loss_difference": difference,
            **{"image_size": self.image_size, "batch_size": self.batch_size},
            **{"steps": self.steps, "rounds": self.rounds - WARM_ROUNDS},
            "device": world.device.type,
            "precision": world.precision,
            "threads": world.cores,
            "tracker": "wandb offline" if has_tracker else "none",
        }

    def _train(self, folder: RunFolder, make: Callable[..., WatchedTrainer], *, untimed: int, jpeg_size: int | None) -> Turns:
        """Train in turn with the bare loop, and return the times."""
        folder.path.mkdir(parents=True)
        num_images = (untimed + self.steps) * self.batch_size
        settings: dict[str, object] = {
            "data.manifest": write_noise(folder.path.parent / "shards", num_images, jpeg_size),
            "run.dir": folder.path,
            "data.image_size": self.image_size,
            "train.batch_size": self.batch_size,
            "train.micro_batch": 0,  # as in the bare loop
            "train.precision": self.world.precision,
            "train.epochs": self.rounds + 1,  # one turn each, and one in which the run stops
            "train.save_every": self.rounds + 1,
            "tracker.name": "wandb",
            "tracker.mode": "offline",
        }
        if self.model in HAVE_WIDTH:
            settings["model.width"] = self.sizes.width
        resolved = load_recipe(write_recipe(folder.path.parent, self.model, {**settings, **self.settings}))
        turns: list[Turns] = []

        def build_watch(trainer: Trainer) -> Turns:
            turns.append(Turns(BareLoop(trainer), self.steps, self.rounds, untimed))
            return turns[0]

        # The trainer's own figures include the turns of the bare loop.
        with contextlib.redirect_stdout(io.StringIO()) as quiet, contextlib.redirect_stderr(quiet):
            make(resolved, self.world, self.environ, build_watch).run()
        self.world.mixed_precision.release()
        return turns[0]


def compare_losses(lines: Sequence[Mapping[str, Any]], bare: Sequence[float], precision: str) -> float:
    """Compare the trainer's logged losses with those of the bare loop.

    Args:
        lines: of metrics.jsonl: ``train/loss`` is the mean since the line before.
        bare: loss of each step.
        precision: key of TOLERANCES.

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
    first, largest = TOLERANCES[precision]
    is_same = differences[0] < first and max(differences) < largest
    assert is_same, f"the losses of the two loops differ: relative differences {differences}"
    return max(differences)
