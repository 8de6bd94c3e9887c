"""Job files of a run folder: submissions, restarts, the last failure and the logs of the ranks.

Each line of jobs.jsonl and restarts.jsonl is written by a single write, so that two writers on one machine never mix their lines
(on NFS: two writers on one client). A line that a crash left half-written is ignored.
"""

import dataclasses
import errno
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from galaxydist.atomic_files import explain_full_disk, fsync_file
from galaxydist.errors import UserError
from galaxydist.runs.folder import plain

Scheduler = Literal["slurm", "local"]
Decision = Literal["finished", "requeue", "resubmit", "stop"]

# Appended to a half-written line, so that the next record starts on its own line.
_TORN = b" #torn"
# Number of bytes of a damaged line that an error message shows.
_SHOWN = 80

Record = TypeVar("Record", "JobRecord", "RestartRecord")


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
        _append(self.jobs_path, record)

    def jobs(self) -> list[JobRecord]:
        """Return all submissions, oldest first.

        Raises:
            UserError: a line is damaged.
        """
        return list(_read_records(self.jobs_path, JobRecord))

    def append_restart(self, record: RestartRecord) -> None:
        """Add the record of an ended start.

        Raises:
            UserError: the disk is full.
        """
        _append(self.restarts_path, record)

    def restarts(self) -> list[RestartRecord]:
        """Return the records of all ended starts, oldest first.

        Raises:
            UserError: a line is damaged.
        """
        return list(_read_records(self.restarts_path, RestartRecord))

    def rank_log(self, rank: int) -> Path:
        """Return the path of a rank's log over all restarts."""
        return self.logs_dir / f"rank-{rank}.log"

    def rank_logs(self) -> list[Path]:
        """Return the existing logs, sorted by rank."""
        found = [path for path in self.logs_dir.glob("rank-*.log") if path.stem.removeprefix("rank-").isdecimal()]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("rank-")))


def _append(path: Path, record: JobRecord | RestartRecord) -> None:
    """Append a line by one write, followed by fsync."""
    line = json.dumps(plain(dataclasses.asdict(record)), allow_nan=False, ensure_ascii=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    sys.audit("galaxydist.write", str(path))
    with explain_full_disk(path, "The lines before are untouched."):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if _is_torn(descriptor):
                line = _TORN + b"\n" + line
            if os.write(descriptor, line) < len(line):  # a full disk accepts only a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            sys.audit("galaxydist.fsync", str(path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if is_new:
        fsync_file(path.parent)


def _is_torn(descriptor: int) -> bool:
    """Return True if the last line has no newline (killed writer or full disk)."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines[:-1], 1):  # after the last newline there is nothing, or a half-written line
        if line.endswith(_TORN):
            continue
        try:
            yield from_plain(kind, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is damaged ({error}): {line[:_SHOWN].decode(errors='replace')!r}. "
                "It was edited, or written by another version of galaxydist: restore or remove that line."
            ) from error


def from_plain(kind: type[Record], content: Any) -> Record:
    """Build a record from JSON values.

    Raises:
        ValueError: a key is missing, or a value has the wrong type; the message names the key.
    """
    if not isinstance(content, Mapping):
        raise ValueError("not an object")
    hints = typing.get_type_hints(kind)
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if missing := sorted(needed - set(content)):
        raise ValueError(f"{', '.join(missing)} is missing")
    # Unknown keys are ignored: a job's snapshot may be older than the command that wrote the line.
    return kind(**{name: _checked(name, hints[name], value) for name, value in content.items() if name in hints})


def _checked(name: str, hint: Any, value: Any) -> Any:
    """Convert a JSON value to a field's type."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if origin is Literal and value in typing.get_args(hint):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{name}={value!r} is not {getattr(hint, '__name__', hint)}")
