"""Estimated memory of one GPU in training: weights, optimizer state and a traced training step.

Forward and backward pass run under torch's ``FakeTensorMode``, on tensors with shapes but no data, as if on a CPU. Attention then
uses the fused kernel, which keeps no matrix of tokens by tokens, and autocast keeps the same half-precision tensors as on a GPU.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from galaxydist.loading.decode import reduction
from galaxydist.models.build import build_model, freeze_backbone
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.performance import check_compilable, checkpoint_activations
from galaxydist.models.registry import architecture_of
from galaxydist.recipe.schema import OptimConfig, Recipe
from galaxydist.training.optimizer import build_optimizer

Int64 = NDArray[np.int64]

# Batch sizes of the two traced passes, from which others are extrapolated. Not 1, which has special layouts.
FEW, MORE = 2, 4


@dataclass(frozen=True)
class Timeline:
    """Bytes allocated after each operation of a forward and a backward pass, without weights and kept gradients.

    Args:
        constant, per_image: int64, one entry for each operation: ``constant + per_image * B`` bytes without gradients of weights.
        made: bytes of the gradients of weights computed so far.
        new: bytes of those computed by this operation.
    """

    constant: Int64
    per_image: Int64
    made: Int64
    new: Int64

    def activations(self, num_images: int) -> int:
        """Return the peak bytes of all tensors except weights and their gradients."""
        return int(self._at(num_images).max())

    def peak(self, num_images: int, *, keeps_gradients: bool) -> int:
        """Return the peak bytes, gradients of weights included.

        Args:
            num_images: in the pass.
            keeps_gradients: gradients are allocated from the start (DDP's buckets, or those of an earlier micro-batch), and new
                ones are added to them; else they are allocated one by one while activations are freed.
        """
        if keeps_gradients:
            return int((self._at(num_images) + self.new).max() + self.made[-1])
        return int((self._at(num_images) + self.made).max())

    def _at(self, num_images: int) -> Int64:
        return self.constant + self.per_image * num_images


def trace_step(model: nn.Module, image_size: int, precision: str) -> Timeline:
    """Trace the memory of a model's training step.

    Args:
        model: in training mode, on the device "meta"; cannot be used afterwards.
        image_size: width of its square RGB input in pixels.
        precision: ``bf16`` and ``fp16`` run the forward pass under autocast; all others run it unchanged.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        (few, new), (more, _) = (_trace(model, image_size, num_images, precision) for num_images in (FEW, MORE))
    assert few.size == more.size, "the operations must not depend on the number of images"
    per_image = (more - few) // (MORE - FEW)
    return Timeline(few - per_image * FEW, per_image, np.cumsum(new), new)


class _Recorder(TorchDispatchMode):
    """Records the allocated bytes after each operation; the storages of ``known`` tensors are not counted."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: list[int] = []
        self._alive = 0
        self._births: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._births[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # called ten times as often as all other operations
            return args[0].device
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        self.bytes.append(self._alive)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._births:
            self._births[storage] = len(self.bytes)
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())

    def gradients(self, model: nn.Module) -> Int64:
        """Return, for each operation, the bytes of the gradients of weights that it allocated; after the backward pass."""
        new = np.zeros(len(self.bytes), np.int64)
        for parameter in model.parameters():
            if parameter.grad is not None:
                storage = parameter.grad.untyped_storage()
                new[self._births[storage]] += storage.nbytes()
        return new

    def _drop(self, num_bytes: int) -> None:
        self._alive -= num_bytes


def _trace(model: nn.Module, image_size: int, num_images: int, precision: str) -> tuple[Int64, Int64]:
    """Return the bytes allocated after each operation without gradients of weights, and the bytes of new gradients."""
    model.zero_grad(set_to_none=True)
    recorder = _Recorder([*model.parameters(), *model.buffers()])
    images_BCHW = torch.empty(num_images, 3, image_size, image_size, dtype=next(model.parameters()).dtype)
    labels_B = torch.zeros(num_images, dtype=torch.int64)
    recorder.add(images_BCHW)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with recorder:
        with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
            logits_BK = model(images_BCHW)
        # As in the trainer: a summed loss in float32, or float64 if the logits have that.
        logits_BK = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
        loss = functional.cross_entropy(logits_BK, labels_B, reduction="none").sum()
        loss.backward()
    new = recorder.gradients(model)
    return np.asarray(recorder.bytes, np.int64) - np.cumsum(new), new


# Allowance, not measured, for memory that the trace does not show: a constant for the CUDA context with its libraries, and a
# share of the step's memory for workspaces of convolutions and fragmentation of torch's allocator.
ALLOWED_BYTES = 1_000_000_000
ALLOWED_SHARE = 0.1


@dataclass(frozen=True)
class ModelMemory:
    """Memory of a recipe's model and optimizer, in bytes unless noted otherwise.

    Args:
        num_trained, num_frozen: numbers of parameters.
        weights: parameters and buffers.
        gradients: of the trained parameters.
        optimizer: the optimizer's state.
        moving_average: a copy of the weights, or 0.
        largest_block: weights of the model's largest block, which FSDP gathers at a time.
        image: one decoded image as it is copied to the GPU.
        has_batch_norm: True if a layer uses batch statistics in training.
        timeline: of a forward and a backward pass.
    """

    num_trained: int
    num_frozen: int
    weights: int
    gradients: int
    optimizer: int
    moving_average: int
    largest_block: int
    image: int
    has_batch_norm: bool
    timeline: Timeline

    @property
    def checkpoint(self) -> int:
        """The size of a checkpoint: model, optimizer and moving average (its text files are small)."""
        return self.weights + self.optimizer + self.moving_average


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one GPU.

    Args:
        weights, gradients, optimizer, moving_average: held by this GPU; with FSDP its share.
        gathered: weights and gradients of the blocks that FSDP has gathered.
        images: decoded batches, the current and the next one.
        activations: peak of all other tensors of a forward and backward pass.
        allowance: for memory that cannot be computed.
        total: peak, allowance included; less than the sum of the parts if activations are freed while gradients are allocated.
        micro_batch: images in a forward pass.
        per_image: increase of the total for each further image, allowance included.
    """

    weights: int
    gradients: int
    optimizer: int
    moving_average: int
    gathered: int
    images: int
    activations: int
    allowance: int
    total: int
    micro_batch: int
    per_image: int


def model_memory(recipe: Recipe, num_classes: int, stored_size: int, weights_dir: Path | None = None) -> ModelMemory:
    """Return the memory of a recipe's model, built without data, and of a traced step.

    Args:
        recipe: model, optimizer, precision, image size.
        num_classes: K.
        stored_size: width of the stored images in pixels.
        weights_dir: folder of published weights, where the description of a hub's model is.

    Raises:
        UserError: the model does not support the settings.
    """
    # On "meta", not in FakeTensorMode: timm reads values from tensors while it builds.
    with torch.device("meta"):
        model = _build(recipe, num_classes, weights_dir)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if recipe.train.compile:
        check_compilable(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    weights = _bytes([*model.parameters(), *model.buffers()])
    data = recipe.data
    width = stored_size // reduction(stored_size, data.image_size, data.crop, data.augment.zoom)
    return ModelMemory(
        num_trained=num_trained,
        num_frozen=sum(parameter.numel() for parameter in model.parameters()) - num_trained,
        weights=weights,
        gradients=_bytes(trained),
        optimizer=_optimizer_bytes(model, recipe.optim),
        moving_average=weights if recipe.train.ema > 0 else 0,
        largest_block=max(_bytes(block.parameters()) for block in _blocks(model)),
        image=3 * width**2,
        has_batch_norm=any(isinstance(module, _BatchNorm) and module.training for module in model.modules()),
        timeline=trace_step(model, data.image_size, planned_precision(recipe)),
    )


def estimate(model: ModelMemory, recipe: Recipe, *, world_size: int, rank_batch: int, num_parts: int) -> Memory:
    """Estimate the memory of the GPU with the largest batch.

    Args:
        model: memory of the recipe's model.
        recipe: its strategy is used.
        world_size: number of processes.
        rank_batch: largest number of images of a rank in a step.
        num_parts: micro-batches in a step.
    """
    is_sharded = recipe.train.strategy == "fsdp" and world_size > 1
    holders = world_size if is_sharded else 1
    weights, gradients, optimizer, average = (
        -(-part // holders) for part in (model.weights, model.gradients, model.optimizer, model.moving_average)
    )
    # Weights of the current and the next block, and the gradients of one block before reduce-scatter.
    gathered = 3 * model.largest_block if is_sharded else 0
    images = 2 * rank_batch * model.image
    micro_batch = -(-rank_batch // num_parts)
    keeps_gradients = world_size > 1 or num_parts > 1
    step = model.timeline.peak(micro_batch, keeps_gradients=keeps_gradients)
    more = model.timeline.peak(micro_batch + 1, keeps_gradients=keeps_gradients) - step
    if is_sharded:
        step -= model.gradients - gradients
    allowance = ALLOWED_BYTES + int(ALLOWED_SHARE * step)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        moving_average=average,
        gathered=gathered,
        images=images,
        activations=step - gradients if keeps_gradients else model.timeline.activations(micro_batch),
        allowance=allowance,
        total=weights + optimizer + average + gathered + images + step + allowance,
        micro_batch=micro_batch,
        per_image=int(more * (1 + ALLOWED_SHARE)),
    )


def planned_precision(recipe: Recipe) -> str:
    """Return the recipe's precision; ``auto`` is bf16, as on all GPUs of compute capability 8 and later."""
    return "bf16" if recipe.train.precision == "auto" else recipe.train.precision


def _build(recipe: Recipe, num_classes: int, weights_dir: Path | None) -> nn.Module:
    """Build the recipe's model without loading pretrained weights."""
    config = recipe.model.model_copy(update={"pretrained": False, "weights": None, "freeze_backbone": False})
    model = build_model(config, num_classes, recipe.data.image_size, weights_dir=weights_dir, trust_code=True)
    if recipe.model.freeze_backbone:  # here, since build_model warns of a frozen backbone without weights
        freeze_backbone(model, architecture_of(recipe.model, model).head)
    return model.double() if recipe.train.precision == "fp64" else model


def _optimizer_bytes(model: nn.Module, config: OptimConfig) -> int:
    """Return the bytes of the optimizer's state, measured by one real step on one parameter of each shape."""
    groups = parameter_groups(model, config.weight_decay)
    counts = Counter((number, tuple(p.shape), p.dtype) for number, group in enumerate(groups) for p in group["params"])
    samples = {key: nn.Parameter(torch.zeros(key[1], dtype=key[2])) for key in counts}
    for sample in samples.values():
        sample.grad = torch.zeros_like(sample)
    kept = [
        {**group, "params": [sample for key, sample in samples.items() if key[0] == number]}
        for number, group in enumerate(groups)
    ]
    optimizer = build_optimizer(kept, config, torch.device("cpu"))
    optimizer.step()
    return sum(count * _bytes(tree_iter(optimizer.state[samples[key]])) for key, count in counts.items())


def _bytes(values: Iterable[Any]) -> int:
    """Return the bytes of all tensors among the values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that FSDP gathers one at a time: items of the outermost lists, and other children."""
    blocks: list[nn.Module] = []
    for child in model.children():
        inner = list(child.children()) if isinstance(child, (nn.Sequential, nn.ModuleList)) else []
        blocks += inner or [child]
    return blocks
