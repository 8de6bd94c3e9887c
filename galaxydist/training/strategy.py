"""Strategies: how the processes share a model (``train.strategy``), whole on each (``ddp``) or sharded (``fsdp``).

FSDP is PyTorch's ``fully_shard``. Accelerate's plugin is not used: without a GPU it is ignored and gives a DDP model. Parameters,
gradients and the optimizer's state are DTensors sharded along their first dimension; buffers are whole on every process.
Gradients are the mean over the processes, as with DDP.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from galaxydist.checkpoints import store
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.sharded import ShardedWriter, load_sharded, open_saving_group
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.devices import autocast
from galaxydist.distributed import World
from galaxydist.errors import RunFailedError
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

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of a micro-batch, computed in the precision of the run."""

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return a context for a micro-batch; gradients are reduced over the ranks in the last one of a step only."""

    def warm_up(self, images_BCHW: Tensor) -> None:
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

    def forward(self, images_BCHW: Tensor) -> Tensor:
        with self.world.mixed_precision.autocast():
            logits_BK: Tensor = self._wrapped(images_BCHW)
        return logits_BK

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        wrapped = self._wrapped
        return nullcontext() if is_last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()

    def warm_up(self, images_BCHW: Tensor) -> None:
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


class FSDPStrategy:
    """The ``fsdp`` strategy: each process holds a part of each parameter, gradient, optimizer state and moving average."""

    is_collective = True

    def __init__(self, world: World, model: nn.Module, config: TrainConfig) -> None:
        mesh = open_mesh(world.device)
        self._whole = WholeCopy(model)
        self.model = shard_model(model, mesh)
        self._world = world
        self.ema = MovingAverage(model, config.ema) if config.ema > 0 else None
        self.ema_state: HasBuffers | None = self.ema
        # Checkpoints are written while the training continues: on groups of their own they cannot collide with its collectives.
        self._saving, self._loading = open_saving_group(), open_saving_group()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # Casts are not cached, since the whole weights exist for one block at a time.
        with autocast(self._world.device, self._world.precision, cached=False):
            logits_BK: Tensor = self.model(images_BCHW)
        return logits_BK

    @contextmanager
    def gradient_sync(self, *, is_last: bool) -> Iterator[None]:
        set_gradient_sync(self.model, is_last)
        yield

    def warm_up(self, images_BCHW: Tensor) -> None:
        """Do nothing: gradients are grouped by block from the first pass on."""

    def eval_model(self) -> AbstractContextManager[nn.Module]:
        return self._whole.filled((self.ema_state or self.model).state_dict())

    def open_writer(self, checkpoints_dir: Path, *, background: bool, check: Callable[[], None]) -> CheckpointWriter:
        return ShardedWriter(checkpoints_dir, group=self._saving, background=background, check=check)

    def load(self, checkpoints_dir: Path) -> Checkpoint | None:
        return load_sharded(checkpoints_dir, make=shard_maker(self.model), group=self._loading)


def open_mesh(device: torch.device) -> DeviceMesh:
    """Return a one-dimensional mesh of all processes; a process without a launcher gets a group of its own."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model's parameters in place. All ranks take part, before the optimizer is built.

    Every process starts from rank 0's weights. Parameters keep their names and, in communication too, their dtype: in half
    precision the forward pass runs under autocast, as with DDP, and gives DDP's numbers. Parameters in half precision would send
    less, but also round the scales of normalisations.

    Args:
        model: the whole model, on the mesh's device.
        mesh: the mesh from ``open_mesh``.

    Returns:
        The same model.

    Raises:
        RunFailedError: a parameter was not sharded.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0, group=mesh.get_group())
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in repeated_blocks(model):
        fully_shard(block if len(block) > 1 else block[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RunFailedError(f"train.strategy=fsdp: {len(whole)} parameters were not sharded, the first is {whole[0]}")
    return model


def repeated_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks that are gathered one after the other, each a list of modules that run in sequence.

    They are a ViT's blocks, a ResNet's residual blocks, a VGG's convolutions between two poolings and the stages of our own
    networks. Parameters outside of them are gathered with the root module.
    """
    for name in ("blocks", "stages"):
        if isinstance(parts := getattr(model, name, None), nn.Sequential):
            return [[part] for part in parts]
    layers = [getattr(model, f"layer{number}", None) for number in range(1, 5)]
    if all(isinstance(layer, nn.Sequential) for layer in layers):
        return [[block] for layer in layers for block in cast(nn.Sequential, layer)]
    if isinstance(features := getattr(model, "features", None), nn.Sequential):
        return _between_poolings(features)
    raise RunFailedError(f"train.strategy=fsdp: {type(model).__name__} has no repeated blocks that are known here")


def _between_poolings(features: nn.Sequential) -> list[list[nn.Module]]:
    segments: list[list[nn.Module]] = [[]]
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            segments.append([])
        elif any(True for _ in module.parameters()):
            segments[-1].append(module)
    return [segment for segment in segments if segment]


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """Reduce the gradients in the last backward pass of a step only; until then each process holds them whole."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last)
    model.set_is_last_backward(is_last)


class WholeCopy:
    """A whole copy of a sharded model for evaluation.

    In an evaluation ranks run different numbers of batches, but a sharded model waits for all ranks in each batch. The copy takes
    memory for its weights only while it is filled.

    Args:
        model: the model before it is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._drop()

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Fill the model with weights and yield it in evaluation mode. All ranks enter together; leaving needs no other rank.

        Args:
            tensors: the state dict of the sharded model or of its moving average.
        """
        self._model.load_state_dict(gather(tensors), assign=True)
        try:
            yield self._model.eval()
        finally:
            self._drop()

    def _drop(self) -> None:
        for module in self._model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole copies of tensors on every rank, on their device. All ranks take part, with the names in the same order."""
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def shard_maker(model: nn.Module) -> Callable[[str, torch.Size, torch.dtype], Tensor]:
    """Return a function for ``load_sharded`` that makes the tensor into which a stored tensor is read.

    A tensor of a parameter's shape, with the parameter's name as one part of its own (``optimizer/state/head.weight/exp_avg``),
    is sharded like the parameter, on its device; others are whole, on the CPU.
    """
    parameters = dict(model.named_parameters())

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        for part in name.split("/"):
            like = parameters.get(part)
            if isinstance(like, DTensor) and like.shape == shape:
                return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    return make
