"""``galaxydist bench saving``: how long a training waits for its checkpoints, written beside it and written by itself."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

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
    """Of the trainings.

    Args:
        model: architecture, trained by AdamW.
        image_size, batch_size: of random images; they set how long a step takes.
        every_s: seconds between saves.
        num_saves: of each training.
    """

    model: ModelName = "resnet50"
    image_size: int = 64
    batch_size: int = 16
    every_s: float = 30.0
    num_saves: int = 4


class Trainee:
    """A model and its optimizer, which really move."""

    def __init__(self, conditions: SavingConditions, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = build_model(ModelConfig(name=conditions.model), NUM_CLASSES, conditions.image_size).to(device)
        self.optimizer = torch.optim.AdamW([dict(group) for group in parameter_groups(self.model, 0.05)], lr=1e-3)
        self.images_BCHW = torch.randn(conditions.batch_size, 3, conditions.image_size, conditions.image_size, device=device)
        self.labels_B = torch.arange(conditions.batch_size, device=device) % NUM_CLASSES

    def step(self) -> float:
        """One optimizer step; the loss, which is there when the device is done."""
        self.optimizer.zero_grad()
        loss: torch.Tensor = functional.cross_entropy(self.model(self.images_BCHW), self.labels_B)
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item()

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As for a checkpoint of a run."""
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for name, state in (("model", dict(self.model.state_dict())), ("optimizer", self.optimizer.state_dict())):
            found, described[name] = flatten_state(name, state)
            tensors |= found
        return tensors, described


class Training:
    """One way of saving, and what it has cost so far.

    Args:
        mode: how it saves.
        trainee: what is trained.
        folder: where its checkpoints go.
    """

    def __init__(self, mode: Mode, trainee: Trainee, folder: Path) -> None:
        self.mode = mode
        self._trainee = trainee
        self.saver = CheckpointWriter(folder / mode, background=mode == "background", check=lambda: None)
        self.num_steps = 0
        self.waits: list[float] = []
        self.elapsed_s = 0.0

    def go_on(self, seconds: float) -> None:
        """Save, train until so long after that began, one step at least, and wait for the write, as the next save would."""
        began = time.perf_counter()
        wait_s = self._save()
        is_first = True
        while is_first or time.perf_counter() - began < seconds:
            self._trainee.step()
            self.num_steps += 1
            is_first = False
        ended = time.perf_counter()
        self.saver.wait()
        self.waits.append(wait_s + time.perf_counter() - ended)
        self.elapsed_s += time.perf_counter() - began

    def save_on_signal(self) -> float:
        """The worst moment: another write has just begun. Seconds until the second one is complete."""
        self._save()
        began = time.perf_counter()
        self._save()
        self.saver.wait()
        return time.perf_counter() - began

    def _save(self) -> float:
        """Seconds until the training may go on."""
        began = time.perf_counter()
        if self.mode != "none":
            tensors, state = self._trainee.snapshot()
            self.saver.save(self.num_steps, tensors, state)
        return time.perf_counter() - began

    def result(self) -> dict[str, Any]:
        waited_s = sum(self.waits)
        return {
            "task": f"saving.{self.mode}",
            "num_steps": self.num_steps,
            "elapsed_s": self.elapsed_s,
            "step_s": (self.elapsed_s - waited_s) / self.num_steps,
            "waited_s": waited_s,
            "wait_share": waited_s / self.elapsed_s,
            "longest_wait_s": max(self.waits),
        }


def measure_saving(folder: Path, conditions: SavingConditions) -> list[dict[str, Any]]:
    """Train without saving, saving in the background, and saving synchronously; print a table and, last, lines of JSON.

    The three take turns, each for the time between two saves, so that whatever else the machine does meets all alike.

    Args:
        folder: where checkpoints go, on the disk to be measured; removed afterwards.
        conditions: of the trainings.

    Returns:
        What the lines of JSON hold.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(available_cores())
    trainee = Trainee(conditions, device)
    for _ in range(3):
        trainee.step()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in trainee.snapshot()[0].values())
    print(
        f"{conditions.model} with AdamW, {num_bytes / 1e6:.0f} MB a checkpoint, on {device.type} with {torch.get_num_threads()} "
        f"threads; batches of {conditions.batch_size} at {conditions.image_size} pixels; saved every {conditions.every_s:g} s, "
        f"{conditions.num_saves} times",
        flush=True,
    )
    modes: tuple[Mode, ...] = ("none", "background", "synchronous")
    with _emptied(folder):
        trainings = [Training(mode, trainee, folder) for mode in modes]
        for _ in range(conditions.num_saves):
            for training in trainings:
                training.go_on(conditions.every_s)
        results = [{**training.result(), "signal_s": training.save_on_signal()} for training in trainings]
    print(f"{'saving':12} {'steps':>6} {'a step':>8} {'waits':>7} {'a save':>8} {'longest':>8} {'on a signal':>12}")
    for result in results:
        result |= {"step_slowdown": result["step_s"] / results[0]["step_s"] - 1, "checkpoint_mb": num_bytes / 1e6}
        result |= {"device": device.type, "threads": torch.get_num_threads(), **asdict(conditions)}
        _show(result)
    print(
        f"limits: the background save waits {WAIT_LIMIT:.0%} of the time, a save on a signal takes {SIGNAL_LIMIT_S:g} s. "
        "A step's time leaves the waiting out: it shows how much a write beside it slows the training."
    )
    for result in results:
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))
    return results


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show(result: Mapping[str, Any]) -> None:
    mode = result["task"].partition(".")[2]
    mean_s = result["waited_s"] / result["num_saves"]
    print(
        f"{mode:12} {result['num_steps']:6} {result['step_s']:6.3f} s {result['wait_share']:7.2%} {mean_s:6.3f} s "
        f"{result['longest_wait_s']:6.3f} s {result['signal_s']:10.2f} s",
        flush=True,
    )
