"""Reading little of a long file of lines: its end, or the lines of one step, so that many runs are looked at in a moment."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

TAIL_BYTES = 65_536
_BLOCK = 4096


def read_tail(path: Path, num_bytes: int = TAIL_BYTES, *, whole: bool = True, end: int | None = None) -> list[bytes]:
    """The whole lines among the last ``num_bytes`` of a file; none where there is no file.

    Args:
        whole: leave out a half-written last one.
        end: take the file to end here.
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
    """The same lines as JSON objects; what is none is passed over, since whoever needs all of them checks the file."""
    return [record for line in read_tail(path, num_bytes) if (record := _record(line)) is not None]


def read_step_records(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of one step of a file whose ``step`` never falls, found by halving: a few blocks are read, however long it is."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    with file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while high - low > _BLOCK:
            middle = (low + high) // 2
            following = _step_after(file, middle)
            if following is not None and following < step:
                low = middle
            else:
                high = middle
        file.seek(low)
        if low > 0:
            file.readline()
        found = []
        for line in file:
            record = _record(line) if line.endswith(b"\n") else None
            if record is not None and record.get("step", step) > step:
                break
            if record is not None and record.get("step") == step:
                found.append(record)
    return found


def _step_after(file: BinaryIO, position: int) -> int | None:
    """The step of the first whole line that begins after a position; None where it is not known."""
    file.seek(position)
    file.readline()
    record = _record(file.readline())
    step = record.get("step") if record is not None else None
    return step if isinstance(step, int) else None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
