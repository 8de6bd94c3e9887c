"""The files of one checkpoint: tensors in safetensors, the rest in one JSON file with the SHA-256 of everything."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from galaxydist.atomic_files import fsync_file, write_bytes
from galaxydist.errors import UserError
from galaxydist.runs import tensor_files
from galaxydist.runs.checkpoint_names import STATE_FILE

FORMAT_VERSION = 1
SHARDED_FORMAT_VERSION = 2  # each process wrote its part: version 1, but for several files a tensor


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Args:
        step: number of optimizer steps done.
        tensors: by name, on the CPU.
        state: everything else, plain JSON values.
        path: its folder.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: Path


class DamagedCheckpointError(Exception):
    """A checkpoint's files are not as they were written."""


def encode_state(step: int, state: Mapping[str, Any], *, best: bool) -> str:
    """What a checkpoint holds beside its tensors, as JSON.

    Raises:
        ValueError, TypeError: ``state`` is not plain JSON values, or holds nan or inf.
    """
    return _dump({"format": FORMAT_VERSION, "step": step, "best": best, "state": state})


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], state_text: str) -> None:
    """Write the files of a checkpoint and fsync them.

    Args:
        folder: a folder that is not there yet.
        tensors: by name.
        state_text: from ``encode_state``.
    """
    sys.audit("galaxydist.write", str(folder))
    folder.mkdir()
    places = tensor_files.write_tensors(folder, tensors)
    for file in sorted(folder.iterdir()):
        fsync_file(file)
    write_state(folder, state_text, places, {name: sha256_of(folder / name) for name in sorted(set(places.values()))})


def write_state(
    folder: Path, state_text: str, places: Mapping[str, str], hashes: Mapping[str, str], *, sharded: bool = False
) -> None:
    """Write checkpoint.json, which completes the folder, and fsync both.

    Args:
        folder: where the tensors are.
        state_text: from ``encode_state``.
        places: the file of each tensor; in a sharded checkpoint without ``shard-00001-``, of which each process has its own.
        hashes: SHA-256 of each file.
        sharded: each process wrote its part.
    """
    content = {**json.loads(state_text), "tensors": dict(places), "files": dict(hashes)}
    body = _dump(content | {"format": SHARDED_FORMAT_VERSION} if sharded else content)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_bytes(folder / STATE_FILE, f'{{"sha256": "{digest}", "content":\n{body}\n}}\n'.encode())
    fsync_file(folder)


def read_checkpoint(
    path: Path,
    *,
    groups: Sequence[str] | None = None,
    make: tensor_files.TensorMaker = tensor_files.whole_on_cpu,
    verify: bool = True,
) -> Checkpoint:
    """Read one checkpoint folder, whole or sharded; the files that are read are checked against their SHA-256.

    Args:
        path: the folder.
        groups: read only the tensors of these first name parts; None: all.
        make: what each tensor is read into: a DTensor takes this process's part alone.
        verify: False: without the SHA-256, where another process has just compared them (``check_files``).

    Raises:
        DamagedCheckpointError: something is missing, changed or unreadable; the message names the file.
        UserError: it was written by a newer galaxydist.
    """
    content = _read_known(path)
    wanted = _wanted(content, groups)
    if verify:
        _check_hashes(path, content, wanted.values())
    try:
        tensors = tensor_files.read_tensors(path, wanted, make)
    except Exception as error:
        raise DamagedCheckpointError(f"its tensors cannot be read: {error}") from error
    return Checkpoint(content["step"], tensors, content["state"], path)


def check_files(path: Path) -> None:
    """Compare all files of a checkpoint folder with their SHA-256; raises as ``read_checkpoint``."""
    content = _read_known(path)
    _check_hashes(path, content, _wanted(content, None).values())


def _read_known(path: Path) -> dict[str, Any]:
    content = read_state(path)
    if content["format"] not in (FORMAT_VERSION, SHARDED_FORMAT_VERSION):
        raise UserError(
            f"{path} has checkpoint format {content['format']}; this galaxydist reads {FORMAT_VERSION} and "
            f"{SHARDED_FORMAT_VERSION}. Use the version that wrote it."
        )
    return content


def _wanted(content: Mapping[str, Any], groups: Sequence[str] | None) -> dict[str, str]:
    return {name: file for name, file in content["tensors"].items() if groups is None or name.split("/", 1)[0] in groups}


def _check_hashes(path: Path, content: Mapping[str, Any], places: Iterable[str]) -> None:
    hashes: dict[str, str] = content["files"]
    unknown = sorted(file.name for file in path.glob("*.safetensors") if file.name not in hashes)
    if unknown:
        raise DamagedCheckpointError(f"{unknown[0]} does not belong to it")
    needed = set(places)
    for file_name in sorted(name for name in hashes if needed & {name, tensor_files.without_shard(name)}):
        try:
            digest = sha256_of(path / file_name)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{file_name} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{file_name} cannot be read: {error}") from error
        if digest != hashes[file_name]:
            raise DamagedCheckpointError(f"{file_name} has changed since it was written: its SHA-256 differs")


def read_state(path: Path) -> dict[str, Any]:
    """The checked contents of checkpoint.json: ``format``, ``step``, ``best``, ``state``, ``tensors`` and ``files``.

    Raises:
        DamagedCheckpointError: it is missing, changed or unreadable.
    """
    try:
        stored = json.loads((path / STATE_FILE).read_bytes())
        digest, content = stored["sha256"], stored["content"]
        if not isinstance(content, dict) or digest != hashlib.sha256(_dump(content).encode()).hexdigest():
            raise DamagedCheckpointError(f"{STATE_FILE} has changed since it was written: its SHA-256 differs")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{STATE_FILE} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"{STATE_FILE} cannot be read: {error}") from error
    return content


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
