"""Submission of a sweep's unfinished runs, as SLURM arrays or a few at a time on this machine."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.requeue import PERMANENT_FAILURES
from galaxydist.cluster.running_jobs import lock_holder, newest_job
from galaxydist.cluster.slurm import WAITING_STATES, JobState
from galaxydist.cluster.submit import JobRequest, build_request
from galaxydist.cluster.sweep import SweepRun
from galaxydist.errors import UserError
from galaxydist.evaluation.results_files import read_evaluation
from galaxydist.runs.folder import RunFolder

logger = logging.getLogger(__name__)

# State of a local job whose process has ended.
LOCAL_ENDED = "ENDED"

ReadStates = Callable[[Sequence[str]], Mapping[str, JobState]]


@dataclass(frozen=True)
class SweepRunState:
    """The state of a run of a sweep, from its run folder and the scheduler.

    Args:
        is_started: the run has written its recipe.
        is_finished: the run has written its result.
        missing: variants of ``eval.variants`` on which the run is not evaluated yet.
        job_id: of the job that is queued or runs, else of the last job; None if there was none.
        job_state: of that job.
        holder: the process that holds the run folder (such as ``launch.py`` started by hand); None if there is none.
        failure: the error of the last start.
        for_good: a restart without changes would fail in the same way.
        is_pruned: a search has ended the run.
    """

    is_started: bool = False
    is_finished: bool = False
    missing: tuple[str, ...] = ()
    job_id: str | None = None
    job_state: JobState | None = None
    holder: str | None = None
    failure: str | None = None
    for_good: bool = False
    is_pruned: bool = False


@dataclass(frozen=True)
class SweepDecision:
    """The decision about a run of a sweep.

    Args:
        state: ``finished``, ``pruned``, ``queued``, ``running``, ``new``, ``stopped``, ``unevaluated`` (not evaluated on all
            variants), or the state in which its last job ended, such as ``failed``.
        is_due: the run must be submitted.
        reason: for the user.
    """

    state: str
    is_due: bool
    reason: str = ""


def decide(run: SweepRunState, *, retry_failed: bool = False) -> SweepDecision:
    """Decide whether to submit a run: only if it is neither finished nor queued nor running.

    Args:
        run: its state.
        retry_failed: also submit runs that would fail again without changes.
    """
    job = run.job_state
    if run.is_finished and not run.missing:
        return SweepDecision("finished", False)
    if run.is_pruned:
        return SweepDecision("pruned", False)
    if job is not None and job.is_active:
        is_waiting = job.state in WAITING_STATES
        reason = f"job {run.job_id} {job.reason if is_waiting else ''}".rstrip()
        return SweepDecision("queued" if is_waiting else "running", False, reason)
    if run.holder is not None:
        return SweepDecision("running", False, run.holder)
    if run.for_good and not run.is_finished and not retry_failed:
        return SweepDecision("failed", False, f"{run.failure}; it would fail again (fix the cause, then --retry-failed)")
    return _due(run)


def _due(run: SweepRunState) -> SweepDecision:
    """Return the decision about a run that must be submitted."""
    if run.is_finished:
        return SweepDecision("unevaluated", True, f"finished, not evaluated on {' and '.join(run.missing)} yet")
    if run.job_state is not None:
        reason = run.failure or run.job_state.reason or "ended before the run was finished"
        return SweepDecision(run.job_state.state.lower(), True, f"job {run.job_id}: {reason}")
    if run.is_started:
        return SweepDecision("stopped", True, run.failure or "started, not finished")
    return SweepDecision("new", True)


def read_run_states(runs: Sequence[SweepRun], read_states: ReadStates) -> list[SweepRunState]:
    """Read the states of runs, in their order.

    Args:
        runs: of a sweep.
        read_states: returns SLURM's states of job ids; not called if no run has a SLURM job.

    Raises:
        UserError: the scheduler does not answer, or a file is damaged.
    """
    records = [JobFiles(run.run_dir).jobs() for run in runs]
    slurm_ids = [record.job_id for jobs in records for record in jobs if record.scheduler == "slurm"]
    job_states = read_states(slurm_ids) if slurm_ids else {}
    return [_read_run_state(run, jobs, job_states) for run, jobs in zip(runs, records, strict=True)]


def _read_run_state(run: SweepRun, jobs: Sequence[JobRecord], job_states: Mapping[str, JobState]) -> SweepRunState:
    folder = RunFolder(run.run_dir)
    job, job_state = newest_job(jobs, job_states)
    if job is not None and job_state is None:
        job_state = JobState(LOCAL_ENDED)
    failure = folder.read_failure()
    # Only of the newest job: after earlier failures the run was submitted again.
    records = [record for record in JobFiles(run.run_dir).restarts()[-1:] if job is None or record.job_id == job.job_id]
    own_failure = failure if failure is not None and (job is None or _is_of(failure, job)) else {}
    holder = lock_holder(folder.lock_path, job_states)  # ranks of ended jobs do not count
    return SweepRunState(
        is_started=folder.is_started,
        is_finished=folder.is_finished,
        missing=_missing_variants(run, folder),
        job_id=job.job_id if job is not None else None,
        job_state=job_state,
        holder=str(holder) if holder is not None else None,
        failure=_describe(failure) if failure is not None else next((record.error for record in records), None),
        for_good=any(record.for_good for record in records) or own_failure.get("kind") in PERMANENT_FAILURES,
        is_pruned=folder.is_pruned,
    )


def _missing_variants(run: SweepRun, folder: RunFolder) -> tuple[str, ...]:
    """Return the variants of ``eval.variants`` that lack an evaluation of the checkpoint in the run's own test evaluation."""
    recipe = run.resolved.recipe
    steps: dict[str, int] = {}
    own = read_evaluation(folder.evaluation_dir, "test", recipe.eval.tta)
    dataset = own["dataset"] if own is not None else recipe.data.dataset
    for path in (folder.evaluation_dir, *sorted(folder.evaluation_dir.glob("*/"))):
        evaluation = read_evaluation(path, "test", recipe.eval.tta)
        if evaluation is not None and evaluation["dataset"] == dataset:
            steps[evaluation["variant"]] = evaluation["step"]
    return tuple(
        variant
        for variant in dict.fromkeys(recipe.eval.variants)
        if variant not in steps or (own is not None and steps[variant] != own["step"])
    )


