"""Features of images: the pooled input of a model's head."""

from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.errors import UserError
from galaxydist.models.build import evaluation_mode


@torch.no_grad()
def extract_features(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return the pooled features before the head of a model, in evaluation mode; the model and its mode do not change.

    Models of timm have functions for it. In other models the features are the input of the last linear layer.

    Args:
        model: from ``build_model``.
        images_BCHW: normalised images B x 3 x H x W, on the model's device.

    Returns:
        B x D, float32.

    Raises:
        UserError: the model has no linear layer, or its input is no vector per image.
    """
    with evaluation_mode(model):
        features = _timm_features(model, images_BCHW)
        if features is None:
            features = _head_input(model, images_BCHW)
    if features.ndim > 2:
        features = features.flatten(2).mean(dim=2)
    if features.ndim != 2 or len(features) != len(images_BCHW):
        raise UserError(
            f"{type(model).__name__} has no features to extract: the input of its last linear layer has the shape "
            f"{tuple(features.shape)}, which is no vector for each of {len(images_BCHW)} images"
        )
    return features.float()


def _timm_features(model: nn.Module, images_BCHW: Tensor) -> Tensor | None:
    network: Any = model
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        return None
    found = network.forward_head(network.forward_features(images_BCHW), pre_logits=True)
    if isinstance(found, tuple):  # a model with a second head for distillation
        found = torch.stack(found).mean(dim=0)
    return found if isinstance(found, Tensor) else None


def _head_input(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no features to extract: it has no linear layer, whose input they would be")
    kept: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        model(images_BCHW)
    finally:
        handle.remove()
    if not kept:
        raise UserError(f"{type(model).__name__} has no features to extract: its last linear layer is not used")
    return kept[-1]
