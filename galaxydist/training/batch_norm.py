"""Batch-norm statistics of several processes: averaging, checkpoints, and normalisation over the images of all processes.

Each process updates its own statistics (DDP runs with ``broadcast_buffers=False``). A model is evaluated with their mean, and a
run continues with each process's own, so that the steps at which it was saved do not change the numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from galaxydist.distributed import World
from galaxydist.errors import EveryRankError

STATISTICS = ("running_mean", "running_var")
# First part of the names of the ranks' own statistics in a checkpoint.
GROUP = "ranks"


class HasBuffers(Protocol):
    """A model, or the moving average of one."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def gather_statistics(world: World, modules: Mapping[str, HasBuffers]) -> dict[str, Tensor]:
    """Gather the batch-norm statistics of models, given by name. All ranks take part.

    Returns:
        W x n float64 by name in a checkpoint: the concatenated statistics of each rank. Empty for one process.
    """
    rows: dict[str, Tensor] = {}
    for name, module in modules.items():
        if world.size > 1 and statistics_of(module):
            own = _flatten(statistics_of(module))
            gathered = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(gathered, own)
            rows[f"{GROUP}/{name}"] = torch.stack(gathered)
    return rows


@torch.no_grad()
def restore_statistics(world: World, modules: Mapping[str, HasBuffers], tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's own statistics into the models, if a checkpoint holds those of as many ranks."""
    for name, module in modules.items():
        rows_Wn = tensors.get(f"{GROUP}/{name}")
        if rows_Wn is not None and len(rows_Wn) == world.size:
            _copy(rows_Wn[world.rank], module)


@torch.no_grad()
def average_statistics(world: World, *models: HasBuffers) -> None:
    """Set the statistics of models to their mean over the ranks. All ranks take part."""
    for model in models:
        if world.size > 1 and statistics_of(model):
            _copy(world.all_reduce(_flatten(statistics_of(model))) / world.size, model)


def statistics_of(model: HasBuffers) -> dict[str, Tensor]:
    """Return the running means and variances of a model by name."""
    return {name: b for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in STATISTICS and b.is_floating_point()}


def split_statistics(flat: Tensor, model: HasBuffers) -> dict[str, Tensor]:
    """Split concatenated statistics of a model into tensors of the shapes of its own, by name."""
    buffers = statistics_of(model)
    parts = torch.split(flat, [buffer.numel() for buffer in buffers.values()])
    return {name: part.view_as(buffer) for (name, buffer), part in zip(buffers.items(), parts, strict=True)}


def _flatten(buffers: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers.values()]).double()


def _copy(flat: Tensor, model: HasBuffers) -> None:
    torch._foreach_copy_([*statistics_of(model).values()], [*split_statistics(flat, model).values()])


class BatchNormBackup:
    """Keeps a model's batch-norm statistics before a step, and restores them if the step is skipped or abandoned.

    A single activation that is not finite would otherwise make them non-finite in all later steps.

    Args:
        model: the bare model.
    """

    def __init__(self, model: nn.Module) -> None:
        names = (*STATISTICS, "num_batches_tracked")
        buffers = [buffer for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] in names]
        # A GPU copies the tensors of one data type with a few kernels.
        dtypes = {buffer.dtype: None for buffer in buffers}
        self._buffers = [[buffer.view(-1) for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]
        self._kept: list[Tensor] = []

    def keep(self, *, is_needed: bool) -> None:
        """Copy the statistics; if the copies are not needed, ``restore`` does nothing until the next call."""
        self._kept = [torch.cat(buffers) for buffers in self._buffers] if is_needed else []

    def restore(self, where: Tensor | None = None) -> None:
        """Copy the kept statistics back; with ``where`` (a boolean scalar on the device) only if it is true."""
        if self._kept:
            for buffers, kept in zip(self._buffers, self._kept, strict=True):
                values = kept if where is None else torch.where(where, kept, torch.cat(buffers))
                torch._foreach_copy_(buffers, torch.split(values, [len(buffer) for buffer in buffers]))


# Synchronised batch normalisation, also on CPUs, for which torch has none.


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Let every batch normalisation of ``model`` take its statistics over the images of all processes in training.

    On a GPU the layers become torch's ``SyncBatchNorm`` (timm's, if an activation belongs to the layer), on a CPU
    ``SynchronisedNorm``, which allows unequal numbers of images. Names of parameters and buffers stay; evaluation and frozen
    layers are unchanged. Call it after the model is on its device and before it is wrapped; all processes must run the same
    layers in the same order.

    Returns:
        The converted model; ``model`` may no longer be used.

    Raises:
        EveryRankError: a batch normalisation of an unknown kind.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not _is_known(module):
            raise EveryRankError(
                f"train.sync_batchnorm=true: the layer {name} is a {type(module).__name__}, which cannot be synchronised; "
                "set it to false"
            )
    if next(model.parameters()).device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    return _convert(model)


def _is_known(module: nn.Module) -> bool:
    if type(module).forward is _BatchNorm.forward:
        return True
    from timm.layers import BatchNormAct2d

    return type(module).forward is BatchNormAct2d.forward


