"""How the processes share a model (``train.strategy``): each has the whole of it, or each holds a part."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.sharded import ShardedWriter, load_sharded, open_saving_group
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.distributed import World
from galaxydist.recipe.schema import TrainConfig
from galaxydist.training.batch_norm import HasBuffers
from galaxydist.training.fsdp import (
    WholeCopy,
    clip_gradients,
    clip_sharded_gradients,
    open_mesh,
    part_maker,
    set_gradient_sync,
    shard_model,
)
from galaxydist.training.micro_batch import dummy_loss, unchanged
from galaxydist.training.optimizer import MovingAverage


class Strategy(Protocol):
    """What differs between whole and divided models.

    Attributes:
        model: what the optimizer moves and a checkpoint holds.
        ema: the moving average, or None; ``averages`` is what a checkpoint holds of it.
        is_collective: all ranks write a checkpoint together; else rank 0 alone.
    """

    model: nn.Module
    ema: MovingAverage | None
    averages: HasBuffers | None
    is_collective: bool

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits of a micro-batch, in the precision of the run."""
        ...

    def exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients are exchanged in the last one only."""
        ...

    def settle(self, images_BCHW: torch.Tensor) -> None:
        """Let passes that are thrown away decide what only the first passes of a process decide, so that all later ones add up
        gradients in one order. Nothing else changes. All ranks take part.

        Args:
            images_BCHW: of any content, in the layout and data type of a step's.
        """
        ...

    def clip(self, parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> torch.Tensor:
        """See ``clip_gradients``."""
        ...

    def judged(self) -> AbstractContextManager[nn.Module]:
        """The model that is validated, whole on every rank: the moving average where there is one. All ranks take part."""
        ...

    def open_saver(self, checkpoints_dir: Path, *, background: bool, check: Callable[[], None]) -> CheckpointWriter | None:
        """What writes checkpoints; None on a rank that has no part in it. All ranks take part."""
        ...

    def load(self, checkpoints_dir: Path) -> Checkpoint | None:
        """The newest sound checkpoint, the same on all ranks; None where there is none. All ranks take part.

        Raises:
            UserError: on every rank: none is sound.
        """
        ...


def build_strategy(world: World, model: nn.Module, config: TrainConfig) -> Strategy:
    """Share a model, which is on its device, among the processes. All ranks take part; rank 0's weights count."""
    return FSDPStrategy(world, model, config) if config.strategy == "fsdp" else DDPStrategy(world, model, config)


class DDPStrategy:
    """``ddp``: every process has the whole model, in DistributedDataParallel as Accelerate sets it up."""

    is_collective = False

    def __init__(self, world: World, model: nn.Module, config: TrainConfig) -> None:
        self.world = world
        self.model = model
        self._average = copy.deepcopy(model).eval() if config.ema > 0 else None
        self.ema = MovingAverage(model, config.ema, self._average.state_dict()) if self._average is not None else None
        self.averages: HasBuffers | None = self._average
        # torch advises another argument, which Accelerate does not know, and other strides of gradients, which cost nothing here.
        for message in ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
            warnings.filterwarnings("ignore", message=message)
        self._prepared: nn.Module = world.accelerator.prepare(model)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BK: torch.Tensor = self._prepared(images_BCHW)
        return logits_BK

    def exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = nullcontext() if is_last else self.world.accelerator.no_sync(self._prepared)
        return context

    def settle(self, images_BCHW: torch.Tensor) -> None:
        """After its first backward pass DistributedDataParallel sorts the gradients anew, into other buckets, and a gradient's
        place in a bucket decides in which order three or more processes add it up."""
        if self.world.size == 1:
            return
        with unchanged(self.model, self.world.device):
            for _ in range(2):  # it is the second forward pass that makes the new buckets
                torch.autograd.backward(dummy_loss(self.forward(images_BCHW)))

    def clip(self, parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> torch.Tensor:
        return clip_gradients(parameters, norm=norm, value=value)

    def judged(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model if self._average is None else self._average)

    def open_saver(self, checkpoints_dir: Path, *, background: bool, check: Callable[[], None]) -> CheckpointWriter | None:
        return CheckpointWriter(checkpoints_dir, background=background, check=check) if self.world.is_main else None

    def load(self, checkpoints_dir: Path) -> Checkpoint | None:
        """Rank 0 says which it is, and every rank reads that one."""
        found: list[Checkpoint | None] = []

        def find() -> Path | None:
            found.append(store.load(checkpoints_dir))
            return found[0].path if found[0] is not None else None

        path = self.world.run_on_main(find)
        if path is None:
            return None
        return self.world.run_on_all(lambda: found[0] if found and found[0] else store.read_sound(path))


class FSDPStrategy:
    """``fsdp``: every process holds a part of each parameter, of its gradient, of the optimizer's state and of the average."""

    is_collective = True

    def __init__(self, world: World, model: nn.Module, config: TrainConfig) -> None:
        mesh = open_mesh(world.device)
        self._whole = WholeCopy(model)
        self.model = shard_model(model, mesh)
        self._device, self._is_mixed = world.device, world.precision == "bf16"
        self.ema = MovingAverage(model, config.ema) if config.ema > 0 else None
        self.averages: HasBuffers | None = self.ema
        # Saving happens beside the training: on a group of its own it cannot collide with the exchange of gradients.
        self._saving, self._loading = open_saving_group(), open_saving_group()

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        # Accelerate does not wrap this model. Casts are not kept: the whole weights are there for one block at a time.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_mixed, cache_enabled=False):
            logits_BK: torch.Tensor = self.model(images_BCHW)
        return logits_BK

    @contextmanager
    def exchange(self, *, is_last: bool) -> Iterator[None]:
        set_gradient_sync(self.model, is_last)
        yield

    def settle(self, images_BCHW: torch.Tensor) -> None:
        """Gradients are grouped by block, from the first pass on."""

    def clip(self, parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> torch.Tensor:
        return clip_sharded_gradients(parameters, norm=norm, value=value)

    def judged(self) -> AbstractContextManager[nn.Module]:
        tensors: Mapping[str, torch.Tensor] = (self.averages or self.model).state_dict()
        return self._whole.filled(tensors)

    def open_saver(self, checkpoints_dir: Path, *, background: bool, check: Callable[[], None]) -> CheckpointWriter | None:
        return ShardedWriter(checkpoints_dir, group=self._saving, background=background, check=check)

    def load(self, checkpoints_dir: Path) -> Checkpoint | None:
        return load_sharded(checkpoints_dir, make=part_maker(self.model), group=self._loading)
