"""The optimizer, and the learning rate as a function of the step alone."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.checkpoints.sharded import own_part, shard_like
from galaxydist.errors import EveryRankError, UserError
from galaxydist.recipe.schema import OptimConfig

# Which optimizers there are: all that timm's factory knows, less those that cannot work here, each with the reason.

# torch's own, which need no timm.
BUILT_IN = ("adamw", "sgd")
# In front of another name: Zhang et al. 2019, arXiv:1907.08610.
LOOKAHEAD = "lookahead_"

_DTYPE = "it keeps a data type among its settings, which a checkpoint of tensors and plain text cannot hold"
REFUSED = {
    "adahessian": "it needs second derivatives, for which the backward pass would have to be recorded too",
    "adafactorbv": _DTYPE,
    "adafactorbvc": _DTYPE,
    "cadafactorbv": _DTYPE,
    "cadafactorbvc": _DTYPE,
}
# Without it torch contracts Kron's factors in an order that takes memory without end.
_KRON_PACKAGE = "opt_einsum"
_KRON = ("kron", "kronc", "kronw")


def usable_names() -> list[str]:
    """Every name that ``find_optimizer`` takes on this machine, sorted, each possible with ``lookahead_`` in front too."""
    from timm.optim import get_optimizer_info, list_optimizers

    return [name for name in list_optimizers() if _refusal(name, get_optimizer_info(name)) is None]


def find_optimizer(name: str) -> Any:
    """Return timm's description of an optimizer: its class and settings; of the inner one for ``lookahead_NAME``.

    Cheap: may be called before anything is built or written. For ``adamw`` and ``sgd``, which are torch's, it returns None
    and does not import timm, which takes a second.

    Raises:
        EveryRankError: there is none of that name, it needs another package, or it cannot work here.
    """
    if name in BUILT_IN:
        return None
    from timm.optim import get_optimizer_info, list_optimizers

    inner = name.removeprefix(LOOKAHEAD)
    if inner not in list_optimizers():
        close = get_close_matches(inner.lower(), usable_names(), n=1, cutoff=0.6)
        hint = f"; did you mean {LOOKAHEAD if inner != name else ''}{close[0]}?" if close else "."
        raise EveryRankError(
            f"optim.name={name}: there is no such optimizer{hint} There are {', '.join(usable_names())}; "
            f"and {LOOKAHEAD}NAME for each of them."
        )
    info = get_optimizer_info(inner)
    if (reason := _refusal(inner, info)) is not None:
        raise EveryRankError(f"optim.name={name} cannot be used: {reason}. Take another one, such as adamw, sgd or lamb.")
    return info


def _refusal(name: str, info: Any) -> str | None:
    if isinstance(info.opt_class, str):
        package = info.opt_class.split(".")[0]
        return f"it needs the package {package}, which galaxydist does not use (its state was never seen to survive a restart)"
    if name in _KRON and find_spec(_KRON_PACKAGE) is None:
        return f"it needs the package {_KRON_PACKAGE}, which is not installed (pip install {_KRON_PACKAGE})"
    return REFUSED.get(name)


# What the recipe decides in a parameter group: a restart under other settings keeps none of these from the checkpoint.
SETTINGS = ("lr", "lr_scale", "weight_decay", "betas", "beta1", "momentum", "nesterov", "fused", "max_lr_snapshot")


@dataclass(frozen=True)
class LRSchedule:
    """Linear warm-up from 0, then from the peak: half a cosine or a straight line down to a fraction of it, steps, or a constant.

    Cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """

    config: OptimConfig
    total_steps: int

    def __call__(self, step: int) -> float:
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


# The moving average of a model's weights: each process averages what it holds, and nothing is sent.


class MovingAverage:
    """The same numbers as timm's ``ModelEmaV3(model, decay, use_warmup=True)``, also for a sharded model, which cannot be copied.

    All floating-point tensors of the state dict are averaged, batch-norm statistics too; others are copied. The decay is ramped
    up: ``min(decay, 1 - (1 + t)^(-2/3))`` at the t-th update after the first, which copies (timm's ``warmup_power`` and
    ``warmup_gamma``). timm's own class is not used: importing
    timm takes more than a second, which runs of our own networks do not need.

    Args:
        model: sharded, or not.
        decay: a step, in the end.
        tensors: where the averages are kept, under the model's names; None: new ones, with the model's present values.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} if tensors is None else tensors
        self._tensors: Mapping[str, Tensor] = found
        self._buffer_names = {name for name, _ in model.named_buffers()}

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step number ``step``, counted from 1."""
        after_first = max(0, step - 1)
        if after_first == 0:
            return 0.0
        ramp: float = 1.0 - (1.0 + after_first) ** (-2 / 3)
        return min(ramp, self.decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number ``step``, counted from 1."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in zip(self._tensors.values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(own_part(average))
                values.append(own_part(value))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, weight=1.0 - self.decay_at(step))

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The averages of the model's buffers, which are whole: those of batch-norm statistics are made equal over the ranks."""
        return ((name, tensor) for name, tensor in self._tensors.items() if name in self._buffer_names)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the model's names: the same tensors, not copies."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put averages back, sharded or whole. Nothing is sent.

        Raises:
            KeyError: one is missing.
        """
        for name, average in self._tensors.items():
            own_part(average).copy_(own_part(shard_like(state[name], average)))
