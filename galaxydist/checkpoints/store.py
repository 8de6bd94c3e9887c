"""Checkpoints on disk: written atomically, verified when read, never unpickled.

A checkpoint is a folder ``checkpoints/step-00000120-0003`` (step 120, the third save). It holds the tensors in safetensors files,
written by ``torch.distributed.checkpoint``, and everything else in ``checkpoint.json``, with the SHA-256 of each file. The folder
is written under a temporary name and renamed; then the file ``latest`` names it (for people and other programs: ``load`` uses the
number of the save); only then are older checkpoints deleted. The file ``best`` names a checkpoint that is kept.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from galaxydist.atomic_files import explain_full_disk, file_sha256, fsync_file, rename, replace_bytes, unlink, write_bytes
from galaxydist.checkpoints import tensor_files
from galaxydist.errors import UserError
from galaxydist.runs.folder import BEST, FOLDER_NAME, LATEST, STATE_FILE

T = TypeVar("T")

FORMAT_VERSION = 1
SHARDED_FORMAT_VERSION = 2  # as version 1, but each rank wrote its own files, so that a tensor may be in several of them
_DAMAGED_MARK = "DAMAGED"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Args:
        step: number of optimizer steps done.
        tensors: by name, on the CPU.
        state: everything else, plain JSON values.
        path: folder of the checkpoint.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: Path


class DamagedCheckpointError(Exception):
    """Error of a checkpoint whose files are missing, changed or unreadable."""


def encode_state(step: int, state: Mapping[str, Any], *, best: bool) -> str:
    """Return the JSON text of everything in a checkpoint except its tensors.

    Raises:
        ValueError, TypeError: ``state`` holds nan, inf or a type that JSON lacks (see ``flatten_state``).
    """
    return _dump({"format": FORMAT_VERSION, "step": step, "best": best, "state": state})


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], state_text: str) -> None:
    """Write the files of a checkpoint and flush them to the disk.

    Args:
        folder: a new folder.
        tensors: by name.
        state_text: from ``encode_state``.
    """
    sys.audit("galaxydist.write", str(folder))
    folder.mkdir()
    file_names = tensor_files.write_tensors(folder, tensors)
    for file in sorted(folder.iterdir()):
        fsync_file(file)
    write_state(folder, state_text, file_names, {name: file_sha256(folder / name) for name in sorted(set(file_names.values()))})


def write_state(
    folder: Path, state_text: str, file_names: Mapping[str, str], hashes: Mapping[str, str], *, sharded: bool = False
) -> None:
    """Write checkpoint.json, which completes the folder, and flush both to the disk.

    Args:
        folder: folder of the tensors.
        state_text: from ``encode_state``.
        file_names: the file name of each tensor; in a sharded checkpoint without the prefix of a rank (``shard-00001-``).
        hashes: SHA-256 of each file.
        sharded: True if each rank wrote its own files.
    """
    content = {**json.loads(state_text), "tensors": dict(file_names), "files": dict(hashes)}
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
    """Read one checkpoint folder, whole or sharded, and verify the SHA-256 of the files that are read.

    Args:
        path: folder of the checkpoint.
        groups: first parts of the names of the tensors to read; None: all tensors.
        make: allocates each tensor; for a DTensor only this rank's part is read.
        verify: False if another rank has just verified all files (``verify_files``).

    Raises:
        DamagedCheckpointError: a file is missing, changed or unreadable; the message names it.
        UserError: the checkpoint was written by a newer galaxydist.
    """
    content = _read_supported_state(path)
    file_names = _file_names(content, groups)
    if verify:
        _verify(path, content, file_names.values())
    try:
        tensors = tensor_files.read_tensors(path, file_names, make)
    except Exception as error:
        raise DamagedCheckpointError(f"its tensors cannot be read: {error}") from error
    return Checkpoint(content["step"], tensors, content["state"], path)


def verify_files(path: Path) -> Path:
    """Verify the SHA-256 of all files of a checkpoint folder and return the folder; raises the errors of ``read_checkpoint``."""
    content = _read_supported_state(path)
    _verify(path, content, _file_names(content, None).values())
    return path


def _read_supported_state(path: Path) -> dict[str, Any]:
    content = read_state(path)
    if content["format"] not in (FORMAT_VERSION, SHARDED_FORMAT_VERSION):
        raise UserError(
            f"{path} has checkpoint format {content['format']}; this galaxydist reads {FORMAT_VERSION} and "
            f"{SHARDED_FORMAT_VERSION}. Use the version that wrote it."
        )
    return content


def _file_names(content: Mapping[str, Any], groups: Sequence[str] | None) -> dict[str, str]:
    return {name: file for name, file in content["tensors"].items() if groups is None or name.split("/", 1)[0] in groups}


def _verify(path: Path, content: Mapping[str, Any], file_names: Iterable[str]) -> None:
    hashes: dict[str, str] = content["files"]
    unknown = sorted(file.name for file in path.glob("*.safetensors") if file.name not in hashes)
    if unknown:
        raise DamagedCheckpointError(f"{unknown[0]} does not belong to it")
    needed = set(file_names)
    for file_name in sorted(name for name in hashes if needed & {name, tensor_files.without_shard(name)}):
        try:
            digest = file_sha256(path / file_name)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{file_name} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{file_name} cannot be read: {error}") from error
        if digest != hashes[file_name]:
            raise DamagedCheckpointError(f"{file_name} has changed since it was written: its SHA-256 differs")


def read_state(path: Path) -> dict[str, Any]:
    """Return the verified contents of checkpoint.json: ``format``, ``step``, ``best``, ``state``, ``tensors`` and ``files``.

    Raises:
        DamagedCheckpointError: the file is missing, changed or unreadable.
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


