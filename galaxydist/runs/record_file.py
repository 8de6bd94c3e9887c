"""Files of records in a run folder: one JSON object in each line, appended by any process of a run.

Each line is written by a single write, so that two writers on one machine never mix their lines (on NFS: two writers on one
client). A line that a crash left half-written is ignored.
"""

import dataclasses
import errno
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from galaxydist.atomic_files import explain_full_disk, fsync_file
from galaxydist.errors import UserError
from galaxydist.runs.folder import plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Appended to a half-written line, so that the next record starts on its own line.
_TORN = b" #torn"
# Number of bytes of a damaged line that an error message shows.
_SHOWN = 80

Record = TypeVar("Record", bound="DataclassInstance")


def append_record(path: Path, record: Any) -> None:
    """Append a record, a dataclass, as one line, and flush it to the disk.

    Raises:
        UserError: the disk is full.
    """
    line = json.dumps(plain(dataclasses.asdict(record)), allow_nan=False, ensure_ascii=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    sys.audit("galaxydist.write", str(path))
    with explain_full_disk(path, "The lines before are untouched."):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if _is_torn(descriptor):
                line = _TORN + b"\n" + line
            if os.write(descriptor, line) < len(line):  # a full disk accepts only a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            sys.audit("galaxydist.fsync", str(path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if is_new:
        fsync_file(path.parent)


def _is_torn(descriptor: int) -> bool:
    """Return True if the last line has no newline (killed writer or full disk)."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of a file, oldest first; none if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines[:-1], 1):  # after the last newline there is nothing, or a half-written line
        if line.endswith(_TORN):
            continue
        try:
            yield from_plain(kind, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is damaged ({error}): {line[:_SHOWN].decode(errors='replace')!r}. "
                "It was edited, or written by another version of galaxydist: restore or remove that line."
            ) from error


def from_plain(kind: type[Record], content: Any) -> Record:
    """Build a record from JSON values.

    Raises:
        ValueError: a key is missing, or a value has the wrong type; the message names the key.
    """
    if not isinstance(content, Mapping):
        raise ValueError("not an object")
    hints = typing.get_type_hints(kind)
    needed = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - set(content)):
        raise ValueError(f"{', '.join(missing)} is missing")
    # Unknown keys are ignored: a job's snapshot may be older than the command that wrote the line.
    return kind(**{name: _checked(name, hints[name], value) for name, value in content.items() if name in hints})


def _checked(name: str, hint: Any, value: Any) -> Any:
    """Convert a JSON value to a field's type."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if origin is Literal and value in typing.get_args(hint):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if (origin is dict and isinstance(value, dict)) or (hint in (int, str, bool) and type(value) is hint):
        return value
    raise ValueError(f"{name}={value!r} is not {getattr(hint, '__name__', hint)}")
