"""Job files of a run folder: submissions, restarts, the last failure and the logs of the ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from galaxydist.runs.record_file import append_record, read_records

Scheduler = Literal["slurm", "local"]
Decision = Literal["finished", "requeue", "resubmit", "stop"]


@dataclass(frozen=True)
class JobRecord:
    """A submission of a run.

    Args:
        job_id: ``123``, or ``123_4`` for a task of an array; for ``local`` the process id of submitit's controller or its shell.
        scheduler: its scheduler.
        cluster: name of the cluster profile.
        time: of the submission, seconds since 1970.
        nodes: number of nodes.
        tasks: number of processes on all nodes.
        time_limit_min: time limit in minutes.
        code: the code snapshot that it runs.
        folder: submitit's folder.
        arguments: for the recipe, such as ``recipe=vit``.
        cluster_arguments: for the cluster profile, such as ``cluster=a100``.
        resubmits: the job that submitted this one as its replacement; None if a user submitted it.
    """

    job_id: str
    scheduler: Scheduler
    cluster: str
    time: float
    nodes: int
    tasks: int
    time_limit_min: int
    code: Path
    folder: Path
    arguments: tuple[str, ...] = ()
    cluster_arguments: tuple[str, ...] = ()
    resubmits: str | None = None


@dataclass(frozen=True)
class RestartRecord:
    """The end of one start of a job, and the decision made then.

    Args:
        job_id: of the job.
        restart: SLURM_RESTART_COUNT; 0 for the first start.
        exit_code: of srun.
        step: the step at which the start ended; None if unknown.
        error: the error; None if there was none.
        decision: the decision about the run.
        reason: of the decision, for the user.
        time: seconds since 1970.
        saved: the step of the newest checkpoint; None if there is none (or in records of an older galaxydist).
        for_good: a restart without changes would end in the same way.
    """

    job_id: str
    restart: int
    exit_code: int
    step: int | None
    error: str | None
    decision: Decision
    reason: str
    time: float
    saved: int | None = None
    for_good: bool = False


class JobFiles:
    """Reads and writes the job files of a run folder; creates nothing before the first write.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.jobs_path = run_dir / "jobs.jsonl"
        self.restarts_path = run_dir / "restarts.jsonl"
        self.logs_dir = run_dir / "logs"
        self.slurm_dir = self.logs_dir / "slurm"

    def append_job(self, record: JobRecord) -> None:
        """Add a submission.

        Raises:
            UserError: the disk is full.
        """
        append_record(self.jobs_path, record)

    def jobs(self) -> list[JobRecord]:
        """Return all submissions, oldest first.

        Raises:
            UserError: a line is damaged.
        """
        return list(read_records(self.jobs_path, JobRecord))

    def append_restart(self, record: RestartRecord) -> None:
        """Add the record of an ended start.

        Raises:
            UserError: the disk is full.
        """
        append_record(self.restarts_path, record)

    def restarts(self) -> list[RestartRecord]:
        """Return the records of all ended starts, oldest first.

        Raises:
            UserError: a line is damaged.
        """
        return list(read_records(self.restarts_path, RestartRecord))

    def rank_log(self, rank: int) -> Path:
        """Return the path of a rank's log over all restarts."""
        return self.logs_dir / f"rank-{rank}.log"

    def rank_logs(self) -> list[Path]:
        """Return the existing logs, sorted by rank."""
        found = [path for path in self.logs_dir.glob("rank-*.log") if path.stem.removeprefix("rank-").isdecimal()]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("rank-")))
