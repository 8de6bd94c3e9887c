"""State and progress of runs, from SLURM and the run folders, never from the tracker."""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from galaxydist.cluster.logs import explain_end
from galaxydist.cluster.records import JobFiles, JobRecord, RestartRecord
from galaxydist.cluster.running_jobs import lock_holder, newest_job
from galaxydist.cluster.slurm import (
    TIMED_STATES,
    UNKNOWN,
    WAITING_STATES,
    JobState,
    SlurmUnavailableError,
    read_states,
)
from galaxydist.errors import UserError
from galaxydist.runs.events import Event, read_last_event
from galaxydist.runs.folder import BEST, FOLDER_NAME, RunFolder
from galaxydist.runs.listing import find_runs, label_runs, read_settings
from galaxydist.runs.lock import LockOwner, read_owner
from galaxydist.runs.metrics_file import read_step_records, read_tail_records


@dataclass(frozen=True)
class Progress:
    """Progress of a run. Values that its folder does not contain (yet) are None.

    Args:
        step: the last logged optimizer step.
        total_steps: steps of the whole run, without early stopping.
        epoch: epochs done.
        epochs: epochs of the whole run.
        img_s: images per second over all ranks, in the last measurement.
        metric: the validation metric that chooses the best checkpoint.
        best: its best value.
        batch_size: galaxies in one step.
        updated: time of the last log line, in seconds since 1970.
    """

    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    img_s: float | None = None
    metric: str | None = None
    best: float | None = None
    batch_size: int | None = None
    updated: float | None = None

    @property
    def to_do_s(self) -> float | None:
        """Seconds of training left at the last measured speed, without validation."""
        if not (self.total_steps and self.batch_size and self.img_s):
            return None
        return max(0, self.total_steps - self.step) * self.batch_size / self.img_s


def read_progress(folder: RunFolder) -> Progress:
    """Read the progress of a run.

    Raises:
        UserError: recipe.json is damaged.
    """
    recipe = folder.read_recipe().recipe if folder.is_started else {}
    metric, epochs, batch_size = (recipe.get(f"train.{key}") for key in ("metric", "epochs", "batch_size"))
    lines = read_tail_records(folder.metrics_path)
    timing = read_tail_records(folder.timing.path, 4096)
    last = next((line for line in reversed(lines) if _is_number(line.get("step"))), None)
    epoch = last.get("epoch") if last is not None else None
    return Progress(
        step=int(last["step"]) if last is not None else 0,
        total_steps=_total_steps(last, epochs),
        epoch=epoch if _is_number(epoch) else None,
        epochs=epochs,
        img_s=next((line["time/img_s"] for line in reversed(timing) if _is_number(line.get("time/img_s"))), None),
        metric=metric,
        best=_best(folder, metric, lines),
        batch_size=batch_size,
        updated=folder.metrics_path.stat().st_mtime if folder.metrics_path.exists() else None,
    )


def _total_steps(line: Mapping[str, Any] | None, epochs: int | None) -> int | None:
    """Return the steps of the whole run, from step and epoch of a log line."""
    if line is None or not epochs or not _is_number(line.get("epoch")) or line["epoch"] <= 0:
        return None
    steps_per_epoch: int = round(line["step"] / line["epoch"])
    return steps_per_epoch * epochs


def _best(folder: RunFolder, metric: str | None, lines: list[dict[str, Any]]) -> float | None:
    """Return the best validation value: the best checkpoint's, or a later one."""
    if metric is None:
        return None
    try:
        saved = FOLDER_NAME.fullmatch((folder.checkpoints_dir / BEST).read_text().strip())
    except (FileNotFoundError, UnicodeDecodeError):
        saved = None
    earlier = read_step_records(folder.metrics_path, int(saved[1])) if saved is not None else []
    values = [line[f"val/{metric}"] for line in (*earlier, *lines) if _is_number(line.get(f"val/{metric}"))]
    if not values:
        return None
    best: float = min(values) if metric == "loss" else max(values)
    return best


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Group = Literal["running", "pending", "unknown", "failed", "stopped", "finished"]
GROUPS: tuple[Group, ...] = ("running", "pending", "unknown", "failed", "stopped", "finished")

