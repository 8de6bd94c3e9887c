"""What makes a step faster without another recipe: TensorFloat-32, channels last in memory, torch.compile."""

import os
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.errors import EveryRankError
from galaxydist.models.memory import has_spared_buffers

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
