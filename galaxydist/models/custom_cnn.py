"""The project's own small convolutional network, made for 64 to 80 pixel galaxies on a CPU."""

from torch import Tensor, nn


class CustomCNN(nn.Module):
    """Convolution blocks with batch normalisation and a global average, so that any image of 16 pixels or more fits.

    Four stages of two 3 x 3 convolutions, with 1, 2, 4 and 8 times ``width`` channels, halving the map between stages.

    Args:
        num_classes: K.
        width: channels of the first stage.
        drop_rate: dropout before the linear head.
    """

    def __init__(self, num_classes: int, width: int = 32, drop_rate: float = 0.0) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 3
        for stage in range(4):
            if stage:
                stages.append(nn.MaxPool2d(2))
            out = width * 2**stage
            stages += [_conv_block(channels, out), _conv_block(out, out)]
            channels = out
        self.features = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits B x K of normalised images B x 3 x H x W."""
        logits_BK: Tensor = self.head(self.drop(self.features(images_BCHW).mean(dim=(2, 3))))
        return logits_BK


def _conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )
