"""Performance options of a model: gradient checkpointing, memory format, TF32, torch.compile."""

import contextlib
import itertools
import os
import re
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from galaxydist.errors import EveryRankError, UserError

# Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): activations inside the repeated blocks are not stored, but computed
# again in the backward pass. timm's set_grad_checkpointing is used for no model that has batch normalisation: its second forward
# pass updates the statistics a second time. It does not support VGG either.


class CheckpointedSequential(nn.Sequential):
    """``nn.Sequential`` that stores only the input of each segment while it trains.

    The parameter names are those of the replaced ``nn.Sequential``. A segment is one layer; in a flat sequence of convolutions
    it is a run of layers up to a pooling, because smaller segments are not worthwhile.
    """

    def forward(self, x: Tensor) -> Tensor:
        for segment in self.segments():
            function = segment[0] if len(segment) == 1 else partial(_run, segment)
            is_checkpointed = self.training and torch.is_grad_enabled() and _has_parameters(segment)
            x = _checkpoint(segment, function, x) if is_checkpointed else function(x)
        return x

    def segments(self) -> list[list[nn.Module]]:
        """Return the layers of each segment."""
        layers = list(self)
        if not any(isinstance(layer, nn.Conv2d) for layer in layers):
            return [[layer] for layer in layers]
        ends = [number + 1 for number, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        return [layers[start:end] for start, end in itertools.pairwise(sorted({0, *ends, len(layers)}))]


def checkpoint_activations(model: nn.Module) -> int:
    """Checkpoint the repeated blocks of ``model`` in place, so that training stores only their inputs.

    Blocks are those of a ViT, of a ResNet's layers and of the stages of our own networks; a VGG is cut after each pooling. Other
    models of timm have a way of their own. Loss, gradients, dropout and batch-norm statistics stay bitwise the same.

    Returns:
        The number of checkpointed segments.

    Raises:
        UserError: the model has no repeated blocks.
    """
    parent, names = model, ["blocks", "features", "layer1", "layer2", "layer3", "layer4"]
    if hasattr(model, "stages"):
        parent = model.get_submodule("stages")
        names = [name for name, _ in parent.named_children()]
    count = 0
    for name in names:
        if isinstance(layers := getattr(parent, name, None), nn.Sequential):
            checkpointed = CheckpointedSequential(OrderedDict(layers.named_children()))
            checkpointed.training = layers.training
            setattr(parent, name, checkpointed)
            count += sum(map(_has_parameters, checkpointed.segments()))
    if count:
        return count
    blocks = sum(1 for name, _ in model.named_modules() if re.search(r"(^|\.)(blocks|layers)\.\d+$", name))
    timm_model: Any = model
    if blocks and hasattr(model, "set_grad_checkpointing") and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        timm_model.set_grad_checkpointing(True)
        return blocks
    raise UserError(
        f"train.gradient_checkpointing=true: {type(model).__name__} has no repeated blocks that can be computed again; "
        "set it to false"
    )


def _has_parameters(modules: Sequence[nn.Module]) -> bool:
    return any(True for module in modules for _ in module.parameters())


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _checkpoint(modules: Sequence[nn.Module], function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Checkpoint ``function``, which runs ``modules``; torch.compile supports it only if they have no buffers."""
    options: dict[str, Any] = {}
    if any(True for module in modules for _ in module.buffers()):  # contexts of the forward pass and of its recomputation
        options["context_fn"] = lambda: (contextlib.nullcontext(), _spare_buffers(modules))
    result: Tensor = checkpoint(function, x, use_reentrant=False, **options)
    return result


@contextlib.contextmanager
def _spare_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Replace buffers by copies, because batch norm updates its statistics in every forward pass, and restore them afterwards."""
    inside = [inner for module in modules for inner in module.modules()]
    kept = [(inner, name, buffer) for inner in inside for name, buffer in inner._buffers.items() if buffer is not None]
    try:
        for inner, name, buffer in kept:
            inner._buffers[name] = buffer.clone()
        yield
    finally:
        for inner, name, buffer in kept:
            inner._buffers[name] = buffer


def choose_memory_format(
    channels_last: Literal["auto"] | bool, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> torch.memory_format:
    """Return the memory format of a model's images and weights.

    cuDNN's kernels for tensor cores take channels last, to which it would convert other images in each layer; it has none of them
    for float64 (torch's ``cudnn_conv_suggest_memory_format``). Patch embeddings, whose patches do not overlap, are products of
    matrices and gain nothing.

    Args:
        channels_last: ``train.channels_last``; ``auto``: True on a GPU for a model with other convolutions than patch embeddings.
        model: neither wrapped nor sharded.
        device, dtype: of the images.
    """
    if channels_last == "auto":
        is_convolutional = any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules())
        channels_last = is_convolutional and device.type == "cuda" and dtype != torch.float64
    return torch.channels_last if channels_last else torch.contiguous_format


def set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Convert a model's weights in place. ``nn.Module.to`` would fail for weights of five dimensions, which d4_cnn has."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


# Smallest compute capability that Triton, which compiles Inductor's GPU kernels, supports.
_TRITON_CAPABILITY = (7, 0)


def set_tf32(enabled: bool, device: torch.device) -> None:
    """Compute float32 matrix products and convolutions on a GPU in TensorFloat-32 (10 bits of mantissa), or in full float32.

    Nothing changes on a CPU, where the same setting could also choose kernels of lower precision.

    Both torch's older settings and ``fp32_precision`` are set: in torch 2.14, code that reads the older ones, such as
    torch.compile, raises an error if only the newer ones were set (pytorch/pytorch#166387).
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if enabled else "highest")  # sets cuda.matmul.fp32_precision too
    precision = "tf32" if enabled else "ieee"
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = enabled
    cudnn.conv.fp32_precision = precision
    cudnn.rnn.fp32_precision = precision


@contextlib.contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Let cuDNN time its kernels for each new shape and take the fastest; otherwise it chooses by rule."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, enabled
    try:
        yield
    finally:
        cudnn.benchmark = before


# Workspaces of cuBLAS with which it adds up in one order (cuBLAS documentation, "Results reproducibility").
_CUBLAS_WORKSPACES = (":4096:8", ":16:8")


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool, environ: MutableMapping[str, str]) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits each time; an operation without one raises ``RuntimeError``.

    Enter it before the process group exists: NCCL then leaves out the reductions in switches, whose order varies.

    Args:
        enabled: do it; False does nothing.
        environ: the process's environment, in which the workspace of cuBLAS is set.

    Raises:
        EveryRankError: the environment has another workspace, or this process has used cuBLAS with another one before.
    """
    if not enabled:
        yield
        return
    given = environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACES[0])
    if given not in _CUBLAS_WORKSPACES:
        allowed = " or ".join(_CUBLAS_WORKSPACES)
        raise EveryRankError(
            f"train.deterministic=true needs CUBLAS_WORKSPACE_CONFIG={allowed}, not {given}; unset the variable."
        )
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, memory.fill_uninitialized_memory = True, False  # filling only shows faults, and takes time
    try:
        with explained_workspace():
            yield
    finally:
        mode, cudnn.deterministic, memory.fill_uninitialized_memory = before
        torch.set_deterministic_debug_mode(mode)


@contextlib.contextmanager
def explained_workspace() -> Iterator[None]:
    """Explain torch's error about the workspace of cuBLAS: torch reads the variable once in a process, at the first product.

    Raises:
        EveryRankError: instead of torch's ``RuntimeError``.
    """
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise EveryRankError(
            "train.deterministic=true: this process has used cuBLAS before, with a workspace whose sums vary. Start a new "
            "process (a notebook: restart its kernel), or set the variable before the first run: "
            f"CUBLAS_WORKSPACE_CONFIG={_CUBLAS_WORKSPACES[0]}."
        ) from error


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile ``model`` in place, at its first call; to be called before DDP wraps the model.

    Parameter names stay (there is no ``_orig_mod``); copies of the model are not compiled. The second batch size leads to one
    more compilation, which is valid for any size. Within DDP torch cuts the model into a graph for each of DDP's buckets, so that
    gradients are reduced during the backward pass (torch's ``DDPOptimizer``).

    Raises:
        EveryRankError: torch.compile lacks a compiler on this machine, or the model has batch normalisation inside checkpointed
            blocks, which torch.compile does not support.
    """
    check_compilable(model)
    check_compiler(device)
    model.compile()


def remove_broken_libraries(cache_dir: Path) -> list[Path]:
    """Remove incomplete libraries of a killed compilation, which torch.compile would load at every later start and fail.

    A library that another process is compiling is not touched: that process holds Inductor's lock of the same name.

    Args:
        cache_dir: Inductor's cache folder.

    Returns:
        The removed files.
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
    """Return True for a file that is too short, begins with zeros, or is a 64-bit ELF file (elf(5)) that is truncated.

    The section headers are at the end of the file.
    """
    try:
        with library.open("rb") as file:
            header, size = file.read(64), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    if len(header) < 64 or not any(header):
        return True
    if header[:5] != b"\x7fELF\x02":
        return False  # a format of another operating system
    (table_at,), (entry_size, num_sections) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(table_at + entry_size * num_sections > size)


def check_compilable(model: nn.Module) -> None:
    """Refuse a model that torch.compile does not support on any machine.

    Raises:
        EveryRankError: the model has checkpointed blocks with batch normalisation.
    """
    blocks = (module for module in model.modules() if isinstance(module, CheckpointedSequential))
    if any(True for block in blocks for _ in block.buffers()):
        raise EveryRankError(
            f"train.compile=true and train.gradient_checkpointing=true do not go together in {type(model).__name__}, "
            "whose blocks have statistics of batch normalisation; set one of them to false"
        )


def check_compiler(device: torch.device) -> None:
    """Refuse a machine without the compilers of torch.compile, which itself would fail in the first step.

    Raises:
        EveryRankError: the text names what is missing.
    """
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
