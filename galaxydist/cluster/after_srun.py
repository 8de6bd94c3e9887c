"""The last line of a batch script: note how ``srun`` ended, and queue the job again where the run must go on.

    python -P -m galaxydist.cluster.after_srun REQUESTS EXIT_CODE

Light on purpose: a job that is being preempted has seconds left.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galaxydist.cluster.programs import SchedulerAwayError, ask_slurm, check_controller, is_away
from galaxydist.cluster.records import Decision, JobFiles, RestartRecord
from galaxydist.cluster.request_file import RequestFile
from galaxydist.cluster.requeue import Ending, decide
from galaxydist.errors import EXIT_FAILED, EXIT_STOPPED, UserError
from galaxydist.runs.checkpoint_names import FOLDER_NAME
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock_owner import job_of, read_owner, restart_of, start_of

LEAVING = "SLURM is ending or requeueing the job itself"
# Between attempts while slurmctld is away: five minutes in all.
PAUSES_S = (5.0, 10.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Decide and act.

    Args:
        arguments: the requests' file, srun's exit code.
        environ: of the batch script.

    Returns:
        The exit code of the batch script: 0 for a run that is finished, else srun's, or 75 where that is 0.
    """
    requests_path, exit_code = Path(arguments[0]), int(arguments[1])
    requests = RequestFile.read(requests_path)
    request = requests.requests[int(environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    folder, files = RunFolder(request.run_dir), JobFiles(request.run_dir)
    _unlock(folder, job_name(environ))
    ending = Ending(exit_code, folder.is_finished, _own_failure(folder, environ), _newest_step(folder))
    cluster = requests.cluster
    history = _since_submission(files)
    decision, reason = decide(ending, history, policy=cluster.requeue, max_requeues=cluster.max_requeues)
    if decision in ("requeue", "resubmit") and _is_leaving(job_name(environ)):
        decision, reason = "stop", LEAVING
    _note(files, environ, ending, decision, reason)
    if decision == "requeue" and (refusal := requeue_patiently(job_name(environ))):
        decision, reason = ("stop", LEAVING) if refusal == LEAVING else ("resubmit", f"SLURM does not requeue it ({refusal})")
        _note(files, environ, ending, decision, reason)
    if decision == "resubmit":
        _resubmit(requests, request.run_dir, files, environ, ending)
    return exit_code if ending.is_finished else exit_code or EXIT_STOPPED


def job_name(environ: Mapping[str, str]) -> str:
    """The id by which the job is requeued: of one task of an array, where it is one."""
    name = job_of(environ)
    assert name is not None, "a batch script runs in a job"
    return name


def _note(files: JobFiles, environ: Mapping[str, str], ending: Ending, decision: Decision, reason: str) -> None:
    record = RestartRecord(
        job_id=job_name(environ),
        restart=restart_of(environ),
        exit_code=ending.exit_code,
        step=ending.crash_step,
        error=ending.error,
        decision=decision,
        reason=reason,
        time=time.time(),
    )
    files.append_restart(record)
    print(f"galaxydist: srun ended with {ending.exit_code} at step {ending.step}: {decision} ({reason})", flush=True)


def _since_submission(files: JobFiles) -> list[RestartRecord]:
    """The endings since the last time that somebody, not a job, submitted the run."""
    submitted = [job.time for job in files.jobs() if job.resubmits is None]
    start = max(submitted, default=0.0)
    return [record for record in files.restarts() if record.time >= start]


def _newest_step(folder: RunFolder) -> int | None:
    """The last step that a checkpoint or the metrics show."""
    names = [FOLDER_NAME.fullmatch(path.name) for path in folder.checkpoints_dir.glob("step-*")]
    steps = [int(name[1]) for name in names if name is not None]
    return max([*steps, *(line["step"] for line in folder.metrics.read()[-1:])], default=None)


def _unlock(folder: RunFolder, job_id: str) -> None:
    """srun has ended, so no rank of this job holds the run folder, whatever a killed one left behind."""
    owner = read_owner(folder.lock_path)
    if owner is not None and owner.job_id == job_id:
        folder.lock_path.unlink(missing_ok=True)


def _own_failure(folder: RunFolder, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """How this start failed; what another start or another job left says nothing of it."""
    failure = folder.read_failure()
    return failure if failure is not None and failure.get("start") == start_of(environ) else None


def _is_leaving(job_id: str) -> bool:
    """SLURM has begun to end the job, so that it is cancelled, or will be requeued without us."""
    try:
        check_controller()
        answer = ask_slurm(["squeue", "--noheader", "--jobs", job_id, "--format", "%T"])
    except SchedulerAwayError:
        return False
    return answer.returncode == 0 and "RUNNING" not in answer.stdout.split()


def requeue_patiently(job_id: str, pauses_s: Sequence[float] = PAUSES_S) -> str:
    """Requeue a job, also where slurmctld is away for some minutes.

    Args:
        job_id: the job's.
        pauses_s: between the attempts.

    Returns:
        Nothing where it is done, ``LEAVING`` where SLURM acts on the job already, else its words against it.
    """
    for number, pause_s in enumerate((*pauses_s, 0.0)):
        if number and _is_leaving(job_id):
            return ""  # an answer was lost, but the request had arrived
        words = _requeue(job_id)
        if not words or not is_away(words):
            break
        print(f"galaxydist: not requeued yet: {words}", flush=True)
        time.sleep(pause_s)
    return LEAVING if words and not is_away(words) and _is_leaving(job_id) else words


def _requeue(job_id: str) -> str:
    """Ask for it; what SLURM says against it, else nothing."""
    try:
        check_controller()
        answer = ask_slurm(["scontrol", "requeue", job_id])
    except SchedulerAwayError as error:
        return str(error)
    return "" if answer.returncode == 0 else " ".join((answer.stderr or answer.stdout).split())


def _resubmit(requests: RequestFile, run_dir: Path, files: JobFiles, environ: Mapping[str, str], ending: Ending) -> None:
    """Submit the run again, by the way that a user does."""
    from galaxydist.cluster.submission import submit_again

    for pause_s in (*PAUSES_S, None):
        try:
            job_id = submit_again(requests, run_dir, resubmits=job_name(environ))
        except UserError as error:
            if pause_s is not None and is_away(str(error)):
                time.sleep(pause_s)
                continue
            _note(files, environ, ending, "stop", f"it could not be submitted again: {error}")
        else:
            print(f"galaxydist: submitted again as job {job_id}", flush=True)
        return


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except UserError as problem:
        print(f"galaxydist: error: {problem}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
