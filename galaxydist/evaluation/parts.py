"""What each process predicts, on its way into one file: a part a process, merged in the order of the samples.

A part holds rows of fixed length in the order of its batches, so that merging maps the parts and copies: no part is ever in
memory whole, nor is the result.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.atomic_files import explain_full_disk

# Rows that are handed on together, at least: more than a batch, less than a row group.
TOGETHER = 4096


def part_row(num_classes: int) -> np.dtype[Any]:
    """A galaxy in a part; ``size`` in pixels of the stored picture and ``sky_brightness`` are nan where unknown."""
    scores = ("logits", "<f4", (num_classes,))
    return np.dtype(
        [("sample", "<i8"), ("label", "<i4"), ("predicted", "<i4"), scores, ("size", "<f8"), ("sky_brightness", "<f8")]
    )


def part_path(target: Path, rank: int) -> Path:
    """Where the part of a process lies, beside the file that it will be a part of."""
    return target.with_name(f".{target.name}.rank-{rank}")


class PartWriter:
    """Writes one process's part. Use as a context manager: whatever happens, the part is gone after it.

    Args:
        path: of the part; what a killed process left there is overwritten.
        num_classes: K.
    """

    def __init__(self, path: Path, num_classes: int) -> None:
        self.path = path
        self._row = part_row(num_classes)
        self.num_rows = 0

    def __enter__(self) -> Self:
        with explain_full_disk(self.path):
            self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk also fails the flush at closing
            self._file.close()
        self.path.unlink(missing_ok=True)

    def append(self, columns: Mapping[str, ArrayLike]) -> None:
        """Write galaxies.

        Args:
            columns: one for each field of ``part_row``.

        Raises:
            UserError: the disk is full.
        """
        rows = np.empty(len(np.asarray(columns["sample"])), self._row)
        for name in rows.dtype.names or ():
            rows[name] = columns[name]
        with explain_full_disk(self.path):
            self._file.write(rows.tobytes())
        self.num_rows += len(rows)

    def finish(self) -> None:
        """All is written: other processes, on other machines too, may read the part from here on."""
        with explain_full_disk(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


def merge_parts(paths: Sequence[Path], num_classes: int, *, batch_size: int, num_samples: int) -> Iterator[NDArray[np.void]]:
    """The rows of all parts in the order of their samples, some thousand at a time.

    Batch j holds the samples j E ... (j + 1) E - 1 and was rank j mod W's (``shards.order.evaluation_batches``).

    Args:
        paths: of the parts, by rank.
        num_classes: K.
        batch_size: E.
        num_samples: of the split.

    Raises:
        ValueError: a galaxy is missing, or stands twice.
    """
    parts = [_map(path, part_row(num_classes)) for path in paths]
    places, blocks, num_waiting = [0] * len(parts), list[NDArray[np.void]](), 0
    for number, first in enumerate(range(0, num_samples, batch_size)):
        rank, count = number % len(parts), min(batch_size, num_samples - first)
        rows = parts[rank][places[rank] : places[rank] + count]
        places[rank] += count
        if not np.array_equal(rows["sample"], np.arange(first, first + count)):
            raise ValueError(f"{paths[rank].name}: the predictions of samples {first} to {first + count - 1} are not there")
        blocks.append(rows)
        num_waiting += count
        if num_waiting >= TOGETHER:
            yield np.concatenate(blocks)
            blocks, num_waiting = [], 0
    if blocks:
        yield np.concatenate(blocks)
    if places != [len(part) for part in parts]:
        raise ValueError("more galaxies were predicted than the split has")


def _map(path: Path, row: np.dtype[Any]) -> NDArray[np.void]:
    size = path.stat().st_size
    if size % row.itemsize:
        raise ValueError(f"{path} is cut off")
    return np.memmap(path, row, mode="r") if size else np.empty(0, row)
