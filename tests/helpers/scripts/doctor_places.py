"""For tests of the doctor's checks: places and programs that are as a site may have them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from galaxydist.doctor.check import Check

# Nobody can make a file there, not even root.
UNWRITABLE = Path("/proc")
SHM = Path("/dev/shm")
linux = pytest.mark.skipif(not UNWRITABLE.is_dir() or not SHM.is_dir(), reason="needs /proc and /dev/shm")


def program(folder: Path, name: str, lines: str) -> str:
    """A program of that name which does these shell lines."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def layered_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size that does not look as if it were in memory: an overlay, as containers have."""
    below = folder.with_name(f"{folder.name}.below")
    with small_disk(below, size):
        for part in (folder, below / "lower", below / "upper", below / "work"):
            part.mkdir()
        options = ",".join(f"{name}dir={below / name}" for name in ("lower", "upper", "work"))
        command = ["mount", "-t", "overlay", "-o", options, "overlay", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting is not allowed here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def levels(checks: list[Check]) -> dict[str, str]:
    """By name."""
    return {check.name: check.level for check in checks}
