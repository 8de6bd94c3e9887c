"""From requests to jobs: the snapshot, the batch script, the run folder's record. Light: a job sends itself again with it."""

import contextlib
import dataclasses
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from submitit.core.utils import FailedSubmissionError

from galaxydist.cluster.active import find_holder, newest_job
from galaxydist.cluster.executor import JobExecutor, SlurmExecutor, build_executor, explain_refusal
from galaxydist.cluster.profile import ClusterConfig, ResolvedCluster
from galaxydist.cluster.programs import SchedulerAwayError, ask_slurm
from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.request_file import JobRequest, RequestFile
from galaxydist.cluster.scheduler import cancel_jobs, read_states
from galaxydist.cluster.sending import adopt_settings, plain_environment, signals_later
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.work import run_request
from galaxydist.errors import UserError
from galaxydist.recipe.identity import run_path
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.runs.folder import RunFolder

__all__ = ["JobRequest", "build_request", "check_idle", "script_of", "submit_again", "submit_requests"]


def build_request(resolved: ResolvedRecipe, arguments: Sequence[str]) -> JobRequest:
    """The request of a command line that was read already.

    Args:
        resolved: the recipe.
        arguments: ``recipe=NAME`` and ``key=value``.
    """
    recipe = resolved.recipe
    run_dir = run_path(recipe).expanduser().absolute()
    return JobRequest(tuple(arguments), run_dir, resolved.path.absolute(), recipe.name)


def check_idle(run_dir: Path) -> None:
    """Refuse a run that is queued or running already.

    Raises:
        UserError: with its job, or with the process that works in its folder.
    """
    jobs, lock_path = JobFiles(run_dir).jobs(), RunFolder(run_dir).lock_path
    states = read_states(list(dict.fromkeys(job.job_id for job in jobs if job.scheduler == "slurm")))
    job, found = newest_job(jobs, states)
    if job is not None and found is not None and found.is_active:
        raise UserError(
            f"{run_dir} is {found.state.lower()} as job {job.job_id} already. Follow it with `galaxydist status {run_dir}`, or "
            f"end it first with `galaxydist cancel {run_dir}`."
        )
    if (holder := find_holder(lock_path, states)) is not None:
        raise UserError(
            f"{run_dir} is in use by {holder}, which no galaxydist submit has started. Wait until that has ended, or stop it: "
            "both would write to the same folder."
        )


def submit_requests(
    requests: Sequence[JobRequest],
    cluster: ResolvedCluster,
    *,
    folder: Path,
    name: str,
    parallel: int | None = None,
    after: str | None = None,
) -> list[str]:
    """Submit runs: one as a job, several as one array.

    Args:
        requests: the runs, checked.
        cluster: the profile.
        folder: of the submission's files (batch script, output, snapshot); all nodes must see it.
        name: of the job.
        parallel: tasks of the array that run at the same time, instead of the profile's.
        after: a job that must have ended before.

    Returns:
        The job ids, in the order of the requests (``123`` or ``123_4``).

    Raises:
        UserError: SLURM does not take it, with its words.
    """
    submission = _prepare(requests, cluster, folder=folder, name=name)
    submission.write()
    return _send(submission, parallel=parallel, after=after)


def submit_again(submission: RequestFile, run_dir: Path, *, resubmits: str) -> str:
    """Submit one run of an earlier submission again, with the same code; for a site that does not let jobs be requeued.

    Args:
        submission: the earlier one.
        run_dir: the run.
        resubmits: the job that the new one replaces.

    Returns:
        The new job's id.
    """
    request = next(request for request in submission.requests if request.run_dir == run_dir)
    again = dataclasses.replace(
        submission,
        path=_request_path(submission.folder),
        requests=(request,),
        cluster=submission.cluster.model_copy(update={"after": None}),
    )
    again.write()
    # Its ranks may be writing still.
    (job_id,) = _send(again, after=resubmits, resubmits=resubmits)
    return job_id


