"""Sharded checkpoints: each rank writes its own part, and any number of ranks reads them.

All ranks take part in a save, in this order: rank 0 creates the temporary folder; every rank writes its part, fsyncs it and
hashes it; rank 0 writes ``checkpoint.json`` and renames the folder. If any rank fails, rank 0 removes the folder, and all ranks
raise the same error. The ranks use a gloo group of their own: on the training's group, a save in a thread would collide with the
all-reduce of gradients.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from galaxydist.atomic_files import file_sha256, fsync_file
from galaxydist.checkpoints import store, tensor_files
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.store import Checkpoint, DamagedCheckpointError, read_checkpoint, write_state
from galaxydist.distributed import all_gather, run_on_all, run_on_main
from galaxydist.errors import RunFailedError, UserError
from galaxydist.rank_store import LONG_TIMEOUT


def open_saving_group() -> dist.ProcessGroup:
    """Create a gloo group of all ranks for saving or loading; all ranks must call it."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONG_TIMEOUT))


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
    """Save a checkpoint from all ranks into a folder on a file system that they share.

    Args:
        checkpoints_dir: folder of the run's checkpoints; created if missing.
        step: number of optimizer steps done.
        tensors: by name, the same names on all ranks: DTensors, of which each rank writes its part, and tensors that are equal on
            all ranks. Contiguous, without shared memory.
        state_text: from ``encode_state``; that of rank 0 is written.
        group: from ``open_saving_group``.
        keep, best: as for ``store.save``.
        check: called on rank 0, as for ``store.save``.

    Returns:
        The checkpoint's folder.

    Raises:
        EveryRankError: on all ranks if the disk of one is full or the lock was lost. The earlier checkpoints are untouched.
        RunFailedError: on all ranks, for any other failure.
    """
    rank = dist.get_rank(group)

    @contextmanager
    def explained() -> Iterator[None]:
        try:
            with store.explain_failure(checkpoints_dir):
                yield
        except UserError:
            raise
        except Exception as error:
            text = f"A checkpoint could not be written: {type(error).__name__} on rank {rank}: {error}"
            raise RunFailedError(text) from error

    def begin() -> Path:
        with explained():
            check()
            temporary = store.begin(checkpoints_dir, step)
            sys.audit("galaxydist.write", str(temporary))
            temporary.mkdir()
            return temporary

    def write() -> tuple[dict[str, str], dict[str, str]]:
        with explained():
            # All ranks are inside this at the same time, and the writer raises the same error on all of them.
            files = tensor_files.write_tensors(temporary, tensors, group)
            return files, _sync_and_hash(tensor_files.own_files(temporary, rank))

    def complete() -> Path:
        with explained():
            hashes = {name: digest for _, of_rank in parts for name, digest in of_rank.items()}
            _check_visible(temporary, hashes)
            write_state(temporary, state_text, parts[0][0], hashes, sharded=True)
            check()
            return store.publish(temporary, keep=keep, best=best)

    temporary = run_on_main(begin, group)
    try:
        parts = all_gather(run_on_all(write, group), group)
        return run_on_main(complete, group)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_sharded(checkpoints_dir: Path, *, make: tensor_files.TensorMaker, group: dist.ProcessGroup) -> Checkpoint | None:
    """Load the newest undamaged checkpoint, whole or sharded, on all ranks; each rank reads only its own part.

    Only rank 0 compares the files with their SHA-256.

    Args:
        checkpoints_dir: folder of the run's checkpoints.
        make: allocates the DTensor, or the whole tensor, that each tensor is read into.
        group: as for ``save_sharded``.

    Returns:
        The same checkpoint on all ranks, or None on all ranks if there is none.

    Raises:
        EveryRankError: on all ranks if all checkpoints are damaged.
    """
    path = run_on_main(lambda: store.newest_sound(checkpoints_dir), group)

    def read(path: Path) -> Checkpoint:
        try:
            return read_checkpoint(path, make=make, verify=False)
        except DamagedCheckpointError as error:
            raise UserError(
                f"{path} cannot be read by all processes ({error}), though its SHA-256 is right: is it a shared disk?"
            ) from error

    return None if path is None else run_on_all(lambda: read(path), group)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or another tensor itself; the memory is shared."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a whole tensor as ``like`` is, on its device, in its own dtype; nothing is sent, since every rank has the whole."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@dataclass(eq=False)
class ShardedWriter(CheckpointWriter):
    """``CheckpointWriter`` for sharded checkpoints. Every rank has one and makes the same calls in the same order.

    A failed write is raised on all ranks in their next ``save`` or ``wait``; ``failed`` may become true some steps earlier on one
    rank than on another, so the ranks must agree on it before they act.

    Args:
        checkpoints_dir, background, check, keep: as for ``CheckpointWriter``; ``check`` is called on rank 0.
        group: from ``open_saving_group``; nothing else may use it.
    """

    group: dist.ProcessGroup = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mesh = DeviceMesh.from_group(self.group, "cpu")
        self._layouts: dict[str, DTensor] = {}

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, best: bool = False) -> None:
        """Save a checkpoint as ``CheckpointWriter.save`` does; ``tensors`` may hold DTensors."""
        self.wait()  # the thread still uses the layouts of its save
        self._layouts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        super().save(step, {name: own_part(tensor) for name, tensor in tensors.items()}, state, best=best)

    def _write(self, step: int, tensors: Mapping[str, torch.Tensor], state_text: str, best: bool) -> None:
        if not self.background:
            tensors = tensor_files.separate(tensors)
        save_sharded(
            self.checkpoints_dir,
            step,
            {name: self._as_dtensor(name, tensor.cpu()) for name, tensor in tensors.items()},
            state_text,
            group=self.group,
            keep=self.keep,
            best=best,
            check=self.check,
        )

    def _as_dtensor(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return this rank's part as a DTensor on the CPU; other tensors unchanged."""
        if name not in self._layouts:
            return part
        whole = self._layouts[name]
        return DTensor.from_local(part, self._mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _sync_and_hash(files: list[Path]) -> dict[str, str]:
    """Flush files to the disk and return their SHA-256 by name."""
    for file in files:
        fsync_file(file)
    return {file.name: file_sha256(file) for file in files}


def _check_visible(folder: Path, names: Iterable[str]) -> None:
    """Check that rank 0 sees the files that other ranks wrote."""
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise UserError(
            f"{folder / missing[0]} was written by another process, but rank 0 does not see it: train.strategy=fsdp needs a run "
            "folder on a file system that all nodes share. Give one with run.dir or run.root."
        )