def _is_of(failure: Mapping[str, object], job: JobRecord) -> bool:
    """Return True for a failure of this job, or of a start without one (on this machine)."""
    start = failure.get("start")
    return start is None or str(start).rpartition(".")[0] == job.job_id


def _describe(failure: Mapping[str, object]) -> str:
    step = failure.get("step")
    text = str(failure.get("error") or failure.get("kind"))
    return f"{text.splitlines()[0]}{f' at step {step}' if step is not None else ''}"


# (requests, most runs at a time, job to wait for) -> job ids; see ``submit_requests``.
Send = Callable[[Sequence[JobRequest], int | None, str | None], list[str]]


def request_of(run: SweepRun) -> JobRequest:
    return build_request(run.resolved, run.arguments, is_trial=run.is_trial)


def submit_arrays(runs: Sequence[SweepRun], *, send: Send, chunk_size: int, parallel: int) -> list[str]:
    """Submit runs as arrays, each waiting for the previous one, so that at most ``parallel`` run at any time.

    Jobs submitted before an error or Ctrl-C are recorded in the run folders, so that the same command submits the rest.

    Args:
        runs: to submit, in this order.
        send: submits one array, and records its jobs in the run folders.
        chunk_size: most tasks that the cluster allows in an array.
        parallel: most runs at a time.

    Returns:
        The job ids, in the order of the runs.

    Raises:
        UserError: SLURM refuses an array; reports the number of runs submitted before.
    """
    job_ids: list[str] = []
    for start in range(0, len(runs), chunk_size):
        chunk = runs[start : start + chunk_size]
        after = array_of(job_ids[-1]) if job_ids else None
        try:
            sent = send([request_of(run) for run in chunk], parallel, after)
        except UserError as error:
            if not job_ids:
                raise
            raise UserError(f"{error}\n{len(job_ids)} of {len(runs)} runs were submitted before; they stay.") from error
        job_ids += sent
        waits = f", after job {after}" if after else ""
        logger.info("submitted job %s: %s%s", array_of(sent[0]), count_runs(len(chunk)), waits)
    return job_ids