def save(
    checkpoints_dir: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state_text: str,
    *,
    keep: int = 2,
    best: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Save a checkpoint, then delete old ones; it may run in a thread, and needs no process group.

    Call it on one rank that holds the run folder's lock.

    Args:
        checkpoints_dir: folder of the run's checkpoints; created if missing.
        step: number of optimizer steps done.
        tensors: by name; the part before the first ``/`` (``model``, ``optimizer``, ``ema``) chooses the file, so that each part
            can be read alone.
        state_text: from ``encode_state`` with the same ``step`` and ``best``.
        keep: number of newest checkpoints to keep, including this one; the best one is kept too.
        best: True if this is the best checkpoint so far.
        check: raises if this process may no longer write here; called before the first change and before the rename.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full. The earlier checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the new checkpoint is kept")
    check()
    with explain_failure(checkpoints_dir):
        temporary = begin(checkpoints_dir, step)
        try:
            write_checkpoint(temporary, tensors, state_text)
            check()
            return publish(temporary, keep=keep, best=best)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def explain_failure(checkpoints_dir: Path) -> Iterator[None]:
    """Turn a full disk into a UserError that names the checkpoints that are still there."""
    kept = "The earlier checkpoints are untouched." if list_checkpoints(checkpoints_dir) else ""
    with explain_full_disk(checkpoints_dir, kept):
        yield


def begin(checkpoints_dir: Path, step: int) -> Path:
    """Remove the leftovers of killed saves, and return the temporary folder (not created) of the next checkpoint."""
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(checkpoints_dir)
    number = 1 + max((_parse(path)[1] for path in list_checkpoints(checkpoints_dir)), default=0)
    return checkpoints_dir / f".step-{step:08d}-{number:04d}.tmp"


def publish(temporary: Path, *, keep: int, best: bool) -> Path:
    """Rename a complete folder from ``begin`` to the newest checkpoint, delete old ones, and return the checkpoint's folder."""
    checkpoints_dir = temporary.parent
    target = checkpoints_dir / temporary.name.removeprefix(".").removesuffix(".tmp")
    rename(temporary, target)
    replace_bytes(checkpoints_dir / LATEST, f"{target.name}\n".encode())
    if best:
        mark_best(target)
    _prune(checkpoints_dir, target, keep)
    return target


def mark_best(checkpoint_path: Path) -> None:
    """Mark a checkpoint as the best; it is kept until another one is marked."""
    replace_bytes(checkpoint_path.parent / BEST, f"{checkpoint_path.name}\n".encode())


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the complete checkpoints, newest save first, without verifying them."""
    if not checkpoints_dir.is_dir():
        return []
    found = [path for path in checkpoints_dir.iterdir() if FOLDER_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: _parse(path)[1], reverse=True)


def load(checkpoints_dir: Path, *, groups: Sequence[str] | None = None) -> Checkpoint | None:
    """Load the newest undamaged checkpoint, with a warning for each damaged one before it; None if there is none.

    Args:
        checkpoints_dir: folder of the run's checkpoints.
        groups: first parts of the names of the tensors to read (``("model",)``); None: all tensors.

    Raises:
        UserError: all checkpoints are damaged.
    """
    return _first_sound(checkpoints_dir, lambda path: read_checkpoint(path, groups=groups))


def newest_sound(checkpoints_dir: Path) -> Path | None:
    """Return the folder of the newest undamaged checkpoint after verifying all its files; None if there is no checkpoint.

    One rank can call it for all ranks, which then read without verifying.

    Raises:
        UserError: all checkpoints are damaged.
    """
    return _first_sound(checkpoints_dir, verify_files)


def _first_sound(checkpoints_dir: Path, read: Callable[[Path], T]) -> T | None:
    damaged: list[str] = []
    for path in list_checkpoints(checkpoints_dir):
        try:
            found = read(path)
        except DamagedCheckpointError as error:
            damaged.append(f"{path.name}: {error}")
            _log.warning("the checkpoint %s is damaged (%s): taking the one before", path, error)
            _mark_damaged(path)
            continue
        if damaged:
            _log.warning("going on from %s, step %d", path, _parse(path)[0])
        return found
    if damaged:
        raise UserError(
            f"All checkpoints in {checkpoints_dir} are damaged:\n  " + "\n  ".join(damaged) + "\n"
            "Restore one from a backup, or remove this folder to start the run from its beginning."
        )
    return None


def read_sound(path: Path, *, groups: Sequence[str] | None = None) -> Checkpoint:
    """Read one checkpoint.

    Args:
        path: folder of the checkpoint.
        groups: as for ``load``.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        return read_checkpoint(path, groups=groups)
    except DamagedCheckpointError as error:
        raise UserError(
            f"The checkpoint {path} is damaged ({error}). Restore it from a backup, or use the last one (eval.checkpoint=last)."
        ) from error


def best_path(checkpoints_dir: Path) -> Path | None:
    """Return the folder of the best checkpoint; None if none was marked."""
    try:
        name = (checkpoints_dir / BEST).read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        name = ""
    best = checkpoints_dir / name if FOLDER_NAME.fullmatch(name) else None
    for path in list_checkpoints(checkpoints_dir):  # the process may have been killed before it wrote the pointer
        if best is not None and _parse(path)[1] <= _parse(best)[1]:
            break
        with suppress(DamagedCheckpointError):
            if read_state(path).get("best"):
                return path
    return best


def _prune(checkpoints_dir: Path, newest: Path, keep: int) -> None:
    """Delete the checkpoints that ``newest`` replaces; log a warning for each that cannot be deleted.

    These are older saves beyond ``keep``, saves of the same or a later step (the run was continued from an earlier one), and
    damaged ones.
    """
    step = _parse(newest)[0]
    protected, num_kept = {newest, best_path(checkpoints_dir)}, 1
    for path in list_checkpoints(checkpoints_dir):
        if path in protected:
            continue
        if _parse(path)[0] < step and num_kept < keep and not (path / _DAMAGED_MARK).exists():
            num_kept += 1
            continue
        try:
            aside = path.with_name(f".{path.name}.old")
            rename(path, aside)
            _remove_tree(aside)
        except OSError as error:
            _log.warning("the old checkpoint %s could not be deleted: %s", path, error)


def remove_leftovers(checkpoints_dir: Path) -> None:
    """Remove what killed saves and deletions left under temporary names, as far as that is possible.

    Call it on one rank that holds the run folder's lock.
    """
    for path in checkpoints_dir.iterdir() if checkpoints_dir.is_dir() else ():
        if path.name.startswith(".") and path.suffix in (".tmp", ".old"):
            try:
                _remove_tree(path) if path.is_dir() else unlink(path)
            except OSError as error:  # on NFS, a file that another process has open
                _log.warning("%s could not be deleted: %s", path, error)


def _remove_tree(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        unlink(file)
    sys.audit("galaxydist.unlink", str(folder))
    folder.rmdir()


def _mark_damaged(path: Path) -> None:
    """Mark a checkpoint as damaged, so that it does not count among those to keep; do nothing in a read-only folder."""
    try:
        (path / _DAMAGED_MARK).touch()
    except OSError as error:
        _log.debug("%s could not be marked as damaged: %s", path, error)


def _parse(path: Path) -> tuple[int, int]:
    match = FOLDER_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])
