"""Checkpoints that each process writes its own part of, and that any number of processes reads, whole or in parts.

All ranks take part in a save, in this order: rank 0 makes the temporary folder; every rank writes its part, fsyncs and hashes it;
rank 0 writes ``checkpoint.json`` and gives the folder its name. If any rank fails, rank 0 removes the folder, and all ranks raise
the same error. The processes talk over a gloo group of their own: on that of the training, a save in a thread would collide with
the exchange of gradients.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from galaxydist.atomic_files import fsync_file
from galaxydist.checkpoints import store, tensor_files
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.store import Checkpoint, DamagedCheckpointError, read_checkpoint, sha256_of, write_state
from galaxydist.errors import EveryRankError, RunFailedError, UserError

T = TypeVar("T")


def open_saving_group() -> dist.ProcessGroup:
    """A gloo group of all ranks, for saving and loading alone. All ranks take part."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def save_sharded(
    checkpoints_dir: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state_text: str,
    *,
    group: dist.ProcessGroup,
    keep: int = 2,
    best: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Save a checkpoint from all ranks. The folder must be on a file system that all of them see.

    Args:
        checkpoints_dir: folder of the run's checkpoints; made where it is missing.
        step: number of optimizer steps done.
        tensors: by name, the same names on all ranks: DTensors, of which each rank writes its part, and others that are equal on
            all ranks. Contiguous, without shared memory.
        state_text: from ``encode_state``; rank 0's counts.
        group: from ``open_saving_group``.
        keep, best: as for ``checkpoints.save``.
        check: called on rank 0, as for ``checkpoints.save_encoded``.

    Returns:
        The checkpoint's folder.

    Raises:
        EveryRankError: on all ranks: the disk of one is full, or the lock was lost. The earlier checkpoints are untouched.
        RunFailedError: on all ranks: anything else.
    """
    ranks = _Ranks(group)

    def begin() -> Path:
        check()
        temporary = store.begin(checkpoints_dir, step)
        sys.audit("galaxydist.write", str(temporary))
        temporary.mkdir()
        return temporary

    def write(temporary: Path) -> _Part:
        # All ranks are inside this at the same time, and the writer raises the same error on all of them.
        places = tensor_files.write_own_parts(temporary, tensors, group)
        return _Part(places, _finish_files(temporary, ranks.rank))

    def complete(temporary: Path, parts: list[_Part]) -> Path:
        hashes = {name: digest for part in parts for name, digest in part.hashes.items()}
        _check_seen(temporary, hashes)
        write_state(temporary, state_text, parts[0].places, hashes, sharded=True)
        check()
        return store.publish(temporary, keep=keep, best=best)

    temporary: Path | None = None
    try:
        temporary = ranks.first(checkpoints_dir, begin)
        folder = temporary
        parts = ranks.together(checkpoints_dir, lambda: write(folder))
        return ranks.first(checkpoints_dir, lambda: complete(folder, parts))
    except BaseException:
        if temporary is not None and ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_sharded(checkpoints_dir: Path, *, make: tensor_files.TensorMaker, group: dist.ProcessGroup) -> Checkpoint | None:
    """Load the newest sound checkpoint, whole or sharded, on all ranks; each reads what it needs of it.

    Rank 0 alone compares the files with their SHA-256.

    Args:
        make: gives the DTensor that each tensor is read into, or a whole one.
        group: as for ``save_sharded``.

    Returns:
        The same checkpoint on all ranks, or None on all where there is none.

    Raises:
        EveryRankError: on all ranks: there are checkpoints, but none is sound.
    """
    ranks = _Ranks(group)
    path = ranks.first(checkpoints_dir, lambda: store.newest_sound(checkpoints_dir))
    if path is None:
        return None
    found: list[Checkpoint] = []

    def read() -> None:
        try:
            found.append(read_checkpoint(path, make=make, verify=False))
        except DamagedCheckpointError as error:
            raise UserError(
                f"{path} cannot be read by all processes ({error}), though its SHA-256 is right: is it a shared disk?"
            ) from error

    ranks.together(checkpoints_dir, read)
    return found[0]


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a whole tensor as ``like`` is, on its device, in its own dtype; nothing is sent, since every rank has the whole."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class ShardedWriter(CheckpointWriter):
    """``CheckpointWriter`` for sharded checkpoints. Every rank has one and makes the same calls in the same order.

    A failed write is raised by all ranks in their next ``save`` or ``wait``; ``failed`` may become true some steps earlier on one
    rank than on another, so agree on it before acting.

    Args:
        checkpoints_dir, background, check, options: as for ``CheckpointWriter``; ``check`` is called on rank 0.
        group: from ``open_saving_group``; this saver's alone.
    """

    def __init__(
        self, checkpoints_dir: Path, *, group: dist.ProcessGroup, background: bool, check: Callable[[], None], **options: Any
    ) -> None:
        super().__init__(checkpoints_dir, background=background, check=check, **options)
        self._group = group
        self._mesh = DeviceMesh.from_group(group, "cpu")
        self._layouts: dict[str, DTensor] = {}

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, best: bool = False) -> None:
        """As ``CheckpointWriter.save``, with DTensors."""
        self.wait()  # the thread still uses the layouts of its save
        self._layouts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        super().save(step, {name: own_part(tensor) for name, tensor in tensors.items()}, state, best=best)

    def _write(self, step: int, tensors: Mapping[str, torch.Tensor], state_text: str, best: bool) -> None:
        if not self._background:
            tensors = tensor_files.separate(tensors)
        save_sharded(
            self._checkpoints_dir,
            step,
            {name: self._as_part(name, tensor.cpu()) for name, tensor in tensors.items()},
            state_text,
            group=self._group,
            keep=self._keep,
            best=best,
            check=self._check,
        )

    def _as_part(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A copy of this process's part, as part of the whole, on the CPU."""
        if name not in self._layouts:
            return part
        whole = self._layouts[name]
        return DTensor.from_local(part, self._mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


@dataclass(frozen=True)
class _Part:
    """What a rank wrote: the file of each tensor, the SHA-256 of each of its own files."""

    places: dict[str, str]
    hashes: dict[str, str]


@dataclass(frozen=True)
class _Failure:
    text: str
    by_user: bool

    def __call__(self) -> Exception:
        return EveryRankError(self.text) if self.by_user else RunFailedError(self.text)


class _Ranks:
    """Work of the ranks of a group, with the same outcome on all of them. All take part in each call."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)

    def first(self, checkpoints_dir: Path, work: Callable[[], T]) -> T:
        """Rank 0's result, on all."""
        answer: list[Any] = [_attempt(checkpoints_dir, work, self.rank) if self.rank == 0 else None]
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        if isinstance(answer[0], _Failure):
            raise answer[0]()
        result: T = answer[0]
        return result

    def together(self, checkpoints_dir: Path, work: Callable[[], T]) -> list[T]:
        """The results of all ranks, on all."""
        answers: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(answers, _attempt(checkpoints_dir, work, self.rank), group=self.group)
        for answer in answers:
            if isinstance(answer, _Failure):
                raise answer()
        return answers


def _attempt(checkpoints_dir: Path, work: Callable[[], T], rank: int) -> T | _Failure:
    try:
        with store.explain_failure(checkpoints_dir):
            return work()
    except UserError as error:
        return _Failure(str(error), by_user=True)
    except Exception as error:
        return _Failure(f"A checkpoint could not be written: {type(error).__name__} on rank {rank}: {error}", by_user=False)


def _finish_files(folder: Path, rank: int) -> dict[str, str]:
    """Make this rank's files survive a power cut; gives their SHA-256."""
    hashes = {}
    for file in tensor_files.own_files(folder, rank):
        fsync_file(file)
        hashes[file.name] = sha256_of(file)
    return hashes


def _check_seen(folder: Path, hashes: Mapping[str, str]) -> None:
    missing = sorted(name for name in hashes if not (folder / name).exists())
    if missing:
        raise UserError(
            f"{folder / missing[0]} was written by another process, but rank 0 does not see it: train.strategy=fsdp needs a run "
            "folder on a file system that all nodes share. Give one with run.dir or run.root."
        )
