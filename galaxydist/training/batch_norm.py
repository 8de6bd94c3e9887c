"""Batch-norm statistics of several processes. Each moves its own (DDP runs with ``broadcast_buffers=False``); a model is judged
with their mean, and a run goes on with each process's own, so that when it was saved leaves no trace."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from galaxydist.distributed import World
from galaxydist.errors import EveryRankError

STATISTICS = ("running_mean", "running_var")
ALL_STATISTICS = (*STATISTICS, "num_batches_tracked")
GROUP = "ranks"  # of the tensors in a checkpoint


class HasBuffers(Protocol):
    """A model, or the moving average of one."""

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class RankStatistics:
    """The statistics of all ranks at one moment.

    Args:
        means: their mean over the ranks, by model and name in its state dict; empty for one process.
        rows: W x n, each rank's statistics one behind the other, by model and dtype.
    """

    means: Mapping[str, Mapping[str, torch.Tensor]]
    rows: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, world: World, modules: Mapping[str, HasBuffers]) -> Self:
        """Of models by name. All ranks take part."""
        means: dict[str, dict[str, torch.Tensor]] = {}
        rows: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            buffers = statistics_of(module)
            if world.size == 1 or not buffers:
                continue
            mine = torch.cat([buffer.flatten().double() for buffer in buffers.values()])
            gathered = [torch.empty_like(mine) for _ in range(world.size)]
            dist.all_gather(gathered, mine)
            rows_Wn = torch.stack(gathered)
            rows[name] = rows_Wn
            sizes = [buffer.numel() for buffer in buffers.values()]
            parts = torch.split(rows_Wn.mean(dim=0), sizes)
            means[name] = {
                key: part.view_as(buffer).to(buffer.dtype) for (key, buffer), part in zip(buffers.items(), parts, strict=True)
            }
        return cls(means, rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {f"{GROUP}/{name}": rows for name, rows in self.rows.items()}

    @staticmethod
    @torch.no_grad()
    def restore(world: World, modules: Mapping[str, HasBuffers], tensors: Mapping[str, torch.Tensor]) -> None:
        """Give this rank its own statistics back, if there are those of as many ranks."""
        for name, module in modules.items():
            rows_Wn = tensors.get(f"{GROUP}/{name}")
            if rows_Wn is None or len(rows_Wn) != world.size:
                continue
            buffers = statistics_of(module)
            parts = torch.split(rows_Wn[world.rank], [buffer.numel() for buffer in buffers.values()])
            for buffer, part in zip(buffers.values(), parts, strict=True):
                buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def average_statistics(world: World, *models: HasBuffers) -> None:
    """The statistics of models become their mean over the ranks. All ranks take part."""
    if world.size == 1:
        return
    buffers = [buffer for model in models for buffer in statistics_of(model).values()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= world.size
    for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def statistics_of(model: HasBuffers) -> dict[str, torch.Tensor]:
    """The running means and variances of a model, by name."""
    return {name: b for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in STATISTICS and b.is_floating_point()}


# Batch normalisation over the images of all processes together, also on CPUs, for which torch has none.


def synchronise_batch_norm(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Let every batch normalisation of ``model`` take its statistics over all processes' images while training.

    On a GPU these are torch's ``SyncBatchNorm`` (timm's, where an activation belongs to the layer), on a CPU our own, for which
    processes may hold unequal numbers of images. Names of parameters and buffers stay; evaluation and frozen layers are as
    before. Call it after the model is on its device and before it is wrapped. Copies of the model share the group.

    Args:
        group: the processes; they must run the same layers in the same order. None: all.

    Returns:
        The model to use; ``model`` itself may no longer be.

    Raises:
        EveryRankError: a batch normalisation of a kind that is not known here.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not _is_known(module):
            raise EveryRankError(
                f"train.sync_batchnorm=true: the layer {name} is a {type(module).__name__}, which cannot be synchronised; "
                "set it to false"
            )
    if next(model.parameters()).device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        model = convert_sync_batchnorm(model, group)
        return _each_shares(model, nn.SyncBatchNorm, SharedGroup, group)
    return _each_shares(model, _BatchNorm, SynchronisedNorm, group)


class SharedGroup(nn.Module):
    """Put in front of a layer's class: a process group cannot be copied, and a copy of the model belongs to the same one."""

    process_group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGroup":
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return copied


