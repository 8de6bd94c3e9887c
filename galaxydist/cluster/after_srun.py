"""The last line of a batch script: note how ``srun`` ended, and queue the job again where the run must go on.

    python -P -m galaxydist.cluster.after_srun REQUESTS EXIT_CODE

Light on purpose: a job that is being preempted has seconds left.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from galaxydist.cluster.records import JobFiles, RestartRecord
from galaxydist.cluster.request_file import RequestFile
from galaxydist.cluster.requeue import Decision, Ending, decide
from galaxydist.cluster.scheduler import SchedulerAwayError, ask_slurm
from galaxydist.errors import EXIT_FAILED, EXIT_STOPPED, UserError
from galaxydist.runs.checkpoint_names import FOLDER_NAME
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock_owner import read_owner


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
    _unlock(folder, environ["SLURM_JOB_ID"])
    ending = Ending(exit_code, folder.is_finished, folder.read_failure(), _newest_step(folder))
    cluster = requests.cluster
    history = _since_submission(files)
    decision, reason = decide(ending, history, policy=cluster.requeue, max_requeues=cluster.max_requeues)
    if decision in ("requeue", "resubmit") and _is_leaving(environ["SLURM_JOB_ID"]):
        decision, reason = "stop", "SLURM is ending or requeueing the job itself"
    _note(files, environ, ending, decision, reason)
    if decision == "requeue" and (refusal := _requeue(environ)):
        decision, reason = "resubmit", f"SLURM does not requeue it ({refusal})"
        _note(files, environ, ending, decision, reason)
    if decision == "resubmit":
        _resubmit(requests, request.run_dir, files, environ, ending)
    return 0 if ending.is_finished else exit_code or EXIT_STOPPED


def job_name_of(environ: Mapping[str, str]) -> str:
    """The id by which the job is requeued: of one task of an array, where it is one."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


def _note(files: JobFiles, environ: Mapping[str, str], ending: Ending, decision: Decision, reason: str) -> None:
    restart = int(environ.get("SLURM_RESTART_COUNT", "0"))
    record = RestartRecord(
        job_id=job_name_of(environ),
        restart=restart,
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


def _is_leaving(job_id: str) -> bool:
    """SLURM has begun to end the job, so that it is cancelled, or will be requeued without us."""
    try:
        answer = ask_slurm(["squeue", "--noheader", "--jobs", job_id, "--format", "%T"])
    except SchedulerAwayError:
        return False
    return answer.returncode == 0 and "RUNNING" not in answer.stdout.split()


def _requeue(environ: Mapping[str, str]) -> str:
    """Requeue the job; what SLURM says against it, else nothing."""
    try:
        answer = ask_slurm(["scontrol", "requeue", job_name_of(environ)])
    except SchedulerAwayError as error:
        return str(error)
    return "" if answer.returncode == 0 else " ".join((answer.stderr or answer.stdout).split())


def _resubmit(requests: RequestFile, run_dir: Path, files: JobFiles, environ: Mapping[str, str], ending: Ending) -> None:
    """Submit the run again, by the way that a user does."""
    from submitit.helpers import clean_env

    from galaxydist.cluster.submission import submit_again

    ended = job_name_of(environ)
    where = {name: environ[name] for name in ("SLURM_CONF",) if name in environ}  # which SLURM, not which job
    try:
        with clean_env():  # without this job's variables
            os.environ.update(where)
            job_id = submit_again(requests, run_dir, resubmits=ended)
    except UserError as error:
        _note(files, environ, ending, "stop", f"it could not be submitted again: {error}")
    else:
        print(f"galaxydist: submitted again as job {job_id}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except UserError as problem:
        print(f"galaxydist: error: {problem}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
