"""Gradient checkpointing: activations inside the repeated blocks are computed again in the backward pass, not kept."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from galaxydist.errors import UserError


def checkpoint_activations(model: nn.Module) -> int:
    """Let the repeated blocks of ``model`` keep their inputs alone while training, in place (Chen et al. 2016, arXiv:1604.06174).

    Blocks are those of a ViT, of a ResNet's layers, of the stages of our own networks; a VGG is cut after each pooling. Loss,
    gradients, dropout and batch-norm statistics are bit for bit what they are without. Names of parameters stay, and a copy of
    the model (the moving average) is checkpointed too, because the classes of the blocks change and not their methods.

    Returns:
        How many parts are computed again.

    Raises:
        UserError: the model has no such blocks.
    """
    blocks = _blocks(model)
    for block in blocks:
        block.__class__ = type(f"Checkpointed{type(block).__name__}", (CheckpointedBlock, type(block)), {})
    features = getattr(model, "features", None)
    if type(features) is nn.Sequential:
        features.__class__ = CheckpointedFeatures
        return len(_segments(features))
    if not blocks:
        raise UserError(f"train.gradient_checkpointing=true: {type(model).__name__} has no repeated blocks; set it to false")
    return len(blocks)


class CheckpointedBlock(nn.Module):
    """Put in front of a block's class by ``checkpoint_activations``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return _checkpoint([self], super().forward, *args, **kwargs)


class CheckpointedFeatures(nn.Sequential):
    """A flat sequence of layers, cut after each pooling: what lies between two is the smallest part worth keeping."""

    def forward(self, x: Tensor) -> Tensor:
        for segment in _segments(self):
            run = partial(_run, segment)
            x = _checkpoint(segment, run, x) if self.training and torch.is_grad_enabled() else run(x)
        return x


def has_spared_buffers(model: nn.Module) -> bool:
    """Whether ``checkpoint_activations`` has found blocks whose buffers (batch-norm statistics) a repetition must not move."""
    parts = (module for module in model.modules() if isinstance(module, (CheckpointedBlock, CheckpointedFeatures)))
    return any(True for part in parts for _ in part.buffers())


def _blocks(model: nn.Module) -> list[nn.Module]:
    groups: list[Any] = []
    if hasattr(model, "blocks"):
        groups = [model.blocks]
    elif hasattr(model, "layer1"):
        groups = [model.get_submodule(f"layer{number}") for number in range(1, 5)]
    elif hasattr(model, "stages"):
        stages: Any = model.stages
        groups = [stage if isinstance(stage, nn.Sequential) else [stage] for stage in stages]
    return [block for group in groups for block in group if any(True for _ in block.parameters())]


def _segments(features: nn.Sequential) -> list[list[nn.Module]]:
    segments: list[list[nn.Module]] = [[]]
    for layer in features:
        segments[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            segments.append([])
    return [layers for layers in segments if layers]


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _checkpoint(modules: Sequence[nn.Module], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function`` runs ``modules``; without buffers in them this is what torch.compile can take too."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if any(True for module in modules for _ in module.buffers()):
        options["context_fn"] = partial(_contexts, modules)
    return checkpoint(function, *args, **options, **kwargs)


Context = contextlib.AbstractContextManager[None]


def _contexts(modules: Sequence[nn.Module]) -> tuple[Context, Context]:
    """For the forward pass, and for its repetition."""
    return contextlib.nullcontext(), _spare_buffers(modules)


@contextlib.contextmanager
def _spare_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norm moves its statistics in every forward pass: the repetition moves copies, which are thrown away."""
    inside = [inner for module in modules for inner in module.modules()]
    kept = [(inner, name, buffer) for inner in inside for name, buffer in inner._buffers.items() if buffer is not None]
    try:
        for inner, name, buffer in kept:
            inner._buffers[name] = buffer.clone()
        yield
    finally:
        for inner, name, buffer in kept:
            inner._buffers[name] = buffer
