"""Atomic file writes: a crash, a kill or a full disk never leaves a partial file that looks complete.

Each change of the disk raises a ``sys.audit`` event (``galaxydist.write``, ``galaxydist.fsync``, ``galaxydist.rename``,
``galaxydist.unlink``, each with the path), so that a test can check their order or kill the process at any of them.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from galaxydist.errors import UserError

NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


def full_disk_reason(error: OSError) -> str | None:
    """Return the reason if an error means that no more can be written to a disk, otherwise None."""
    # HDF5 passes the reason on as text only.
    return next((text for code, text in NO_SPACE.items() if error.errno == code or os.strerror(code) in str(error)), None)


@contextmanager
def explain_full_disk(path: Path, kept: str = "") -> Iterator[None]:
    """Turn a full disk, a used-up quota or a file size limit into a UserError.

    Args:
        path: the file that is being written.
        kept: a sentence about the contents that are still there.
    """
    try:
        yield
    except OSError as error:
        if (reason := full_disk_reason(error)) is None:
            raise
        text = f"{path} could not be written: {reason}. {kept}".rstrip()
        raise UserError(f"{text} Free some space there, then give the same command again.") from error


def disk_error(path: Path, error: OSError) -> UserError:
    """Return the UserError for any OSError during an atomic write of ``path``, with the reason or the system's message."""
    reason = full_disk_reason(error)
    return UserError(
        f"cannot write {path}: {f'no room left ({reason})' if reason else error}; no partial file is left under that name; free "
        "some space or choose another folder"
    )


def fsync_file(path: Path) -> None:
    """Flush the contents of a file, or the names in a folder, to the disk."""
    sys.audit("galaxydist.fsync", str(path))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync a folder; their renames are synchronous.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file and flush the folder; an existing file of that name is replaced atomically."""
    sys.audit("galaxydist.rename", str(source), str(target))
    source.replace(target)
    fsync_file(target.parent)


def unlink(path: Path) -> None:
    """Remove a file if it exists."""
    sys.audit("galaxydist.unlink", str(path))
    path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and fsync it; use ``replace_bytes`` for a file that may exist."""
    sys.audit("galaxydist.write", str(path))
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        sys.audit("galaxydist.fsync", str(path))
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; rename it after fsync, or remove it if the writing fails.

    Args:
        path: the final name; an existing file is replaced atomically.
        temporary: the name until then, of a file that only one process writes; a leftover of a killed process is overwritten.
            None: a hidden name that no other writer has; a write of the same file a day later removes a leftover.
    """
    if temporary is None:
        remove_stale(path.parent, f".{glob.escape(path.name)}.*.tmp")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        sys.audit("galaxydist.write", str(temporary))
        with temporary.open("wb") as file:
            yield file
            file.flush()
            sys.audit("galaxydist.fsync", str(temporary))
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: at any time it holds either its old or its new contents.

    Raises:
        UserError: the disk is full; the old contents are still there.
    """
    kept = "Its earlier contents are unchanged." if path.exists() else ""
    with explain_full_disk(path, kept), whole_file(path) as file:
        file.write(data)


def to_json(value: Any) -> str:
    """Return indented JSON text of plain values, keys in their own order.

    Raises:
        ValueError: nan or inf, which JSON does not have.
    """
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically (see ``replace_bytes``)."""
    replace_bytes(path, to_json(value).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable as JSON ({error}). It was damaged or edited: restore it or remove it."
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Age in seconds from which a temporary file counts as a leftover of a killed process.
_STALE_SECONDS = 24 * 3600.0


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders that have not changed for a day: leftovers of killed processes."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process has renamed or removed it, or it is another user's
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
