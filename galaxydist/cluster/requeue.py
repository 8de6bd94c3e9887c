"""Requeue decision of a batch script after srun has ended, made from the run folder, not by a rank.

    python -P -m galaxydist.cluster.requeue REQUESTS EXIT_CODE
    python -P -m galaxydist.cluster.requeue REQUESTS told-to-end     (SLURM has sent SIGTERM to the script; srun still runs)

It imports no torch: a preempted job has only seconds left.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

from galaxydist.cluster.records import Decision, JobFiles, RestartRecord
from galaxydist.cluster.slurm import SlurmUnavailableError, check_controller, is_unavailable, run_slurm
from galaxydist.cluster.srun_messages import TOLD_TO_END, find_death, find_remedy, read_own_stderr
from galaxydist.cluster.submit import RequestFile, job_arguments
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from galaxydist.job_environment import job_of, restart_of, start_of
from galaxydist.log import set_up_logging
from galaxydist.recipe.resolve import load_recipe
from galaxydist.runs.events import EventKind, EventLog
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock import read_owner
from galaxydist.tracking.webhook import Webhook, find_webhook

# By name, because this module runs as ``__main__``.
logger = logging.getLogger("galaxydist.cluster.requeue")

# Kinds of failure (``failure.json``) that a restart cannot fix.
PERMANENT_FAILURES = {
    "bad_input": "the recipe, its data or the run folder cannot be used as they are",
    "nonfinite": "the loss is not a number",
}


@dataclass(frozen=True)
class Ending:
    """The end of one start of a job.

    Args:
        exit_code: srun's exit code: the highest of its tasks, 128 + N after signal N.
        is_finished: the run has its result, or was pruned: no step is left.
        failure: ``failure.json`` of this start, if a rank wrote one.
        step: the last optimizer step in the run folder.
        saved: the step of the newest checkpoint; None if there is none.
        death: the rank or node that died first, in one line; empty if srun reported none.
        ended_by_slurm: why SLURM is ending the job, in one line; empty if it is not.
        is_pruned: a search has ended the run.
    """

    exit_code: int
    is_finished: bool
    failure: Mapping[str, Any] | None
    step: int | None
    saved: int | None = None
    death: str = ""
    ended_by_slurm: str = ""
    is_pruned: bool = False

    @property
    def error(self) -> str | None:
        """The error in one line; None after a stop with everything saved."""
        # Surviving ranks only report that they lost the connection to the dead one.
        if self.death and self.kind not in PERMANENT_FAILURES:
            return self.death
        if self.failure is not None:
            return str(self.failure["error"])
        if self.ended_by_slurm:
            return None
        if self.exit_code in (0, EXIT_STOPPED, EXIT_INTERRUPTED):
            return None
        if self.exit_code > 128:
            return f"a rank was ended by signal {self.exit_code - 128}"
        return f"a rank ended with exit code {self.exit_code}"

    @property
    def kind(self) -> str:
        """The kind of failure; empty if none was recorded."""
        if self.failure is not None:
            return str(self.failure["kind"])
        return "bad_input" if self.exit_code == EXIT_BAD_INPUT else ""

    @property
    def crash_step(self) -> int | None:
        """The step of the failure if known, else the last step in the run folder."""
        return self.step if self.failure is None or self.failure["step"] is None else self.failure["step"]


def decide(
    ending: Ending, history: Sequence[RestartRecord], *, policy: Literal["auto", "resubmit", "never"], max_requeues: int
) -> tuple[Decision, str]:
    """Decide whether the run continues.

    Args:
        ending: of this start.
        history: records of the earlier starts since a user submitted the run, oldest first.
        policy: ``cluster.requeue``.
        max_requeues: ``cluster.max_requeues``.

    Returns:
        The decision and its reason.
    """
    if ending.is_finished:
        text = "a search has pruned the run" if ending.is_pruned else "the run is finished"
        return "finished", text + (f", but {ending.error}" if ending.error else "")
    if reason := _stop_reason(ending, history, policy, max_requeues):
        return "stop", reason
    return ("requeue" if policy == "auto" else "resubmit"), _reason(ending)


def _reason(ending: Ending) -> str:
    saved = "" if ending.saved is None else f"; step {ending.saved} is saved"
    return ending.error or f"{ending.ended_by_slurm or 'it was stopped by a signal'}{saved}"


def _permanent_reason(ending: Ending, history: Sequence[RestartRecord]) -> str:
    """Explain why a restart without changes would fail in the same way; empty if it might not."""
    if reason := PERMANENT_FAILURES.get(ending.kind):
        return f"{reason}: it would end the same way again"
    last = (history[-1].error, history[-1].step) if history else None
    if ending.error is not None and last == (ending.error, ending.crash_step):
        return f"the same crash at the same step ({ending.crash_step}) twice: {ending.error}"
    return ""


def _stop_reason(ending: Ending, history: Sequence[RestartRecord], policy: str, max_requeues: int) -> str:
    """Explain why the run is not restarted automatically; empty if it is."""
    if reason := _permanent_reason(ending, history):
        return reason
    if policy == "never":
        return f"{_reason(ending)}; cluster.requeue=never"
    idle = _count_idle(ending, history)
    if idle > max_requeues:
        # ">", because the first idle start is not a repetition.
        return (
            f"{_reason(ending)}; {idle} consecutive starts saved no new step, and cluster.max_requeues={max_requeues}. If they "
            "reached their time limit, raise cluster.time; the same galaxydist submit continues the run"
        )
    return ""


def _count_idle(ending: Ending, history: Sequence[RestartRecord]) -> int:
    """Count the consecutive starts up to this one without a newer checkpoint."""
    # A start has two records if SLURM refused to requeue it.
    starts = {(record.job_id, record.restart): record.saved for record in history}
    best, idle = -1, 0
    for saved in (*starts.values(), ending.saved):
        has_progressed = saved is not None and saved > best
        best, idle = (saved, 0) if has_progressed and saved is not None else (best, idle + 1)
    return idle


LEAVING = "SLURM itself is ending the job"
# Seconds that a webhook may take, before a job is requeued and at the end.
SENDING_S, POST_S = 1.0, 3.0
# Pauses between attempts while slurmctld does not answer, in total five minutes.
PAUSES_S = (5.0, 10.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)
# Largest difference of a job's PreemptTime and EndTime if the preemption ended it.
_SAME_MOMENT = timedelta(seconds=2)


@dataclass(frozen=True)
class StartedRun:
    """The start of a run that belongs to this batch script.

    Args:
        requests: the submission.
        run_dir: the run folder.
        environ: environment of the batch script.
        webhook: is told of the decision.
    """

    requests: RequestFile
    run_dir: Path
    environ: Mapping[str, str]
    webhook: Webhook

    @classmethod
    def read(cls, path: Path, environ: Mapping[str, str]) -> Self:
        """Read the start from the submission's file."""
        requests = RequestFile.read(path)
        request = requests.requests[int(environ.get("SLURM_ARRAY_TASK_ID", "0"))]
        configured = None
        with contextlib.suppress(UserError):  # the recipe may be what is wrong
            configured = load_recipe(job_arguments(request, requests.code)).recipe.tracker.webhook
        return cls(requests, request.run_dir, environ, Webhook(find_webhook(configured, environ), request.run_dir.name))

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.run_dir)

    @property
    def files(self) -> JobFiles:
        """The job files in the run folder."""
        return JobFiles(self.run_dir)

    @property
    def job_id(self) -> str:
        """The id of the job or array task."""
        job_id = job_of(self.environ)
        assert job_id is not None, "a batch script runs in a job"
        return job_id

    @property
    def restart(self) -> int:
        """Number of times that SLURM has started the job again."""
        return restart_of(self.environ)

    def own_records(self) -> list[RestartRecord]:
        """Return the records already written about this start."""
        return [record for record in self.files.restarts() if self._is_own(record)]

    def history(self) -> list[RestartRecord]:
        """Return the records of earlier starts since a user, not a job, last submitted the run."""
        first = max((job.time for job in self.files.jobs() if job.resubmits is None), default=0.0)
        return [record for record in self.files.restarts() if record.time >= first and not self._is_own(record)]

    def _tell(self, ending: Ending, decision: Decision, reason: str) -> None:
        """Write a decision as an event; a stop is an alert if an error caused it."""
        kind: EventKind = "requeue" if decision != "stop" else "failure" if ending.error else "stop"
        events = EventLog(self.folder.events_path, start_of(self.environ), tell=self.webhook.send)
        events.write(kind, reason, ending.crash_step, decision=decision, exit_code=ending.exit_code, saved=ending.saved)

    def _is_own(self, record: RestartRecord) -> bool:
        return (record.job_id, record.restart) == (self.job_id, self.restart)

    def write_record(self, ending: Ending, decision: Decision, reason: str) -> None:
        """Record and print the decision."""
        record = RestartRecord(
            job_id=self.job_id,
            restart=self.restart,
            exit_code=ending.exit_code,
            step=ending.crash_step,
            error=ending.error,
            decision=decision,
            reason=reason,
            time=time.time(),
            saved=ending.saved,
            for_good=decision == "stop" and bool(_permanent_reason(ending, self.history())),
        )
        is_known = decision == "resubmit" and any(own.decision == "requeue" for own in self.own_records())
        self.files.append_restart(record)
        if decision != "finished" and not is_known:
            self._tell(ending, decision, reason)
        logger.info("galaxydist: srun ended with %d at step %s: %s (%s)", ending.exit_code, ending.step, decision, reason)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Record how srun ended, then requeue, resubmit or stop.

    Args:
        arguments: the path of the request file; srun's exit code, or ``told-to-end``.
        environ: environment of the batch script.

    Returns:
        The exit code of the batch script: srun's, but 75 instead of 0 if the run is not finished.
    """
    start = StartedRun.read(Path(arguments[0]), environ)
    if arguments[1] == TOLD_TO_END:
        _after_sigterm(start)
        start.webhook.close(POST_S)
        return 0
    exit_code = int(arguments[1])
    _unlock(start.folder, start.job_id)
    ending = _read_ending(start, exit_code)
    if ending.is_finished or not any(record.decision in ("requeue", "resubmit") for record in start.own_records()):
        _act(start, ending)
    start.webhook.close(POST_S)
    return exit_code if ending.is_finished else exit_code or EXIT_STOPPED


def _after_sigterm(start: StartedRun) -> None:
    """Requeue or resubmit at once if SLURM ends the job without requeueing it: ranks may have no time to save."""
    cause = _find_slurm_cause(start)
    if cause:
        ending = _read_ending(start, 0, cause)
        _decide_and_act(start, ending, may_act=True)


def _act(start: StartedRun, ending: Ending) -> None:
    """Decide about the run after srun has ended, unless SLURM has requeued the job."""
    state = _read_job(start.job_id)
    is_leaving = _is_leaving(state)
    if is_leaving and not ending.is_finished and _is_queued_again(state, start.restart):
        cause = f": {ending.error}" if ending.error else ""
        start.write_record(ending, "requeue", f"SLURM itself has requeued the job{cause}")
    else:
        _decide_and_act(start, ending, may_act=not is_leaving)


def _decide_and_act(start: StartedRun, ending: Ending, *, may_act: bool) -> None:
    cluster = start.requests.cluster
    decision, reason = decide(ending, start.history(), policy=cluster.requeue, max_requeues=cluster.max_requeues)
    if decision in ("requeue", "resubmit") and not may_act:
        decision, reason = "stop", LEAVING
    start.write_record(ending, decision, reason)
    start.webhook.close(SENDING_S)  # SLURM ends this process with the job that it requeues
    if decision == "requeue" and (refusal := requeue_patiently(start.job_id, ends_anyway=bool(ending.ended_by_slurm))):
        decision, reason = ("stop", LEAVING) if refusal == LEAVING else ("resubmit", f"SLURM does not requeue it ({refusal})")
        start.write_record(ending, decision, reason)
    if decision == "resubmit" and (problem := _resubmit(start)):
        start.write_record(ending, "stop", problem)


def _read_ending(start: StartedRun, exit_code: int, ended_by_slurm: str = "") -> Ending:
    folder = start.folder
    saved = folder.saved_step()
    stderr = read_own_stderr()
    logged = [int(line["step"]) for line in folder.metrics.read()[-1:]]
    step = max([*logged, *([] if saved is None else [saved])], default=None)
    return Ending(
        exit_code,
        folder.is_finished or folder.is_pruned,
        _own_failure(folder, start.environ),
        step,
        saved,
        "" if ended_by_slurm else find_death(stderr) or find_remedy(stderr),
        ended_by_slurm,
        folder.is_pruned,
    )


def _unlock(folder: RunFolder, job_id: str) -> None:
    """Remove a lock left by a killed rank of this job; srun has ended, so none still runs."""
    owner = read_owner(folder.lock_path)
    if owner is not None and owner.job_id == job_id:
        folder.lock_path.unlink(missing_ok=True)


def _own_failure(folder: RunFolder, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return this start's failure, not that of another start or job."""
    failure = folder.read_failure()
    return failure if failure is not None and failure.get("start") == start_of(environ) else None


