"""What a run folder knows of the scheduler: which jobs ran it, how each start ended, what each rank printed."""

import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from galaxydist.errors import UserError
from galaxydist.files import explain_full_disk


@dataclass(frozen=True)
class JobRecord:
    """One submission.

    Args:
        job_id: ``123``, or ``123_4`` for a task of an array; the process id of submitit's controller for a local one.
        scheduler: who runs it.
        cluster: the profile's name.
        time: of the submission, seconds since 1970.
        nodes, tasks: machines, and processes on all of them.
        time_limit_min: minutes.
        code: the snapshot of the code.
        folder: submitit's.
        arguments, cluster_arguments: as they were typed.
        resubmits: the job that this one was submitted again for, by the job itself; None where a user submitted it.
    """

    job_id: str
    scheduler: Literal["slurm", "local"]
    cluster: str
    time: float
    nodes: int
    tasks: int
    time_limit_min: int
    code: str
    folder: str
    arguments: tuple[str, ...]
    cluster_arguments: tuple[str, ...]
    resubmits: str | None = None


@dataclass(frozen=True)
class RestartRecord:
    """How one start of a job ended.

    Args:
        job_id: as in ``JobRecord``.
        restart: how often the job had been requeued before (SLURM_RESTART_COUNT).
        exit_code: srun's.
        step: optimizer steps done, where that is known.
        error: a line; None where it ended without one.
        decision: what became of the run.
        reason: why.
        time: seconds since 1970.
    """

    job_id: str
    restart: int
    exit_code: int
    step: int | None
    error: str | None
    decision: Literal["finished", "requeue", "resubmit", "stop"]
    reason: str
    time: float


Record = TypeVar("Record", JobRecord, RestartRecord)


class JobFiles:
    """The scheduler's part of a run folder. Makes nothing until something is written.

    Args:
        run_dir: the run folder; it need not exist.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.jobs_path = run_dir / "jobs.jsonl"
        self.restarts_path = run_dir / "restarts.jsonl"
        self.logs_dir = run_dir / "logs"

    def append_job(self, record: JobRecord) -> None:
        """Note a submission."""
        _append(self.jobs_path, asdict(record))

    def jobs(self) -> list[JobRecord]:
        """All submissions, oldest first."""
        return list(_read(self.jobs_path, JobRecord))

    def append_restart(self, record: RestartRecord) -> None:
        """Note how a start ended."""
        _append(self.restarts_path, asdict(record))

    def restarts(self) -> list[RestartRecord]:
        """How all starts ended, oldest first."""
        return list(_read(self.restarts_path, RestartRecord))

    def rank_log(self, rank: int) -> Path:
        """What a rank printed, over all restarts."""
        return self.logs_dir / f"rank-{rank}.log"

    def rank_logs(self) -> list[Path]:
        """The logs that there are, in the order of the ranks."""
        return sorted(self.logs_dir.glob("rank-*.log"), key=lambda path: int(path.stem.removeprefix("rank-")))


def _append(path: Path, plain: dict[str, Any]) -> None:
    """Add a line in one write, so that the lines of two processes never mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(plain, allow_nan=False).encode() + b"\n"
    with explain_full_disk(path, "The lines before are untouched."):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # what a full disk or a crash left of a line stays alone
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The whole lines; a torn one is left out.

    Raises:
        UserError: a line of something else.
    """
    if not path.exists():
        return
    known = fields(kind)
    required = {field.name for field in known if field.default is MISSING}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            plain = json.loads(line)
        except ValueError:
            continue
        if not isinstance(plain, dict) or not required <= set(plain):
            raise UserError(f"{path}, line {number} is not one of galaxydist's: {line[:80]!r}. Remove the line.")
        values = {field.name: plain[field.name] for field in known if field.name in plain}
        yield kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
