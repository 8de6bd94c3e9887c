"""Entry point of every rank of a job: runs submitit's job with our signal handling.

submitit's own handler requeues from inside rank 0's signal handler, and counts every preemption of a job of ten minutes or less
as a timeout. Here a signal stops the training at the end of a step, on all ranks, and the batch script requeues.

    srun python -P -u -m galaxydist.cluster.task FOLDER      (-P: do not import from the working directory)
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

from galaxydist.job_environment import SCHEDULER_SIGNALS


def main(folder: str) -> None:
    """Run the job that submitit has stored in a folder.

    Args:
        folder: submitit's folder.
    """
    # These handlers are active before and after the training, which installs its own; outside it there is nothing to save.
    for number in SCHEDULER_SIGNALS:
        signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # LocalExecutor blocks it

    from submitit.core.job_environment import JobEnvironment
    from submitit.core.submission import process_job

    # The hook with which submitit's plugins adapt to the signals of a cluster.
    JobEnvironment._handle_signals = _keep_signals  # type: ignore[assignment, method-assign]
    try:
        process_job(folder)
    finally:
        for number in SCHEDULER_SIGNALS:  # a signal that arrives now must not turn a normal exit into a failure
            signal.signal(number, signal.SIG_IGN)


def _leave(number: int, _frame: FrameType | None) -> None:
    # Not 75: srun would kill the ranks that exit a moment later. The batch script sees that the run is not finished.
    os.write(2, f"galaxydist: stopped by signal {number} outside of the training\n".encode())
    os._exit(0)


def _keep_signals(_environment: Any, _paths: Any, _submission: Any) -> None:
    """Keep the current handlers."""


if __name__ == "__main__":
    main(sys.argv[1])
