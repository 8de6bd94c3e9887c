"""The memory of one GPU in training, from the recipe alone: a sum of what is certain and a traced step."""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.performance import check_compilable, checkpoint_activations
from galaxydist.recipe.schema import OptimConfig, Recipe
from galaxydist.training.optimizer import build_optimizer

# The memory of a forward and a backward pass, moment by moment, found without any: on tensors that have shapes and no
# content.
#
# The model runs under torch's ``FakeTensorMode`` as if it were on a CPU. There attention takes the fused kernel, which
# keeps no
# matrix of tokens by tokens, and autocast keeps the same tensors in half precision as it does on a GPU.

Int64 = NDArray[np.int64]

# Images of the two passes from which all others are worked out. Not 1: such tensors have layouts of their own.
FEW, MORE = 2, 4


@dataclass(frozen=True)
class Timeline:
    """Bytes that are alive after each operation of a forward and a backward pass, beside weights and kept gradients.

    Args:
        constant, per_image: int64, an entry an operation: ``constant + per_image * B`` bytes, gradients of weights not counted.
        made: bytes of the gradients of weights made so far.
        new: bytes of a gradient of a weight that is made by this operation.
    """

    constant: Int64
    per_image: Int64
    made: Int64
    new: Int64

    def activations(self, num_images: int) -> int:
        """The most at one moment that is neither weight nor gradient of a weight."""
        return int(self._at(num_images).max())

    def peak(self, num_images: int, *, keeps_gradients: bool) -> int:
        """The most at one moment, gradients included.

        Args:
            num_images: in the pass.
            keeps_gradients: gradients are there from the start (DDP's buckets, or those of an earlier micro-batch), and new ones
                are added to them; else they come one by one while activations go.
        """
        if keeps_gradients:
            return int((self._at(num_images) + self.new).max() + self.made[-1])
        return int((self._at(num_images) + self.made).max())

    def _at(self, num_images: int) -> Int64:
        return self.constant + self.per_image * num_images


def trace_step(model: nn.Module, image_size: int, precision: str) -> Timeline:
    """The timeline of a model's training step.

    Args:
        model: in training mode, on the device "meta"; of no use afterwards.
        image_size: of its square RGB input, in pixels.
        precision: ``bf16`` and ``fp16``: the forward pass under autocast; all others: as it is.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        few, more = (_run(model, image_size, num_images, precision) for num_images in (FEW, MORE))
    assert len(few.bytes) == len(more.bytes), "the operations must not depend on the number of images"
    per_image = (more.without_gradients() - few.without_gradients()) // (MORE - FEW)
    return Timeline(few.without_gradients() - per_image * FEW, per_image, few.gradients_made(), few.new_gradients())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, after each operation; ``known`` ones are not counted."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: list[int] = []
        self._alive = 0
        self._births: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._gradients: dict[int, int] = {}
        for tensor in known:
            self._births[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for ten times as often as anything is done
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

    def note_gradients(self, model: nn.Module) -> None:
        """After the backward pass: which of the storages are gradients of weights."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                storage = parameter.grad.untyped_storage()
                birth = self._births[storage]
                self._gradients[birth] = self._gradients.get(birth, 0) + storage.nbytes()

    def new_gradients(self) -> Int64:
        new = np.zeros(len(self.bytes), np.int64)
        for birth, size in self._gradients.items():
            new[birth] += size
        return new

    def gradients_made(self) -> Int64:
        return np.cumsum(self.new_gradients())

    def without_gradients(self) -> Int64:
        return np.asarray(self.bytes, np.int64) - self.gradients_made()

    def _drop(self, num_bytes: int) -> None:
        self._alive -= num_bytes


def _run(model: nn.Module, image_size: int, num_images: int, precision: str) -> _Recorder:
    model.zero_grad(set_to_none=True)
    recorder = _Recorder([*model.parameters(), *model.buffers()])
    images_BCHW = torch.empty(num_images, 3, image_size, image_size, dtype=next(model.parameters()).dtype)
    labels_B = torch.zeros(num_images, dtype=torch.int64)
    recorder.add(images_BCHW)
    with recorder:
        with _autocast(precision):
            logits_BK = model(images_BCHW)
        # As the trainer does: the loss in float32 at least, a sum.
        logits_BK = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
        loss = functional.cross_entropy(logits_BK, labels_B, reduction="none").sum()
        loss.backward()  # type: ignore[no-untyped-call]
    recorder.note_gradients(model)
    return recorder


def _autocast(precision: str) -> AbstractContextManager[Any]:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast("cpu", dtype=types[precision]) if precision in types else nullcontext()


# What no tensor of ours shows: the CUDA context with its libraries (a constant), and workspaces of convolutions and memory that
# torch's allocator holds in pieces too small to use (a share of what comes and goes). An allowance, not a measurement.
ALLOWED_BYTES = 1_000_000_000
ALLOWED_SHARE = 0.1


