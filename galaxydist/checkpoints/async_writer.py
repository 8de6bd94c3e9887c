"""Asynchronous checkpoint writer: copies the tensors, then writes the copies in a thread.

A single process writes the whole checkpoint, so the thread needs no process group and cannot disturb the training's collectives.
``torch.distributed.checkpoint.async_save`` is not used: its copies take two to three times as long and hold the whole storage of
a view, and hashing, fsync and rename after its write would still need a thread.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import encode_state
from galaxydist.checkpoints.tensor_files import import_writer

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class CheckpointWriter:
    """Saves checkpoints one at a time, on the one rank that holds the run's lock.

    Leaving the context waits for the last write. If the process is killed during a write, the earlier checkpoints stay complete.
    An interpreter that exits finishes the write first. The files are those of ``store.save``.

    Args:
        checkpoints_dir: folder of the run's checkpoints; created if missing.
        background: copy the tensors and write in a thread; otherwise ``save`` returns once the checkpoint is on disk.
        check: raises if this process may no longer write to the run folder (``RunLock.check``). Called in the writing thread
            before a write begins and before it becomes the newest checkpoint.
        keep: number of newest checkpoints to keep.
    """

    checkpoints_dir: Path
    background: bool
    check: Callable[[], None]
    keep: int = 2

    def __post_init__(self) -> None:
        self._copies = TensorCopies()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")  # starts no thread before the first write
        self._write_in_progress: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as write_error:
            if error is None:
                raise
            _log.error("a checkpoint could not be written either: %s", write_error)
        finally:
            self._executor.shutdown()

    @property
    def failed(self) -> bool:
        """True if a write has failed and ``save`` or ``wait`` would raise its error; cheap enough to check every step."""
        write = self._write_in_progress
        return write is not None and write.done() and write.exception() is not None

    @property
    def is_writing(self) -> bool:
        """True if ``save`` would have to wait for a write in progress."""
        write = self._write_in_progress
        return write is not None and not write.done()

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, best: bool = False) -> None:
        """Save a checkpoint, after waiting for a write in progress.

        Once this returns, work on the current stream of the tensors' device may change them again.

        Args:
            step, tensors, best: as for ``store.save``.
            state: plain JSON values (see ``flatten_state``), without nan and inf.

        Raises:
            ValueError, TypeError: ``state`` is not plain JSON; nothing is written.
            UserError: the last write failed (and this checkpoint is not written), or this one did and ``background`` is False.
        """
        state_text = encode_state(step, state, best=best)
        self.wait()
        if not self.background:
            self._write(step, tensors, state_text, best)
            return
        import_writer()
        copies = self._copies.take(tensors)
        self._write_in_progress = self._executor.submit(self._write_copies, step, copies, state_text, best)

    def wait(self) -> None:
        """Wait until the write in progress, if any, is complete.

        Raises:
            UserError: the write failed (disk full, lock lost). Raised once. The earlier checkpoints are untouched.
        """
        if (write := self._write_in_progress) is not None:
            try:
                write.result()
            finally:
                self._write_in_progress = None  # not before: a rank that leaves after a failure waits in another thread

    def _write_copies(self, step: int, copies: dict[str, torch.Tensor], state_text: str, best: bool) -> None:
        with self._copies.finished():
            self._write(step, copies, state_text, best)

    def _write(self, step: int, tensors: Mapping[str, torch.Tensor], state_text: str, best: bool) -> None:
        store.save(self.checkpoints_dir, step, tensors, state_text, keep=self.keep, best=best, check=self.check)


class TensorCopies:
    """Copies tensors into reused host buffers, so that later copies of the same tensors allocate no memory.

    CUDA tensors are copied into pinned memory on their device's current stream, without blocking the host. PyTorch rounds the
    pinned memory of each tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy each tensor into its own buffer, overwriting the earlier copies.

        Args:
            tensors: by name, any device and layout; they may share memory.

        Returns:
            The copies by name, on the CPU. Copies of CUDA tensors are complete only inside ``finished``.
        """
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        self._copied = {}
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            self._copied[device] = torch.cuda.Event(blocking=True)
            self._copied[device].record(torch.cuda.current_stream(device))
        return dict(self._buffers)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Wait until the copies are complete; call it in the writing thread.

        Inside the context, the current stream is an idle one of the same device. PyTorch's writer waits for the current stream,
        which would otherwise be the training's, and a thread that sets no device would allocate memory on device 0.
        """
        with ExitStack() as stack:
            for device, event in self._copied.items():
                event.synchronize()
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                stack.enter_context(torch.cuda.stream(self._streams[device]))
            yield

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        old = self._buffers.get(name)
        if old is not None and (old.shape, old.dtype, old.is_pinned()) == (tensor.shape, tensor.dtype, tensor.is_cuda):
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
