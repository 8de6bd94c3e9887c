"""Parameter groups of the optimizer: weight decay, and learning rates by layer."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from torch import nn

from galaxydist.errors import UserError


class ParameterGroup(TypedDict):
    """A parameter group of the optimizer; ``lr_scale`` is the group's factor of the learning rate (layer decay)."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: NotRequired[float]


# Layers of our own networks: the stem, each block of ``stages``; parameters without a match are the head.
_OWN_LAYERS = {"stem": r"^stem", "blocks": r"^stages\.(\d+)(?:\.(\d+))?"}


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the names of trained parameters without weight decay: biases, normalisation, and the architecture's exceptions.

    A scale or an offset closer to zero does not make the model simpler. ViTs also exempt their position embedding and class token
    (timm's ``no_weight_decay``).
    """
    architecture: Any = model
    exempt: set[str] = architecture.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    return {name for name, p in model.named_parameters() if p.requires_grad and (p.ndim <= 1 or name in exempt)}


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the layer depth of each parameter, counted from the head (0) to the stem.

    Layers follow timm's ``group_matcher`` if the model has one. A layer that has only vectors is a normalisation and joins the
    convolution before it: timm counts the two as separate layers in a VGG, which would decay each convolution twice.

    Raises:
        UserError: the layers have no numbers.
    """
    from timm.models import group_parameters

    architecture: Any = model
    matcher = architecture.group_matcher(coarse=False) if hasattr(model, "group_matcher") else _OWN_LAYERS
    try:
        layers: Mapping[int, list[str]] = group_parameters(model, matcher)
    except TypeError as error:  # some patterns of timm match no number
        raise UserError(f"optim.layer_decay: timm does not number the layers of {type(model).__name__}; set it to 1") from error
    if len(layers) < 2:
        raise UserError(
            f"optim.layer_decay: the layers of {type(model).__name__} have no numbers, which a method group_matcher gives as in "
            "timm's models; set it to 1"
        )
    parameters = dict(model.named_parameters())
    joined: list[list[str]] = []
    for _, names in sorted(layers.items()):
        if joined and all(parameters[name].ndim <= 1 for name in names):
            joined[-1] += names
        else:
            joined.append([*names])
    return {name: len(joined) - 1 - layer for layer, names in enumerate(joined) for name in names}


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[ParameterGroup]:
    """Return the optimizer's groups of trained parameters: with weight decay, then without, each in the model's order.

    With ``layer_decay`` below 1 there are two such groups for every layer, from the stem to the head, and the learning rate of
    each is scaled by ``layer_decay ** depth`` (BEiT, Bao et al. 2021, arXiv:2106.08254). Frozen parameters and empty groups are
    left out.
    """
    exempt = no_decay_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if layer_decay == 1.0:
        return _split(trained, exempt, weight_decay)
    depths = layer_depths(model)
    groups: list[ParameterGroup] = []
    for depth in sorted(set(depths.values()), reverse=True):
        layer = [(name, parameter) for name, parameter in trained if depths[name] == depth]
        for group in _split(layer, exempt, weight_decay):
            groups.append({**group, "lr_scale": layer_decay**depth})
    return groups


def _split(trained: list[tuple[str, nn.Parameter]], exempt: set[str], weight_decay: float) -> list[ParameterGroup]:
    groups: list[ParameterGroup] = [
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
