"""Tensors in safetensors files, through ``torch.distributed.checkpoint``, whose default storage would unpickle."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

_MAX_FILE_BYTES = 1 << 30  # a file is built up in memory before it is written


def import_writer() -> None:
    """Import what ``write_tensors`` needs. Before it is called in a thread: two threads that import parts of torch at the same
    time may find them half made, and an interpreter that is ending imports nothing more."""
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.checkpoint.state_dict_saver  # noqa: F401


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write tensors into an existing folder, from this process alone: no process group takes part.

    Args:
        folder: where the files go.
        tensors: by name, any device and layout.

    Returns:
        The file of each tensor.
    """
    # Imported here: it takes most of a second, and a run that starts anew needs it only when it saves.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    if not tensors:
        return {}
    numbers = _file_numbers(tensors)
    _ignore_single_process_warning()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers)
    with _original_errors():
        dcp_save(_separate(tensors), storage_writer=writer, no_dist=True)
    num_files = max(numbers.values())
    return {name: f"model-{number:05d}-of-{num_files:05d}.safetensors" for name, number in numbers.items()}


def read_tensors(folder: Path, places: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Read tensors, onto the CPU.

    Args:
        folder: where the files are.
        places: the tensors wanted, with the file of each.

    Raises:
        ValueError: one is missing.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    if not places:
        return {}
    _ignore_single_process_warning()
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    missing = sorted(set(places) - set(known))
    if missing:
        raise ValueError(f"{places[missing[0]]} does not hold {missing[0]}")
    tensors: dict[str, torch.Tensor] = {}
    for name in places:
        described = known[name]
        assert isinstance(described, TensorStorageMetadata)  # the safetensors reader knows no others
        tensors[name] = torch.empty(described.size, dtype=described.properties.dtype)
    with _original_errors():
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


@contextmanager
def _original_errors() -> Iterator[None]:
    """``CheckpointException`` is no ``Exception`` and hides what happened: raise that instead."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        for original, _ in error.failures.values():
            raise original from error
        raise


def _file_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A new file for each first part of the names, and whenever one is full."""
    numbers: dict[str, int] = {}
    number, size, group = 0, 0, None
    for name in sorted(tensors):
        num_bytes = tensors[name].numel() * tensors[name].element_size()
        if name.split("/", 1)[0] != group or size + num_bytes > _MAX_FILE_BYTES:
            number, size, group = number + 1, 0, name.split("/", 1)[0]
        numbers[name] = number
        size += num_bytes
    return numbers


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors takes only contiguous tensors that share no memory (tied weights, views of one buffer): copy the others. It
    writes the memory of a lazy conjugate or negative as it stands: compute those."""
    separate: dict[str, torch.Tensor] = {}
    used: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        place = (plain.device, plain.untyped_storage().data_ptr())
        if plain.numel() and place in used:
            plain = plain.clone()
        elif plain.numel():
            used.add(place)
        separate[name] = plain
    return separate


def _ignore_single_process_warning() -> None:
    # Not warnings.catch_warnings: a save may run in a thread, and that changes the filters of all threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
