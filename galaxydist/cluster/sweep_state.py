"""What is known of a sweep's trials, and what that means: which are done, which are on their way, which are to be submitted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galaxydist.cluster.active import find_holder, local_state, newest_job
from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.requeue import FOR_GOOD
from galaxydist.cluster.scheduler import WAITING_STATES, JobState
from galaxydist.cluster.sweep import Trial
from galaxydist.evaluation.results_files import read_evaluation
from galaxydist.runs.folder import RunFolder

LOCAL_ENDED = "ENDED"

ReadStates = Callable[[Sequence[str]], Mapping[str, JobState]]


@dataclass(frozen=True)
class TrialFacts:
    """What the run folder and the scheduler say of a trial.

    Args:
        is_started: the run has written its recipe.
        is_finished: it has left its result.
        missing: data sets of ``eval.variants`` on which it is not judged yet.
        job_id: of the job that is queued or runs, else of the last one; None where there never was one.
        state: of that job.
        holder: who else works in the folder (``launch.py`` by hand); None: nobody.
        failure: how the last start failed.
        for_good: it would fail in the same way again if nobody changes anything.
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
    """What becomes of a trial.

    Args:
        standing: one word: ``finished``, ``queued``, ``running``, ``new``, ``stopped``, ``unjudged``, or the state in which its
            last job ended, such as ``failed``.
        is_due: it is to be submitted.
        reason: for the user.
    """

    standing: str
    is_due: bool
    reason: str


def decide(facts: TrialFacts, *, retry_failed: bool = False) -> Decision:
    """Decide about a trial. Submitted is what is neither done nor on its way.

    Args:
        facts: of the trial.
        retry_failed: also what failed for good.
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
    """The decision for a trial that is to be submitted."""
    if facts.is_finished:
        return "unjudged", True, f"finished, not judged on {' and '.join(facts.missing)} yet"
    if facts.state is not None:
        why = facts.failure or facts.state.reason or "ended before the run was finished"
        return facts.state.state.lower(), True, f"job {facts.job_id}: {why}"
    return ("stopped", True, facts.failure or "begun, not finished") if facts.is_started else ("new", True, "")


def read_facts(trials: Sequence[Trial], read_states: ReadStates) -> list[TrialFacts]:
    """The facts of trials, in their order.

    Args:
        trials: of a sweep.
        read_states: what the scheduler says of job ids; not called where SLURM never had a job of these trials.

    Raises:
        UserError: the scheduler cannot be asked, or a file is damaged.
    """
    records = [JobFiles(trial.run_dir).jobs() for trial in trials]
    slurm_ids = [record.job_id for jobs in records for record in jobs if record.scheduler == "slurm"]
    states = dict(read_states(slurm_ids)) if slurm_ids else {}
    return [_facts_of(trial, jobs, states) for trial, jobs in zip(trials, records, strict=True)]


def _facts_of(trial: Trial, jobs: Sequence[JobRecord], states: Mapping[str, JobState]) -> TrialFacts:
    folder = RunFolder(trial.run_dir)
    job, state = newest_job(jobs, states)
    if job is not None and state is None:
        state = JobState(LOCAL_ENDED)
    failure = folder.read_failure()
    # Of the newest job: what an earlier one failed by was sent again since.
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
    """submitit's process of a local job still runs on this machine."""
    return local_state(job) is not None


def _missing(trial: Trial, folder: RunFolder) -> tuple[str, ...]:
    """Data sets of ``eval.variants`` without an evaluation of the checkpoint that the run is judged by."""
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
    """A process that works in the folder, but none of a job that is over."""
    holder = find_holder(folder.lock_path, states)
    return str(holder) if holder is not None else None


def _is_of(failure: Mapping[str, object], job: JobRecord) -> bool:
    """The failure is of this job, or of a start without one (processes of this machine)."""
    start = failure.get("start")
    return start is None or str(start).rpartition(".")[0] == job.job_id


def _describe(failure: Mapping[str, object]) -> str:
    step = failure.get("step")
    where = f" at step {step}" if step is not None else ""
    text = str(failure.get("error") or failure.get("kind"))
    return f"{text.splitlines()[0]}{where}"