class SynchronisedNorm(SharedGroup, _BatchNorm):
    """Put in front of a batch normalisation's class on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Of x (B x C x ...), each process's own B; of the input's dtype."""
        if not self.training or dist.get_world_size(self.process_group) == 1:
            return super().forward(x)
        found = _gather_statistics(x, self.eps, self.process_group)
        if found.count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {found.count} over all processes")
        self._track(found)
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, found)
        layer: Any = self
        return layer.act(layer.drop(y)) if hasattr(self, "act") else y  # timm's BatchNormAct2d

    @torch.no_grad()
    def _track(self, found: "Statistics") -> None:
        """Move the running statistics; the variance is the unbiased one of all processes' values, as in torch."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased_C = found.variance_C * (found.count / (found.count - 1))
        self.running_mean.mul_(1 - share).add_(found.mean_C.to(self.running_mean.dtype), alpha=share)
        self.running_var.mul_(1 - share).add_(unbiased_C.to(self.running_var.dtype), alpha=share)


@dataclass(frozen=True)
class Statistics:
    """Mean and (biased) variance of each channel over all processes of ``group``, float64 of shape C, of ``count`` values.

    ``eps`` is added to the variance.
    """

    mean_C: Tensor
    variance_C: Tensor
    count: int
    eps: float
    group: Any


class _Normalise(torch.autograd.Function):
    """Batch normalisation with given statistics, and its gradient: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.

    The gradients of weight and bias are this process's part; DistributedDataParallel adds them up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, found: Statistics) -> Tensor:
        ctx.save_for_backward(x, weight_C, found.mean_C, (found.variance_C + found.eps).rsqrt())
        ctx.count, ctx.group = found.count, found.group
        dtype = _precise(x) if weight_C is None else weight_C.dtype
        mean_C, variance_C = found.mean_C.to(dtype), found.variance_C.to(dtype)
        return nn.functional.batch_norm(x, mean_C, variance_C, weight_C, bias_C, training=False, eps=found.eps)

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
            dist.all_reduce(totals, group=ctx.group)
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
def _gather_statistics(x: Tensor, eps: float, group: Any) -> Statistics:
    """Of all processes' x. They tell their own mean, sum of squares around it and count, which combine without cancellation:
    Chan, Golub & LeVeque 1983, DOI 10.1080/00031305.1983.10483115."""
    count = x.numel() // x.shape[1]
    variance_C, mean_C = torch.var_mean(x.to(_precise(x)), _others(x), correction=0)
    mine = torch.cat([mean_C.double(), variance_C.double() * count, torch.tensor([count], dtype=torch.float64)])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    told = torch.stack(everyones)  # W x (2 C + 1)
    means_WC, squares_WC = told[:, :-1].chunk(2, dim=1)
    counts_W1 = told[:, -1:]
    total = counts_W1.sum()
    mean_C = (means_WC * counts_W1).sum(0) / total
    squares_C = squares_WC.sum(0) + (counts_W1 * (means_WC - mean_C).square()).sum(0)
    return Statistics(mean_C, squares_C / total, int(total), eps, group)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _others(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _is_known(module: nn.Module) -> bool:
    if type(module).forward is _BatchNorm.forward:
        return True
    from timm.layers import BatchNormAct2d

    return type(module).forward is BatchNormAct2d.forward


def _each_shares(model: nn.Module, kind: type[nn.Module], front: type[nn.Module], group: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, kind):
            module.__class__ = type(f"Synchronised{type(module).__name__}", (front, type(module)), {})
            module.process_group = group
    return model
