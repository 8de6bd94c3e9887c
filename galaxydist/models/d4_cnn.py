"""Small convolutional network with logits that are invariant under flips and quarter turns.

A group feature map has F fields of 8 channels, one channel for each element g of the group D4. Channels are numbered orientation
first (g * F + f). Turning the image by u turns each map by u and renumbers the orientations: g becomes u g (Cohen & Welling 2016,
arXiv:1602.07576, sections 4 to 6). Every layer here commutes with that.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.models.custom_cnn import block_channels, depth_rates, stochastic_depth

ORDER = 8


def transform(x: Tensor, element: int) -> Tensor:
    """Transform ``x``, ... x H x W, by one element of D4: flip along W from element 4 on, then ``element % 4`` quarter turns."""
    if element >= 4:
        x = x.flip(-1)
    return torch.rot90(x, element % 4, dims=(-2, -1))


@cache
def inverse_products() -> tuple[tuple[int, ...], ...]:
    """Return the element number of g^-1 h for each g (row) and h."""
    corners = torch.arange(4, device="cpu").view(2, 2)  # its eight transforms all differ
    views = [transform(corners, element) for element in range(ORDER)]

    def product(g: int, h: int) -> int:
        return next(i for i, view in enumerate(views) if torch.equal(view, transform(views[h], g)))

    inverse = [next(h for h in range(ORDER) if product(g, h) == 0) for g in range(ORDER)]
    return tuple(tuple(product(inverse[g], h) for h in range(ORDER)) for g in range(ORDER))


class D4Conv(nn.Module):
    """Cross-correlation over D4 and the plane, without bias: one ordinary convolution with an expanded kernel.

    The expanded kernel holds eight transforms of each weight: for output orientation g and input orientation h the weight of
    g^-1 h, transformed by g (the paper's equation 11; equation 10 where the input is an image). Outside of training the expanded
    kernel is cached until the weights change.

    Args:
        fields_in: fields of the input, or channels of the image if ``lifting``.
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
        # An image has no orientation axis, so one weight serves all orientations.
        self.weight = nn.Parameter(torch.empty(fields_out, fields_in, *orientations, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as in nn.Conv2d; the expanded kernel has the same fan-in
        self.register_buffer("index", _expansion(kernel, lifting=lifting), persistent=False)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map B x (8 ``fields_in``) x H x W (images if ``lifting``) to B x (8 ``fields_out``) x H / stride x W / stride."""
        return nn.functional.conv2d(x, self._kernel(), stride=self.stride, padding=self.padding)

    def expand(self) -> Tensor:
        """Return the kernel of the ordinary convolution, (8 ``fields_out``) x (8 ``fields_in``) x k x k; differentiable."""
        out, inside, *_, side = self.weight.shape
        views = self.weight.flatten(2).index_select(2, self.index).view(out, inside, ORDER, -1, side, side)
        orientations = views.shape[3]
        return views.permute(2, 0, 3, 1, 4, 5).reshape(ORDER * out, orientations * inside, side, side)

    def train(self, mode: bool = True) -> "D4Conv":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cached kernel, which copies and pickles compute again."""
        return self.__dict__ | {"_kept": None}

    def _kernel(self) -> Tensor:
        weight = self.weight
        is_learning = self.training or (torch.is_grad_enabled() and weight.requires_grad)
        if is_learning or torch.compiler.is_compiling() or weight.is_inference():
            return self.expand()
        # The version counts in-place changes; .to() changes storage, dtype or device.
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._kept is None or self._kept[0] != state:
            # A kernel from inference mode could not be used later to train the layers after a frozen backbone.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, self.expand())
        return self._kept[1]


def make_even(x: Tensor) -> Tensor:
    """Average neighbouring pixels along odd sides, which become one shorter; a crop or padding by one pixel is not symmetric."""
    height, width = x.shape[2:]
    return nn.functional.avg_pool2d(x, (1 + height % 2, 1 + width % 2), stride=1) if height % 2 or width % 2 else x


def _expansion(kernel: int, *, lifting: bool) -> Tensor:
    """Return the flat indices of a weight's elements in its eight transforms."""
    if lifting:
        indices = torch.arange(kernel**2).view(kernel, kernel)
        return torch.stack([transform(indices, g) for g in range(ORDER)]).flatten()
    indices = torch.arange(ORDER * kernel**2).view(ORDER, kernel, kernel)
    return torch.stack([transform(indices[list(row)], g) for g, row in enumerate(inverse_products())]).flatten()


class D4Norm(nn.Module):
    """Batch normalisation over the images, the plane and the eight orientations of a field.

    Parameters and running statistics are those of an ``nn.BatchNorm2d`` over B x F x H x (8 W), which runs on a GPU and may be
    replaced by ``nn.SyncBatchNorm``. On a CPU it is slow with few fields (they do not fill a vector register), so torch's
    kernels for 8 F channels compute the same there.
    """

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d(fields)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise B x (8 F) x H x W, channels last in memory; shape and layout stay."""
        plain = type(self.batch) is nn.BatchNorm2d and x.device.type == "cpu" and x.dtype == self.batch.weight.dtype
        if plain and not torch.compiler.is_compiling():
            return self._normalise(x)
        shape = x.permute(0, 2, 3, 1).shape
        x_BFHP = x.permute(0, 2, 3, 1).reshape(*shape[:2], shape[2] * ORDER, -1).permute(0, 3, 1, 2)
        normal_BFHP: Tensor = self.batch(x_BFHP)
        return normal_BFHP.permute(0, 2, 3, 1).reshape(shape).permute(0, 3, 1, 2)

    def _normalise(self, x: Tensor) -> Tensor:
        batch: Any = self.batch
        if not batch.training:
            statistics = (batch.running_mean.repeat(ORDER), batch.running_var.repeat(ORDER))
            scale, offset = batch.weight.repeat(ORDER), batch.bias.repeat(ORDER)
            return nn.functional.batch_norm(x, *statistics, scale, offset, training=False, eps=batch.eps)
        y: Tensor
        y, mean_F, var_F = _SharedNorm.apply(x, batch.weight, batch.bias, batch.eps)
        with torch.no_grad():
            count = x.numel() // len(mean_F)
            batch.running_mean.lerp_(mean_F, batch.momentum)
            batch.running_var.lerp_(var_F * (count / max(1, count - 1)), batch.momentum)
            batch.num_batches_tracked += 1
        return y


class _SharedNorm(torch.autograd.Function):
    """Batch normalisation over 8 channels at once (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1 and section 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_F: Tensor, offset_F: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean_GF, var_GF = (part.view(ORDER, -1) for part in torch.batch_norm_update_stats(x, None, None, 0.0))
        mean_F = mean_GF.mean(0)
        var_F = (var_GF + (mean_GF - mean_F).square()).mean(0)
        scale_C, offset_C, mean_C, var_C = (part.repeat(ORDER) for part in (scale_F, offset_F, mean_F, var_F))
        y, _, _ = torch.native_batch_norm(x, scale_C, offset_C, mean_C, var_C, False, 0.0, eps)
        ctx.save_for_backward(x, scale_C, mean_C, var_C)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean_F, var_F)
        return y, mean_F, var_F

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale_C, mean_C, var_C = ctx.saved_tensors
        fixed = (scale_C, mean_C, var_C, None, None, False, ctx.eps, [True, True, True])
        # The gradient for constant mean and deviation, and the sums over each channel.
        grad_x, grad_scale_C, grad_offset_C = torch.ops.aten.native_batch_norm_backward(gradients[0], x, *fixed)
        grad_scale_F, grad_offset_F = (part.view(ORDER, -1).sum(0) for part in (grad_scale_C, grad_offset_C))
        # The gradient through mean and deviation, with x' = (x - mean) / deviation:
        # -scale / (N deviation) (sum of g + x' sum of (g x')). It is linear in x, so one batch_norm call computes it.
        count = x.numel() // len(grad_scale_F)
        inverse_C = (var_C + ctx.eps).rsqrt()
        slope_C = -scale_C * inverse_C.square() * grad_scale_F.repeat(ORDER) / count
        level_C = -scale_C * inverse_C * grad_offset_F.repeat(ORDER) / count
        through, _, _ = torch.native_batch_norm(x, slope_C, level_C, mean_C, torch.ones_like(var_C), False, 0.0, 0.0)
        return grad_x.add_(through), grad_scale_F, grad_offset_F, None


class D4CNN(nn.Module):
    """The stages of ``CustomCNN`` with convolutions over D4: same channels and computation, an eighth of the weights.

    The invariance is exact (up to rounding) for images of any size from 16 pixels on; an odd side is made even first
    (``make_even``). Rotations by other angles are learned from augmentation.

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
        """Return logits B x K of normalised images B x 3 x H x W."""
        # D4Norm expects the channels-last layout.
        x = make_even(images_BCHW).contiguous(memory_format=torch.channels_last)
        features_BD = self.stages(self.stem(x)).mean(dim=(2, 3))
        # The mean over the orientations is invariant; the maximum learned more slowly from few galaxies.
        invariant_BF = torch.unflatten(features_BD, 1, (ORDER, -1)).mean(dim=1)
        logits_BK: Tensor = self.head(self.drop(invariant_BF))
        return logits_BK


class D4Block(nn.Module):
    """``custom_cnn.Block`` over D4: two 3 x 3 convolutions and a shortcut; the branch starts at zero."""

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
    """D4 convolution, batch normalisation and, if ``activation``, a ReLU."""

    def __init__(self, conv: D4Conv, *, activation: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.norm = D4Norm(conv.weight.shape[0])
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class Halve(nn.Module):
    """Max-pool by 2: windows of 2 pixels on an even side, overlapping windows of 3 on an odd side; both are symmetric."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return nn.functional.max_pool2d(x, (2 + height % 2, 2 + width % 2), stride=2)
