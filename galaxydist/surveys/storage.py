"""Writing where it may fail: what to say of a full disk, what a killed process left behind."""

import os
import shutil
import time
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.files import NO_SPACE

_STALE_SECONDS = 24 * 3600.0


def disk_error(path: Path, error: OSError) -> UserError:
    """The UserError for an OSError while writing ``path``: full disk, quota, size limit, or the system's own words."""
    # HDF5 hands the reason on as text alone.
    full = error.errno in NO_SPACE or any(os.strerror(code) in str(error) for code in NO_SPACE)
    reason = f"no room left ({error})" if full else str(error)
    return UserError(
        f"cannot write {path}: {reason}; nothing half-written stands under that name; free some space or choose another place"
    )


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders of a killed process: those that nobody has touched for a day."""
    for path in folder.glob(pattern):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