def _read_job(job_id: str) -> dict[str, str]:
    """Return slurmctld's fields of a job; empty if it does not answer."""
    try:
        check_controller()
        answer = run_slurm(["scontrol", "--oneliner", "show", "job", job_id])
    except SlurmUnavailableError:
        return {}
    fields = [word.partition("=") for word in answer.stdout.split()] if answer.returncode == 0 else []
    return {key: value for key, equals, value in fields if equals}


def _is_queued_again(state: Mapping[str, str], restart: int) -> bool:
    """Return True if SLURM has requeued the job itself (preemption, node failure) and counts the next start."""
    return state.get("Restarts", "0").isdecimal() and int(state.get("Restarts", "0")) > restart


def _find_slurm_cause(start: StartedRun) -> str:
    """Explain why SLURM ends the job without requeueing it; empty if it does not, or after scancel."""
    state = _read_job(start.job_id)
    if not _is_leaving(state) or _is_queued_again(state, start.restart):
        return ""
    if state.get("Reason") == "TimeLimit":
        return "the time limit was reached before everything was saved"
    try:
        preempted, ended = (datetime.fromisoformat(state[key]) for key in ("PreemptTime", "EndTime"))
    except (KeyError, ValueError):
        return ""
    # Different times: a user cancelled the job in the grace time before a preemption.
    return "it was preempted" if abs(preempted - ended) <= _SAME_MOMENT else ""


