"""Which parameters the optimizer moves, and which of them decay."""

from typing import Any, TypedDict

from torch import nn


class ParameterGroup(TypedDict):
    """One of the optimizer's parameter groups."""

    params: list[nn.Parameter]
    weight_decay: float


def no_decay_names(model: nn.Module) -> set[str]:
    """Names of the trained parameters without weight decay: biases, normalisation, and what the architecture itself exempts.

    Decay pulls towards zero, which for a scale or an offset is no simpler model. ViTs exempt their position embedding and class
    token too (timm's ``no_weight_decay``).
    """
    architecture: Any = model
    exempt: set[str] = architecture.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    return {name for name, p in model.named_parameters() if p.requires_grad and (p.ndim <= 1 or name in exempt)}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """The trained parameters of ``model`` for an optimizer: those that decay, then those that do not; each in the model's order.

    Frozen parameters are in neither, and a group that would be empty is left out.
    """
    exempt = no_decay_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[ParameterGroup] = [
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
