"""A small convolutional network whose logits are the same for all eight flips and quarter turns of an image."""

import torch
from torch import Tensor, nn

from galaxydist.models.custom_cnn import block_channels, depth_rates, stochastic_depth
from galaxydist.models.d4 import ORDER, D4Conv, halve, make_even, pool_orbit
from galaxydist.models.d4_norm import D4Norm


class D4CNN(nn.Module):
    """The stages of ``CustomCNN`` with convolutions over D4: equal channels and equal work, an eighth of the weights.

    The invariance is exact (up to rounding) for square or other images of any size from 16 pixels; an image with an odd side is
    made even first, by the means of neighbours. Sky rotations by other angles are learned from augmentation.

    Args:
        num_classes: K.
        width: channels of the stem and the first stage, a multiple of 8: the fields times their orientations.
        drop_rate: dropout before the linear head.
        drop_path_rate: stochastic depth of the last block, growing linearly from the first.
    """

    def __init__(self, num_classes: int, width: int = 32, drop_rate: float = 0.0, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        assert width % ORDER == 0, "the recipe's checks have seen to it"
        fields = width // ORDER
        rates = iter(depth_rates(drop_path_rate))
        self.stem = D4Layer(D4Conv(3, fields, 6, stride=2, lifting=True))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*([Halve()] if number else []), *(D4Block(a, b, next(rates)) for a, b in blocks))
                for number, blocks in enumerate(block_channels(fields))
            )
        )
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(8 * fields, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits B x K of normalised images B x 3 x H x W."""
        # The normalisation shares its statistics between channels that lie beside each other in memory this way.
        x = make_even(images_BCHW).contiguous(memory_format=torch.channels_last)
        features_BD = self.stages(self.stem(x)).mean(dim=(2, 3))
        logits_BK: Tensor = self.head(self.drop(pool_orbit(features_BD)))
        return logits_BK


class D4Block(nn.Module):
    """``custom_cnn.Block`` over D4: two 3 x 3 convolutions beside a shortcut; the branch starts at zero."""

    def __init__(self, fields_in: int, fields_out: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.first = D4Layer(D4Conv(fields_in, fields_out, 3))
        self.second = D4Layer(D4Conv(fields_out, fields_out, 3), activation=False)
        self.drop_path = stochastic_depth(drop_path)
        same = fields_in == fields_out
        self.shortcut = nn.Identity() if same else D4Layer(D4Conv(fields_in, fields_out, 1), activation=False)
        nn.init.zeros_(self.second.norm.batch.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.drop_path(self.second(self.first(x))) + self.shortcut(x))


class D4Layer(nn.Module):
    """Convolution, batch normalisation and, where asked, ReLU."""

    def __init__(self, conv: D4Conv, *, activation: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.norm = D4Norm(conv.weight.shape[0])
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class Halve(nn.Module):
    """Half the height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return halve(x)
