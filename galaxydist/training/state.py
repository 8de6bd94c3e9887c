"""What a checkpoint holds, taken from and put back into the parts of a training run."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import nn

from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.distributed import World
from galaxydist.errors import UserError
from galaxydist.training.health.anomalies import Nonfinite, Skipped, SpikeDetector
from galaxydist.training.journal import Window
from galaxydist.training.optimizer import load_optimizer_state
from galaxydist.training.optimizer_state import named_optimizer_state, numbered_optimizer_state
from galaxydist.training.statistics import HasBuffers, RankStatistics
from galaxydist.training.stopping import EarlyStopping

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy", "galaxydist")


class Stateful(Protocol):
    """A part of the run that must survive."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass
class TrainingState:
    """Everything that changes while training and must survive.

    Args:
        model: not wrapped.
        optimizer: as Accelerate prepared it.
        scaler: gradient scaler of fp16, or None.
        averages: moving average of the weights, or None.
        stopping: best validation so far.
        skipped: galaxies that could not be read.
        nonfinite: steps that were left out.
        spikes: the last losses.
        window: sums since the last line of metrics.jsonl.
        micro_batch: what ``train.micro_batch=auto`` found, and where.
        threads: that each process computes with, and the number of processes.
        step: optimizer steps done.
        tracker_run_id: of the tracked run.
    """

    model: nn.Module
    optimizer: Any
    scaler: Any
    averages: HasBuffers | None
    stopping: EarlyStopping
    skipped: Skipped
    nonfinite: Nonfinite
    spikes: SpikeDetector
    window: Window = field(default_factory=Window)
    micro_batch: dict[str, Any] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    step: int = 0
    tracker_run_id: str | None = None

    def snapshot(self, world: World) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as plain JSON values. All ranks take part; the model's batch-norm statistics are the mean
        over the ranks, and each rank's own stand beside them."""
        statistics = RankStatistics.of(world, self.modules())
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for name, state in self._state_dicts().items():
            found, described[name] = flatten_state(name, {**state, **statistics.means.get(name, {})})
            tensors |= found
        progress = {
            "step": self.step,
            "tracker_run_id": self.tracker_run_id,
            "micro_batch": self.micro_batch,
            "threads": self.threads,
            **{name: part.state_dict() for name, part in self._progress().items()},
        }
        return tensors | statistics.tensors(), {"progress": progress, "described": described, "versions": library_versions()}

    def restore(self, world: World, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Put a snapshot back. With the number of ranks that it was taken with, each gets its own batch-norm statistics back,
        with another number their mean.

        Raises:
            UserError: it belongs to another model or optimizer.
        """
        loaded = {name: unflatten_state(described, tensors) for name, described in state["described"].items()}
        expected = set(self._state_dicts())
        if set(loaded) != expected:
            raise UserError(
                f"The checkpoint holds {sorted(loaded)}, this run needs {sorted(expected)}. "
                "Continue with the recipe and precision it was made with, or give another run.dir."
            )
        try:
            for name, module in self.modules().items():
                module.load_state_dict(loaded[name])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"The checkpoint's weights are not this model's ({str(error).strip().splitlines()[-1].strip()}). "
                "Continue with the model that it was made with, or give another run.dir."
            ) from error
        RankStatistics.restore(world, self.modules(), tensors)
        numbered = numbered_optimizer_state(self.model, self.optimizer, loaded["optimizer"])
        load_optimizer_state(self.optimizer, numbered)
        if self.scaler is not None:
            self.scaler.load_state_dict(loaded["scaler"])
        progress = state["progress"]
        self.step = progress["step"]
        self.tracker_run_id = progress["tracker_run_id"]
        for name, part in self._progress().items():
            if name in progress:  # older checkpoints know fewer
                part.load_state_dict(progress[name])

    def modules(self) -> dict[str, HasBuffers]:
        """The model, and its moving average where there is one."""
        return {"model": self.model} if self.averages is None else {"model": self.model, "ema": self.averages}

    def _state_dicts(self) -> dict[str, dict[str, Any]]:
        states = {name: dict(module.state_dict()) for name, module in self.modules().items()}
        states["optimizer"] = named_optimizer_state(self.model, self.optimizer)
        if self.scaler is not None:
            states["scaler"] = self.scaler.state_dict()
        return states

    def _progress(self) -> dict[str, Stateful]:
        return {
            "stopping": self.stopping,
            "skipped": self.skipped,
            "nonfinite": self.nonfinite,
            "spikes": self.spikes,
            "window": self.window,
        }


def evaluation_weights(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model state that a checkpoint is judged by: the moving average where there is one, else the model's own."""
    described = state["described"]
    weights: dict[str, torch.Tensor] = unflatten_state(described.get("ema", described["model"]), tensors)
    return weights


def library_versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