def _convert(module: nn.Module) -> nn.Module:
    """Replace the batch normalisations of a module, as ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does."""
    if isinstance(module, _BatchNorm):
        return SynchronisedNorm(module)
    for name, child in module.named_children():
        module.add_module(name, _convert(child))
    return module


class SynchronisedNorm(_BatchNorm):
    """Batch normalisation of CPU tensors over the images of all processes, with the parameters and buffers of another layer."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.training = layer.training
        for name, child in layer.named_children():  # act and drop of timm's BatchNormAct2d
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B x C x ..., each process's own B), in x's dtype."""
        if self.training and dist.get_world_size() > 1:
            batch = _gather_statistics(x, self.eps)
            if batch.count <= 1:
                raise ValueError(f"Expected more than 1 value per channel when training, got {batch.count} over all processes")
            self._update(batch)
            x = _Normalise.apply(x, self.weight, self.bias, batch)
        else:
            x = super().forward(x)
        layer: Any = self
        return layer.act(layer.drop(x)) if hasattr(self, "act") else x

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept every shape that the replaced layer could get."""

    @torch.no_grad()
    def _update(self, batch: "BatchStatistics") -> None:
        """Update the running statistics; the variance is the unbiased one of all processes' values, as in torch."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased_C = batch.variance_C * (batch.count / (batch.count - 1))
        self.running_mean.mul_(1 - share).add_(batch.mean_C.to(self.running_mean.dtype), alpha=share)
        self.running_var.mul_(1 - share).add_(unbiased_C.to(self.running_var.dtype), alpha=share)


@dataclass(frozen=True)
class BatchStatistics:
    """Mean and biased variance of each channel over all processes, float64 of shape C, of ``count`` values.

    ``eps`` is added to the variance.
    """

    mean_C: Tensor
    variance_C: Tensor
    count: int
    eps: float


class _Normalise(torch.autograd.Function):
    """Batch normalisation with given statistics, and its gradient: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.

    The gradients of weight and bias are this process's part; DistributedDataParallel sums them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, batch: BatchStatistics) -> Tensor:
        ctx.save_for_backward(x, weight_C, batch.mean_C, (batch.variance_C + batch.eps).rsqrt())
        ctx.count = batch.count
        dtype = _precise(x) if weight_C is None else weight_C.dtype
        mean_C, variance_C = batch.mean_C.to(dtype), batch.variance_C.to(dtype)
        return nn.functional.batch_norm(x, mean_C, variance_C, weight_C, bias_C, training=False, eps=batch.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, inverse_C = ctx.saved_tensors
        dtype, along, others = _precise(x), [1, -1] + [1] * (x.ndim - 2), _others(x)
        inverse_C = inverse_C.to(dtype)
        gradient = gradients[0].to(dtype)
        normal = (x.to(dtype) - mean_C.to(dtype).view(along)) * inverse_C.view(along)
        sum_C, product_C = gradient.sum(others), (gradient * normal).sum(others)
        gradient_x = None
        if ctx.needs_input_grad[0]:
            totals = torch.cat([sum_C, product_C])
            dist.all_reduce(totals)
            mean_sum_C, mean_product_C = (totals / ctx.count).chunk(2)
            scale_C = inverse_C if weight_C is None else inverse_C * weight_C.to(dtype)
            pulled = gradient - mean_sum_C.view(along) - normal * mean_product_C.view(along)
            gradient_x = (pulled * scale_C.view(along)).to(x.dtype)
        return (
            gradient_x,
            *(total_C if ctx.needs_input_grad[i] else None for i, total_C in ((1, product_C), (2, sum_C))),
            None,
            None,
        )


@torch.no_grad()
def _gather_statistics(x: Tensor, eps: float) -> BatchStatistics:
    """Return the statistics of all processes' x.

    Each process sends its mean, sum of squares around the mean and count, which combine without cancellation: Chan, Golub &
    LeVeque 1983, DOI 10.1080/00031305.1983.10483115.
    """
    count = x.numel() // x.shape[1]
    variance_C, mean_C = torch.var_mean(x.to(_precise(x)), _others(x), correction=0)
    own = torch.cat([mean_C.double(), variance_C.double() * count, torch.tensor([count], dtype=torch.float64)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    statistics_Wn = torch.stack(gathered)  # n = 2 C + 1
    means_WC, squares_WC = statistics_Wn[:, :-1].chunk(2, dim=1)
    counts_W1 = statistics_Wn[:, -1:]
    total = counts_W1.sum()
    mean_C = (means_WC * counts_W1).sum(0) / total
    squares_C = squares_WC.sum(0) + (counts_W1 * (means_WC - mean_C).square()).sum(0)
    return BatchStatistics(mean_C, squares_C / total, int(total), eps)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _others(x: Tensor) -> list[int]:
    """Return the dimensions of x (B x C x ...) except the channels."""
    return [dim for dim in range(x.ndim) if dim != 1]
