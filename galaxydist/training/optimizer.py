"""The optimizer, and the learning rate as a function of the step alone."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from galaxydist.recipe.schema import OptimConfig


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0, then half a cosine down to a fraction of the peak, or a constant.

    Cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """

    config: OptimConfig
    total_steps: int

    def at(self, step: int) -> float:
        """The rate that update number ``step`` (from 0) uses."""
        warmup_steps = round(self.config.warmup * self.total_steps)
        if step < warmup_steps:
            return self.config.lr * (step + 1) / (warmup_steps + 1)
        if self.config.schedule == "constant":
            return self.config.lr
        done = (step - warmup_steps) / max(1, self.total_steps - warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.config.lr * (self.config.final + (1.0 - self.config.final) * cosine)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, over parameter groups that carry their own weight decay."""
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
