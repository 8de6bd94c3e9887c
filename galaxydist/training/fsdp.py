"""A model of which each process holds a part (``train.strategy=fsdp``): PyTorch's ``fully_shard``, called directly.

Accelerate's plugin is ignored on a machine without a GPU and gives a DDP model there. Parameters, gradients and the optimizer's
state are DTensors cut along their first dimension; buffers are whole on every process. Gradients are the mean over the processes,
as with DDP.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from galaxydist.errors import RunFailedError


def open_mesh(device: torch.device) -> DeviceMesh:
    """The processes in a row. One process alone, which no launcher joined to others, becomes a group of its own."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut a model's parameters up among the processes, in place. All ranks take part, before the optimizer is built.

    Every process starts from rank 0's weights. Parameters keep their names, and their dtype also on the way between processes: in
    half precision run the forward pass under autocast, as with DDP. That gives DDP's numbers; parameters in half precision would
    send less, but round the scales of normalisations too.

    Args:
        model: whole, on the mesh's device.
        mesh: one-dimensional, from ``open_mesh``.

    Returns:
        The same model.

    Raises:
        RunFailedError: a parameter was not cut up.
    """
    _copy_from_rank_0(model, mesh)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in repeated_blocks(model):
        fully_shard(block if len(block) > 1 else block[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RunFailedError(f"train.strategy=fsdp: {len(whole)} parameters were not cut up, the first is {whole[0]}")
    return model


def repeated_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The parts that are gathered one after the other, each a list of modules that run in sequence.

    A ViT's blocks, a ResNet's residual blocks, a VGG's convolutions between two poolings, the stages of our own networks. What is
    in none of them is gathered with the root.
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


@torch.no_grad()
def _copy_from_rank_0(model: nn.Module, mesh: DeviceMesh) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0, group=mesh.get_group())


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """Before each backward pass of a step: gradients are exchanged in the last one only; till then a process holds them whole."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last)
    model.set_is_last_backward(is_last)


# ---- gradients ----


@torch.no_grad()
def clip_sharded_gradients(parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> Tensor:
    """Clip the gradients in place: all together by their global norm, or each element to a range. All ranks take part.

    torch's own functions send one message a parameter for DTensors; here it is one in all. Nothing is read by the host.

    Args:
        parameters: those without a gradient are passed over.
        norm: largest Euclidean norm of all gradients together (0: do not clip by it).
        value: largest magnitude of an element (0: do not clip by it).

    Returns:
        The norm before clipping, a plain scalar, equal on all ranks; nan or inf where a gradient of any rank is.
    """
    gradients = [_sharded(parameter.grad) for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients]
    total = torch.nn.utils.get_total_norm(parts).square()
    dist.all_reduce(total, group=gradients[0].device_mesh.get_group())
    total = total.sqrt()
    if norm > 0:
        torch._foreach_mul_(parts, (norm / (total + 1e-6)).clamp(max=1.0))
    if value > 0:
        torch._foreach_clamp_min_(parts, -value)
        torch._foreach_clamp_max_(parts, value)
    return total


def _sharded(tensor: Tensor | None) -> DTensor:
    assert isinstance(tensor, DTensor)
    assert all(isinstance(placement, Shard) for placement in tensor.placements)
    return tensor


# ---- whole copies ----


class WholeCopy:
    """An unsharded model beside a sharded one, for evaluation: there ranks run different numbers of batches, and a sharded model
    waits in each for the others.

    It takes memory for its weights only while it is filled.

    Args:
        model: before it is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._drop()

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The model in evaluation mode with these weights. All ranks take part in entering, and none in leaving.

        Args:
            tensors: the state dict of the sharded model or of its moving average, under the model's names.
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
    """Copies of tensors, whole on every rank, on their device. All ranks take part, with the same names in the same order."""
    return {name: whole(tensor).clone() for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank; all take part. Other tensors as they are."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` cut up as ``like`` is, on its device and in its own dtype. Nothing is sent: every rank has the whole of it."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return cast(Tensor, distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None))


def part_maker(model: nn.Module) -> Callable[[str, torch.Size, torch.dtype], Tensor]:
    """For ``load_sharded``: what belongs to a parameter and has its shape is read into a tensor cut up like it, on its device.

    A part of the tensor's name, between slashes, must be the parameter's name: ``optimizer/state/head.weight/exp_avg``.
    """
    parameters = dict(model.named_parameters())

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        for part in name.split("/"):
            like = parameters.get(part)
            if isinstance(like, DTensor) and like.shape == shape:
                return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    return make


# Gradient clipping, and the size of the gradient, without waiting for the device.


def clip_gradients(parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> Tensor:
    """Clip the gradients in place: all together by their global norm, or each element to a range.

    With fp16 the gradients must have been unscaled before. Nothing is read by the host; a gradient that is not finite stays so.

    Args:
        parameters: those without a gradient are passed over. Gradients may be sharded over processes (DTensor); then every
            process calls this.
        norm: largest Euclidean norm of all gradients together (0: do not clip by it).
        value: largest magnitude of an element (0: do not clip by it).

    Returns:
        The norm before clipping, a scalar on the gradients' device and in their float type; nan or inf where a gradient is.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    total: Any = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if hasattr(total, "full_tensor"):
        total = total.full_tensor()
    if norm > 0:
        clip_grads_with_norm_(trained, norm, total)
    if value > 0:
        clip_grad_value_(trained, value)
    whole: Tensor = total
    return whole.detach() if isinstance(whole, Tensor) else torch.tensor(whole)
