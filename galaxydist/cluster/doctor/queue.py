"""The doctor's job, of SLURM or of this machine: its state, and ending it with all of its processes."""

import contextlib
from typing import Any, Protocol

import psutil

from galaxydist.cluster.slurm import UNKNOWN, WAITING_STATES, JobState, SchedulerAwayError, cancel_jobs, read_states

ENDING_S = 10.0


class QueuedJob(Protocol):
    """What was submitted."""

    def look(self) -> JobState:
        """Its state; UNKNOWN with a reason where it cannot be told."""

    def end(self) -> None:
        """Cancel it, if it is still there."""


def is_waiting(state: JobState) -> bool:
    """It has not started."""
    return state.state in WAITING_STATES


def has_ended(state: JobState) -> bool:
    """It is over."""
    return not state.is_active and state.state != UNKNOWN


class SlurmQueuedJob:
    """A job of SLURM.

    Args:
        job_id: its number.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id

    def look(self) -> JobState:
        try:
            return read_states([self.job_id])[self.job_id]
        except SchedulerAwayError as error:
            return JobState(UNKNOWN, str(error))

    def end(self) -> None:
        with contextlib.suppress(SchedulerAwayError):
            cancel_jobs([self.job_id])


class LocalQueuedJob:
    """Processes that submitit started on this machine.

    Args:
        job: submitit's.
    """

    def __init__(self, job: Any) -> None:
        self._job = job

    def look(self) -> JobState:
        return JobState(self._job.state)

    def end(self) -> None:
        """Its shell does not hand signals on: every process of the tree gets its own."""
        try:
            root = psutil.Process(int(self._job.job_id))
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(process)
            _, tree = psutil.wait_procs(tree, timeout=ENDING_S)
