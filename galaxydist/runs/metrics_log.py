"""metrics.jsonl: one line of JSON for each logged step."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from galaxydist.atomic_files import explain_full_disk, fsync_file, replace_bytes
from galaxydist.errors import UserError

Metric = float | int | str | None


class MetricsLog:
    """The log of a run's metrics: lines such as ``{"step": 20, "train/loss": 1.9}``, in the order of their steps.

    Args:
        path: the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_checked = False

    def append(self, step: int, values: Mapping[str, Metric]) -> None:
        """Add one line. nan and inf, which JSON does not have, become null.

        Raises:
            UserError: the disk is full; the lines before are untouched.
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
                while written < len(line):  # a disk that fills up takes a part first and fails on the next call
                    written += file.write(line[written:])
            except OSError:
                os.truncate(self.path, length)
                raise

    def sync(self) -> None:
        """Make the lines so far survive a power cut; call it before a checkpoint is saved that says that they are written."""
        if self.path.exists():
            fsync_file(self.path)

    def read(self) -> list[dict[str, Any]]:
        """All lines, oldest first. A half-written last line is left out.

        Raises:
            UserError: another line is damaged.
        """
        return [json.loads(line) for line in self._lines()]

    def cut_back(self, step: int) -> int:
        """Remove the lines after ``step``, which will be written again by a run that goes on from there.

        Returns:
            The number of lines removed, a half-written one not counted.
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
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            data_end = file.seek(0, os.SEEK_END)
            start = data_end
            while start > 0:
                step = min(start, 4096)
                block_start = start - step
                file.seek(block_start)
                position = file.read(step).rfind(b"\n")
                if position >= 0:
                    start = block_start + position + 1
                    break
                start = block_start
            if start != data_end:
                file.truncate(start)
