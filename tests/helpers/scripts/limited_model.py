"""A model with everything that a pass changes, which runs out of memory above a number of images."""

from collections.abc import Callable

import torch
from torch import nn


def raise_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB")


def raise_cpu() -> None:
    torch.empty(1 << 50)  # torch's own error


def raise_host() -> None:
    raise MemoryError


class LimitedModel(nn.Module):
    """Convolution, batch normalisation, dropout and a head; B x 3 x H x W in, B x 3 out.

    Args:
        limit: images that fit.
        run_out: raises what a lack of memory raises.
        in_backward: not in the forward pass but on the way back.
    """

    def __init__(self, limit: int, run_out: Callable[[], None] = raise_cuda, *, in_backward: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        self.limit, self.run_out, self.in_backward = limit, run_out, in_backward
        self.sizes: list[int] = []

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images_BCHW))
        assert self.training
        hidden_BC = self.dropout(self.norm(self.conv(images_BCHW)).relu().mean((2, 3)))
        if len(images_BCHW) > self.limit:
            if not self.in_backward:
                self.run_out()
            hidden_BC.register_hook(lambda _: self.run_out())
        logits_BK: torch.Tensor = self.head(hidden_BC)
        return logits_BK
