"""Saliency maps: attention rollout for plain vision transformers, Grad-CAM for other networks."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from galaxydist.models.build import evaluation_mode
from galaxydist.models.registry import Architecture

logger = logging.getLogger(__name__)

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


def explain(model: nn.Module, architecture: Architecture, images_BCHW: Tensor, targets_B: Tensor) -> Saliency | None:
    """Compute the saliency maps of a model for images: attention rollout where it is defined, else Grad-CAM.

    Args:
        model: from ``build_model``; its mode and its gradients do not change.
        architecture: from ``architecture_of``.
        images_BCHW: normalised images on the model's device.
        targets_B: class for which Grad-CAM shows the evidence in each image; rollout does not depend on it.

    Returns:
        The maps; None if the model has no map of the image that could be shown.
    """
    height, width = images_BCHW.shape[2:]
    method = ROLLOUT
    try:
        raw_Bhw = attention_rollout(model, images_BCHW)
        size = patch_size(model)
        # The last row and column of patches may extend beyond the image, which the model pads.
        padded = raw_Bhw.shape[1] * size[0], raw_Bhw.shape[2] * size[1]
        maps_BHW = _resized(raw_Bhw, padded)[:, :height, :width]
        floor_B = maps_BHW.amin(dim=(1, 2))
    except NoMapError:
        method = GRAD_CAM
        if architecture.last_map is None:
            return None
        try:
            raw_Bhw = grad_cam(model, model.get_submodule(architecture.last_map), images_BCHW, targets_B)
        except NoMapError:
            return None
        maps_BHW = _resized(raw_Bhw, (height, width))
        floor_B = torch.zeros(len(maps_BHW), device=maps_BHW.device)
    mean_B, top_B = raw_Bhw.mean(dim=(1, 2)), raw_Bhw.amax(dim=(1, 2))
    peaks_B = torch.where(mean_B > 0, top_B / mean_B.clamp(min=torch.finfo(mean_B.dtype).tiny), 0.0)
    span_B = maps_BHW.amax(dim=(1, 2)) - floor_B
    scale_B = torch.where(span_B > 0, 1 / span_B.clamp(min=torch.finfo(span_B.dtype).tiny), 0.0)
    maps_BHW = (maps_BHW - floor_B[:, None, None]) * scale_B[:, None, None]
    return Saliency(method, maps_BHW.clamp(0, 1).cpu(), peaks_B.cpu())


class NoMapError(ValueError):
    """Error of a model or layer without a map of the image."""


def grad_cam(model: nn.Module, layer: nn.Module, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
    """Compute Grad-CAM maps (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2).

    Each feature map of the layer is weighted by the mean gradient of the class's logit over it; the result is the positive part
    of the sum.

    Args:
        layer: a layer of the model with output B x C x h x w, B x h x w x C or tokens B x N x C.
        targets_B: class numbers.

    Returns:
        Unscaled maps, B x h x w.

    Raises:
        NoMapError: the layer's output has another shape.
    """
    from captum.attr import LayerGradCam

    feature_map = nn.Identity()  # the layer's output as B x C x h x w, which captum needs

    def through_map(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        shaped = FeatureLayout.of(model, output, images_BCHW)
        return shaped.back(feature_map(shaped.to_map(output)), output)

    with evaluation_mode(model), ExitStack() as stack:
        stack.callback(layer.register_forward_hook(through_map).remove)
        images = images_BCHW.detach().requires_grad_()  # if all parameters before the layer are frozen, gradients need this input
        try:
            maps_B1hw: Tensor = LayerGradCam(model, feature_map).attribute(images, targets_B, relu_attributions=True)
        except AssertionError as error:
            raise NoMapError("its last layer is not used") from error
    return maps_B1hw.detach()[:, 0].float()


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """Arrangement of a layer's output: ``channels_first``, ``channels_last`` or tokens of a grid behind some prefix tokens."""

    kind: Literal["channels_first", "channels_last", "tokens"]
    num_prefix: int = 0
    grid: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, model: nn.Module, output: Any, images_BCHW: Tensor) -> "FeatureLayout":
        """Return the arrangement of a layer's output for these images.

        Raises:
            NoMapError: the output is no map of the images.
        """
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise NoMapError("its last layer has no map as output")
        height, width = images_BCHW.shape[2:]
        if output.ndim == 4:
            first, second, third = output.shape[1:]
            # Of timm's models, those of SAM and VOLO do not state their format.
            has_image_shape = first * width == second * height and second * width != third * height
            is_stated = getattr(model, "output_fmt", "NCHW") == "NHWC"
            return cls("channels_last" if is_stated or has_image_shape else "channels_first")
        for num_prefix in (int(getattr(model, "num_prefix_tokens", 0)), 0):  # some models add theirs after the last block
            num_patches = output.shape[1] - num_prefix
            rows = round((num_patches * height / width) ** 0.5)
            if rows >= 1 and num_patches % rows == 0 and rows * width == num_patches // rows * height:
                return cls("tokens", num_prefix, (rows, num_patches // rows))
        raise NoMapError(f"{output.shape[1]} tokens are no grid of the image")

    def to_map(self, output: Tensor) -> Tensor:
        """Return the output as B x C x h x w."""
        if self.kind == "channels_first":
            return output
        if self.kind == "channels_last":
            return output.permute(0, 3, 1, 2)
        tokens_BCN = output[:, self.num_prefix :].transpose(1, 2)
        return tokens_BCN.reshape(*tokens_BCN.shape[:2], *self.grid)

    def back(self, mapped: Tensor, output: Tensor) -> Tensor:
        """Return a map in the arrangement of the output, with the output's prefix tokens."""
        if self.kind == "channels_first":
            return mapped
        if self.kind == "channels_last":
            return mapped.permute(0, 2, 3, 1)
        return torch.cat([output[:, : self.num_prefix], mapped.flatten(2).transpose(1, 2)], dim=1)


def has_plain_attention(model: nn.Module) -> bool:
    """Return True if attention rollout is defined: blocks of attention over one grid of patches, whose weights can be read."""
    blocks = getattr(model, "blocks", None)
    patches: Any = getattr(model, "patch_embed", None)
    if blocks is None or not hasattr(patches, "patch_size") or not hasattr(model, "num_prefix_tokens"):
        return False
    layers = [getattr(block, "attn", None) for block in blocks]
    has_dropout = all(isinstance(getattr(layer, "attn_drop", None), nn.Module) for layer in layers)
    return bool(layers) and has_dropout and all(hasattr(layer, "fused_attn") and hasattr(layer, "num_heads") for layer in layers)


@torch.no_grad()
def attention_rollout(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Compute attention rollout maps (Abnar & Zuidema 2020, arXiv:2005.00928, section 3).

    The rollout is the product over the layers of (A + I) / 2: A are the attention weights, averaged over the heads, and I is the
    residual connection. The map is the class token's row if the model classifies that token, else the mean of the patches' rows.

    Args:
        model: timm's VisionTransformer, or a model with the same blocks.

    Returns:
        B x h x w: the share of each patch; the shares and that of the class token add up to 1.

    Raises:
        NoMapError: the model has no such blocks.
    """
    vit: Any = model
    if not has_plain_attention(model):
        raise NoMapError("it has no blocks of attention over patches")
    with evaluation_mode(model), recorded_attention(vit) as weights:
        model(images_BCHW)
    return roll_out(vit, weights, images_BCHW)


def roll_out(model: nn.Module, weights: Sequence[Tensor], images_BCHW: Tensor) -> Tensor:
    """Return the attention rollout maps B x h x w of recorded attention weights; see :func:`attention_rollout`.

    Args:
        model: with plain attention.
        weights: of each block, from :func:`recorded_attention`.
        images_BCHW: the images, for their size.

    Raises:
        NoMapError: the weights are not between all patches.
    """
    vit: Any = model
    height, width = (-(-side // size) for side, size in zip(images_BCHW.shape[2:], patch_size(model), strict=True))
    num_tokens = int(vit.num_prefix_tokens) + height * width
    # A block of differential attention has two matrices for each head, of which it takes the difference.
    shapes = [(block.attn.num_heads, num_tokens, num_tokens) for block in vit.blocks]
    if [tuple(one.shape[1:]) for one in weights] != shapes:
        raise NoMapError("its attention is not one matrix between all patches for each head")
    rolled_BNN: Tensor | None = None
    for attention_BHNN in weights:
        mean_BNN = attention_BHNN.float().mean(dim=1)
        mixed_BNN = (mean_BNN + torch.eye(mean_BNN.shape[1], device=mean_BNN.device)) / 2
        rolled_BNN = mixed_BNN if rolled_BNN is None else mixed_BNN @ rolled_BNN
    assert rolled_BNN is not None, "a transformer has layers"
    first = vit.num_prefix_tokens
    rows_BN = rolled_BNN[:, 0] if vit.global_pool == "token" else rolled_BNN[:, first:].mean(dim=1)
    return rows_BN[:, first:].reshape(-1, height, width)


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width of a ViT's patches in pixels."""
    vit: Any = model
    size = vit.patch_embed.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


@contextmanager
def recorded_attention(vit: Any) -> Iterator[list[Tensor]]:
    """Collect the attention weights, B x heads x N x N, of each block in turn, while a model with plain attention runs.

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
