"""Architectures of the published seven-network comparison on Galaxy10 DECaLS that differ from ours.

Published are: a CNN of 512, 256, 128, 128 and 64 channels without normalisation; a ViT with patches of 25 pixels on images of 200
pixels, width 256, 6 layers and 8 heads; VGGs with frozen ImageNet weights and a new head of three (VGG-19: two) layers.
Everything else, such as the widths of these heads, is our choice and marked as "ours".
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class MlpHead(nn.Module):
    """Head of linear layers with ReLU and dropout between them, on a feature map of fixed size.

    Args:
        channels: C of the feature map.
        num_classes: K.
        hidden: widths of the hidden layers; if empty, the head is a single linear layer.
        pool_size: height and width to which feature maps are averaged.
        drop_rate: dropout after each hidden layer, or before the single layer.
    """

    def __init__(
        self, channels: int, num_classes: int, hidden: Sequence[int] = (), *, pool_size: int = 1, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(pool_size)
        self.flatten = nn.Flatten()
        layers: list[nn.Module] = [] if hidden else [nn.Dropout(drop_rate)]
        width = channels * pool_size**2
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU(inplace=True), nn.Dropout(drop_rate)]
            width = next_width
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, features_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits B x K of feature maps B x C x H x W, or with ``pre_logits`` the maps, as timm's heads do."""
        if pre_logits:
            return features_BCHW
        logits_BK: Tensor = self.layers(self.flatten(self.pool(features_BCHW)))
        return logits_BK


CNN_CHANNELS = (512, 256, 128, 128, 64)
VIT_PATCH, VIT_WIDTH, VIT_LAYERS, VIT_HEADS = 25, 256, 6, 8
# A name under which timm builds a plain ViT of any sizes.
VIT_BASE = "vit_small_patch16_224"
# Widths of the hidden layers (ours). VGG's own 4,096 would mean 120 million weights for 14,188 galaxies.
VGG_HIDDEN = {"reference_vgg16": (512, 256), "reference_vgg19": (512,)}
VGG_MAP = 7  # height and width of VGG's last feature map at 224 pixels, which its classifier flattens


class ReferenceCNN(nn.Module):
    """Five 3 x 3 convolutions, each followed by ReLU and a pooling that halves the map, a global average and a linear layer.

    Kernel, pooling and head are ours. Without normalisation the initial weights set the scale of the activations: He et al. 2015
    (arXiv:1502.01852), equation 10.

    Args:
        num_classes: K.
        drop_rate: dropout before the linear head.
    """

    def __init__(self, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels_out in zip((3, *CNN_CHANNELS), CNN_CHANNELS, strict=False):
            convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.get_parameter("bias"))
            layers += [convolution, nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(CNN_CHANNELS[-1], num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits B x K of normalised images B x 3 x H x W, of 32 pixels or more."""
        features_BD = self.features(images_BCHW).mean(dim=(2, 3))
        logits_BK: Tensor = self.head(self.drop(features_BD))
        return logits_BK

    @staticmethod
    def group_matcher(coarse: bool = False) -> dict[str, Any]:
        """Return the name patterns of the layers, in timm's format."""
        return {"stem": r"^features\.0", "blocks": None if coarse else r"^features\.(\d+)"}


def build_reference_vit(num_classes: int, image_size: int, drop_rate: float, drop_path_rate: float) -> nn.Module:
    """Build timm's VisionTransformer of the published sizes, with a class token and an MLP of four times the width (ours).

    Args:
        num_classes: K.
        image_size: pixels of the square images of the position embedding; it is resampled for other sizes.
        drop_rate: dropout before the linear head.
        drop_path_rate: stochastic depth of the last block.
    """
    from timm.models import VisionTransformer

    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    vit: nn.Module = VisionTransformer(num_classes=num_classes, **reference_vit_arguments(image_size), **rates)
    return vit


def reference_vit_arguments(image_size: int) -> dict[str, Any]:
    """Return timm's arguments of the published ViT; with them timm builds it from ``VIT_BASE``, too."""
    return {
        "img_size": image_size,
        "patch_size": VIT_PATCH,
        "embed_dim": VIT_WIDTH,
        "depth": VIT_LAYERS,
        "num_heads": VIT_HEADS,
        "dynamic_img_size": True,
        "dynamic_img_pad": image_size % VIT_PATCH > 0,
    }
