"""Submission of a sweep's unfinished runs: as SLURM arrays, or a few at a time on this machine."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.requeue import FOR_GOOD
from galaxydist.cluster.running_jobs import local_state, lock_holder, newest_job
from galaxydist.cluster.slurm import WAITING_STATES, JobState
from galaxydist.cluster.submit import JobRequest, build_request
from galaxydist.cluster.sweep import SweepRun
from galaxydist.errors import UserError
from galaxydist.evaluation.results_files import read_evaluation
from galaxydist.runs.folder import RunFolder

logger = logging.getLogger(__name__)

LOCAL_ENDED = "ENDED"

ReadStates = Callable[[Sequence[str]], Mapping[str, JobState]]


@dataclass(frozen=True)
class TrialFacts:
    """The state of a run of a sweep, from its run folder and the scheduler.

    Args:
        is_started: the run has written its recipe.
        is_finished: the run has written its result.
        missing: variants of ``eval.variants`` on which the run is not evaluated yet.
        job_id: of the job that is queued or runs, else of the last job; None if there was none.
        state: of that job.
        holder: the process that holds the run folder (such as ``launch.py`` started by hand); None if there is none.
        failure: the error of the last start.
        for_good: a restart without changes would fail in the same way.
    """

    is_started: bool = False
    is_finished: bool = False
    missing: tuple[str, ...] = ()
    job_id: str | None = None
    state: JobState | None = None
    holder: str | None = None
    failure: str | None = None
    for_good: bool = False


@dataclass(frozen=True)
class Decision:
    """The decision about a run of a sweep.

    Args:
        standing: the run's state: ``finished``, ``queued``, ``running``, ``new``, ``stopped``, ``unjudged`` (not evaluated on all
            variants), or the state in which its last job ended, such as ``failed``.
        is_due: the run must be submitted.
        reason: for the user.
    """

    standing: str
    is_due: bool
    reason: str


def decide(facts: TrialFacts, *, retry_failed: bool = False) -> Decision:
    """Decide whether to submit a run: only if it is neither finished nor queued nor running.

    Args:
        facts: of the run.
        retry_failed: also submit runs that would fail again without changes.
    """
    if facts.is_finished and not facts.missing:
        return Decision("finished", False, "")
    if facts.state is not None and facts.state.is_active:
        waits = facts.state.state in WAITING_STATES
        return Decision(
            "queued" if waits else "running", False, f"job {facts.job_id} {facts.state.reason if waits else ''}".rstrip()
        )
    if facts.holder is not None:
        return Decision("running", False, facts.holder)
    if facts.for_good and not facts.is_finished and not retry_failed:
        return Decision("failed", False, f"{facts.failure}; it would fail again (mend the cause, then --retry-failed)")
    return Decision(*_due(facts))


def _due(facts: TrialFacts) -> tuple[str, bool, str]:
    """Return the decision's fields for a run that must be submitted."""
    if facts.is_finished:
        return "unjudged", True, f"finished, not judged on {' and '.join(facts.missing)} yet"
    if facts.state is not None:
        why = facts.failure or facts.state.reason or "ended before the run was finished"
        return facts.state.state.lower(), True, f"job {facts.job_id}: {why}"
    return ("stopped", True, facts.failure or "begun, not finished") if facts.is_started else ("new", True, "")


def read_facts(trials: Sequence[SweepRun], read_states: ReadStates) -> list[TrialFacts]:
    """Read the facts of runs, in their order.

    Args:
        trials: runs of a sweep.
        read_states: returns SLURM's states of job ids; not called if no run has a SLURM job.

    Raises:
        UserError: the scheduler does not answer, or a file is damaged.
    """
    records = [JobFiles(trial.run_dir).jobs() for trial in trials]
    slurm_ids = [record.job_id for jobs in records for record in jobs if record.scheduler == "slurm"]
    states = dict(read_states(slurm_ids)) if slurm_ids else {}
    return [_facts_of(trial, jobs, states) for trial, jobs in zip(trials, records, strict=True)]


def _facts_of(trial: SweepRun, jobs: Sequence[JobRecord], states: Mapping[str, JobState]) -> TrialFacts:
    folder = RunFolder(trial.run_dir)
    job, state = newest_job(jobs, states)
    if job is not None and state is None:
        state = JobState(LOCAL_ENDED)
    failure = folder.read_failure()
    # Only of the newest job: after earlier failures the run was submitted again.
    records = [record for record in JobFiles(trial.run_dir).restarts()[-1:] if job is None or record.job_id == job.job_id]
    own_failure = failure if failure is not None and (job is None or _is_of(failure, job)) else {}
    for_good = any(record.for_good for record in records) or own_failure.get("kind") in FOR_GOOD
    return TrialFacts(
        is_started=folder.is_started,
        is_finished=folder.is_finished,
        missing=_missing(trial, folder),
        job_id=job.job_id if job is not None else None,
        state=state,
        holder=_holder(folder, states),
        failure=_describe(failure) if failure is not None else next((record.error for record in records), None),
        for_good=for_good,
    )


def is_local_job_running(job: JobRecord) -> bool:
    return local_state(job) is not None