# States derived from the run folder, besides SLURM's states.
FINISHED, PRUNED, STOPPED, FAILED, NEW, DAMAGED = "FINISHED", "PRUNED", "STOPPED", "FAILED", "NEW", "DAMAGED"
_OTHER_GROUPS: dict[str, Group] = {
    UNKNOWN: "unknown",
    STOPPED: "stopped",
    NEW: "stopped",
    "CANCELLED": "stopped",
    "COMPLETED": "stopped",  # without a result, so the run was stopped before its end
    FINISHED: "finished",
    PRUNED: "finished",
}
# Time after a submission in which SLURM may not know the job yet.
_SETTLING_S = 60.0


@dataclass(frozen=True)
class RunStatus:
    """Status of one run: a line of the table.

    Args:
        run: the run folder.
        name: name of the run in the table.
        state: SLURM's state of its newest job; FINISHED, PRUNED, RUNNING, STOPPED, FAILED or NEW if derived from the folder;
            DAMAGED if the folder cannot be read.
        reason: of the state; may be empty.
        job: its newest job that waits or runs, else its newest job; None for a run started by hand.
        nodes: the nodes of the job.
        progress: of the training.
        restarts: number of restarts, by SLURM or by us.
        time_left_s: seconds until the job's time limit; None if the job does not run or has no limit.
        last_error: the last error, if known, of a run that neither runs nor is finished.
        last_event: the newest event of the run.
        label: settings that differ from the other runs in the same folder, such as ``vit balanced seed=1``; may be empty.
    """

    run: Path
    name: str
    state: str
    reason: str = ""
    job: JobRecord | None = None
    nodes: str = ""
    progress: Progress = field(default_factory=Progress)
    restarts: int = 0
    time_left_s: float | None = None
    last_error: str | None = None
    last_event: Event | None = None
    label: str = ""

    @property
    def group(self) -> Group:
        return group_of(self.state)

    @property
    def to_do_s(self) -> float | None:
        """Seconds of training left; None if the run does not run."""
        return self.progress.to_do_s if self.group == "running" else None

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON-compatible values."""
        job, event = self.job, self.last_event
        return {
            "run": str(self.run),
            "name": self.name,
            "label": self.label,
            "state": self.state,
            "group": self.group,
            "reason": self.reason,
            "job_id": job.job_id if job else None,
            "scheduler": job.scheduler if job else None,
            "cluster": job.cluster if job else None,
            "nodes": self.nodes,
            **dataclasses.asdict(self.progress),
            "restarts": self.restarts,
            "time_left_s": self.time_left_s,
            "to_do_s": self.to_do_s,
            "last_error": self.last_error,
            "last_event": {key: getattr(event, key) for key in ("time", "kind", "text", "step")} if event is not None else None,
        }


@dataclass(frozen=True)
class Overview:
    """The statuses of all requested runs.

    Args:
        runs: sorted by group, in the order of ``GROUPS``.
        slurm_error: the error if SLURM does not answer; empty otherwise.
    """

    runs: tuple[RunStatus, ...]
    slurm_error: str = ""


def group_of(state: str) -> Group:
    found: Group = "running" if state in TIMED_STATES else "pending" if state in WAITING_STATES else "failed"
    return _OTHER_GROUPS.get(state, found)


def name_runs(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the run folders at or below folders, each with its name in a table."""
    names: dict[Path, str] = {}
    for folder in folders:
        for run in find_runs(folder):
            names.setdefault(run, str(run.relative_to(folder)) if run != folder else run.name or str(run))
    return names


def read_overview(folders: Sequence[Path]) -> Overview:
    """Read the status of all runs in folders; SLURM is asked once."""
    names = name_runs(folders)
    jobs: dict[Path, list[JobRecord]] = {}
    runs: list[RunStatus] = []
    for run, name in names.items():
        try:
            jobs[run] = JobFiles(run).jobs()
        except (UserError, OSError) as error:
            runs.append(RunStatus(run, name, DAMAGED, last_error=str(error)))
    known, slurm_error = _read_job_states([job for run_jobs in jobs.values() for job in run_jobs])
    for run, run_jobs in jobs.items():
        try:
            runs.append(read_status(run, names[run], run_jobs, known))
        except (UserError, OSError) as error:
            runs.append(RunStatus(run, names[run], DAMAGED, last_error=str(error)))
    labels = label_runs({run: read_settings(run) for run in jobs})
    runs = [dataclasses.replace(status, label=labels.get(status.run, "")) for status in runs]
    return Overview(tuple(sorted(runs, key=_sort_key)), slurm_error)


