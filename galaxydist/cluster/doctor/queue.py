"""The doctor's job as the scheduler sees it: its state, and ending it with all of its processes."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

ASKING_S = 30.0
ENDING_S = 10.0
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
ALIVE = {*WAITING, "RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True)
class Seen:
    """A job in the queue.

    Args:
        state: SLURM's word; "" where it cannot be asked.
        reason: SLURM's word for why it waits.
    """

    state: str
    reason: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def has_ended(self) -> bool:
        return self.state != "" and self.state not in ALIVE


class QueuedJob(Protocol):
    """What was submitted."""

    def look(self) -> Seen:
        """Its state."""

    def end(self) -> None:
        """Cancel it, if it is still there."""


class SlurmQueuedJob:
    """A job of SLURM.

    Args:
        job_id: its number.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id

    def look(self) -> Seen:
        answer = _ask(["squeue", "--noheader", "--states=all", "--format=%T|%r", f"--jobs={self.job_id}"])
        if answer is None:
            return Seen("")
        if answer.returncode != 0:
            # Some minutes after its end SLURM forgets a job.
            return Seen("GONE" if "Invalid job id" in answer.stderr else "")
        state, _, reason = answer.stdout.strip().partition("|")
        return Seen(state or "GONE", reason)

    def end(self) -> None:
        _ask(["scancel", self.job_id])


class LocalQueuedJob:
    """Processes that submitit started on this machine.

    Args:
        job: submitit's.
    """

    def __init__(self, job: Any) -> None:
        self._job = job

    def look(self) -> Seen:
        return Seen(self._job.state)

    def end(self) -> None:
        """Its shell does not hand signals on: every process of the tree gets its own."""
        try:
            root = psutil.Process(int(self._job.job_id))
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in tree:
                try:
                    stop(process)
                except psutil.NoSuchProcess:
                    continue
            _, tree = psutil.wait_procs(tree, timeout=ENDING_S)


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """A program's answer; None: there was none in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASKING_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
