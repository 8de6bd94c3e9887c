"""Jobs of submitit's local executor: a process of this machine that starts the tasks, waits for them, and passes SIGTERM on."""

import os
import shlex
import time

import psutil

from galaxydist.cluster.records import JobRecord

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


def time_left(job: JobRecord) -> float:
    """Seconds until submitit ends it."""
    return max(0.0, job.time + 60 * job.time_limit_min - time.time())


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
