"""Tensors and state dicts in safetensors files, written and read without pickle.

Uses ``torch.distributed.checkpoint``, whose default storage would unpickle. Nested state dicts become flat tensors plus JSON.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Allocates the tensor to read into, from a name, a shape and a dtype.
TensorMaker = Callable[[str, torch.Size, torch.dtype], torch.Tensor]

_MAX_FILE_BYTES = 1 << 30  # a file is built up in memory before it is written


def import_writer() -> None:
    """Import the modules of ``write_tensors`` before it is called in a thread.

    Two threads that import parts of torch at the same time may see half-initialised modules, and an exiting interpreter cannot
    import.
    """
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.checkpoint.state_dict_saver  # noqa: F401


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Write tensors into an existing folder, from this process alone or from all ranks of a group.

    With a group, each rank writes its shards of DTensors into its own files; every other tensor is written by one rank. All
    ranks raise the same error.

    Args:
        folder: output folder; shared by the ranks of the group.
        tensors: by name; any device and layout. With a group: the same names on all ranks, contiguous and without shared memory
            (``separate``).
        group: a gloo process group that nothing else uses at the same time; None: write without a process group.

    Returns:
        The file name of each tensor, without the prefix of a rank (``without_shard``).
    """
    # Imported here because it takes most of a second, and a new run needs it only at its first save.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    if not tensors:
        return {}
    numbers = _file_numbers(tensors)
    _ignore_single_process_warning()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=group is not None)
    with original_errors():
        to_write = separate(tensors) if group is None else dict(tensors)
        dcp_save(to_write, storage_writer=writer, process_group=group, no_dist=group is None)
    num_files = max(numbers.values())
    return {name: f"model-{number:05d}-of-{num_files:05d}.safetensors" for name, number in numbers.items()}


def own_files(folder: Path, rank: int) -> list[Path]:
    """Return the files that a rank of a group wrote with ``write_tensors``."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def without_shard(file_name: str) -> str:
    """Remove the prefix ``shard-00002-`` from a file name; return other names unchanged."""
    return re.sub(r"^shard-\d+-", "", file_name)


def whole_on_cpu(_name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Allocate a whole tensor on the CPU: the default ``TensorMaker``."""
    return torch.empty(shape, dtype=dtype)


def read_tensors(folder: Path, file_names: Mapping[str, str], make: TensorMaker = whole_on_cpu) -> dict[str, torch.Tensor]:
    """Read tensors in this process alone, from files that one or several processes wrote.

    Args:
        folder: folder of the files.
        file_names: the file name of each tensor to read.
        make: allocates each tensor. For a DTensor only this process's shard is read, however it was sharded when written.

    Raises:
        ValueError: a tensor is missing.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    if not file_names:
        return {}
    _ignore_single_process_warning()
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    missing = sorted(set(file_names) - set(known))
    if missing:
        raise ValueError(f"{file_names[missing[0]]} does not hold {missing[0]}")
    tensors: dict[str, torch.Tensor] = {}
    for name in file_names:
        described = known[name]
        assert isinstance(described, TensorStorageMetadata)  # the only kind that the safetensors reader returns
        tensors[name] = make(name, described.size, described.properties.dtype)
    with original_errors():
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise the original error instead of ``CheckpointException``, which hides it and is not an ``Exception``."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        for original, _ in error.failures.values():
            raise original from error
        raise


def _file_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Assign each tensor a file number: a new file for each first part of the names, and whenever one is full."""
    numbers: dict[str, int] = {}
    number, size, group = 0, 0, None
    for name in sorted(tensors):
        num_bytes = tensors[name].numel() * tensors[name].element_size()
        if name.split("/", 1)[0] != group or size + num_bytes > _MAX_FILE_BYTES:
            number, size, group = number + 1, 0, name.split("/", 1)[0]
        numbers[name] = number
        size += num_bytes
    return numbers


def separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors that share no memory, as safetensors requires, copying where needed.

    Tied weights and views of one buffer share memory. Lazy conjugates and negatives are computed, because safetensors would
    write their underlying memory unchanged.
    """
    separate: dict[str, torch.Tensor] = {}
    used: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        memory = (plain.device, plain.untyped_storage().data_ptr())
        if plain.numel() and memory in used:
            plain = plain.clone()
        elif plain.numel():
            used.add(memory)
        separate[name] = plain
    return separate


def _ignore_single_process_warning() -> None:
    # Not warnings.catch_warnings: a save may run in a thread, and catch_warnings changes the filters of all threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# Keys that mark what JSON cannot express in the description of a nested state dict.
_TAGS = ("@tensor", "@tuple", "@dict", "@float")


def flatten_state(prefix: str, state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a state dict (of an optimizer, a gradient scaler, an EMA) into tensors and a JSON-able description.

    Args:
        prefix: first part of the tensors' names, such as ``"optimizer"``.
        state: nested dicts (string or integer keys), lists and tuples of tensors, numbers, text, booleans and None.

    Returns:
        The tensors by name (``optimizer/state/0/exp_avg``; the same tensors, not copies) and a JSON-able description of the rest,
        for ``unflatten_state``.

    Raises:
        TypeError: the state holds another type; the message names its key path.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _flatten(prefix, state, tensors)


def _flatten(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: PLR0911
    if isinstance(value, torch.Tensor):
        while name in tensors:  # {"a/b": ...} beside {"a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach()
        return {"@tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"@float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"@tuple": [_flatten(f"{name}/{i}", item, tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_flatten(f"{name}/{i}", item, tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, _flatten(f"{name}/{key}", item, tensors)) for key, item in value.items()]
        for key, _ in items:
            if type(key) not in (str, int):
                raise TypeError(f"{name} has a key {key!r} of type {type(key).__name__}; only str and int keys can be saved")
        if all(isinstance(key, str) and not key.startswith("@") for key, _ in items):
            return dict(items)
        return {"@dict": [[key, item] for key, item in items]}
    raise TypeError(
        f"{name} is a {type(value).__name__}; only tensors, numbers, text, None, lists, tuples and dicts can be saved"
    )


def unflatten_state(description: Any, tensors: Mapping[str, torch.Tensor]) -> Any:  # noqa: PLR0911
    """Rebuild a state dict from the results of ``flatten_state``; ``tensors`` may hold others as well.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(description, list):
        return [unflatten_state(item, tensors) for item in description]
    if not isinstance(description, dict):
        return description
    if len(description) == 1 and next(iter(description)) in _TAGS:
        tag, content = next(iter(description.items()))
        if tag == "@tensor":
            return tensors[content]
        if tag == "@float":
            return float(content)
        if tag == "@tuple":
            return tuple(unflatten_state(item, tensors) for item in content)
        return {key: unflatten_state(item, tensors) for key, item in content}
    return {key: unflatten_state(item, tensors) for key, item in description.items()}
