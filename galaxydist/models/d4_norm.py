"""Batch normalisation of group feature maps: one mean, deviation, scale and offset for the eight orientations of a field."""

from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.models.d4 import ORDER


class D4Norm(nn.Module):
    """Batch normalisation over the images, the plane and the orientations.

    Parameters and running statistics are those of an ``nn.BatchNorm2d`` over B x F x H x (8 W), which does the work on a GPU, and
    which may be replaced by its synchronised twin. On a CPU it is slow with few fields (they do not fill a vector register), so
    that there the same is done with torch's kernels for 8 F channels.
    """

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d(fields)

    def forward(self, x: Tensor) -> Tensor:
        """B x (8 F) x H x W, channels last in memory, to the same."""
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
    """Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1 and the gradients of section 3, over 8 channels at once."""

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
        # As if mean and deviation were constants; the sums over each channel come with it.
        grad_x, grad_scale_C, grad_offset_C = torch.ops.aten.native_batch_norm_backward(gradients[0], x, *fixed)
        grad_scale_F, grad_offset_F = (part.view(ORDER, -1).sum(0) for part in (grad_scale_C, grad_offset_C))
        # What they depend on x is linear in x: less scale / (N deviation) times (sum of g + (x - mean) / deviation sum of g x').
        count = x.numel() // len(grad_scale_F)
        inverse_C = (var_C + ctx.eps).rsqrt()
        slope_C = -scale_C * inverse_C.square() * grad_scale_F.repeat(ORDER) / count
        level_C = -scale_C * inverse_C * grad_offset_F.repeat(ORDER) / count
        through, _, _ = torch.native_batch_norm(x, slope_C, level_C, mean_C, torch.ones_like(var_C), False, 0.0, 0.0)
        return grad_x.add_(through), grad_scale_F, grad_offset_F, None
