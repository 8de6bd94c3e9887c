"""Saliency maps: Grad-CAM for convolutional networks, attention rollout for vision transformers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from galaxydist.models.build import evaluation_mode
from galaxydist.models.registry import ARCHITECTURES

GRAD_CAM, ROLLOUT = "Grad-CAM", "attention rollout"


@dataclass(frozen=True, slots=True)
class Saliency:
    """Saliency maps of a batch of images.

    Args:
        method: ``GRAD_CAM`` or ``ROLLOUT``.
        maps_BHW: float32 on the CPU, as large as the images, 0 to 1. Grad-CAM: 1 is the largest value of each map, 0 means no
            evidence for the class; a map without evidence is 0 everywhere. Rollout: 0 is the least, 1 the most attended pixel.
        peaks_B: maximum over mean of each map before scaling: 1 for a flat map, 0 for a map that is 0 everywhere.
    """

    method: str
    maps_BHW: Tensor
    peaks_B: Tensor


def method_of(name: str) -> str:
    """Return the saliency method of an architecture of the registry."""
    return ROLLOUT if ARCHITECTURES[name].last_map is None else GRAD_CAM


def explain(model: nn.Module, name: str, images_BCHW: Tensor, targets_B: Tensor) -> Saliency:
    """Compute the saliency maps of a model for images.

    Args:
        model: from ``build_model``; its mode and its gradients do not change.
        name: name of its architecture.
        images_BCHW: normalised images on the model's device.
        targets_B: class for which Grad-CAM shows the evidence in each image; rollout does not depend on it.
    """
    height, width = images_BCHW.shape[2:]
    layer_name = ARCHITECTURES[name].last_map
    if layer_name is None:
        size = patch_size(model)
        raw_Bhw = attention_rollout(model, images_BCHW)
        # The last row and column of patches may extend beyond the image, which the model pads.
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
    """Compute Grad-CAM maps (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2).

    Each feature map of the layer is weighted by the mean gradient of the class's logit over it; the result is the positive part
    of the sum.

    Args:
        layer: a layer of the model with output B x C x h x w.
        targets_B: class numbers.

    Returns:
        Unscaled maps, B x h x w.
    """
    from captum.attr import LayerGradCam

    with evaluation_mode(model):
        images = images_BCHW.detach().requires_grad_()  # if all parameters before the layer are frozen, gradients need this input
        maps_B1hw: Tensor = LayerGradCam(model, layer).attribute(images, targets_B, relu_attributions=True)
    return maps_B1hw.detach()[:, 0].float()


@torch.no_grad()
def attention_rollout(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Compute attention rollout maps (Abnar & Zuidema 2020, arXiv:2005.00928, section 3).

    The rollout is the product over the layers of (A + I) / 2: A are the attention weights, averaged over the heads, and I is the
    residual connection. The map is the class token's row if the model classifies that token, else the mean of the patches' rows.

    Args:
        model: timm's VisionTransformer.

    Returns:
        B x h x w: the share of each patch; the shares and that of the class token add up to 1.
    """
    vit: Any = model
    with evaluation_mode(model), _attention(vit) as weights:
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
    """Return the height and width of a ViT's patches in pixels."""
    vit: Any = model
    height, width = vit.patch_embed.patch_size
    return int(height), int(width)


@contextmanager
def _attention(vit: Any) -> Iterator[list[Tensor]]:
    """Collect the attention weights, B x heads x N x N, of each block in turn.

    A fused attention kernel does not return them, so it is switched off in each block (timm's ``set_fused_attn`` only affects
    models that are built later). The weights are the input of the attention dropout.
    """
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


def _resized(maps_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
