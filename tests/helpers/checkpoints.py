"""Checkpoints for tests: tensors of every kind, a small training, and damage to files."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint, encode_state


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], **options: Any) -> Path:
    return store.save(folder, step, tensors, encode_state(step, state, best=options.get("best", False)), **options)


def load_best(folder: Path) -> Checkpoint | None:
    path = store.best_path(folder)
    return None if path is None else store.read_sound(path)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that makes two tensors the same."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_kind_of_tensor() -> dict[str, torch.Tensor]:
    """By name in a checkpoint; some share memory, some are views."""
    base = torch.randn(6, 4)
    return {
        "model/weight": base,
        "model/tied": base,
        "model/rows": base[2:4],
        "model/transposed": base.t(),
        "model/channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "model/parameter": nn.Parameter(torch.randn(3)),
        "model/expanded": torch.randn(3, 1).expand(3, 4),
        "model/conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "model/num_batches_tracked": torch.tensor(7),
        "optimizer/step": torch.tensor(3.0),
        "optimizer/special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "optimizer/double": torch.randn(2, dtype=torch.float64),
        "ema/half": torch.randn(5).half(),
        "ema/bfloat": torch.randn(5).bfloat16(),
        "ema/nothing": torch.empty(0, 3),
        "ema/flags": torch.tensor([True, False]),
        "rng": torch.arange(256, dtype=torch.uint8),
    }


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Trainee:
    """A small training with everything that has state."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 3))
        decay, rest = [p for p in self.model.parameters() if p.ndim > 1], [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
            if optimizer == "adamw"
            else torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
        self.ema = copy.deepcopy(self.model)

    def step(self, number: int) -> None:
        images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        loss = self.model(images).square().mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        for kept, new in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
            kept.copy_(torch.lerp(kept.float(), new.float(), 0.1))

    def states(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, states: dict[str, Any]) -> None:
        self.model.load_state_dict(states["model"])
        self.ema.load_state_dict(states["ema"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.scaler.load_state_dict(states["scaler"])
