"""Whether a job that has ended goes on: decided after ``srun``, from what the run folder says, never by a rank."""

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
from galaxydist.cluster.srun_messages import TOLD_TO_END, find_death, find_remedy, read_own_words
from galaxydist.cluster.submit import RequestFile
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from galaxydist.job_environment import job_of, restart_of, start_of
from galaxydist.runs.folder import FOLDER_NAME, RunFolder
from galaxydist.runs.lock import read_owner

# How a start ended for good, whatever is tried again (``failure.json``).
FOR_GOOD = {
    "bad_input": "the recipe, its data or the run folder cannot be used as they are",
    "nonfinite": "the loss is not a number",
}


@dataclass(frozen=True)
class Ending:
    """How ``srun`` ended.

    Args:
        exit_code: srun's: the highest of its tasks', 128 + N after a signal.
        is_finished: the run has its result.
        failure: ``failure.json`` of this very start, where a rank wrote one.
        step: optimizer steps that the run folder shows.
        saved: the step of the newest checkpoint; None where there is none.
        death: the rank or node that died first, in a line; empty where srun named none.
        ended_by_slurm: why SLURM is ending the job, in a line; empty where it is not.
    """

    exit_code: int
    is_finished: bool
    failure: Mapping[str, Any] | None
    step: int | None
    saved: int | None = None
    death: str = ""
    ended_by_slurm: str = ""

    @property
    def error(self) -> str | None:
        """What went wrong, in a line; None after a stop with everything saved."""
        # The ranks that live on only note that they lost the connection to the one that died.
        if self.death and self.kind not in FOR_GOOD:
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
        """What kind of failure; empty where nobody has noted one."""
        if self.failure is not None:
            return str(self.failure["kind"])
        return "bad_input" if self.exit_code == EXIT_BAD_INPUT else ""

    @property
    def crash_step(self) -> int | None:
        """The step of the failure, where that is known, else the last that the folder shows."""
        return self.step if self.failure is None or self.failure["step"] is None else self.failure["step"]


def decide(
    ending: Ending, history: Sequence[RestartRecord], *, policy: Literal["auto", "resubmit", "never"], max_requeues: int
) -> tuple[Decision, str]:
    """What becomes of the run, and why.

    Args:
        ending: of this start.
        history: of the earlier ones since somebody submitted the run, oldest first.
        policy: ``cluster.requeue``.
        max_requeues: ``cluster.max_requeues``.
    """
    if ending.is_finished:
        return "finished", "the run is finished" + (f", but {ending.error}" if ending.error else "")
    if reason := _never_again(ending, history, policy, max_requeues):
        return "stop", reason
    return ("requeue" if policy == "auto" else "resubmit"), _why(ending)


def _why(ending: Ending) -> str:
    saved = "" if ending.saved is None else f"; step {ending.saved} is saved"
    return ending.error or f"{ending.ended_by_slurm or 'it was told to stop'}{saved}"


def reason_for_good(ending: Ending, history: Sequence[RestartRecord]) -> str:
    """Why the run would end the same way again if nobody changes anything; empty where it might not."""
    if reason := FOR_GOOD.get(ending.kind):
        return f"{reason}: it would end the same way again"
    if ending.error is not None and history and _is_same_crash(ending, history[-1]):
        return f"the same crash at the same step ({ending.crash_step}) twice: {ending.error}"
    return ""


def _never_again(ending: Ending, history: Sequence[RestartRecord], policy: str, max_requeues: int) -> str:
    """Why the run does not go on by itself; empty where it does."""
    if reason := reason_for_good(ending, history):
        return reason
    if policy == "never":
        return f"{_why(ending)}; cluster.requeue=never"
    idle = _count_idle(ending, history)
    if idle > max_requeues:
        # Of these the first is no repetition.
        return (
            f"{_why(ending)}; {idle} starts in a row saved no new step, and cluster.max_requeues={max_requeues}. If they ended "
            "by their time limit, make cluster.time longer; the same galaxydist submit goes on"
        )
    return ""


def _count_idle(ending: Ending, history: Sequence[RestartRecord]) -> int:
    """Starts in a row, this one included, that left no newer checkpoint than those before."""
    # A start that SLURM would not requeue has two records.
    starts = {(record.job_id, record.restart): record.saved for record in history}
    best, idle = -1, 0
    for saved in (*starts.values(), ending.saved):
        has_progressed = saved is not None and saved > best
        best, idle = (saved, 0) if has_progressed and saved is not None else (best, idle + 1)
    return idle


def _is_same_crash(ending: Ending, before: RestartRecord) -> bool:
    return (before.error, before.step) == (ending.error, ending.crash_step)


# The last line of a batch script: note how ``srun`` ended, and queue the job again where the run must go on.
#
#     python -P -m galaxydist.cluster.requeue REQUESTS EXIT_CODE
#     python -P -m galaxydist.cluster.requeue REQUESTS told-to-end     (when SLURM has sent the script SIGTERM; srun
# still runs)
#
# Light on purpose: a job that is being preempted has seconds left.

