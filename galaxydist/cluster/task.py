"""What ``srun`` starts on every rank: submitit's job, with our way of taking signals.

submitit's own handler requeues from inside rank 0's signal handler, and counts every preemption of a job of ten minutes or less
as a time-out. Here a signal stops the training at the end of a step, on all ranks alike, and the batch script requeues.

    python -P -u -m galaxydist.cluster.task FOLDER      (-P: what lies in the working directory is not imported)
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


def main(folder: str) -> None:
    """Run the job that submitit keeps in ``folder``.

    Args:
        folder: submitit's.
    """
    # Before the training takes them over, and after it has: nothing is done that could be lost, so there is nothing to save.
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see LocalExecutor

    from submitit.core.job_environment import JobEnvironment
    from submitit.core.submission import process_job

    # What submitit gives its plugins to adapt to a cluster's signals.
    JobEnvironment._handle_signals = _keep_signals  # type: ignore[assignment, method-assign]
    try:
        process_job(folder)
    finally:
        for number in STOP_SIGNALS:  # what is told now comes too late: it must not make an end a failure
            signal.signal(number, signal.SIG_IGN)


def _leave(number: int, _frame: FrameType | None) -> None:
    # Not 75: srun would kill the ranks that are a moment behind. The batch script sees that the run is not finished.
    os.write(2, f"galaxydist: stopped by signal {number} outside of the training\n".encode())
    os._exit(0)


def _keep_signals(_environment: Any, _paths: Any, _submission: Any) -> None:
    """Leave the handlers as they are."""


if __name__ == "__main__":
    main(sys.argv[1])
