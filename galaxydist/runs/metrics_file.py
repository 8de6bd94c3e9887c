"""Log of a run's metrics: metrics.jsonl, one line of JSON per logged step."""

import json
import math
import mmap
import os
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from galaxydist.atomic_files import explain_full_disk, fsync_file, replace_bytes
from galaxydist.errors import UserError

# Key of timing.jsonl: when the line was written, in seconds since 1970.
TIME_KEY = "time/unix"


class MetricsFile:
    """Log of metrics: lines such as ``{"step": 20, "train/loss": 1.9}``, in the order of their steps.

    Args:
        path: the file; created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_checked = False

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; nan and inf, which JSON lacks, become null (within lists and mappings they are refused).

        Raises:
            UserError: the disk is full; the earlier lines are unchanged.
        """
        if not self._is_checked:
            self._cut_half_line()
            self._is_checked = True
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
        }
        line = json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n"
        sys.audit("galaxydist.write", str(self.path))
        with explain_full_disk(self.path, "The lines before are untouched."), self.path.open("ab", buffering=0) as file:
            length = file.tell()
            try:
                written = file.write(line)
                while written < len(line):  # a disk that fills up accepts a part first and fails on the next call
                    written += file.write(line[written:])
            except OSError:
                os.truncate(self.path, length)
                raise

    def sync(self) -> None:
        """Flush all lines to disk, so that they survive a power cut; to be called before a checkpoint that relies on them."""
        if self.path.exists():
            fsync_file(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Return all lines, oldest first, without a half-written last line.

        Raises:
            UserError: another line is damaged.
        """
        return [json.loads(line) for line in self._lines()]

    def cut_back(self, step: int) -> int:
        """Remove the lines after ``step``; a run that continues from there writes them again.

        Returns:
            The number of lines removed, not counting a half-written one.
        """
        lines = list(self._lines())
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        data = b"".join(line + b"\n" for line in kept)
        if self.path.exists() and self.path.stat().st_size != len(data):
            replace_bytes(self.path, data)
        self._is_checked = True
        return len(lines) - len(kept)

    def _lines(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # the process was killed while it wrote this
                try:
                    is_metrics = isinstance(json.loads(line)["step"], int)
                except (ValueError, KeyError, TypeError):
                    is_metrics = False
                if not is_metrics:
                    raise UserError(
                        f"{self.path}, line {number} is damaged: {line[:80]!r}. Remove that line (only the curves lose it), "
                        "then give the same command again."
                    )
                yield line.rstrip(b"\n")

    def _cut_half_line(self) -> None:
        """Remove the line that a killed process left incomplete."""
        if not self.path.exists() or (size := self.path.stat().st_size) == 0:
            return
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        if end < size:
            os.truncate(self.path, end)


# Bytes at the end of a long file that are read to find the state of a run.
TAIL_BYTES = 65_536


def read_tail(path: Path, num_bytes: int = TAIL_BYTES, *, whole: bool = True, end: int | None = None) -> list[bytes]:
    """Return the complete lines among the last ``num_bytes`` of a file; empty if there is no file.

    Args:
        whole: leave out a half-written last line.
        end: position taken for the end of the file.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    with file:
        size = file.seek(0, os.SEEK_END)
        size = size if end is None else min(size, end)
        start = max(0, size - num_bytes)
        file.seek(max(0, start - 1))
        lines = file.read(size - file.tell()).split(b"\n")
    return lines[1 if start > 0 else 0 : -1 if whole or not lines[-1] else None]


def read_tail_records(path: Path, num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """Return the lines of ``read_tail`` that are JSON objects; other lines are skipped without an error."""
    return [record for line in read_tail(path, num_bytes) if (record := _record(line)) is not None]


def read_step_records(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of one step, found by binary search in a file whose ``step`` never decreases."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        _seek_line(file, bisect_left(range(size), step, key=lambda position: _step_after(file, position)))
        records = (_record(line) for line in file if line.endswith(b"\n"))
        in_order = takewhile(lambda record: record is None or record.get("step", step) <= step, records)
        return [record for record in in_order if record is not None and record.get("step") == step]


def _seek_line(file: BinaryIO, position: int) -> None:
    """Seek to the first line that begins at a position or after it."""
    file.seek(max(0, position - 1))
    if position > 0:
        file.readline()


def _step_after(file: BinaryIO, position: int) -> int:
    """Return the step of the first line that begins at a position or after it; the largest integer if it is unknown."""
    _seek_line(file, position)
    step = (_record(file.readline()) or {}).get("step")
    return step if isinstance(step, int) else sys.maxsize


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