LEAVING = "SLURM is ending the job itself"
QUEUED_BY_SLURM = "SLURM has queued the job again itself"
# Between attempts while slurmctld is away: five minutes in all.
PAUSES_S = (5.0, 10.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)
# The two times that SLURM notes of a preemption that ends the job.
_SAME_MOMENT = timedelta(seconds=2)


@dataclass(frozen=True)
class StartedRun:
    """The start of the run that this batch script is about.

    Args:
        requests: the submission.
        run_dir: its run.
        environ: of the batch script.
    """

    requests: RequestFile
    run_dir: Path
    environ: Mapping[str, str]

    @classmethod
    def read(cls, path: Path, environ: Mapping[str, str]) -> Self:
        """The start, from the submission's file."""
        requests = RequestFile.read(path)
        return cls(requests, requests.requests[int(environ.get("SLURM_ARRAY_TASK_ID", "0"))].run_dir, environ)

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.run_dir)

    @property
    def files(self) -> JobFiles:
        """The files about jobs in it."""
        return JobFiles(self.run_dir)

    @property
    def job_id(self) -> str:
        """The id by which the job is requeued: of one task of an array, where it is one."""
        return job_name(self.environ)

    @property
    def restart(self) -> int:
        """Number of times that SLURM has started the job again."""
        return restart_of(self.environ)

    def own_records(self) -> list[RestartRecord]:
        """Records that were written about this start already."""
        return [record for record in self.files.restarts() if (record.job_id, record.restart) == (self.job_id, self.restart)]

    def history(self) -> list[RestartRecord]:
        """The endings of earlier starts since the last time that somebody, not a job, submitted the run."""
        submitted = [job.time for job in self.files.jobs() if job.resubmits is None]
        first = max(submitted, default=0.0)
        own = (self.job_id, self.restart)
        return [record for record in self.files.restarts() if record.time >= first and (record.job_id, record.restart) != own]

    def note(self, ending: Ending, decision: Decision, reason: str) -> None:
        """Write down and print what was decided."""
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
            for_good=decision == "stop" and bool(reason_for_good(ending, self.history())),
        )
        self.files.append_restart(record)
        print(f"galaxydist: srun ended with {ending.exit_code} at step {ending.step}: {decision} ({reason})", flush=True)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Decide and act.

    Args:
        arguments: the requests' file; srun's exit code, or ``told-to-end``.
        environ: of the batch script.

    Returns:
        The exit code of the batch script: 0 for a run that is finished, else srun's, or 75 where that is 0.
    """
    start = StartedRun.read(Path(arguments[0]), environ)
    if arguments[1] == TOLD_TO_END:
        _after_sigterm(start)
        return 0
    exit_code = int(arguments[1])
    _unlock(start.folder, start.job_id)
    ending = _read_ending(start, exit_code)
    if ending.is_finished or not any(record.decision in ("requeue", "resubmit") for record in start.own_records()):
        _act(start, ending)
    return exit_code if ending.is_finished else exit_code or EXIT_STOPPED


def _after_sigterm(start: StartedRun) -> None:
    """SLURM ends the job, and the ranks may not come to save: where it would not queue the job again itself, do so now."""
    cause = _why_slurm_ends(start)
    if cause:
        ending = _read_ending(start, 0, cause)
        _decide_and_act(start, ending, may_act=True)


def _act(start: StartedRun, ending: Ending) -> None:
    """Decide how the run goes on after srun has ended, and do it."""
    state = _ask_job(start.job_id)
    is_leaving = bool(state) and "RUNNING" not in state.get("JobState", "")
    if is_leaving and not ending.is_finished and _is_queued_again(state, start.restart):
        start.note(ending, "requeue", f"{QUEUED_BY_SLURM}{f': {ending.error}' if ending.error else ''}")
    else:
        _decide_and_act(start, ending, may_act=not is_leaving)


def _decide_and_act(start: StartedRun, ending: Ending, *, may_act: bool) -> None:
    cluster = start.requests.cluster
    decision, reason = decide(ending, start.history(), policy=cluster.requeue, max_requeues=cluster.max_requeues)
    if decision in ("requeue", "resubmit") and not may_act:
        decision, reason = "stop", LEAVING
    start.note(ending, decision, reason)
    if decision == "requeue" and (refusal := requeue_patiently(start.job_id, ends_anyway=bool(ending.ended_by_slurm))):
        decision, reason = ("stop", LEAVING) if refusal == LEAVING else ("resubmit", f"SLURM does not requeue it ({refusal})")
        start.note(ending, decision, reason)
    if decision == "resubmit":
        _resubmit(start, ending)


def _read_ending(start: StartedRun, exit_code: int, ended_by_slurm: str = "") -> Ending:
    folder = start.folder
    saved = _newest_checkpoint(folder)
    words = read_own_words()
    logged = [int(line["step"]) for line in folder.metrics.read()[-1:]]
    step = max([*logged, *([] if saved is None else [saved])], default=None)
    return Ending(
        exit_code,
        folder.is_finished,
        _own_failure(folder, start.environ),
        step,
        saved,
        "" if ended_by_slurm else find_death(words) or find_remedy(words),
        ended_by_slurm,
    )


def job_name(environ: Mapping[str, str]) -> str:
    """The id by which the job is requeued: of one task of an array, where it is one."""
    name = job_of(environ)
    assert name is not None, "a batch script runs in a job"
    return name


def _newest_checkpoint(folder: RunFolder) -> int | None:
    """The step of the newest checkpoint."""
    names = [FOLDER_NAME.fullmatch(path.name) for path in folder.checkpoints_dir.glob("step-*")]
    return max((int(name[1]) for name in names if name is not None), default=None)


def _unlock(folder: RunFolder, job_id: str) -> None:
    """srun has ended, so no rank of this job holds the run folder, whatever a killed one left behind."""
    owner = read_owner(folder.lock_path)
    if owner is not None and owner.job_id == job_id:
        folder.lock_path.unlink(missing_ok=True)


def _own_failure(folder: RunFolder, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """How this start failed; what another start or another job left says nothing of it."""
    failure = folder.read_failure()
    return failure if failure is not None and failure.get("start") == start_of(environ) else None


def _ask_job(job_id: str) -> dict[str, str]:
    """Return the fields that slurmctld shows of a job; none where it does not answer."""
    try:
        check_controller()
        answer = run_slurm(["scontrol", "--oneliner", "show", "job", job_id])
    except SlurmUnavailableError:
        return {}
    words = [word.partition("=") for word in answer.stdout.split()] if answer.returncode == 0 else []
    return {key: value for key, equals, value in words if equals}


def _is_queued_again(state: Mapping[str, str], restart: int) -> bool:
    """SLURM counts a start that is to come: it queues the job again by itself, after a preemption or the death of a node."""
    return state.get("Restarts", "0").isdecimal() and int(state.get("Restarts", "0")) > restart


def _why_slurm_ends(start: StartedRun) -> str:
    """Why SLURM is ending a job for good that could go on; empty where it is not, or was told to (scancel)."""
    state = _ask_job(start.job_id)
    if not state or "RUNNING" in state.get("JobState", "") or _is_queued_again(state, start.restart):
        return ""
    if state.get("Reason") == "TimeLimit":
        return "the time limit came before everything was saved"
    try:
        preempted, ended = (datetime.fromisoformat(state[key]) for key in ("PreemptTime", "EndTime"))
    except (KeyError, ValueError):
        return ""
    # Whoever cancels a job in the grace time before a preemption means it.
    return "it was preempted" if abs(preempted - ended) <= _SAME_MOMENT else ""


def _is_leaving(job_id: str) -> bool:
    """SLURM has begun to end the job, so that it is cancelled, or will be requeued without us."""
    state = _ask_job(job_id)
    return bool(state) and "RUNNING" not in state.get("JobState", "")


def requeue_patiently(job_id: str, pauses_s: Sequence[float] = PAUSES_S, *, ends_anyway: bool = False) -> str:
    """Requeue a job, also where slurmctld is away for some minutes.

    Args:
        job_id: the job's.
        pauses_s: between the attempts.
        ends_anyway: SLURM has begun to end it, and is to start it again afterwards.

    Returns:
        Nothing where it is done, ``LEAVING`` where SLURM acts on the job already, else its words against it.
    """
    for number, pause_s in enumerate((*pauses_s, 0.0)):
        if number and not ends_anyway and _is_leaving(job_id):
            return ""  # an answer was lost, but the request had arrived
        words = _requeue(job_id)
        if not words or not is_unavailable(words):
            break
        print(f"galaxydist: not requeued yet: {words}", flush=True)
        time.sleep(pause_s)
    return LEAVING if words and not ends_anyway and not is_unavailable(words) and _is_leaving(job_id) else words


def _requeue(job_id: str) -> str:
    """Ask for it; what SLURM says against it, else nothing."""
    try:
        check_controller()
        answer = run_slurm(["scontrol", "requeue", job_id])
    except SlurmUnavailableError as error:
        return str(error)
    return "" if answer.returncode == 0 else " ".join((answer.stderr or answer.stdout).split())


def _resubmit(start: StartedRun, ending: Ending) -> None:
    """Submit the run again, by the way that a user does."""
    from galaxydist.cluster.submit import submit_again

    for pause_s in (*PAUSES_S, None):
        try:
            job_id = submit_again(start.requests, start.run_dir, resubmits=start.job_id)
        except UserError as error:
            if pause_s is not None and is_unavailable(str(error)):
                time.sleep(pause_s)
                continue
            start.note(ending, "stop", f"it could not be submitted again: {error}")
        else:
            print(f"galaxydist: submitted again as job {job_id}", flush=True)
        return


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except UserError as problem:
        print(f"galaxydist: error: {problem}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
