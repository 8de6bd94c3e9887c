"""A convolutional network that is equivariant under flips and quarter turns: a galaxy has the same logits in all eight views.

Group convolutions: Cohen & Welling 2016, arXiv:1602.07576. A field has a map for each of the eight elements g of the group D4;
element g of an output field sees its input with the kernel transformed by g, and with the input's elements reordered by g:

    y[f, g] = sum over i, h of  x[i, h] * T_g w[f, i, g^-1 h]

so that a transformed image gives the same maps, transformed and reordered. Channels stand as element-major pairs (g, f): with
channels last in memory all eight maps of a field are then one channel of a wider image, which is what batch normalisation sees.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

from galaxydist.models.custom_cnn import block_channels, depth_rates

ORIENTATIONS = 8


class D4CNN(nn.Module):
    """A stem, seven residual blocks in four stages, a mean over the image and a maximum over the orbit.

    The feature maps are those of ``CustomCNN`` of equal width; the weights are an eighth of them, each used in eight ways.

    Args:
        num_classes: K.
        width: channels of the stem and the first stage, eight for each field; later stages have 2, 4 and 8 times as many.
        drop_rate: dropout before the linear head.
        drop_path_rate: stochastic depth of the last block, growing linearly from the first.
    """

    def __init__(self, num_classes: int, width: int = 32, drop_rate: float = 0.0, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        n = width // ORIENTATIONS
        rates = iter(depth_rates(drop_path_rate))
        # An even kernel at stride 2 is symmetric about the middle of an image of even width.
        self.stem = nn.Sequential(LiftingConv2d(3, n, kernel=6, stride=2), FieldNorm(n), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*([SymmetricPool()] if number else []), *(D4Block(a, b, next(rates)) for a, b in blocks))
                for number, blocks in enumerate(block_channels(n))
            )
        )
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(8 * n, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits B x K of normalised square images B x 3 x H x H."""
        width = images_BCHW.shape[-1]
        if width % 2:
            images_BCHW = functional.interpolate(images_BCHW, size=(width + 1, width + 1), mode="bilinear", align_corners=False)
        x = images_BCHW.contiguous(memory_format=torch.channels_last)
        features_BGF = self.stages(self.stem(x)).mean(dim=(2, 3)).unflatten(1, (ORIENTATIONS, -1))
        logits_BK: Tensor = self.head(self.drop(features_BGF.amax(dim=1)))
        return logits_BK


