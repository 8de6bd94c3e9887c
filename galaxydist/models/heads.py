"""Heads of several layers, to be trained on a frozen backbone."""

from collections.abc import Sequence

from torch import Tensor, nn


class MlpHead(nn.Module):
    """Linear layers with ReLU and dropout between them, on a feature map of one size.

    Args:
        channels: C of the feature map.
        num_classes: K.
        hidden: widths of the layers before the last one; without any, the head is a single linear layer.
        pool_size: height and width to which maps of other sizes are averaged.
        drop_rate: dropout after each hidden layer; where there is none, before the single layer.
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

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Logits B x K of feature maps B x C x H x W."""
        logits_BK: Tensor = self.layers(self.flatten(self.pool(features_BCHW)))
        return logits_BK
