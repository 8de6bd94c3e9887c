"""``galaxydist bench saving``: time that a training waits for its checkpoints."""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from galaxydist.bench.common import show, show_json
from galaxydist.bench.in_memory import plain_step
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.tensor_files import flatten_state
from galaxydist.cpus import available_cores
from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.recipe.schema import ModelConfig, ModelName

WAIT_LIMIT = 0.05
SIGNAL_LIMIT_S = 30.0
NUM_CLASSES = 10

Mode = Literal["none", "background", "synchronous"]


@dataclass(frozen=True)
class SavingConditions:
    """Settings of the trainings.

    Args:
        model: architecture, trained by AdamW.
        image_size, batch_size: of random images; they determine the time of a step.
        every_s: seconds between saves.
        num_saves: number of saves of each training.
    """

    model: ModelName = "resnet50"
    image_size: int = 64
    batch_size: int = 16
    every_s: float = 30.0
    num_saves: int = 4


class Trainee:
    """A model with its optimizer, trained on random images."""

    def __init__(self, conditions: SavingConditions, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = build_model(ModelConfig(name=conditions.model), NUM_CLASSES, conditions.image_size, trust_code=True).to(
            device
        )
        self.optimizer = torch.optim.AdamW([dict(group) for group in parameter_groups(self.model, 0.05)], lr=1e-3)
        self.images_BCHW = torch.randn(conditions.batch_size, 3, conditions.image_size, conditions.image_size, device=device)
        self.labels_B = torch.arange(conditions.batch_size, device=device) % NUM_CLASSES

    def step(self) -> float:
        """Take one optimizer step; return the loss, which waits for the device."""
        return plain_step(self.model, self.optimizer, self.images_BCHW, self.labels_B).item()

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and structure of model and optimizer, as for a checkpoint of a run."""
        return flatten_state("training", {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()})


class Training:
    """One way of saving, with its accumulated cost.

    Args:
        mode: the way of saving.
        trainee: the trained model.
        folder: for its checkpoints.
    """

    def __init__(self, mode: Mode, trainee: Trainee, folder: Path) -> None:
        self.mode = mode
        self._trainee = trainee
        self.saver = CheckpointWriter(folder / mode, background=mode == "background", check=lambda: None)
        self.num_steps = 0
        self.waits: list[float] = []
        self.elapsed_s = 0.0

    def run(self, seconds: float) -> None:
        """Save, train for some seconds from the start of the save, one step at least, and wait for the write to end."""
        began = time.perf_counter()
        wait_s = self._save()
        while True:
            self._trainee.step()
            self.num_steps += 1
            if time.perf_counter() - began >= seconds:
                break
        ended = time.perf_counter()
        self.saver.wait()
        self.waits.append(wait_s + time.perf_counter() - ended)
        self.elapsed_s += time.perf_counter() - began

    def save_on_signal(self) -> float:
        """Save at the worst moment, when another write has just begun; return the seconds until the second is complete."""
        self._save()
        began = time.perf_counter()
        self._save()
        self.saver.wait()
        return time.perf_counter() - began

    def _save(self) -> float:
        """Save; return the seconds until the training continues."""
        began = time.perf_counter()
        if self.mode != "none":
            self.saver.save(self.num_steps, *self._trainee.snapshot())
        return time.perf_counter() - began

    def finish(self) -> dict[str, Any]:
        """Measure a save on a signal; return the figures of the training."""
        waited_s = sum(self.waits)
        return {
            "task": f"saving.{self.mode}",
            "num_steps": self.num_steps,
            "elapsed_s": self.elapsed_s,
            "step_s": (self.elapsed_s - waited_s) / self.num_steps,
            "waited_s": waited_s,
            "wait_share": waited_s / self.elapsed_s,
            "longest_wait_s": max(self.waits),
            "signal_s": self.save_on_signal(),
        }


def measure_saving(folder: Path, conditions: SavingConditions) -> list[dict[str, Any]]:
    """Train without saving, saving in the background, and saving synchronously; print a table and, last, lines of JSON.

    The three take turns, each for the time between two saves, so that other work on the machine affects all alike.

    Args:
        folder: for the checkpoints, on the disk to be measured; emptied, and removed afterwards.
        conditions: settings of the trainings.

    Returns:
        The content of the lines of JSON.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(available_cores())
    trainee = Trainee(conditions, device)
    for _ in range(3):
        trainee.step()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in trainee.snapshot()[0].values())
    show(
        f"{conditions.model} with AdamW, {num_bytes / 1e6:.0f} MB a checkpoint, on {device.type} with {torch.get_num_threads()} "
        f"threads; batches of {conditions.batch_size} at {conditions.image_size} pixels; saved every {conditions.every_s:g} s, "
        f"{conditions.num_saves} times"
    )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        trainings = [Training(mode, trainee, folder) for mode in get_args(Mode)]
        for _ in range(conditions.num_saves):
            for training in trainings:
                training.run(conditions.every_s)
        results = [training.finish() for training in trainings]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(f"{'saving':12} {'steps':>6} {'a step':>8} {'waits':>7} {'a save':>8} {'longest':>8} {'on a signal':>12}")
    for training, result in zip(trainings, results, strict=True):
        result |= {
            "step_slowdown": result["step_s"] / results[0]["step_s"] - 1,
            "checkpoint_mb": num_bytes / 1e6,
            "device": device.type,
            "threads": torch.get_num_threads(),
            **asdict(conditions),
        }
        show(
            f"{training.mode:12} {result['num_steps']:6} {result['step_s']:6.3f} s {result['wait_share']:7.2%} "
            f"{result['waited_s'] / conditions.num_saves:6.3f} s {result['longest_wait_s']:6.3f} s {result['signal_s']:10.2f} s"
        )
    show(
        f"limits: the background save waits {WAIT_LIMIT:.0%} of the time, a save on a signal takes {SIGNAL_LIMIT_S:g} s. "
        "The time of a step excludes the waiting: it shows how much a write in the background slows the training."
    )
    show_json(*results)
    return results
