"""A bed's processes, found by what their environment says; and ended.

Each daemon of a bed carries ``SLURM_BED_PART=DIR:PART``, which slurmstepd gets from its slurmd. What a job runs carries the bed's
``SLURM_CONF`` and the ``SLURMD_NODENAME`` that slurmd gives it. No process of anybody else carries these, so there are no process
numbers in files that may be another's tomorrow.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PART_VARIABLE = "SLURM_BED_PART"


def find_parts(folder: Path, part: str | None = None) -> dict[int, str]:
    """The bed's own processes, as process numbers and command lines: of one part, or of all."""
    mark = f"\0{PART_VARIABLE}={folder}:{part or ''}".encode() + (b"\0" if part else b"")
    return {pid: command_line(pid) for pid, environ in _environs() if mark in environ}


def find_jobs(folder: Path, node: str | None = None) -> dict[int, str]:
    """What the bed's jobs run, slurmstepds and orphans too, as process numbers and command lines: of one node, or of all."""
    environs = dict(_environs())
    end = f"{node}\0" if node else ""
    conf, name = f"\0SLURM_CONF={folder}/slurm.conf\0".encode(), f"\0SLURMD_NODENAME={end}".encode()
    found = {pid for pid, environ in environs.items() if conf in environ and name in environ}
    # What has cleared its environment is still in the namespaces of its node.
    spaces = {_namespace(pid) for pid in found} - {_namespace(os.getpid()), None}
    found |= {pid for pid in environs if spaces and _namespace(pid) in spaces}
    lines = {pid: command_line(pid) for pid in sorted(found - {os.getpid()})}
    return {pid: line for pid, line in lines.items() if not line.startswith("slurmd ")}


def kill_all(find: Callable[[], dict[int, str]], patience_s: float) -> None:
    """SIGKILL for what ``find`` finds, until it finds nothing twice: it may miss a process that is just being started.

    Raises:
        TimeoutError: some are still there after ``patience_s``.
    """
    deadline, misses = time.monotonic() + patience_s, 0
    while misses < 2:
        found = find()
        misses = 0 if found else misses + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"killed, but still there after {patience_s} s: {found}")
        time.sleep(0.02)


def command_line(pid: int) -> str:
    """What a process was started as; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _environs() -> Iterator[tuple[int, bytes]]:
    """The environments that the processes which live, and may be seen, were started with; each variable between two NUL."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), b"\0" + (folder / "environ").read_bytes()


def _namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return None