def _missing(trial: SweepRun, folder: RunFolder) -> tuple[str, ...]:
    """Return the variants of ``eval.variants`` that lack an evaluation of the checkpoint in the run's own test evaluation."""
    recipe = trial.resolved.recipe
    steps: dict[str, int] = {}
    own = read_evaluation(folder.evaluation_dir, "test", recipe.eval.tta)
    dataset = own["dataset"] if own is not None else recipe.data.dataset
    for place in (folder.evaluation_dir, *_folders_in(folder.evaluation_dir)):
        evaluation = read_evaluation(place, "test", recipe.eval.tta)
        if evaluation is not None and evaluation["dataset"] == dataset:
            steps[evaluation["variant"]] = evaluation["step"]
    return tuple(
        variant
        for variant in dict.fromkeys(recipe.eval.variants)
        if variant not in steps or (own is not None and steps[variant] != own["step"])
    )


def _folders_in(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def _holder(folder: RunFolder, states: Mapping[str, JobState]) -> str | None:
    """Return the process that holds the run folder; ranks of ended jobs do not count."""
    holder = lock_holder(folder.lock_path, states)
    return str(holder) if holder is not None else None


def _is_of(failure: Mapping[str, object], job: JobRecord) -> bool:
    """Return True for a failure of this job, or of a start without one (on this machine)."""
    start = failure.get("start")
    return start is None or str(start).rpartition(".")[0] == job.job_id


def _describe(failure: Mapping[str, object]) -> str:
    step = failure.get("step")
    where = f" at step {step}" if step is not None else ""
    text = str(failure.get("error") or failure.get("kind"))
    return f"{text.splitlines()[0]}{where}"


# (requests, most runs at the same time, job to wait for) -> job ids; see ``submit_requests``.
Send = Callable[[Sequence[JobRequest], int | None, str | None], list[str]]


def submit_arrays(trials: Sequence[SweepRun], *, send: Send, chunk_size: int, parallel: int) -> list[str]:
    """Submit runs as arrays, each waiting for the previous one, so that at most ``parallel`` run at any time.

    Jobs submitted before an error or Ctrl-C are recorded in the run folders, so that the same command submits the rest.

    Args:
        trials: the runs to submit, in this order.
        send: submits one array, and records its jobs in the run folders.
        chunk_size: most tasks that the cluster allows in an array.
        parallel: most runs at the same time.

    Returns:
        The job ids, in the order of the runs.

    Raises:
        UserError: SLURM refuses an array; reports the number of runs submitted before.
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
        logger.info("submitted job %s: %d trial%s%s", array_of(sent[0]), len(chunk), "s" if len(chunk) > 1 else "", waits)
    return job_ids


def run_here(
    trials: Sequence[SweepRun],
    *,
    send: Send,
    parallel: int,
    is_running: Callable[[SweepRun], bool],
    judge: Callable[[SweepRun], Decision],
    pause: Callable[[], None],
) -> list[SweepRun]:
    """Run a few runs at a time on this machine until all have ended.

    Args:
        trials: the runs, in this order.
        send: starts one run.
        parallel: most runs at the same time.
        is_running: returns True while a started run runs.
        judge: returns the decision about an ended run.
        pause: waits until the next poll.

    Returns:
        The runs that did not finish.
    """
    waiting, running, failed = deque(trials), list[SweepRun](), list[SweepRun]()
    while waiting or running:
        while waiting and len(running) < parallel:
            trial = waiting.popleft()
            (job_id,) = send([build_request(trial.resolved, trial.arguments)], None, None)
            running.append(trial)
            logger.info("started  %s  %s  (process %s)", trial.name, trial.label, job_id)
        pause()
        for trial in [trial for trial in running if not is_running(trial)]:
            running.remove(trial)
            decision = judge(trial)
            logger.info(f"{decision.standing:8} {trial.name}  {trial.label}  {decision.reason}".rstrip())
            if decision.is_due:
                failed.append(trial)
    return failed


def array_of(job_id: str) -> str:
    """Return ``123`` for ``123_4``."""
    return job_id.partition("_")[0]


def render_trials(trials: Sequence[SweepRun], decisions: Sequence[Decision]) -> str:
    """Return a text table with one line for each run: name, label, state, action and reason."""
    head = ("run", "trial", "state", "action", "why")
    rows = [
        (trial.name, trial.label, decision.standing, "submit" if decision.is_due else "leave", decision.reason)
        for trial, decision in zip(trials, decisions, strict=True)
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(f"{text:{width}}" for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in (head, *rows)
    )


def summarise(decisions: Sequence[Decision]) -> str:
    """Return text such as ``42 trials: 30 finished, 8 running, 4 to submit (2 failed, 2 new)``."""
    left = Counter(decision.standing for decision in decisions if not decision.is_due)
    due = Counter(decision.standing for decision in decisions if decision.is_due)
    parts = [f"{left[standing]} {standing}" for standing in ("finished", "running", "queued", "failed") if left[standing]]
    parts += [f"{due.total()} to submit ({', '.join(f'{count} {standing}' for standing, count in due.items())})"] if due else []
    return f"{len(decisions)} trial{'s' if len(decisions) != 1 else ''}: {', '.join(parts)}"
