"""Whether a run is on its way: which of its jobs waits or runs, and which process holds its folder."""

import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from galaxydist.cluster.records import JobRecord
from galaxydist.cluster.slurm import UNKNOWN, JobState
from galaxydist.runs.lock import STALE_SECONDS, LockOwner, is_alive, pid_space, read_owner

# Jobs of submitit's local executor: a process of this machine that starts the tasks, waits for them, and passes SIGTERM on.

_CONTROLLER = "submitit.local._local"
# A record is written when its process has started; clocks may be adjusted by a little.
_LATEST_START_S = 5.0


def find_controller(job: JobRecord) -> psutil.Process | None:
    """The process that a local job's id names, while it runs on this machine: the user's, submitit's, and as old as the job."""
    try:
        process = psutil.Process(int(job.job_id))
        words = " ".join(process.cmdline())
        is_it = (
            process.uids().real == os.getuid()
            and process.status() != psutil.STATUS_ZOMBIE
            and process.create_time() <= job.time + _LATEST_START_S
            and _CONTROLLER in words
            and (str(job.folder) in words or shlex.quote(str(job.folder)) in words)
        )
    except (psutil.Error, ValueError):
        return None
    return process if is_it else None


def stop(job: JobRecord) -> bool:
    """Tell a local job to save and end; False where it does not run here (any more).

    Where setup lines were given, the id is a shell's, which would end without telling anybody: what it started is told.
    """
    process = find_controller(job)
    if process is None:
        return False
    try:
        inner = [child for child in process.children() if _CONTROLLER in " ".join(child.cmdline())]
        (inner[0] if inner else process).terminate()
    except psutil.NoSuchProcess:
        return False
    return True


def newest_job(jobs: Sequence[JobRecord], known: Mapping[str, JobState]) -> tuple[JobRecord | None, JobState | None]:
    """The newest job of a run that waits or runs, else the newest, with what is known of it.

    Args:
        jobs: its submissions, oldest first.
        known: what SLURM says, by job id.
    """
    for job in reversed(jobs):
        told = local_state(job) if job.scheduler == "local" else known.get(job.job_id)
        if told is not None and told.is_active:
            return job, told
    newest = jobs[-1] if jobs else None
    return newest, known.get(newest.job_id) if newest is not None and newest.scheduler == "slurm" else None


def local_state(job: JobRecord) -> JobState | None:
    """RUNNING for a job of this machine that runs; None for one that does not."""
    is_running = find_controller(job) is not None
    return JobState("RUNNING", "", None, socket.gethostname()) if is_running else None


def lock_holder(lock_path: Path, known: Mapping[str, JobState]) -> LockOwner | None:
    """The living process that holds a run folder.

    The rank of a job that SLURM knows to be over is not one, however fresh its last heartbeat.

    Args:
        lock_path: the folder's lock.
        known: what SLURM says, by job id.
    """
    owner = read_owner(lock_path)
    if owner is None:
        return None
    told = known.get(owner.job_id) if owner.job_id is not None else None
    if told is not None and told.state != UNKNOWN and not told.is_active:
        return None
    return owner if is_held(owner, lock_path) else None


def is_held(owner: LockOwner, lock_path: Path) -> bool:
    """Whoever locked a run folder still lives: its process where that is this machine's, else its heartbeat."""
    if owner.host == socket.gethostname() and owner.pid_space == pid_space():
        return is_alive(owner)
    try:
        return time.time() - lock_path.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False