@dataclass(frozen=True)
class ModelMemory:
    """What a recipe's model and optimizer weigh, in bytes where nothing else is said.

    Args:
        num_trained, num_frozen: parameters.
        weights: parameters and buffers.
        gradients: of the trained parameters.
        optimizer: its state.
        moving_average: a copy of the weights, or 0.
        largest_block: weights of the largest block of the model: what FSDP gathers at a time.
        picture: a decoded picture as it comes to the GPU.
        has_batch_norm: whether a layer normalises over the images of a forward pass.
        timeline: of a forward and a backward pass.
    """

    num_trained: int
    num_frozen: int
    weights: int
    gradients: int
    optimizer: int
    moving_average: int
    largest_block: int
    picture: int
    has_batch_norm: bool
    timeline: Timeline

    @property
    def checkpoint(self) -> int:
        """A checkpoint: model, optimizer and moving average (the text beside them is small)."""
        return self.weights + self.optimizer + self.moving_average


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Args:
        weights, gradients, optimizer, moving_average: that it holds, with FSDP its share of them.
        gathered: FSDP: weights and gradients of the blocks in use.
        pictures: decoded batches, the one in use and the next.
        activations: the most at one moment that a forward and backward pass needs beside.
        allowance: for what cannot be worked out.
        total: at the worst moment, the allowance included. Less than the sum where gradients come while activations go.
        micro_batch: images in that pass.
        per_image: how much each image more in the pass adds to the total, the allowance for it included.
    """

    weights: int
    gradients: int
    optimizer: int
    moving_average: int
    gathered: int
    pictures: int
    activations: int
    allowance: int
    total: int
    micro_batch: int
    per_image: int


def model_memory(recipe: Recipe, num_classes: int, stored_size: int) -> ModelMemory:
    """Build the model without memory and weights, and trace a step of it.

    Args:
        recipe: model, optimizer, precision, image size.
        num_classes: K.
        stored_size: width of the stored pictures in pixels.

    Raises:
        UserError: settings that the model cannot use.
    """
    # On "meta" rather than among fakes: timm reads numbers out of tensors while it builds.
    with torch.device("meta"):
        model = _build(recipe, num_classes)
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
        picture=3 * width**2,
        has_batch_norm=any(isinstance(module, _BatchNorm) and module.training for module in model.modules()),
        timeline=trace_step(model, data.image_size, planned_precision(recipe)),
    )


def estimate(facts: ModelMemory, recipe: Recipe, *, world_size: int, rank_batch: int, num_parts: int) -> Memory:
    """The memory of the GPU that has most to do.

    Args:
        facts: of the recipe's model.
        recipe: the strategy.
        world_size: processes.
        rank_batch: the most pictures of one of them in a step.
        num_parts: forward passes in a step.
    """
    is_sharded = recipe.train.strategy == "fsdp" and world_size > 1
    holders = world_size if is_sharded else 1
    weights, gradients, optimizer, average = (
        -(-part // holders) for part in (facts.weights, facts.gradients, facts.optimizer, facts.moving_average)
    )
    # The block in use and the next one, and the gradients of one before they are dealt out.
    gathered = 3 * facts.largest_block if is_sharded else 0
    pictures = 2 * rank_batch * facts.picture
    micro_batch = -(-rank_batch // num_parts)
    keeps_gradients = world_size > 1 or num_parts > 1
    step = facts.timeline.peak(micro_batch, keeps_gradients=keeps_gradients)
    if is_sharded:
        step -= facts.gradients - gradients
    next_step = facts.timeline.peak(micro_batch + 1, keeps_gradients=keeps_gradients)
    more = next_step - facts.timeline.peak(micro_batch, keeps_gradients=keeps_gradients)
    allowance = ALLOWED_BYTES + int(ALLOWED_SHARE * step)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        moving_average=average,
        gathered=gathered,
        pictures=pictures,
        activations=step - gradients if keeps_gradients else facts.timeline.activations(micro_batch),
        allowance=allowance,
        total=weights + optimizer + average + gathered + pictures + step + allowance,
        micro_batch=micro_batch,
        per_image=int(more * (1 + ALLOWED_SHARE)),
    )


def planned_precision(recipe: Recipe) -> str:
    """What a plan takes ``train.precision=auto`` for: bf16, as on all GPUs of compute capability 8 and later."""
    return "bf16" if recipe.train.precision == "auto" else recipe.train.precision


def _build(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model without trained weights."""
    config = recipe.model.model_copy(update={"pretrained": False, "weights": None})
    model = build_model(config, num_classes, recipe.data.image_size, say=lambda _: None)
    return model.double() if recipe.train.precision == "fp64" else model


def _optimizer_bytes(model: nn.Module, config: OptimConfig) -> int:
    """Bytes of the optimizer's state, found by one real step of it on one parameter of each shape."""
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
    return sum(count * _bytes(_tensors(optimizer.state[samples[key]])) for key, count in counts.items())


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that FSDP would gather one at a time: members of its outermost lists, and what stands beside them."""
    blocks: list[nn.Module] = []
    for child in model.children():
        inner = list(child.children()) if isinstance(child, (nn.Sequential, nn.ModuleList)) else []
        blocks += inner or [child]
    return blocks
