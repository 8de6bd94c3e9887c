"""Optimizers, the learning-rate schedule and the moving average of the weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from galaxydist.checkpoints.sharded import own_part, shard_like
from galaxydist.errors import EveryRankError, UserError
from galaxydist.recipe.rules import check_optimizer
from galaxydist.recipe.schema import OptimConfig

# Settings of a parameter group that the present recipe decides; on a restart the checkpoint's values are not used.
RECIPE_SETTINGS = ("lr", "lr_scale", "weight_decay", "betas", "momentum", "nesterov", "fused")
# Optimizers with fused kernels in torch, and those whose kernels also take sharded parameters (DTensors).
FUSED, FUSED_SHARDED = ("adamw", "sgd"), ("adamw",)
# Adan's second decay, of differences of gradients (Xie et al. 2022, arXiv:2208.06677); the recipe has no key for it.
ADAN_DIFFERENCE_DECAY = 0.92


@dataclass(frozen=True)
class LRSchedule:
    """Learning rate by step: a linear warm-up from 0 to the peak, then the schedule of the recipe.

    ``cosine`` (half a cosine; Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts) and ``linear`` fall to
    the fraction ``optim.final`` of the peak, ``step`` is multiplied by ``optim.gamma`` at each milestone.
    """

    config: OptimConfig
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimizer step number ``step``, counted from 0."""
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
    """Build the optimizer of the recipe.

    ``adamw`` and ``sgd`` (with Nesterov momentum) are torch's, the others timm's, which is imported only for them: it takes more
    than a second. Settings that the recipe does not have keep the optimizer's own defaults.

    Args:
        groups: parameter groups with their weight decay, as from ``parameter_groups``; on ``device`` already.
        device: decides on fused kernels.

    Raises:
        EveryRankError: the optimizer is unknown, or has no fused kernels with ``optim.fused=on``.
    """
    check_optimizer(config.name)
    is_sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    fused = {"fused": True} if _use_fused(config, device, is_sharded=is_sharded) else {}
    betas = (config.momentum, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, **fused)
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, **fused)
        _fill_momentum_buffers(sgd)
        return sgd
    from timm import optim

    optimizer: torch.optim.Optimizer
    if config.name == "lamb":
        optimizer = optim.Lamb(groups, lr=config.lr, weight_decay=0.0, betas=betas)
    elif config.name == "lion":
        optimizer = optim.Lion(groups, lr=config.lr, weight_decay=0.0, betas=betas)
    elif config.name == "muon":  # the betas are those of AdamW, which updates parameters that are not matrices
        optimizer = optim.Muon(groups, lr=config.lr, weight_decay=0.0, betas=betas, momentum=config.momentum)
    else:
        adan_betas = (config.momentum, ADAN_DIFFERENCE_DECAY, config.beta2)
        optimizer = optim.Adan(groups, lr=config.lr, weight_decay=0.0, betas=adan_betas)
    return optimizer


def _fill_momentum_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Add momentum buffers of zeros where fused kernels would make new ones; they give the same first step.

    The kernels of SGD do not write into new buffers if they skip the step (a gradient that is not finite), and take what is
    in that memory for the momentum in the next step. AdamW's buffers begin as zeros.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum", 0.0) > 0:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, times the group's ``lr_scale`` if it has one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def step_if_finite(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Take a step, unless the gradient is not finite.

    Fused kernels skip the step themselves, as they do with fp16; for the other optimizers the host waits for the device.

    Args:
        optimizer: with gradients.
        is_finite: boolean scalar on the device, equal on all ranks.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, (~is_finite).float()
        optimizer.step()
    elif bool(is_finite):
        optimizer.step()


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a saved ``state_dict``, but keep the settings of the present recipe and device.

    torch's own ``load_state_dict`` would restore the old settings (weight decay, layer decay, fused kernels), and changes
    between restarts would have no effect.

    Raises:
        UserError: the state belongs to other parameter groups.
    """
    ours, saved = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in saved]:
        raise UserError(
            f"The checkpoint's optimizer has {len(saved)} groups of parameters, this run's {len(ours)}, or of other sizes: "
            "optim.layer_decay, model.freeze_backbone and optim.weight_decay=0 must be as they were, or give another run.dir."
        )
    groups = [
        {key: value for key, value in old.items() if key not in RECIPE_SETTINGS}
        | {key: new[key] for key in RECIPE_SETTINGS if key in new}
        for old, new in zip(saved, ours, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _fill_momentum_buffers(optimizer)  # a state from before the first step, or of unfused kernels that skipped it, has none


def _use_fused(config: OptimConfig, device: torch.device, *, is_sharded: bool) -> bool:
    """Return True for fused kernels; otherwise torch chooses one of its other two implementations."""
    names = FUSED_SHARDED if is_sharded else FUSED
    supported = config.name in names
    if config.fused == "on" and not supported:
        with_fsdp = " with train.strategy=fsdp" if is_sharded else ""
        raise EveryRankError(
            f"optim.fused=on: there are no fused kernels of {config.name}{with_fsdp}; use optim.fused=auto, or optim.name="
            f"{' or '.join(names)}"
        )
    return supported and (config.fused == "on" or (config.fused == "auto" and device.type == "cuda"))


class MovingAverage:
    """Exponential moving average of a model's state dict; each process averages its own part and nothing is communicated.

    The numbers are those of timm's ``ModelEmaV3(model, decay, use_warmup=True)``, which cannot copy a sharded model and needs
    more than a second to import. All floating-point tensors are averaged, batch-norm statistics too; others are copied. The decay
    is ramped up: ``min(decay, 1 - (1 + t)^(-2/3))`` at the t-th update after the first, which copies (timm's ``warmup_power`` and
    ``warmup_gamma``).

    Args:
        model: whole or sharded; its tensors must keep their memory.
        decay: decay of a step after the ramp.
        tensors: storage of the averages, by the model's names; None: new tensors with the model's present values.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} if tensors is None else tensors
        self._tensors: Mapping[str, Tensor] = found
        pairs = [(own_part(found[name]), own_part(tensor.detach())) for name, tensor in model.state_dict().items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._buffer_names = {name for name, _ in model.named_buffers()}

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after optimizer step number ``step``, counted from 1."""
        after_first = max(0, step - 1)
        if after_first == 0:
            return 0.0
        ramp: float = 1.0 - (1.0 + after_first) ** (-2 / 3)
        return min(ramp, self.decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the model's weights after optimizer step number ``step``, counted from 1."""
        averages, values = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, values, weight=1.0 - self.decay_at(step))
        if self._copied:
            copies, values = zip(*self._copied, strict=True)
            torch._foreach_copy_(copies, values)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the averages of the model's buffers, which are never sharded: batch-norm statistics are averaged over ranks."""
        return ((name, tensor) for name, tensor in self._tensors.items() if name in self._buffer_names)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the model's names: the tensors themselves, not copies."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load averages, whole or sharded, without communication.

        Raises:
            KeyError: an average is missing.
        """
        for name, average in self._tensors.items():
            own_part(average).copy_(own_part(shard_like(state[name], average)))
