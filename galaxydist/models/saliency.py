"""Where in a picture a model looks: Grad-CAM for convolutional networks, attention rollout for vision transformers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from galaxydist.models.registry import ARCHITECTURES

GRAD_CAM, ROLLOUT = "Grad-CAM", "attention rollout"


@dataclass(frozen=True, slots=True)
class Saliency:
    """Where a model looked.

    Args:
        method: ``GRAD_CAM`` or ``ROLLOUT``.
        maps_BHW: float32 on the CPU, as large as the images, 0 to 1. Grad-CAM: 1 is the largest value of each map, 0 no evidence
            for the class; a map without any is 0 everywhere. Rollout: from the least to the most attended place.
        peaks_B: each map's largest value over its mean, before that: 1 is a map without structure; 0 one that is 0 everywhere.
    """

    method: str
    maps_BHW: Tensor
    peaks_B: Tensor


def method_of(name: str) -> str:
    """How an architecture of the registry is looked into."""
    return ROLLOUT if ARCHITECTURES[name].last_map is None else GRAD_CAM


def explain(model: nn.Module, name: str, images_BCHW: Tensor, targets_B: Tensor) -> Saliency:
    """Where a model looks in images.

    Args:
        model: of ``build_model``; its mode and its gradients are left as they are.
        name: its architecture's.
        images_BCHW: normalised, on the model's device.
        targets_B: the class that Grad-CAM finds evidence for in each image; rollout does not depend on it.
    """
    height, width = images_BCHW.shape[2:]
    layer_name = ARCHITECTURES[name].last_map
    if layer_name is None:
        size = patch_size(model)
        raw_Bhw = attention_rollout(model, images_BCHW)
        # The last row and column of patches may reach over the image, which is padded there.
        padded = raw_Bhw.shape[1] * size[0], raw_Bhw.shape[2] * size[1]
        maps_BHW = _resized(raw_Bhw, padded)[:, :height, :width]
        floor_B = maps_BHW.amin(dim=(1, 2))
    else:
        raw_Bhw = grad_cam(model, model.get_submodule(layer_name), images_BCHW, targets_B)
        maps_BHW = _resized(raw_Bhw, (height, width))
        floor_B = torch.zeros(len(maps_BHW), device=maps_BHW.device)
    mean_B, top_B = raw_Bhw.mean(dim=(1, 2)), raw_Bhw.amax(dim=(1, 2))
    peaks_B = torch.where(mean_B > 0, top_B / mean_B.clamp(min=torch.finfo(mean_B.dtype).tiny), 0.0)
    span_B = maps_BHW.amax(dim=(1, 2)) - floor_B
    scale_B = torch.where(span_B > 0, 1 / span_B.clamp(min=torch.finfo(span_B.dtype).tiny), 0.0)
    maps_BHW = (maps_BHW - floor_B[:, None, None]) * scale_B[:, None, None]
    return Saliency(ROLLOUT if layer_name is None else GRAD_CAM, maps_BHW.clamp(0, 1).cpu(), peaks_B.cpu())


def grad_cam(model: nn.Module, layer: nn.Module, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
    """Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2: the layer's maps, weighted by the mean gradient of the class's
    logit over each, added up, and what is positive of that.

    Args:
        layer: of the model, whose output is B x C x h x w.
        targets_B: class numbers.

    Returns:
        B x h x w, not scaled.
    """
    from captum.attr import LayerGradCam

    with _evaluating(model):
        images = images_BCHW.detach().requires_grad_()  # the way to the layer may be frozen
        maps_B1hw: Tensor = LayerGradCam(model, layer).attribute(images, targets_B, relu_attributions=True)
    return maps_B1hw.detach()[:, 0].float()


@torch.no_grad()
def attention_rollout(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Abnar & Zuidema 2020, arXiv:2005.00928, section 3: the product over the layers of (A + I) / 2, A being the attention
    weights, averaged over the heads, and I standing for the residual connection.

    Of the product, the class token's row where the model classifies that token, else the mean of all patches' rows.

    Args:
        model: timm's VisionTransformer.

    Returns:
        B x h x w: the share of each patch; they add up to 1 but for what stays on the class token.
    """
    vit: Any = model
    with _evaluating(model), _attention(vit) as weights:
        model(images_BCHW)
    rolled_BNN: Tensor | None = None
    for attention_BHNN in weights:
        mean_BNN = attention_BHNN.float().mean(dim=1)
        mixed_BNN = (mean_BNN + torch.eye(mean_BNN.shape[1], device=mean_BNN.device)) / 2
        rolled_BNN = mixed_BNN if rolled_BNN is None else mixed_BNN @ rolled_BNN
    assert rolled_BNN is not None, "a transformer has layers"
    first = vit.num_prefix_tokens
    rows_BN = rolled_BNN[:, 0] if vit.global_pool == "token" else rolled_BNN[:, first:].mean(dim=1)
    height, width = (-(-side // size) for side, size in zip(images_BCHW.shape[2:], patch_size(model), strict=True))
    return rows_BN[:, first:].reshape(-1, height, width)


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a ViT's patches in pixels."""
    vit: Any = model
    height, width = vit.patch_embed.patch_size
    return int(height), int(width)


@contextmanager
def _attention(vit: Any) -> Iterator[list[Tensor]]:
    """Collects the attention weights, B x heads x N x N, of each block in turn. They exist only where attention is computed step
    by step and not by one fused kernel (timm's ``set_fused_attn`` says so for models that are built after it; a built model
    keeps it in each block), and are the input of the dropout on them."""
    layers, weights = [block.attn for block in vit.blocks], []
    fused = [layer.fused_attn for layer in layers]

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weights.append(inputs[0])

    with ExitStack() as stack:
        for layer, was_fused in zip(layers, fused, strict=True):
            layer.fused_attn = False
            stack.callback(setattr, layer, "fused_attn", was_fused)
            stack.callback(layer.attn_drop.register_forward_pre_hook(keep).remove)
        yield weights


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _resized(maps_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