class _ExpandedConv2d(nn.Module):
    """A convolution whose kernel is made of fewer weights; without gradients it is made once and kept until they change."""

    index: Tensor
    inverse: Tensor

    def __init__(self, shape: tuple[int, ...], stride: int, padding: int, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.stride, self.padding = stride, padding
        nn.init.uniform_(self.weight, -(fan_in**-0.5), fan_in**-0.5)  # as torch's own convolutions
        self._kept: tuple[Any, Tensor] | None = None

    def expand(self) -> Tensor:
        """The kernel of an ordinary convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self._kernel(), stride=self.stride, padding=self.padding)

    def _kernel(self) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.expand()
        key = (self.weight._version, self.weight.data_ptr(), self.weight.dtype)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self.expand().contiguous(memory_format=torch.channels_last))
        return self._kept[1]

    def train(self, mode: bool = True) -> "_ExpandedConv2d":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class LiftingConv2d(_ExpandedConv2d):
    """From an image to fields: the kernel in all eight positions.

    Args:
        channels_in: of the image.
        fields: that come out, of eight maps each.
        kernel, stride: in pixels; even ones for images of even width.
    """

    def __init__(self, channels_in: int, fields: int, *, kernel: int, stride: int = 1) -> None:
        super().__init__((fields, channels_in, kernel, kernel), stride, (kernel - stride + 1) // 2, channels_in * kernel**2)
        index = _pixels_seen(kernel)
        self.register_buffer("index", torch.from_numpy(index.ravel()), persistent=False)
        self.register_buffer("inverse", torch.from_numpy(np.argsort(index, axis=1)), persistent=False)

    def expand(self) -> Tensor:
        fields, channels, kernel, _ = self.weight.shape
        expanded = _Expand.apply(self.weight.flatten(2), self.index, self.inverse)  # type: ignore[no-untyped-call]
        parts: Tensor = expanded.unflatten(2, (ORIENTATIONS, kernel, kernel)).permute(2, 0, 1, 3, 4)
        return parts.reshape(ORIENTATIONS * fields, channels, kernel, kernel)


class GroupConv2d(_ExpandedConv2d):
    """From fields to fields.

    Args:
        fields_in, fields_out: of eight maps each.
        kernel: odd, in pixels.
    """

    def __init__(self, fields_in: int, fields_out: int, *, kernel: int) -> None:
        shape = (fields_out, fields_in, ORIENTATIONS, kernel, kernel)
        super().__init__(shape, 1, kernel // 2, fields_in * ORIENTATIONS * kernel**2)
        pixels_gp, elements_gh = _pixels_seen(kernel), _elements_seen()
        index = (elements_gh[:, :, None] * kernel**2 + pixels_gp[:, None]).reshape(ORIENTATIONS, -1)
        self.register_buffer("index", torch.from_numpy(index.ravel()), persistent=False)
        self.register_buffer("inverse", torch.from_numpy(np.argsort(index, axis=1)), persistent=False)

    def expand(self) -> Tensor:
        out, into, _, kernel, _ = self.weight.shape
        expanded = _Expand.apply(self.weight.flatten(2), self.index, self.inverse)  # type: ignore[no-untyped-call]
        parts: Tensor = expanded.unflatten(2, (ORIENTATIONS, ORIENTATIONS, kernel, kernel)).permute(2, 0, 3, 1, 4, 5)
        return parts.reshape(ORIENTATIONS * out, ORIENTATIONS * into, kernel, kernel)


class _Expand(torch.autograd.Function):
    """The n weights of each pair of channels in eight orders: F x I x n to F x I x 8n.

    The gradient of a weight is the sum over its eight places, gathered by the inverse orders: quicker than adding up by index,
    and always in the same order.
    """

    @staticmethod
    def forward(ctx: Any, weight_FIn: Tensor, index: Tensor, inverse_8n: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_8n)
        return weight_FIn.index_select(2, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse_8n,) = ctx.saved_tensors
        by_element = gradient.unflatten(2, inverse_8n.shape)
        return by_element.gather(3, inverse_8n.expand_as(by_element)).sum(2), None, None


class FieldNorm(nn.Module):
    """Batch normalisation of fields: one mean and one variance for all eight maps of a field, or equivariance would be lost."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(fields)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        wide = x.permute(0, 2, 3, 1).reshape(batch, height, width * ORIENTATIONS, channels // ORIENTATIONS).permute(0, 3, 1, 2)
        normalised: Tensor = self.norm(wide).permute(0, 2, 3, 1).reshape(batch, height, width, channels)
        return normalised.permute(0, 3, 1, 2)


class SymmetricPool(nn.Module):
    """The maximum of neighbours at half the width, in windows that lie symmetric about the middle for even and odd widths."""

    def forward(self, x: Tensor) -> Tensor:
        odd = x.shape[-1] % 2
        return functional.max_pool2d(x, 2 + odd, stride=2, padding=odd)


class D4Block(nn.Module):
    """``custom_cnn.Block`` of group convolutions; its branch starts at zero."""

    def __init__(self, fields_in: int, fields_out: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(GroupConv2d(fields_in, fields_out, kernel=3), FieldNorm(fields_out), nn.ReLU(inplace=True))
        norm = FieldNorm(fields_out)
        self.second = nn.Sequential(GroupConv2d(fields_out, fields_out, kernel=3), norm)
        self.drop_path = DropPath(drop_path)
        same = fields_in == fields_out
        self.shortcut: nn.Module = (
            nn.Identity() if same else nn.Sequential(GroupConv2d(fields_in, fields_out, kernel=1), FieldNorm(fields_out))
        )
        nn.init.zeros_(norm.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.drop_path(self.second(self.first(x))) + self.shortcut(x))


def transformations() -> list[Callable[[NDArray[Any]], NDArray[Any]]]:
    """The eight elements of D4 acting on square arrays H x W: number g = 4 m + k mirrors m times, then turns k quarters."""
    return [lambda a, m=m, k=k: np.rot90(a[:, ::-1] if m else a, k) for m in range(2) for k in range(4)]  # type: ignore[misc]


def _pixels_seen(kernel: int) -> NDArray[np.int64]:
    """8 x kernel^2: which pixel of a kernel stands at each place of the kernel transformed by g."""
    places = np.arange(kernel**2).reshape(kernel, kernel)
    return np.stack([transform(places).ravel() for transform in transformations()])


def _elements_seen() -> NDArray[np.int64]:
    """8 x 8: the number of g^-1 h."""
    asymmetric = np.arange(4).reshape(2, 2)
    act = transformations()
    looks = {act[g](asymmetric).tobytes(): g for g in range(ORIENTATIONS)}
    product = [[looks[np.ascontiguousarray(act[g](act[h](asymmetric))).tobytes()] for h in range(8)] for g in range(8)]
    return np.array([[product[g].index(h) for h in range(ORIENTATIONS)] for g in range(ORIENTATIONS)])
