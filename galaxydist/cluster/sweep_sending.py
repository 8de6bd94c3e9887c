"""Sending a sweep's trials: arrays that the cluster takes, or a few processes at a time on this machine."""

from collections import deque
from collections.abc import Callable, Sequence

from galaxydist.cluster.submission import JobRequest, build_request
from galaxydist.cluster.sweep import Trial
from galaxydist.cluster.sweep_state import Decision
from galaxydist.errors import UserError

# Requests, how many run at the same time, the job to wait for -> the job ids; see ``submit_requests``.
Send = Callable[[Sequence[JobRequest], int | None, str | None], list[str]]
Say = Callable[[str], None]


def submit_arrays(trials: Sequence[Trial], *, send: Send, chunk_size: int, parallel: int, say: Say) -> list[str]:
    """Submit trials as arrays, each waiting for the one before: no more than ``parallel`` run at any time.

    What was sent before an error or Ctrl-C stands in the run folders: the same command sends the rest.

    Args:
        trials: what to submit, in this order.
        send: submits one array, and notes its jobs in the run folders.
        chunk_size: most tasks of an array that the cluster takes.
        parallel: trials at the same time.
        say: prints a line.

    Returns:
        The job ids, in the order of the trials.

    Raises:
        UserError: SLURM does not take an array; says what was sent before.
    """
    job_ids: list[str] = []
    for start in range(0, len(trials), chunk_size):
        chunk = trials[start : start + chunk_size]
        after = array_of(job_ids[-1]) if job_ids else None
        try:
            sent = send([build_request(trial.resolved, trial.arguments) for trial in chunk], parallel, after)
        except UserError as error:
            if not job_ids:
                raise
            raise UserError(f"{error}\n{len(job_ids)} of {len(trials)} trials were submitted before; they stay.") from error
        job_ids += sent
        waits = f", after job {after}" if after else ""
        say(f"submitted job {array_of(sent[0])}: {len(chunk)} trial{'s' if len(chunk) > 1 else ''}{waits}")
    return job_ids


def run_here(
    trials: Sequence[Trial],
    *,
    send: Send,
    parallel: int,
    is_running: Callable[[Trial], bool],
    judge: Callable[[Trial], Decision],
    pause: Callable[[], None],
    say: Say,
) -> list[Trial]:
    """Run trials on this machine, a few at a time; returns when all have ended.

    Args:
        trials: what to run, in this order.
        send: starts one.
        parallel: trials at the same time.
        is_running: whether a trial that was started still runs.
        judge: how a trial ended.
        pause: waits a moment.
        say: prints a line.

    Returns:
        The trials that did not finish.
    """
    waiting, running, failed = deque(trials), list[Trial](), list[Trial]()
    while waiting or running:
        while waiting and len(running) < parallel:
            trial = waiting.popleft()
            (job_id,) = send([build_request(trial.resolved, trial.arguments)], None, None)
            running.append(trial)
            say(f"started  {trial.name}  {trial.label}  (process {job_id})")
        pause()
        for trial in [trial for trial in running if not is_running(trial)]:
            running.remove(trial)
            decision = judge(trial)
            say(f"{decision.standing:8} {trial.name}  {trial.label}  {decision.reason}".rstrip())
            if decision.is_due:
                failed.append(trial)
    return failed


def array_of(job_id: str) -> str:
    """``123`` of ``123_4``."""
    return job_id.partition("_")[0]