def _is_leaving(state: Mapping[str, str]) -> bool:
    """Return True if SLURM is already ending the job (cancelled or being requeued)."""
    return bool(state) and "RUNNING" not in state.get("JobState", "")


def requeue_patiently(job_id: str, *, ends_anyway: bool) -> str:
    """Requeue a job; retry if slurmctld does not answer for some minutes.

    Args:
        job_id: the job.
        ends_anyway: SLURM is already ending the job, which must start again afterwards.

    Returns:
        An empty string on success, ``LEAVING`` if SLURM is already ending the job, else SLURM's message.
    """
    for number, pause_s in enumerate((*PAUSES_S, 0.0)):
        if number and not ends_anyway and _is_leaving(_read_job(job_id)):
            return ""  # an earlier request had arrived, but not its answer
        refusal = _requeue(job_id)
        if not refusal or not is_unavailable(refusal):
            break
        logger.info("galaxydist: not requeued yet: %s", refusal)
        time.sleep(pause_s)
    is_refused = refusal and not ends_anyway and not is_unavailable(refusal)
    return LEAVING if is_refused and _is_leaving(_read_job(job_id)) else refusal


def _requeue(job_id: str) -> str:
    """Run ``scontrol requeue`` and return its error message; empty on success."""
    try:
        check_controller()
        answer = run_slurm(["scontrol", "requeue", job_id])
    except SlurmUnavailableError as error:
        return str(error)
    return "" if answer.returncode == 0 else " ".join((answer.stderr or answer.stdout).split())


def _resubmit(start: StartedRun) -> str:
    """Submit the run as a new job; return why that failed, or an empty text."""
    from galaxydist.cluster.submit import submit_again

    for pause_s in (*PAUSES_S, None):
        try:
            job_id = submit_again(start.requests, start.run_dir, resubmits=start.job_id)
        except UserError as error:
            if pause_s is not None and is_unavailable(str(error)):
                time.sleep(pause_s)
                continue
            return f"it could not be submitted again: {error}"
        logger.info("galaxydist: submitted again as job %s", job_id)
        break
    return ""


if __name__ == "__main__":
    set_up_logging()
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except UserError as problem:
        logger.error("%s", problem)
        sys.exit(EXIT_FAILED)
