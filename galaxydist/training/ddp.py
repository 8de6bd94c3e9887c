"""Strategies: how the processes share a model (``train.strategy``); ``DDPStrategy`` keeps it whole on each."""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from galaxydist.checkpoints import store
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.distributed import World
from galaxydist.recipe.schema import TrainConfig
from galaxydist.training.batch_norm import HasBuffers
from galaxydist.training.micro_batch import dummy_loss, unchanged
from galaxydist.training.optimizer import MovingAverage


class Strategy(Protocol):
    """Interface of ``DDPStrategy`` and ``FSDPStrategy``.

    Attributes:
        model: the bare or sharded model, which the optimizer updates and a checkpoint holds.
        ema: the moving average of the weights, or None.
        ema_state: the object whose state dict a checkpoint holds for the moving average, or None.
        is_collective: True if all ranks write a checkpoint together, False if rank 0 writes alone.
    """

    model: nn.Module
    ema: MovingAverage | None
    ema_state: HasBuffers | None
    is_collective: bool

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the logits of a micro-batch, computed in the precision of the run."""

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return a context for a micro-batch; gradients are reduced over the ranks in the last one of a step only."""

    def warm_up(self, images_BCHW: torch.Tensor) -> None:
        """Run passes that fix the order in which gradients are added, so that all later steps use one order.

        The model, its gradients and the random numbers stay as they were. All ranks take part.

        Args:
            images_BCHW: any images in the memory format and dtype of a step's.
        """

    def eval_model(self) -> AbstractContextManager[nn.Module]:
        """Return a context with the model to evaluate, whole on every rank: the moving average if there is one.

        All ranks take part.
        """

    def open_writer(self, checkpoints_dir: Path, *, background: bool, check: Callable[[], None]) -> CheckpointWriter:
        """Return this rank's writer of checkpoints; without ``is_collective`` only rank 0 may save with it."""

    def load(self, checkpoints_dir: Path) -> Checkpoint | None:
        """Return the newest sound checkpoint, the same on all ranks; None if there is none. All ranks take part.

        Raises:
            UserError: on all ranks: no checkpoint is sound.
        """


class DDPStrategy:
    """The ``ddp`` strategy: each process has the whole model, in torch's DistributedDataParallel."""

    is_collective = False

    def __init__(self, world: World, model: nn.Module, config: TrainConfig) -> None:
        self.world = world
        self.model = model
        self._average = copy.deepcopy(model).eval() if config.ema > 0 else None
        self.ema = MovingAverage(model, config.ema, self._average.state_dict()) if self._average is not None else None
        self.ema_state: HasBuffers | None = self._average
        # torch advises an argument that version 2.11 does not have, and other strides of gradients, which cost nothing here.
        for message in ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
            warnings.filterwarnings("ignore", message=message)
        self._wrapped = (
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world.size > 1 else model
        )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        with self.world.mixed_precision.autocast():
            logits_BK: torch.Tensor = self._wrapped(images_BCHW)
        return logits_BK

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        wrapped = self._wrapped
        return nullcontext() if is_last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()

    def warm_up(self, images_BCHW: torch.Tensor) -> None:
        """Run two passes, after which DistributedDataParallel has rebuilt its buckets.

        It sorts the gradients into other buckets after its first backward pass, and a gradient's position in a bucket decides in
        which order three or more processes add it up.
        """
        if self.world.size == 1:
            return
        with unchanged(self.model, self.world.device):
            for _ in range(2):  # the second forward pass rebuilds the buckets
                torch.autograd.backward(dummy_loss(self.forward(images_BCHW)))

    def eval_model(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model if self._average is None else self._average)

    def open_writer(self, checkpoints_dir: Path, *, background: bool, check: Callable[[], None]) -> CheckpointWriter:
        return CheckpointWriter(checkpoints_dir, background=background, check=check)

    def load(self, checkpoints_dir: Path) -> Checkpoint | None:
        """Let rank 0 choose the checkpoint; every rank reads it."""
        found: list[Checkpoint | None] = []

        def find() -> Path | None:
            found.append(store.load(checkpoints_dir))
            return found[0].path if found[0] is not None else None

        path = self.world.run_on_main(find)
        if path is None:
            return None
        return self.world.run_on_all(lambda: found[0] if found and found[0] else store.read_sound(path))
