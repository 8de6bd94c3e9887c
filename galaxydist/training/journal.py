"""What a training run says while it goes: metrics.jsonl, the tracker, the progress bar. Sums are kept, and divided when told."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from galaxydist.runs.folder import RunFolder
from galaxydist.training.tracking import Tracker
from galaxydist.training.world import World

# A run that would take longer than this on a CPU is told of a smaller one.
LONG_RUN_S = 1800.0
MEASURED_STEPS = 3


@dataclass(frozen=True)
class Schedule:
    """How long the run is."""

    steps_per_epoch: int
    total_steps: int
    batch_size: int

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) that update number ``step`` belongs to."""
        return step // self.steps_per_epoch


class Journal:
    """Rank 0 writes; every rank adds its sums. Use as a context manager: the bar is closed at the end.

    Args:
        world: the processes.
        folder: of the run.
        tracker: of rank 0; null elsewhere.
        schedule: length of the run.
        first_step: where this process starts.
        log_every: steps between two lines.
    """

    def __init__(
        self, world: World, folder: RunFolder, tracker: Tracker, schedule: Schedule, *, first_step: int, log_every: int
    ) -> None:
        self.world = world
        self.folder = folder
        self.tracker = tracker
        self.schedule = schedule
        self.log_every = log_every
        self._sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._steps = 0
        self._wait_s = 0.0
        self._since = time.monotonic()
        self._first_step = first_step
        self._highest_step = folder.read_tracker().get("highest_step", 0) if world.is_main else 0
        self._last: dict[str, float] = {}
        self._bar = tqdm(
            total=schedule.total_steps, initial=first_step, unit="step", disable=not world.is_main or None, dynamic_ncols=True
        )

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step_done(self, step: int, sums: torch.Tensor, wait_s: float, rate: float, counters: Mapping[str, float]) -> None:
        """Take in one step: ``step`` counts the steps done, ``counters`` are written as they are. Every rank calls it; a line is
        written every ``log_every`` steps."""
        self._sums += sums
        self._steps += 1
        self._wait_s += wait_s
        self._bar.update()
        epoch_ends = step % self.schedule.steps_per_epoch == 0
        if step % self.log_every == 0 or epoch_ends or step - self._first_step == MEASURED_STEPS:
            self._write_window(step, rate, counters)

    def _write_window(self, step: int, rate: float, counters: Mapping[str, float]) -> None:
        numerator, weight, correct, count = self.world.sum(self._sums).tolist()
        elapsed = max(time.monotonic() - self._since, 1e-9)
        self._last = {
            "train/loss": numerator / max(weight, 1e-12),
            "train/accuracy": correct / max(count, 1.0),
            "train/lr": rate,
            "time/img_s": self._steps * self.schedule.batch_size / elapsed,
            "time/data_wait": min(1.0, self._wait_s / elapsed),
            **counters,
        }
        self.record(step, self._last)
        self._show(step)
        if step - self._first_step == MEASURED_STEPS and self.world.device.type == "cpu":
            self._tell_long_run(step)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start a new window: time spent on validation and checkpoints is not training time."""
        self._sums.zero_()
        self._steps = 0
        self._wait_s = 0.0
        self._since = time.monotonic()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of ``step`` to metrics.jsonl and the tracker."""
        if self.world.is_main:
            epoch = step / self.schedule.steps_per_epoch
            self.folder.metrics.append(step, {"epoch": epoch, **metrics})
            self.tracker.log({"epoch": epoch, **metrics}, step)
            if self.tracker.run_id is not None:
                self._highest_step = max(self._highest_step, step)
                self.folder.write_tracker(run_id=self.tracker.run_id, highest_step=self._highest_step)

    def epoch_done(self, step: int, validation: Mapping[str, float]) -> None:
        """Say in one line how the epoch went."""
        epoch = step // self.schedule.steps_per_epoch
        total = self.schedule.total_steps // self.schedule.steps_per_epoch
        parts = [f"train loss {self._last.get('train/loss', float('nan')):.4f}"]
        parts += [f"{name.removeprefix('val/').replace('_', ' ')} {value:.4f} (val)" for name, value in validation.items()]
        parts += [f"{self._last.get('time/img_s', 0.0):,.0f} img/s"]
        self.say(f"epoch {epoch}/{total}: " + ", ".join(parts))

    def say(self, text: str) -> None:
        """Print a line above the bar, once."""
        if self.world.is_main:
            tqdm.write(text)

    def _show(self, step: int) -> None:
        self._bar.set_description(f"epoch {min(step // self.schedule.steps_per_epoch + 1, self._num_epochs)}/{self._num_epochs}")
        self._bar.set_postfix_str(
            f"loss {self._last['train/loss']:.3f}, acc {self._last['train/accuracy']:.3f}, "
            f"{self._last['time/img_s']:,.0f} img/s, data wait {self._last['time/data_wait']:.0%}"
        )

    @property
    def _num_epochs(self) -> int:
        return self.schedule.total_steps // self.schedule.steps_per_epoch

    def _tell_long_run(self, step: int) -> None:
        """On a CPU a large recipe trains all the same, but the user is told how long it takes and what is smaller."""
        epoch_s = self.schedule.steps_per_epoch * self.schedule.batch_size / self._last["time/img_s"]
        left_s = epoch_s * (self.schedule.total_steps - step) / self.schedule.steps_per_epoch
        if left_s > LONG_RUN_S:
            self.say(
                f"No GPU here: one epoch takes about {epoch_s / 60:.0f} minutes on this CPU (measured over {self._steps} steps), "
                f"the whole run about {left_s / 3600:.1f} hours. It goes on; a smaller one: "
                "accelerate launch launch.py recipe=custom_cnn data.image_size=64 train.epochs=5"
            )
