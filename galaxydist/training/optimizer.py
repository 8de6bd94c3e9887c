"""The optimizer, and the learning rate as a function of the step alone."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from galaxydist.errors import EveryRankError, UserError
from galaxydist.recipe.schema import OptimConfig
from galaxydist.training.optimizer_names import find_optimizer, usable_names

# What the recipe decides in a parameter group: a restart under other settings keeps none of these from the checkpoint.
SETTINGS = ("lr", "lr_scale", "weight_decay", "betas", "beta1", "momentum", "nesterov", "fused", "max_lr_snapshot")


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0, then from the peak: half a cosine or a straight line down to a fraction of it, steps, or a constant.

    Cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """

    config: OptimConfig
    total_steps: int

    def at(self, step: int) -> float:
        """The rate that update number ``step`` (from 0) uses."""
        config = self.config
        warmup_steps = round(config.warmup * self.total_steps)
        if step < warmup_steps:
            return config.lr * (step + 1) / (warmup_steps + 1)
        if config.schedule == "constant":
            return config.lr
        if config.schedule == "step":
            passed = sum(step >= round(share * self.total_steps) for share in config.milestones)
            return config.lr * config.gamma**passed
        done = min(1.0, (step - warmup_steps) / max(1, self.total_steps - warmup_steps))
        left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return config.lr * (config.final + (1.0 - config.final) * left)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over parameter groups that carry their own weight decay.

    ``adamw`` and ``sgd`` (with Nesterov momentum) are torch's, all others are built by timm. ``optim.momentum`` is the momentum,
    or the decay of the first moment; ``optim.beta2`` that of the second; everything else is the optimizer's own default.

    Args:
        groups: as ``parameter_groups`` gives them; on ``device`` already.
        device: where the parameters are; decides on fused kernels.

    Raises:
        EveryRankError: no such optimizer, one that cannot work here, or settings that it does not take.
    """
    fused = {"fused": True} if _use_fused(config, device) else {}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2), **fused)
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, **fused)
        return _with_momentum(sgd) if fused and config.momentum > 0 else sgd
    from timm.optim import create_optimizer_v2

    info = find_optimizer(config.name)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, config.name, lr=config.lr, weight_decay=0.0, momentum=config.momentum, **_options(info, config), **fused
        )
    except ValueError as error:
        raise EveryRankError(
            f"optim.name={config.name} does not take these settings: {error} (optim.lr={config.lr}, optim.momentum="
            f"{config.momentum}, optim.beta2={config.beta2}, optim.weight_decay={config.weight_decay})"
        ) from error
    for group in optimizer.param_groups:
        if "max_lr_snapshot" in group:  # of decay by lr ** 2 / (peak of lr), where lr is the group's own
            group["max_lr_snapshot"] = config.lr * group.get("lr_scale", 1.0)
    return optimizer


def _with_momentum(sgd: torch.optim.SGD) -> torch.optim.SGD:
    """With buffers of zeros, from which the first step goes as from none: the fused kernel does not write the new ones where it
    leaves the first step out."""
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of this step, times the group's ``lr_scale`` where it has one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from a saved ``state_dict`` under the settings of the present recipe and device.

    torch's own ``load_state_dict`` brings the old settings back (weight decay, layer decay, fused kernels), so that what was
    changed between restarts would have no effect.

    Raises:
        UserError: it is the state of other parameter groups.
    """
    ours, saved = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in saved]:
        raise UserError(
            f"The checkpoint's optimizer has {len(saved)} groups of parameters, this run's {len(ours)}, or of other sizes: "
            "optim.layer_decay, model.freeze_backbone and optim.weight_decay=0 must be as they were, or give another run.dir."
        )
    groups = [
        {key: value for key, value in old.items() if key not in SETTINGS} | {key: new[key] for key in SETTINGS if key in new}
        for old, new in zip(saved, ours, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def _use_fused(config: OptimConfig, device: torch.device) -> bool:
    """Left out rather than set to False elsewhere: torch then chooses between its other two implementations."""
    supported = _has_fused(config.name)
    if config.fused == "on" and not supported:
        names = [name for name in usable_names() if _has_fused(name)]
        raise EveryRankError(
            f"optim.fused=on: there are no fused kernels of {config.name}; use optim.fused=auto, or one of {', '.join(names)}"
        )
    return supported and (config.fused == "on" or (config.fused == "auto" and device.type == "cuda"))


def _has_fused(name: str) -> bool:
    info = find_optimizer(name)
    return info is None or "fused" in inspect.signature(info.opt_class).parameters


def _options(info: Any, config: OptimConfig) -> dict[str, Any]:
    """What the recipe says of the two moments, in the optimizer's own terms."""
    parameters = inspect.signature(info.opt_class).parameters
    options: dict[str, Any] = {}
    if info.has_betas and info.num_betas == 2:
        options["betas"] = (config.momentum, config.beta2)
    elif info.has_betas:  # Adan: the middle one is of differences of gradients, of which the recipe says nothing
        _, *middle, _ = parameters["betas"].default
        options["betas"] = (config.momentum, *middle, config.beta2)
    if info.has_momentum and config.momentum == 0 and (info.defaults or {}).get("nesterov"):
        options["nesterov"] = False
    if "deterministic" in parameters:  # Kron: else it draws from the generator of dropout, which differs from rank to rank
        options["deterministic"] = True
    return options
