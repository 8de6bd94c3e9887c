"""Cancellation of the jobs of runs."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galaxydist.cluster import running_jobs
from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.running_jobs import lock_holder
from galaxydist.cluster.slurm import JobState, cancel_jobs, read_states
from galaxydist.errors import UserError
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.listing import find_runs

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
            done = target.job is not None and running_jobs.stop(target.job)
            messages.append(f"{target.text}: got the signal to save and exit" if done else f"{target.text}: it has already ended")
        elif target.job_id in refused:
            messages.append(f"{target.text}: not cancelled: {refused[target.job_id]}")
        else:
            messages.append(f"{target.text}: cancelled")
    return messages


def _is_active(target: Target, states: Mapping[str, JobState]) -> bool:
    if target.job is not None and target.is_local:
        return running_jobs.find_controller(target.job) is not None
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
