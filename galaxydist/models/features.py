"""Features of images: the pooled input of a model's head."""

from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.errors import UserError
from galaxydist.models.build import evaluation_mode


@torch.no_grad()
def extract_features(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return the pooled features before the head of a model, in evaluation mode; the model and its mode do not change.

    Models of timm have functions for it. In other models the features are the input of the last linear layer. Those of a map
    or of tokens are averaged.

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
            _, features = _with_head_input(model, images_BCHW)
    return _as_vectors(model, features, images_BCHW)


def forward_with_features(model: nn.Module, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits B x K and the features B x D (as :func:`extract_features`) from a single forward pass.

    It can be traced for an export; the model is in evaluation mode already.

    Raises:
        UserError: the model has no features.
    """
    network: Any = model
    features: Tensor | None = None
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        found: list[Any] = []
        compute = network.forward_features

        def keep(*inputs: Any, **options: Any) -> Any:
            found.append(compute(*inputs, **options))
            return found[-1]

        network.forward_features = keep
        try:
            logits_BK: Tensor = model(images_BCHW)
        finally:
            del network.forward_features  # the method of the class again
        features = _before_head(model, found[-1]) if found else _timm_features(model, images_BCHW)
    if features is None:
        logits_BK, features = _with_head_input(model, images_BCHW)
    return logits_BK, _as_vectors(model, features, images_BCHW)


def _as_vectors(model: nn.Module, features: Tensor, images_BCHW: Tensor) -> Tensor:
    if features.ndim != 2 or features.shape[0] != images_BCHW.shape[0]:  # a length is a number, and a traced batch has none
        raise UserError(
            f"{type(model).__name__} has no features to extract: the input of its last linear layer has the shape "
            f"{tuple(features.shape)}, which is no vector for each of {len(images_BCHW)} images"
        )
    return features.float()


def _timm_features(model: nn.Module, images_BCHW: Tensor) -> Tensor | None:
    network: Any = model
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        return None
    return _before_head(model, network.forward_features(images_BCHW))


def _before_head(model: nn.Module, last: Any) -> Tensor | None:
    network: Any = model
    found = network.forward_head(last, pre_logits=True)
    if isinstance(found, tuple):  # a model with a second head for distillation
        found = torch.stack(found).mean(dim=0)
    if not isinstance(found, Tensor):
        return None
    return found.flatten(2).mean(dim=2) if found.ndim > 2 else found  # of a map B x C x h x w


def _with_head_input(model: nn.Module, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no features to extract: it has no linear layer, whose input they would be")
    kept: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        logits_BK = model(images_BCHW)
    finally:
        handle.remove()
    if not kept:
        raise UserError(f"{type(model).__name__} has no features to extract: its last linear layer is not used")
    features = kept[-1]
    return logits_BK, features.flatten(1, -2).mean(dim=1) if features.ndim > 2 else features  # of tokens, or B x h x w x C
