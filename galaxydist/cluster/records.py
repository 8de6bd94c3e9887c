"""What a run folder keeps about its jobs: submissions, restarts, how the last start failed, and what each rank printed.

jobs.jsonl and restarts.jsonl get each line by a single write, so that two writers on one machine never mix their lines (on NFS:
two writers on one client). A line that a crash left half-written is ignored.
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
from galaxydist.runs.folder import RunFolder, plain

Scheduler = Literal["slurm", "local"]
Decision = Literal["finished", "requeue", "resubmit", "stop"]

# Closes off a half-written line, so that the next one stands alone.
_TORN = b" #torn"
# What a line that only was damaged is shown by.
_SHOWN = 80

Record = TypeVar("Record", "JobRecord", "RestartRecord")


@dataclass(frozen=True)
class JobRecord:
    """A submission of a run.

    Args:
        job_id: ``123``, or ``123_4`` for a task of an array; for ``local`` the process number of submitit's controller.
        scheduler: who runs it.
        cluster: name of the cluster profile.
        time: of the submission, seconds since 1970.
        nodes: machines.
        tasks: processes, on all nodes together.
        time_limit_min: minutes after which the scheduler ends it.
        code: the snapshot of the code that it runs.
        folder: submitit's folder.
        arguments: the recipe's, such as ``recipe=vit``.
        cluster_arguments: the cluster's, such as ``cluster=a100``.
        resubmits: the job that this one was submitted again for, by the job itself; None where somebody submitted it.
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
    """How one start of a job ended, and what was decided then.

    Args:
        job_id: of the job.
        restart: SLURM_RESTART_COUNT, 0 the first time.
        exit_code: of srun.
        step: the step at which it ended, as far as that is known.
        error: what went wrong; None where nothing did.
        decision: what happens next.
        reason: why, in a sentence for the user.
        time: seconds since 1970.
        saved: the step of the newest checkpoint; None where there is none (or an older galaxydist wrote the record).
        for_good: the run would end the same way again if nobody changes anything.
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
    """The files about jobs in a run folder; makes nothing until something is written.

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
        """All submissions, oldest first.

        Raises:
            UserError: a line is damaged.
        """
        return list(_read_records(self.jobs_path, JobRecord))

    def append_restart(self, record: RestartRecord) -> None:
        """Add how a start ended.

        Raises:
            UserError: the disk is full.
        """
        _append(self.restarts_path, record)

    def restarts(self) -> list[RestartRecord]:
        """How each start ended, oldest first.

        Raises:
            UserError: a line is damaged.
        """
        return list(_read_records(self.restarts_path, RestartRecord))

    def failure(self) -> dict[str, Any] | None:
        """How the last start failed, as the run folder says; None where it did not."""
        return RunFolder(self.run_dir).read_failure()

    def failed_at(self) -> float:
        """When that was noted, seconds since 1970."""
        path = RunFolder(self.run_dir).failure_path
        return path.stat().st_mtime if path.exists() else 0.0

    def rank_log(self, rank: int) -> Path:
        """What one rank prints, over all restarts."""
        return self.logs_dir / f"rank-{rank}.log"

    def rank_logs(self) -> list[Path]:
        """The logs that are there, by rank."""
        found = [path for path in self.logs_dir.glob("rank-*.log") if rank_of(path) is not None]
        return sorted(found, key=lambda path: rank_of(path) or 0)


def rank_of(path: Path) -> int | None:
    """The rank whose log this is; None where it is not one."""
    number = path.name.removeprefix("rank-").removesuffix(".log")
    return int(number) if number.isascii() and number.isdecimal() else None


def _append(path: Path, record: JobRecord | RestartRecord) -> None:
    """Add a line by one write, and make it survive a power cut."""
    line = json.dumps(plain(dataclasses.asdict(record)), allow_nan=False, ensure_ascii=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    sys.audit("galaxydist.write", str(path))
    with explain_full_disk(path, "The lines before are untouched."):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if _is_torn(descriptor):
                line = _TORN + b"\n" + line
            if os.write(descriptor, line) < len(line):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            sys.audit("galaxydist.fsync", str(path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if is_new:
        fsync_file(path.parent)


def _is_torn(descriptor: int) -> bool:
    """The last line has no end: its writer was killed, or the disk was full."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines[:-1], 1):  # behind the last newline stands nothing, or a torn line
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
    """A record from JSON's values.

    Raises:
        ValueError: a key is missing, or a value is of another type; the message names it.
    """
    if not isinstance(content, Mapping):
        raise ValueError("not an object")
    hints = typing.get_type_hints(kind)
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if missing := sorted(needed - set(content)):
        raise ValueError(f"{', '.join(missing)} is missing")
    # A job's snapshot may be older than the command that wrote the line: what it does not know it leaves.
    return kind(**{name: _checked(name, hints[name], value) for name, value in content.items() if name in hints})


def _checked(name: str, hint: Any, value: Any) -> Any:
    """``value`` as the type that a record's field has."""
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
