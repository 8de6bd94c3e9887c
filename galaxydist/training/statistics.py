"""Batch-norm statistics of several processes. Each moves its own (DDP runs with ``broadcast_buffers=False``); a model is judged
with their mean, and a run goes on with each process's own, so that when it was saved leaves no trace."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from galaxydist.distributed import World

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
