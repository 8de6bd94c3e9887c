"""The memory of one GPU in training, from the recipe alone: a sum of what is certain and a traced step."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from galaxydist.cluster.trace import Timeline, trace_step
from galaxydist.loading.decode import reduction
from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.performance import check_compilable, checkpoint_activations
from galaxydist.recipe.schema import OptimConfig, Recipe
from galaxydist.training.optimizer import build_optimizer

# What no tensor of ours shows: the CUDA context with its libraries (a constant), and workspaces of convolutions and memory that
# torch's allocator holds in pieces too small to use (a share of what comes and goes). An allowance, not a measurement.
ALLOWED_BYTES = 1_000_000_000
ALLOWED_SHARE = 0.1


@dataclass(frozen=True)
class ModelFacts:
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


def weigh(recipe: Recipe, num_classes: int, stored_size: int) -> ModelFacts:
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
    return ModelFacts(
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


def estimate(facts: ModelFacts, recipe: Recipe, *, world_size: int, rank_batch: int, num_parts: int) -> Memory:
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
