"""What a user sees of runs: their state from SLURM, the rest from their folders. The tracker is never asked."""

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
from galaxydist.runs.folder import BEST, FOLDER_NAME, RunFolder
from galaxydist.runs.lock import LockOwner, read_owner
from galaxydist.runs.metrics_log import read_step_records, read_tail_records

# How far a run is, from its folder alone. Only the ends of its files are read.


@dataclass(frozen=True)
class Progress:
    """How far a run is. What its folder does not tell (yet) is None.

    Args:
        step: optimizer steps in its log.
        total_steps: of the whole run, without early stopping.
        epoch: passes over the training split.
        epochs: of the whole run.
        img_s: images a second, over all processes, when they were measured last.
        metric: the validation metric that chooses the best checkpoint.
        best: its best value.
        batch_size: galaxies in one step.
        updated: when it logged last, seconds since 1970.
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
        """Seconds that the rest of the training takes at the speed measured last, without validations."""
        if not (self.total_steps and self.batch_size and self.img_s):
            return None
        return max(0, self.total_steps - self.step) * self.batch_size / self.img_s


def read_progress(folder: RunFolder) -> Progress:
    """Read it.

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
        updated=_modified(folder.metrics_path),
    )


def _total_steps(line: Mapping[str, Any] | None, epochs: int | None) -> int | None:
    """Step and epoch of a line tell how many steps an epoch has."""
    if line is None or not epochs or not _is_number(line.get("epoch")) or line["epoch"] <= 0:
        return None
    steps_per_epoch: int = round(line["step"] / line["epoch"])
    return steps_per_epoch * epochs


def _best(folder: RunFolder, metric: str | None, lines: list[dict[str, Any]]) -> float | None:
    """The best validation: of the checkpoint that was saved as the best, or a later one."""
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


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Group = Literal["running", "pending", "unknown", "failed", "stopped", "finished"]
GROUPS: tuple[Group, ...] = ("running", "pending", "unknown", "failed", "stopped", "finished")

# States that a run folder tells, beside SLURM's.
FINISHED, STOPPED, FAILED, NEW, DAMAGED = "FINISHED", "STOPPED", "FAILED", "NEW", "DAMAGED"
_OTHER_GROUPS: dict[str, Group] = {
    UNKNOWN: "unknown",
    STOPPED: "stopped",
    NEW: "stopped",
    "CANCELLED": "stopped",
    "COMPLETED": "stopped",  # without a result: it ended before its end, as it was told
    FINISHED: "finished",
}
_DEPTH = 2
_BARE_KEYS = ("recipe", "model.name", "data.variant")
_NAMING_KEYS = ("model.name", "data.dataset", "data.variant", "seed")
# SLURM may not know a job for so long after its submission.
_SETTLING_S = 60.0


@dataclass(frozen=True)
class RunStatus:
    """One line of the table.

    Args:
        run: the run folder.
        name: what the user calls it.
        state: SLURM's word for its newest job; FINISHED, RUNNING, STOPPED, FAILED or NEW where only the folder tells; DAMAGED
            where that cannot be read.
        reason: why; may be empty.
        job: its newest job that waits or runs, else its newest; None for a run that was started by hand.
        nodes: where it runs or ran.
        progress: how far it is.
        restarts: how often it was started again after the first time, by SLURM or by us.
        time_left_s: seconds until the job's time limit; None where it does not run or has none.
        last_error: why it does not run as it should; None where it does.
        label: what tells it from the other runs of its folder, such as ``vit balanced seed=1``; may be empty.
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
    label: str = ""

    @property
    def group(self) -> Group:
        """Which of the few things a user asks for first."""
        return group_of(self.state)

    @property
    def to_do_s(self) -> float | None:
        """Seconds that the rest of the training takes; None where it does not run."""
        return self.progress.to_do_s if self.group == "running" else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for other programs."""
        job = self.job
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
        }