def script_of(
    requests: Sequence[JobRequest], cluster: ResolvedCluster, *, folder: Path, name: str, parallel: int | None = None
) -> str:
    """The batch script that would be submitted; nothing is written or sent.

    Args:
        requests, cluster, folder, name, parallel: as for ``submit_requests``.

    Raises:
        UserError: there is none for processes of this machine.
    """
    code = folder.absolute() / "code" / "SNAPSHOT"
    submission = RequestFile(
        folder.absolute() / "requests-ID.json",
        tuple(requests),
        adopt_settings(cluster.config, os.environ),
        cluster.arguments,
        code,
        folder.absolute(),
        name,
    )
    executor = _executor(submission, parallel) if cluster.config.scheduler == "slurm" else None
    if not isinstance(executor, SlurmExecutor):
        raise UserError("cluster=local starts processes on this machine: there is no batch script to show")
    return executor.script(len(requests))


def _prepare(requests: Sequence[JobRequest], cluster: ResolvedCluster, *, folder: Path, name: str) -> RequestFile:
    folder = folder.absolute()
    code = take_snapshot(folder / "code", {request.recipe_name: request.recipe_path for request in requests})
    config = adopt_settings(cluster.config, os.environ)
    return RequestFile(_request_path(folder), tuple(requests), config, cluster.arguments, code, folder, name)


def _request_path(folder: Path) -> Path:
    return folder / f"requests-{secrets.token_hex(4)}.json"


def _executor(submission: RequestFile, parallel: int | None = None, after: str | None = None) -> JobExecutor:
    # Where the tasks run in a container, this does not: SLURM's programs are outside.
    python = sys.executable if submission.cluster.container else submission.cluster.python or sys.executable
    after_srun = f"{shlex.quote(python)} -P -m galaxydist.cluster.after_srun {shlex.quote(str(submission.path))}"
    return build_executor(
        submission.cluster,
        submission.folder,
        name=submission.name,
        code=submission.code,
        after_srun=after_srun,
        parallel=parallel,
        after=after,
    )


def _send(
    submission: RequestFile,
    *,
    parallel: int | None = None,
    after: str | None = None,
    resubmits: str | None = None,
) -> list[str]:
    executor, cluster = _executor(submission, parallel, after), submission.cluster
    calls = [partial(run_request, _job_arguments(request, submission.code), request.run_dir) for request in submission.requests]
    sent_at = time.time()  # before a job can end
    with signals_later(), plain_environment(), explain_refusal(cluster.name):
        jobs = executor.submit_array(calls) if len(calls) > 1 else [executor.submit(calls[0])]
        with _end_unless_recorded([job.job_id for job in jobs], cluster):
            for request, job in zip(submission.requests, jobs, strict=True):
                record = JobRecord(
                    job_id=job.job_id,
                    scheduler=cluster.scheduler,
                    cluster=cluster.name,
                    time=sent_at,
                    nodes=cluster.nodes,
                    tasks=cluster.num_tasks,
                    time_limit_min=cluster.time_min,
                    code=submission.code,
                    folder=submission.folder,
                    arguments=request.arguments,
                    cluster_arguments=submission.cluster_arguments,
                    resubmits=resubmits,
                )
                JobFiles(request.run_dir).append_job(record)
    return [job.job_id for job in jobs]


def ask_start(script: str, cluster_name: str) -> str:
    """Return the words of sbatch about a batch script that is not sent: when and where the job would start.

    Raises:
        UserError: SLURM would not take it, or does not answer.
    """
    with plain_environment():
        done = ask_slurm(["sbatch", "--test-only"], text=script)
    if done.returncode != 0:
        with explain_refusal(cluster_name):
            raise FailedSubmissionError(done.stderr)
    return " ".join(line.removeprefix("sbatch: ") for line in (done.stderr or done.stdout).splitlines())


@contextlib.contextmanager
def _end_unless_recorded(job_ids: Sequence[str], cluster: ClusterConfig) -> Iterator[None]:
    """A job that stands in no run folder would be sent a second time."""
    try:
        yield
    except BaseException:
        if cluster.scheduler == "slurm":
            with contextlib.suppress(SchedulerAwayError):
                cancel_jobs(job_ids)
        raise


def _job_arguments(request: JobRequest, code: Path) -> tuple[str, ...]:
    """The same recipe from the snapshot: a file that is edited later does not change the run."""
    replaced = ("recipe=", "run.dir=", "run.root=")
    kept = [argument for argument in request.arguments if "=" in argument and not argument.startswith(replaced)]
    return (f"recipe={code / 'recipes' / f'{request.recipe_name}.yaml'}", *kept, f"run.dir={request.run_dir}")
