"""Active jobs of runs: the process that holds a run folder, and cancellation."""

import os
import re
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.slurm import UNKNOWN, JobState, cancel_jobs, read_states
from galaxydist.errors import UserError
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.listing import find_runs
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
    if owner is None:
        return None
    state = known.get(owner.job_id) if owner.job_id is not None else None
    if state is not None and state.state != UNKNOWN and not state.is_active:
        return None
    return owner


_JOB_ID = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Target:
    """A job to cancel.

    Args:
        job_id: its id.
        run: its run folder; None if the user gave the id.
        job: its record; None if the user gave the id.
    """

    job_id: str
    run: Path | None = None
    job: JobRecord | None = None

    @property
    def text(self) -> str:
        """Description of the job for messages."""
        local = "local " if self.is_local else ""
        return f"{local}job {self.job_id}" + (f" ({self.run})" if self.run is not None else "")

    @property
    def is_local(self) -> bool:
        """True for a job of submitit's local executor."""
        return self.job is not None and self.job.scheduler == "local"


def find_targets(texts: Sequence[str], find_folder: Callable[[str], Path]) -> tuple[list[Target], list[str]]:
    """Find the jobs that wait or run, and describe the runs without such a job.

    Args:
        texts: run folders, folders of runs, or SLURM job ids (if no folder has that name).
        find_folder: returns the folder for a text.

    Raises:
        UserError: a folder does not exist or contains no run, or SLURM does not answer.
    """
    given: list[Target] = []
    runs: dict[Path, None] = {}
    for text in texts:
        if _JOB_ID.fullmatch(text) and not Path(text).exists():
            given.append(Target(text))
            continue
        folder = find_folder(text)
        found = find_runs(folder)
        if not found:
            raise UserError(f"{folder} contains no runs. Give a run folder, a folder with run folders, or a job id.")
        runs |= dict.fromkeys(found)
    jobs = [Target(job.job_id, run, job) for run in runs for job in JobFiles(run).jobs()]
    states = read_states(list(dict.fromkeys(target.job_id for target in jobs if not target.is_local)))
    active = [target for target in jobs if _is_active(target, states)]
    by_id = {target.job_id: target for target in (*given, *active)}
    with_job = {target.run for target in active}
    return list(by_id.values()), [_note(run, states) for run in runs if run not in with_job]


def cancel(targets: Sequence[Target]) -> list[str]:
    """Cancel the jobs.

    Returns:
        One message for each job.

    Raises:
        SlurmUnavailableError: SLURM does not answer.
    """
    refused = cancel_jobs(target.job_id for target in targets if not target.is_local)
    messages = []
    for target in targets:
        if target.is_local:
            done = target.job is not None and stop(target.job)
            messages.append(f"{target.text}: got the signal to save and exit" if done else f"{target.text}: it has already ended")
        elif target.job_id in refused:
            messages.append(f"{target.text}: not cancelled: {refused[target.job_id]}")
        else:
            messages.append(f"{target.text}: cancelled")
    return messages


def _is_active(target: Target, states: Mapping[str, JobState]) -> bool:
    if target.job is not None and target.is_local:
        return find_controller(target.job) is not None
    return states[target.job_id].is_active


def _note(run: Path, states: Mapping[str, JobState]) -> str:
    """Explain why a run has no job to cancel."""
    folder = RunFolder(run)
    holder = lock_holder(folder.lock_path, states)
    if holder is not None:
        command = f"kill {holder.pid}` on {holder.host}" if holder.job_id is None else f"scancel {holder.job_id}`"
        return f"{run}: started by hand, not by galaxydist submit: stop it with `{command}"
    if folder.is_pruned:
        return f"{run}: a search has pruned it"
    return f"{run}: {'it is finished' if folder.is_finished else 'it has no job that waits or runs'}"
