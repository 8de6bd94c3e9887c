"""Who holds a run folder, and whether that process still runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class LockOwner:
    """Who holds a lock.

    Args:
        host: name of the machine.
        pid: process number there.
        process_start: when that process started, seconds since 1970: tells it from a later process of the same number.
        pid_space: which kernel, boot and container the process number belongs to; empty where the system does not say.
        job_id: the scheduler's job, or None.
        restart_count: how often that job was requeued.
        token: random, of this lock alone.
    """

    host: str
    pid: int
    process_start: float
    pid_space: str
    job_id: str | None
    restart_count: int
    token: str

    def __str__(self) -> str:
        job = f", job {self.job_id}, restart {self.restart_count}" if self.job_id is not None else ""
        return f"process {self.pid} on {self.host}{job}"


def job_of(environ: Mapping[str, str]) -> str | None:
    """The batch job of a process by the id that SLURM's programs take, ``123`` or ``123_4`` for a task of an array (whose
    SLURM_JOB_ID may be the id of the whole array); None outside of one."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")


def restart_of(environ: Mapping[str, str]) -> int:
    """How often SLURM has started the job of a process again."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def start_of(environ: Mapping[str, str]) -> str | None:
    """Names one start of one job, such as ``123_4.0``; None outside of a job."""
    job_id = job_of(environ)
    return f"{job_id}.{restart_of(environ)}" if job_id is not None else None


def read_owner(path: Path) -> LockOwner | None:
    """The owner that a lock file names; None where there is no file or it is not a lock's."""
    try:
        content: Any = json.loads(path.read_bytes())
        return LockOwner(**{field.name: content[field.name] for field in fields(LockOwner)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def process_start(pid: int) -> float | None:
    """When a process of this machine started, seconds since 1970; None where it does not run."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def pid_space() -> str:
    """Two machines may bear one name, a machine may have been restarted, containers number their processes anew: only where this
    is equal does a process number mean the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def is_alive(owner: LockOwner) -> bool:
    """The very process that took the lock still runs on this host (a zombie does not)."""
    try:
        process = psutil.Process(owner.pid)
        # The start time is computed from the boot time, which a clock adjustment may move by a little.
        is_same = abs(process.create_time() - owner.process_start) < 2.0
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