def read_status(run: Path, name: str, jobs: Sequence[JobRecord], known: Mapping[str, JobState]) -> RunStatus:
    """Read the status of one run.

    Args:
        run: the run folder.
        name: name of the run in the table.
        jobs: its submissions, oldest first.
        known: states from SLURM, by job id.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    folder, files = RunFolder(run), JobFiles(run)
    restarts = files.restarts()
    job, job_state = newest_job(jobs, known)
    state = _find_state(folder, restarts, job, job_state, lock_holder(folder.lock_path, known))
    group = group_of(state.state)
    return RunStatus(
        run,
        name,
        state.state,
        state.reason,
        job,
        state.nodes,
        read_progress(folder),
        count_restarts(restarts, {job.job_id: known[job.job_id] for job in jobs if job.job_id in known}),
        state.time_left_s,
        None if group in ("running", "finished") else explain_end(files, job, job_state, group=group),
        read_last_event(folder.events_path),
    )


def count_restarts(restarts: Sequence[RestartRecord], known: Mapping[str, JobState]) -> int:
    """Count the restarts of a run: those by SLURM of each job, and those that we recorded."""
    counts = {job_id: state.restarts for job_id, state in known.items()}
    # A start has two records if SLURM refused to requeue it; the later one counts.
    last = {(record.job_id, record.restart): record.decision for record in restarts}
    for (job_id, restart), decision in last.items():
        counts[job_id] = max(counts.get(job_id, 0), restart + (decision == "requeue"))
    return sum(counts.values()) + sum(decision == "resubmit" for decision in last.values())


def _read_job_states(jobs: Sequence[JobRecord]) -> tuple[dict[str, JobState], str]:
    ids = list(dict.fromkeys(job.job_id for job in jobs if job.scheduler == "slurm"))
    try:
        return read_states(ids), ""
    except SlurmUnavailableError as error:
        return {}, str(error)


def _find_state(
    folder: RunFolder,
    restarts: Sequence[RestartRecord],
    job: JobRecord | None,
    job_state: JobState | None,
    holder: LockOwner | None,
) -> JobState:
    """Combine SLURM's state of the newest job with the run folder and its lock."""
    if job_state is not None and job_state.is_active:
        return job_state
    if folder.is_finished or folder.is_pruned:
        return JobState(FINISHED if folder.is_finished else PRUNED, nodes=job_state.nodes if job_state is not None else "")
    if holder is not None:
        return JobState("RUNNING", f"by {holder}", nodes=holder.host)
    if job_state is not None and job_state.state != UNKNOWN:
        return job_state
    is_settling = job_state is None or (job is not None and time.time() - job.time < _SETTLING_S)
    has_stopped = bool(restarts) and job is not None and restarts[-1].job_id == job.job_id and restarts[-1].decision == "stop"
    if job is not None and job.scheduler == "slurm" and is_settling and not has_stopped:
        return JobState(UNKNOWN, job_state.reason if job_state is not None else "SLURM did not answer")
    reason, owner = job_state.reason if job_state is not None else "", read_owner(folder.lock_path)
    if owner is not None:
        reason = f"{owner} is gone"
    return JobState(_ended_state(folder, restarts, was_locked=owner is not None), reason)


def _ended_state(folder: RunFolder, restarts: Sequence[RestartRecord], *, was_locked: bool) -> str:
    """Return the state of a run that neither runs nor waits nor is finished."""
    if was_locked or folder.read_failure() is not None or (restarts and restarts[-1].decision == "stop"):
        return FAILED
    return STOPPED if folder.metrics_path.exists() or restarts else NEW


def _sort_key(status: RunStatus) -> tuple[int, list[tuple[int, str]]]:
    """Return the sort key of a run: by group, then by path with numbers in numeric order."""
    parts = re.split(r"(\d+)", str(status.run))
    return GROUPS.index(status.group), [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