@dataclass(frozen=True)
class Overview:
    """All runs that were asked for.

    Args:
        runs: running ones first, then those that wait, failed, were stopped, are finished.
        trouble: why SLURM could not be asked; empty where it could.
    """

    runs: tuple[RunStatus, ...]
    trouble: str = ""


def group_of(state: str) -> Group:
    """The group of a state."""
    found: Group = "running" if state in TIMED_STATES else "pending" if state in WAITING_STATES else "failed"
    return _OTHER_GROUPS.get(state, found)


def is_run(folder: Path) -> bool:
    """A run was submitted or started here."""
    return any((folder / name).exists() for name in ("recipe.json", "jobs.jsonl", "lock.json"))


def find_runs(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """The run folders at a folder or below it, down to two levels; links to folders are not followed."""
    try:
        if is_run(folder):
            return [folder]
        if depth == 0:
            return []
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except PermissionError:
        return []
    return [run for path in inner if not path.name.startswith(".") for run in find_runs(path, depth - 1)]


def read_overview(folders: Sequence[Path]) -> Overview:
    """Look at all runs in some folders; SLURM is asked once."""
    names: dict[Path, str] = {}
    for folder in folders:
        for run in find_runs(folder):
            names.setdefault(run, str(run.relative_to(folder)) if run != folder else run.name or str(run))
    jobs, damaged = _read_jobs(names)
    known, trouble = _ask([job for of_run in jobs.values() for job in of_run])
    runs = [RunStatus(run, names[run], DAMAGED, last_error=text) for run, text in damaged.items()]
    for run, of_run in jobs.items():
        try:
            runs.append(read_status(run, names[run], of_run, known))
        except (UserError, PermissionError) as error:
            runs.append(RunStatus(run, names[run], DAMAGED, last_error=str(error)))
    labels = label_runs({run: read_settings(run, of_run) for run, of_run in jobs.items()})
    runs = [dataclasses.replace(status, label=labels.get(status.run, "")) for status in runs]
    return Overview(tuple(sorted(runs, key=_place)), trouble)


def read_settings(run: Path, jobs: Sequence[JobRecord]) -> dict[str, str]:
    """Return the settings of a run by dotted key: the words of its newest submission, and what its recipe says of model, data and
    seed."""
    try:
        recipe = RunFolder(run).read_recipe().recipe if RunFolder(run).is_started else {}
    except (UserError, PermissionError):
        recipe = {}
    from galaxydist.recipe.scalars import to_text

    found = {key: to_text(recipe[key]) for key in _NAMING_KEYS if recipe.get(key) is not None}
    for argument in jobs[-1].arguments if jobs else ():
        key, _, value = argument.partition("=")
        if not key.startswith(("run.", "tracker.")):
            found[key] = value
    if "recipe" in found:  # of which the model is a part
        found["recipe"] = Path(found["recipe"]).stem
        found.pop("model.name", None)
    return found


def label_runs(settings: Mapping[Path, Mapping[str, str]]) -> dict[Path, str]:
    """Return what tells each run from the others of its folder: models and variants by their names, the rest as ``seed=1``."""
    labels: dict[Path, str] = {}
    for folder in {run.parent for run in settings}:
        beside = {run: own for run, own in settings.items() if run.parent == folder}
        keys = dict.fromkeys(key for own in beside.values() for key in own)
        differing = [key for key in keys if len({own.get(key) for own in beside.values()}) > 1]
        for run, own in beside.items():
            words = [own[key] if key in _BARE_KEYS else f"{key.rpartition('.')[2]}={own[key]}" for key in differing if key in own]
            labels[run] = " ".join(words)
    return labels


def read_status(run: Path, name: str, jobs: Sequence[JobRecord], known: Mapping[str, JobState]) -> RunStatus:
    """One run.

    Args:
        run: its folder.
        name: what the user calls it.
        jobs: its submissions, oldest first.
        known: what SLURM says, by job id.

    Raises:
        UserError: something in its folder is damaged.
    """
    folder, files = RunFolder(run), JobFiles(run)
    restarts = files.restarts()
    job, told = newest_job(jobs, known)
    state = _judge(folder, restarts, job, told, lock_holder(folder.lock_path, known))
    status = RunStatus(
        run,
        name,
        state.state,
        state.reason,
        job,
        state.nodes,
        read_progress(folder),
        count_restarts(restarts, {job.job_id: known[job.job_id] for job in jobs if job.job_id in known}),
        state.time_left_s,
    )
    return dataclasses.replace(status, last_error=_last_error(files, job, told, status.group))


def count_restarts(restarts: Sequence[RestartRecord], known: Mapping[str, JobState]) -> int:
    """How often a run was started again: SLURM counts what it did to each job of the run, we record what we asked for."""
    counts = {job_id: state.restarts for job_id, state in known.items()}
    # A start that SLURM would not requeue has two records: the later one says what became of it.
    last = {(record.job_id, record.restart): record.decision for record in restarts}
    for (job_id, restart), decision in last.items():
        counts[job_id] = max(counts.get(job_id, 0), restart + (decision == "requeue"))
    return sum(counts.values()) + sum(decision == "resubmit" for decision in last.values())


def _read_jobs(names: Mapping[Path, str]) -> tuple[dict[Path, list[JobRecord]], dict[Path, str]]:
    jobs: dict[Path, list[JobRecord]] = {}
    damaged: dict[Path, str] = {}
    for run in names:
        try:
            jobs[run] = JobFiles(run).jobs()
        except (UserError, PermissionError) as error:
            damaged[run] = str(error)
    return jobs, damaged


def _ask(jobs: Sequence[JobRecord]) -> tuple[dict[str, JobState], str]:
    ids = list(dict.fromkeys(job.job_id for job in jobs if job.scheduler == "slurm"))
    try:
        return read_states(ids), ""
    except SlurmUnavailableError as error:
        return {}, str(error)


def _judge(
    folder: RunFolder,
    restarts: Sequence[RestartRecord],
    job: JobRecord | None,
    told: JobState | None,
    holder: LockOwner | None,
) -> JobState:
    """SLURM's word where it has one, else what the folder tells."""
    if told is not None and told.is_active:
        return told
    if folder.is_finished:
        return JobState(FINISHED, nodes=told.nodes if told is not None else "")
    if holder is not None:
        return JobState("RUNNING", f"by {holder}", nodes=holder.host)
    if told is not None and told.state != UNKNOWN:
        return told
    is_settling = told is None or (job is not None and time.time() - job.time < _SETTLING_S)
    has_stopped = bool(restarts) and job is not None and restarts[-1].job_id == job.job_id and restarts[-1].decision == "stop"
    if job is not None and job.scheduler == "slurm" and is_settling and not has_stopped:
        return JobState(UNKNOWN, told.reason if told is not None else "SLURM could not be asked")
    reason, owner = told.reason if told is not None else "", read_owner(folder.lock_path)
    if owner is not None:
        reason = f"{owner} is gone"
    return JobState(_judge_ended(folder, restarts, was_locked=owner is not None), reason)


def _judge_ended(folder: RunFolder, restarts: Sequence[RestartRecord], *, was_locked: bool) -> str:
    """The state of a run that neither runs nor waits nor is finished."""
    if was_locked or folder.read_failure() is not None or (restarts and restarts[-1].decision == "stop"):
        return FAILED
    return STOPPED if folder.metrics_path.exists() or restarts else NEW


def _last_error(files: JobFiles, job: JobRecord | None, told: JobState | None, group: Group) -> str | None:
    return None if group in ("running", "finished") else explain_end(files, job, told, group=group)


def _place(status: RunStatus) -> tuple[int, list[tuple[int, str]]]:
    """Running ones first; within a group by name, numbers by their value."""
    parts = re.split(r"(\d+)", str(status.run))
    return GROUPS.index(status.group), [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
