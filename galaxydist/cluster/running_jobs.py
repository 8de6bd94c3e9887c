"""Active jobs of a run, and the process that holds its folder."""

import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from galaxydist.cluster.records import JobRecord
from galaxydist.cluster.slurm import UNKNOWN, JobState
from galaxydist.runs.lock import LockOwner, live_owner

# submitit's process of a local job: it starts the tasks, waits for them and forwards SIGTERM.
_CONTROLLER = "submitit.local._local"
# Longest time between a submission and the start of its process; clocks may be adjusted a little.
_LATEST_START_S = 5.0


def find_controller(job: JobRecord) -> psutil.Process | None:
    """Return the running process of a local job; None if it does not run on this machine.

    Process ids are reused, so user, command line and start time are compared too.
    """
    try:
        process = psutil.Process(int(job.job_id))
        command = " ".join(process.cmdline())
        is_controller = (
            process.uids().real == os.getuid()
            and process.status() != psutil.STATUS_ZOMBIE
            and process.create_time() <= job.time + _LATEST_START_S
            and _CONTROLLER in command
            and (str(job.folder) in command or shlex.quote(str(job.folder)) in command)
        )
    except (psutil.Error, ValueError):
        return None
    return process if is_controller else None


def stop(job: JobRecord) -> bool:
    """Send SIGTERM to a local job, so that it saves and exits; return False if it does not run on this machine.

    With setup lines the process is a shell, which would not forward the signal, so its child gets it.
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
    """Return the newest job of a run that waits or runs, else the newest job, with its state (None if unknown).

    Args:
        jobs: submissions of the run, oldest first.
        known: states from SLURM, by job id.
    """
    for job in reversed(jobs):
        state = local_state(job) if job.scheduler == "local" else known.get(job.job_id)
        if state is not None and state.is_active:
            return job, state
    newest = jobs[-1] if jobs else None
    return newest, known.get(newest.job_id) if newest is not None and newest.scheduler == "slurm" else None


def local_state(job: JobRecord) -> JobState | None:
    """Return RUNNING for a local job that runs, else None."""
    is_running = find_controller(job) is not None
    return JobState("RUNNING", "", None, socket.gethostname()) if is_running else None


def lock_holder(lock_path: Path, known: Mapping[str, JobState]) -> LockOwner | None:
    """Return the live process that holds a run folder.

    A rank whose job is over according to SLURM does not count, however recent its heartbeat.

    Args:
        lock_path: the folder's lock.
        known: states from SLURM, by job id.
    """
    owner = live_owner(lock_path)
    state = known.get(owner.job_id) if owner is not None and owner.job_id is not None else None
    has_ended = state is not None and state.state != UNKNOWN and not state.is_active
    return None if has_ended else owner
