"""Whether a run is on its way: which of its jobs waits or runs, and which process holds its folder."""

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from galaxydist.cluster import local_jobs
from galaxydist.cluster.records import JobRecord
from galaxydist.cluster.scheduler import UNKNOWN, JobState
from galaxydist.runs.lock import STALE_SECONDS, LockOwner, is_alive, pid_space, read_owner


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
    is_running = local_jobs.find_controller(job) is not None
    return JobState("RUNNING", "", None, socket.gethostname()) if is_running else None


def find_holder(lock_path: Path, known: Mapping[str, JobState]) -> LockOwner | None:
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
