"""Output of a run: the logs of its ranks, else the files that submitit captured."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.slurm import UNKNOWN, JobState
from galaxydist.cluster.srun_messages import START_MARK, find_remedy
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_file import read_tail

_ERROR_BYTES = 16_384
# The end of a log that is searched for the job that wrote it.
_MARK_BYTES = 1_000_000
_MOST_RANKS = 8
_ERROR = re.compile(rb"error|exception|fatal|killed|out of memory|segmentation fault", re.IGNORECASE)
_LINE_BYTES = 256
# Escape sequences of progress bars and colors.
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def find_logs(files: JobFiles, rank: int = 0) -> list[Path]:
    """Return the files with a rank's output: its log, and captured files if the newest start has not written to the log.

    The captured files are submitit's of the newest job that has any: those of the task and, for rank 0, of the batch script.
    """
    log, jobs = files.rank_log(rank), files.jobs()
    own = [log] if _is_filled(log) else []
    if own and log.stat().st_mtime >= _newest_start(files, jobs):
        return own
    for job in reversed(jobs):
        if found := [path for path in submitit_logs(job, rank) if _is_filled(path)]:
            return [*own, *found]
    return own


def _newest_start(files: JobFiles, jobs: list[JobRecord]) -> float:
    """Return a time before the newest start: its job's submission, or the end of the last start but one."""
    return max([job.time for job in jobs[-1:]] + [record.time for record in files.restarts()[-2:-1]], default=0.0)


def submitit_logs(job: JobRecord, rank: int = 0) -> list[Path]:
    """Return submitit's output files of a task; for rank 0 also those of the batch script."""
    folders = {job.folder, Path(str(job.folder).replace("%j", job.job_id))}
    stems = [f"{job.job_id}_{rank}_log", *([f"{job.job_id}_log"] if rank == 0 else [])]
    return [folder / f"{stem}.{end}" for folder in sorted(folders) for stem in stems for end in ("out", "err")]


def explain_end(files: JobFiles, job: JobRecord | None, job_state: JobState | None, *, group: str) -> str | None:
    """Explain the end of a run's newest start, ignoring errors of earlier ones; None if unknown.

    Args:
        files: of the run.
        job: the run's newest job.
        job_state: that job's state from SLURM.
        group: the run's group, such as ``pending`` or ``failed``.
    """
    # The newest start that has ended: a pending one has not begun.
    newest = job_state.restarts - (group == "pending") if job_state is not None and job_state.state != UNKNOWN else 0
    last = next(reversed(files.restarts()), None)

    def is_newest(job_id: str, restart: int) -> bool:
        return job is None or (job_id == job.job_id and restart >= newest) or job_id == job.resubmits

    folder = RunFolder(files.run_dir)
    failure = folder.read_failure() or {}
    job_id, _, restart = str(failure.get("start") or "").rpartition(".")
    error = str(failure.get("error") or failure.get("kind"))
    # A start by hand leaves no record; a job writes its record after all its ranks have ended.
    since = max(job.time if job is not None else 0.0, last.time if last is not None else 0.0)
    if failure and not job_id and folder.failure_path.stat().st_mtime > since:
        return error
    if last is not None and last.decision != "finished" and is_newest(last.job_id, last.restart):
        return last.error or last.reason
    if group == "pending" and newest >= 0:
        return "SLURM requeued the job itself: one of its nodes failed, or it was preempted"
    if failure and job_id and is_newest(job_id, int(restart)):
        return error
    if job_state is not None and job_state.state == "TIMEOUT":
        return "it reached its time limit and could not requeue itself; the same galaxydist submit continues it"
    return last_error_line(files, job) if group == "failed" else None


def last_error_line(files: JobFiles, job: JobRecord | None) -> str | None:
    """Find the cause of the newest start's end in its output; None if there is none.

    It is a defect of the nodes with a remedy, else the last line that looks like an error, of rank 0 first.

    Args:
        files: of the run.
        job: the run's newest job.
    """
    captured = [path for rank in range(2) for path in submitit_logs(job, rank)] if job is not None else []
    for path in captured:
        if remedy := find_remedy([line.decode(errors="replace") for line in _newest_lines(path, START_MARK.encode())]):
            return remedy
    mark = b"galaxydist: job " + (f"{job.job_id}, restart".encode() if job is not None else b"")
    logs = [path for path in files.rank_logs()[:_MOST_RANKS] if job is None or _mentions(path, mark)]
    for path in (*logs, *captured):
        for line in reversed(_newest_lines(path, START_MARK.encode() if path in captured else mark)):
            if _ERROR.search(line):
                return line.decode(errors="replace").strip()[:_LINE_BYTES]
    if job is not None and job.scheduler == "slurm" and job.folder.is_dir() and not any(path.exists() for path in captured):
        return (
            f"its node wrote no output to {job.folder}: it does not see that folder, or may not write to it. Put the runs on a "
            "file system that all nodes share (run.root=FOLDER)"
        )
    return None


def _newest_lines(path: Path, mark: bytes) -> list[bytes]:
    """Return the last lines of a log, from the last start on if that is among them."""
    lines = read_lines(path, _ERROR_BYTES)
    starts = [number for number, line in enumerate(lines) if line.startswith(mark)]
    return lines[starts[-1] :] if starts else lines


def _mentions(path: Path, mark: bytes) -> bool:
    """Return False if the end of a log was written by another job."""
    lines = read_lines(path, _MARK_BYTES)
    marked = [line for line in lines if line.startswith(b"galaxydist: job ")]
    return not marked or marked[-1].startswith(mark)


def read_lines(path: Path, num_bytes: int, end: int | None = None) -> list[bytes]:
    """Return the last lines of a log as a terminal shows them, with a progress bar's last state."""
    lines = read_tail(path, num_bytes, whole=False, end=end)
    return [_ESCAPES.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2]) for line in lines]


def last_lines(path: Path, count: int, end: int) -> list[bytes]:
    """Return the last ``count`` lines of a log, or all if there are fewer.

    Args:
        path: the log.
        count: at least 1.
        end: size in bytes up to which the log is read.
    """
    num_bytes = 65_536
    while True:
        lines = read_lines(path, num_bytes, end)
        if len(lines) >= count or num_bytes >= end:
            return lines[-count:]
        num_bytes *= 4


def sizes(logs: Iterable[Path]) -> dict[Path, int]:
    """Return the size of each log in bytes; 0 if it does not exist."""
    return {path: path.stat().st_size if path.exists() else 0 for path in logs}


def follow(find: Callable[[], list[Path]], shown: Mapping[Path, int]) -> Iterator[bytes]:
    """Yield new output of logs without end; wait for missing logs, and read truncated ones from their start.

    Args:
        find: returns the logs to follow; called at every poll, since a restarted run may write to others.
        shown: bytes of each log that are already shown.
    """
    positions = dict(shown)
    while True:
        for path, size in sizes(find()).items():
            start = positions.get(path, 0)
            start = start if start <= size else 0
            if size > start:
                with path.open("rb") as file:
                    file.seek(start)
                    yield file.read(size - start)
            positions[path] = size
        time.sleep(0.5)


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