def run_here(
    runs: Sequence[SweepRun],
    *,
    send: Send,
    lock: Callable[[], AbstractContextManager[object]],
    parallel: int,
    is_running: Callable[[SweepRun], bool],
    decide_again: Callable[[SweepRun], SweepDecision],
    pause: Callable[[], None],
) -> list[SweepRun]:
    """Run a few runs at a time on this machine until all have ended. A run that another command has started is left to it.

    Args:
        runs: to start, in this order.
        send: starts one run.
        lock: keeps other commands from starting runs of the sweep.
        parallel: most runs at a time.
        is_running: returns True while a started run runs.
        decide_again: returns the decision about a run, before its start and after its end.
        pause: waits until the next poll.

    Returns:
        The runs that did not finish.
    """
    waiting, running, failed = deque(runs), list[SweepRun](), list[SweepRun]()
    while waiting or running:
        while waiting and len(running) < parallel:
            run = waiting.popleft()
            with lock():
                if not (decision := decide_again(run)).is_due:
                    _log_decision(run, decision)
                    continue
                (job_id,) = send([request_of(run)], None, None)
            running.append(run)
            logger.info("started  %s  %s  (process %s)", run.name, run.label, job_id)
        pause()
        for run in [run for run in running if not is_running(run)]:
            running.remove(run)
            decision = decide_again(run)
            _log_decision(run, decision)
            if decision.is_due:
                failed.append(run)
    return failed


def _log_decision(run: SweepRun, decision: SweepDecision) -> None:
    logger.info(f"{decision.state:8} {run.name}  {run.label}  {decision.reason}".rstrip())


def array_of(job_id: str) -> str:
    """Return ``123`` for ``123_4``."""
    return job_id.partition("_")[0]


def render_runs(
    runs: Sequence[SweepRun], decisions: Sequence[SweepDecision], column: tuple[str, Sequence[str]] | None = None
) -> str:
    """Return a text table with one line for each run: name, settings, state, action and reason.

    Args:
        runs, decisions: of the sweep.
        column: title and texts of a further column after the state.
    """
    title, texts = column or ("", [""] * len(runs))
    rows = [["run", "settings", "state", title, "action", "why"]]
    for run, decision, text in zip(runs, decisions, texts, strict=True):
        rows.append([run.name, run.label, decision.state, text, "submit" if decision.is_due else "leave", decision.reason])
    if column is None:
        rows = [[*row[:3], *row[4:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(f"{text:{width}}" for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    )


def summarise(decisions: Sequence[SweepDecision]) -> str:
    """Return text such as ``42 runs: 30 finished, 8 running, 4 to submit (2 failed, 2 new)``."""
    left = Counter(decision.state for decision in decisions if not decision.is_due)
    due = Counter(decision.state for decision in decisions if decision.is_due)
    parts = [f"{left[state]} {state}" for state in ("finished", "pruned", "running", "queued", "failed") if left[state]]
    parts += [f"{due.total()} to submit ({', '.join(f'{count} {state}' for state, count in due.items())})"] if due else []
    return f"{count_runs(len(decisions))}: {', '.join(parts)}"


def count_runs(number: int) -> str:
    return f"{number} run{'s' if number != 1 else ''}"
