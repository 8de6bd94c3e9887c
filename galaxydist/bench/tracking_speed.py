"""Steps of a training with and without its tracker, in turn in one run."""

import contextlib
import io
import tempfile
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from galaxydist.bench.common import Lap, show, show_json
from galaxydist.bench.in_memory import MemoryTrainer, write_noise, write_recipe
from galaxydist.bench.trainer_speed import read_clocks
from galaxydist.distributed import World, open_world
from galaxydist.recipe.resolve import load_recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.tracking.run_tracker import RunTracker, Tracker
from galaxydist.training.trainer import Trainer

# Turns before the timed ones: the tracker's program starts meanwhile.
WARM_ROUNDS = 2
# Draws of the rounds for the interval, and its limits in per cent.
DRAWS, LIMITS = 10_000, (2.5, 97.5)


@dataclass(frozen=True)
class TrackingConditions:
    """Conditions of the measurement.

    Args:
        model: architecture.
        image_size: width of the images in pixels.
        batch_size: galaxies of a step.
        steps: of a turn.
        rounds: timed turns with, and without.
        log_every: ``train.log_every``: each line is a row for the tracker.
    """

    model: str = "custom_cnn"
    image_size: int = 64
    batch_size: int = 48
    steps: int = 60
    rounds: int = 15
    log_every: int = 20


class SwitchedTracker(Tracker):
    """Tracker that learns of new lines only while it is on; it is then sent those of the time before, too.

    Args:
        tracker: the run's.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.run_id = tracker.run_id
        self.is_on = True
        self._tracker = tracker
        if isinstance(tracker, RunTracker):
            tracker.interval_s = 0.1  # so that its work falls into the turn that causes it

    def wake(self) -> None:
        if self.is_on:
            self._tracker.wake()

    def finish(self, exit_code: int) -> str | None:
        return self._tracker.finish(exit_code)


class SwitchedTrainer(MemoryTrainer):
    """``MemoryTrainer`` with a ``SwitchedTracker``."""

    @contextlib.contextmanager
    def open_tracker(self) -> Iterator[None]:
        with super().open_tracker():
            self.tracker = SwitchedTracker(self.tracker)
            yield


@dataclass(eq=False)
class Switching:
    """Times turns of steps with and without the tracker, in the order with, without, without, with, with, ...

    Called before each step with the number of steps done; returns True after the last turn.
    """

    trainer: Trainer
    steps: int
    rounds: int
    with_laps: list[Lap] = field(default_factory=list)
    without_laps: list[Lap] = field(default_factory=list)
    _started: Lap | None = None

    def __call__(self, step: int) -> bool:
        turn, place = divmod(step, self.steps)
        if place:
            return False
        now = read_clocks(self.trainer.world.device)
        if self._started is not None:
            (self.with_laps if has_tracker(turn - 1) else self.without_laps).append(now - self._started)
        if isinstance(self.trainer.tracker, SwitchedTracker):
            self.trainer.tracker.is_on = has_tracker(turn)
        self._started = now
        return turn == 2 * self.rounds


def has_tracker(turn: int) -> bool:
    """Return True for the turns 0, 3, 4, 7, 8, ..., which have the tracker."""
    return turn % 4 in (0, 3)


def measure_tracking(environ: MutableMapping[str, str], conditions: TrackingConditions) -> dict[str, Any]:
    """Print a line and, last, a line of JSON with the ratio of the times of steps with and without wandb's offline mode.

    Args:
        environ: environment variables.
        conditions: of the measurement.

    Returns:
        The content of the line of JSON.
    """
    with open_world("no", dict(environ)) as world, tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name:
        switching, num_rows = _train(world, Path(name), environ, conditions)
    pairs = zip(switching.with_laps[WARM_ROUNDS:], switching.without_laps[WARM_ROUNDS:], strict=True)
    ratios = np.array([[tracked.wall_s / bare.wall_s, tracked.cpu_s / bare.cpu_s] for tracked, bare in pairs])
    drawn = np.random.default_rng(0).choice(ratios[:, 0], (DRAWS, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), LIMITS)
    step_s = median(lap.wall_s for lap in switching.without_laps[WARM_ROUNDS:]) / conditions.steps
    ratio, ratio_cpu = (float(value) for value in np.median(ratios, axis=0))
    show(
        f"{conditions.model}, {conditions.image_size} px, batches of {conditions.batch_size}, {world.device.type}: a step of "
        f"{1000 * step_s:.1f} ms takes {ratio:.4f} of that with wandb (offline), 95 % interval {low:.4f} ... {high:.4f}, of its "
        f"process's CPU time {ratio_cpu:.4f}; {len(ratios)} turns of {conditions.steps} steps each, {num_rows} rows"
    )
    result = {
        "task": "tracking",
        "ratio": ratio,
        "ratio_low": float(low),
        "ratio_high": float(high),
        "ratio_cpu": ratio_cpu,
        "step_s": step_s,
        "rows": num_rows,
        **{"steps": conditions.steps, "rounds": len(ratios), "log_every": conditions.log_every},
        **{"model": conditions.model, "image_size": conditions.image_size, "batch_size": conditions.batch_size},
        "device": world.device.type,
        "threads": world.cores,
    }
    show_json(result)
    return result


def _train(
    world: World, folder: Path, environ: MutableMapping[str, str], conditions: TrackingConditions
) -> tuple[Switching, int]:
    """Train from memory, and return the times and the number of rows that wandb has stored."""
    rounds = WARM_ROUNDS + conditions.rounds
    run = RunFolder(folder / "run")
    settings: dict[str, object] = {
        "data.manifest": write_noise(folder / "shards", conditions.steps * conditions.batch_size),
        "run.dir": run.path,
        "data.image_size": conditions.image_size,
        "train.batch_size": conditions.batch_size,
        "train.micro_batch": 0,
        "train.precision": world.precision,
        "train.epochs": 2 * rounds + 1,
        "train.save_every": 2 * rounds + 1,
        "train.log_every": conditions.log_every,
        "eval.every": 2 * rounds + 1,
        "tracker.name": "wandb",
        "tracker.mode": "offline",
    }
    resolved = load_recipe(write_recipe(folder, conditions.model, settings))
    found: list[Switching] = []

    def build_watch(trainer: Trainer) -> Switching:
        found.append(Switching(trainer, conditions.steps, rounds))
        return found[0]

    with contextlib.redirect_stdout(io.StringIO()) as quiet, contextlib.redirect_stderr(quiet):
        SwitchedTrainer(resolved, world, environ, build_watch).run()
    world.mixed_precision.release()
    from galaxydist.tracking.wandb_files import offline_files, read_history

    files = offline_files(run.path, run.read_tracker()["run_id"])
    return found[0], sum(read_history(path).total() for path in files)
