"""What a checkpoint holds, taken from and put back into the parts of a training run."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from galaxydist.errors import UserError
from galaxydist.runs.state import flatten_state, unflatten_state
from galaxydist.training.skipping import Skipped
from galaxydist.training.stopping import EarlyStopping

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy", "galaxydist")


@dataclass
class TrainingState:
    """Everything that changes while training and must survive.

    Args:
        model: not wrapped.
        optimizer: as Accelerate prepared it.
        scaler: gradient scaler of fp16, or None.
        ema: moving average of the weights, or None.
        stopping: best validation so far.
        skipped: galaxies that could not be read.
        step: optimizer steps done.
        tracker_run_id: of the tracked run.
    """

    model: nn.Module
    optimizer: Any
    scaler: Any
    ema: ModelEmaV3 | None
    stopping: EarlyStopping
    skipped: Skipped
    step: int = 0
    tracker_run_id: str | None = None

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as plain JSON values."""
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, Any] = {}
        for name, state in self._state_dicts().items():
            found, described[name] = flatten_state(name, state)
            tensors |= found
        progress = {
            "step": self.step,
            "tracker_run_id": self.tracker_run_id,
            "stopping": self.stopping.state_dict(),
            "skipped": self.skipped.state_dict(),
        }
        return tensors, {"progress": progress, "described": described, "versions": library_versions()}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Put a snapshot back.

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
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(loaded["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(loaded["scaler"])
        progress = state["progress"]
        self.step = progress["step"]
        self.tracker_run_id = progress["tracker_run_id"]
        self.stopping.load_state_dict(progress["stopping"])
        if "skipped" in progress:  # checkpoints of 0.1 did not count
            self.skipped.load_state_dict(progress["skipped"])

    def _state_dicts(self) -> dict[str, Any]:
        states = {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            states["ema"] = dict(self.ema.module.state_dict())
        if self.scaler is not None:
            states["scaler"] = self.scaler.state_dict()
        return states


def evaluation_weights(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model state that a checkpoint is judged by: the moving average where there is one, else the model's own."""
    described = state["described"]
    weights: dict[str, torch.Tensor] = unflatten_state(described.get("ema", described["model"]), tensors)
    return weights


def library_versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
