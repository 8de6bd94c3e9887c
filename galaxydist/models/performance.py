"""What makes a step faster without another recipe: TensorFloat-32, channels last in memory, torch.compile."""

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from galaxydist.errors import EveryRankError, UserError

# Gradient checkpointing: activations inside the repeated blocks are computed again in the backward pass, not kept.


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


# Inductor's kernels for GPUs come from Triton, which works from this compute capability on.
_TRITON_CAPABILITY = (7, 0)


def set_tf32(enabled: bool, device: torch.device) -> None:
    """Compute float32 matrix products and convolutions of a GPU by TensorFloat-32 (10 bits of mantissa), or in full float32.

    Nothing changes on a CPU: there the same switch could choose kernels of less precision too.

    Each is switched by torch's older name as well as by ``fp32_precision``: in torch 2.14 whoever reads the older one back, such
    as torch.compile, stops with an error where only the newer was set (pytorch/pytorch#166387).
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if enabled else "highest")  # sets cuda.matmul.fp32_precision too
    precision = "tf32" if enabled else "ieee"
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = enabled
    cudnn.conv.fp32_precision = precision
    cudnn.rnn.fp32_precision = precision


def channels_last(model: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out as B H W C in memory, in place; shapes and names stay.

    The images must come in the same layout: ``images_channels_last``.
    """
    return model.to(memory_format=torch.channels_last)


def images_channels_last(images_BCHW: Tensor) -> Tensor:
    """The same images with channels as the fastest axis in memory; shape B x 3 x H x W as before."""
    return images_BCHW.contiguous(memory_format=torch.channels_last)


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile ``model`` in place, on its first call; before it is wrapped for several processes.

    Names of parameters stay (there is no ``_orig_mod``); copies of the model are not compiled. A batch of another size is
    compiled once more, then for any size. Gradients are exchanged between processes after the whole backward pass, not during it.

    Raises:
        EveryRankError: what torch.compile needs is not on this machine, or the model has batch normalisation inside checkpointed
            blocks, which torch.compile does not take.
    """
    check_compilable(model)
    _check_compiler(device)
    model.compile()


def remove_broken_libraries(cache_dir: Path) -> list[Path]:
    """Remove what a killed compilation has left of its libraries: torch.compile would load them at every later start, and fail.

    A library that another process compiles just now is left alone: it holds Inductor's lock of that name.

    Args:
        cache_dir: Inductor's.

    Returns:
        What was removed.
    """
    from filelock import FileLock, Timeout

    removed = []
    for path in sorted(cache_dir.glob("*/*.so")):
        if not _is_broken(path):
            continue
        try:
            (cache_dir / "locks").mkdir(exist_ok=True)
            with FileLock(cache_dir / "locks" / f"{path.name.partition('.')[0]}.lock", timeout=0):
                if _is_broken(path):
                    path.unlink()
                    removed.append(path)
        except (Timeout, FileNotFoundError):
            continue
    return removed


def _is_broken(library: Path) -> bool:
    """A file that is empty, begins with zeros, or is an ELF file of 64 bits (elf(5)) that ends before its segments do."""
    try:
        with library.open("rb") as file:
            header, size = file.read(64), os.fstat(file.fileno()).st_size
            if len(header) < 64 or not any(header):
                return True
            if header[:5] != b"\x7fELF\x02":
                return False  # of another system
            (table_at,), (entry_size, num_segments) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
            file.seek(table_at)
            table = file.read(entry_size * num_segments)
    except FileNotFoundError:
        return False
    if len(table) < entry_size * num_segments:
        return True
    entries = [table[start : start + entry_size] for start in range(0, len(table), entry_size)]
    return any(struct.unpack_from("<Q", entry, 8)[0] + struct.unpack_from("<Q", entry, 32)[0] > size for entry in entries)


def check_compilable(model: nn.Module) -> None:
    """Refuse what torch.compile does not take, whatever the machine.

    Raises:
        EveryRankError: checkpointed blocks with batch normalisation in them.
    """
    if has_spared_buffers(model):
        raise EveryRankError(
            f"train.compile=true and train.gradient_checkpointing=true do not go together in {type(model).__name__}, "
            "whose blocks have statistics of batch normalisation; set one of them to false"
        )


def _check_compiler(device: torch.device) -> None:
    """Asked here, since otherwise torch fails in the middle of the first step."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise _unavailable("the package triton, which torch for GPUs brings along on Linux")
        if (capability := torch.cuda.get_device_capability(device)) < _TRITON_CAPABILITY:
            raise _unavailable(f"a GPU of compute capability 7.0 or later (this one has {capability[0]}.{capability[1]})")
        if not any(shutil.which(compiler) for compiler in ("gcc", "clang", "cc")):
            raise _unavailable("a C compiler such as gcc")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise _unavailable("a C++ compiler such as g++ (the variable CXX may name one)") from error


def _unavailable(what: str) -> EveryRankError:
    return EveryRankError(f"train.compile=true needs {what}, and there is none on this machine; install it or set it to false")
