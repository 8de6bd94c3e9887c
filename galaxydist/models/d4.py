"""The eight flips and quarter turns of a square (the group D4), and convolutions that keep track of them.

A group feature map has F fields of 8 channels, one for each element g of D4. Channels are numbered orientation first (g * F + f).
Turning the image by u turns each map by u and renumbers the orientations: g becomes u g (Cohen & Welling 2016, arXiv:1602.07576,
sections 4 to 6). Every layer here commutes with that.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ORDER = 8


def transform(x: Tensor, element: int) -> Tensor:
    """``x``, ... x H x W, under one of the eight elements: mirrored along W from 4 on, then ``element % 4`` quarter turns."""
    if element >= 4:
        x = x.flip(-1)
    return torch.rot90(x, element % 4, dims=(-2, -1))


@cache
def inverse_products() -> tuple[tuple[int, ...], ...]:
    """The number of g^-1 h, for each g (row) and h."""
    corners = torch.arange(4, device="cpu").view(2, 2)  # all eight views of it differ
    views = [transform(corners, element) for element in range(ORDER)]

    def product(g: int, h: int) -> int:
        return next(i for i, view in enumerate(views) if torch.equal(view, transform(views[h], g)))

    inverse = [next(h for h in range(ORDER) if product(g, h) == 0) for g in range(ORDER)]
    return tuple(tuple(product(inverse[g], h) for h in range(ORDER)) for g in range(ORDER))


class D4Conv(nn.Module):
    """Cross-correlation over D4 and the plane, without offset: one ordinary convolution with an expanded kernel.

    The expanded kernel holds eight views of each weight: for output orientation g and input orientation h the weight of g^-1 h,
    transformed by g (the paper's equation 11; equation 10 where the input is an image). Outside of training the expanded kernel
    is kept until the weights change.

    Args:
        fields_in: fields of the input, or channels of an image where ``lifting``.
        fields_out: fields of the output; it has 8 times as many channels.
        kernel: width in pixels; ``kernel // 2`` pixels of padding, one less for even widths with a stride of 2.
        stride: 1 with odd kernels, 2 with even ones on maps of even size: only these are symmetric.
        lifting: the input is an image, without orientations.
    """

    index: Tensor

    def __init__(self, fields_in: int, fields_out: int, kernel: int, *, stride: int = 1, lifting: bool = False) -> None:
        super().__init__()
        assert (kernel % 2, stride) in ((1, 1), (0, 2)), "would not be symmetric"
        self.stride, self.padding, self.lifting = stride, (kernel - 1) // 2, lifting
        orientations = (1,) if lifting else (ORDER,)
        # An image is a map that does not depend on the orientation: one weight then serves all.
        self.weight = nn.Parameter(torch.empty(fields_out, fields_in, *orientations, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d does; the fan-in of the expanded kernel is the same
        self.register_buffer("index", _expansion(kernel, lifting=lifting), persistent=False)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """B x (8 ``fields_in``) x H x W, or images where ``lifting``, to B x (8 ``fields_out``) x H x W (over ``stride``)."""
        return nn.functional.conv2d(x, self._kernel(), stride=self.stride, padding=self.padding)

    def expand(self) -> Tensor:
        """The kernel of the ordinary convolution, (8 ``fields_out``) x (8 ``fields_in``) x k x k; differentiable."""
        out, inside, *_, side = self.weight.shape
        views = self.weight.flatten(2).index_select(2, self.index).view(out, inside, ORDER, -1, side, side)
        orientations = views.shape[3]
        return views.permute(2, 0, 3, 1, 4, 5).reshape(ORDER * out, orientations * inside, side, side)

    def train(self, mode: bool = True) -> "D4Conv":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Without the kept kernel: copies and pickles expand their own."""
        return self.__dict__ | {"_kept": None}

    def _kernel(self) -> Tensor:
        weight = self.weight
        is_learning = self.training or (torch.is_grad_enabled() and weight.requires_grad)
        if is_learning or torch.compiler.is_compiling() or weight.is_inference():
            return self.expand()
        # The version counts changes in place; another storage or type comes with .to().
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._kept is None or self._kept[0] != state:
            # Not in inference mode, or the kernel could not be used for training the layers after a frozen backbone.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, self.expand())
        return self._kept[1]


def pool_orbit(features_BD: Tensor) -> Tensor:
    """Averages over the plane, B x (8 F), to B x F: the mean over the orientations, which no flip or turn changes.

    The largest in place of the mean learned more slowly from few galaxies.
    """
    return torch.unflatten(features_BD, 1, (ORDER, -1)).mean(dim=1)


def halve(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 places; where a side is odd, of 3 that overlap by one. Both are symmetric about the centre."""
    height, width = x.shape[2:]
    return nn.functional.max_pool2d(x, (2 + height % 2, 2 + width % 2), stride=2)


def make_even(x: Tensor) -> Tensor:
    """Means of two neighbours along each odd side, which becomes one shorter: no crop or padding of one pixel is symmetric."""
    height, width = x.shape[2:]
    return nn.functional.avg_pool2d(x, (1 + height % 2, 1 + width % 2), stride=1) if height % 2 or width % 2 else x


def _expansion(kernel: int, *, lifting: bool) -> Tensor:
    """Which of a weight's numbers stand in each of the eight views of it, flat."""
    if lifting:
        places = torch.arange(kernel**2).view(kernel, kernel)
        return torch.stack([transform(places, g) for g in range(ORDER)]).flatten()
    places = torch.arange(ORDER * kernel**2).view(ORDER, kernel, kernel)
    return torch.stack([transform(places[list(row)], g) for g, row in enumerate(inverse_products())]).flatten()
