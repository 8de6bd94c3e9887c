"""Submission of runs as jobs: snapshot, batch script and the run folder's record of the job.

It imports no torch: batch scripts use it to resubmit their runs.
"""

import dataclasses
import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from submitit.core.utils import FailedSubmissionError

from galaxydist.atomic_files import read_json, write_json
from galaxydist.cluster.batch_script import JobExecutor, SlurmExecutor, build_executor, explain_refusal
from galaxydist.cluster.profile import ClusterConfig, ResolvedCluster
from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.running_jobs import lock_holder, newest_job
from galaxydist.cluster.slurm import SlurmUnavailableError, cancel_jobs, read_states, run_slurm
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.worker import train_task
from galaxydist.errors import UserError
from galaxydist.models.own_function import copied_sources
from galaxydist.paths import DATA_VARIABLE, data_root
from galaxydist.recipe.identity import run_path
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.runs.folder import RunFolder

# The request file lies beside the job, so that the batch script knows its runs.

FORMAT_VERSION = 2


@dataclass(frozen=True)
class JobRequest:
    """One run to submit.

    Args:
        arguments: ``recipe=NAME`` and ``key=value``, as for launch.py.
        run_dir: its run folder.
        recipe_path: the recipe's file.
        recipe_name: the recipe's name in the snapshot.
        model_name: ``model.name``, whose own code the snapshot copies.
        is_trial: of a search, which gives it its values.
    """

    arguments: tuple[str, ...]
    run_dir: Path
    recipe_path: Path
    recipe_name: str
    model_name: str = "custom_cnn"
    is_trial: bool = False


@dataclass(frozen=True)
class RequestFile:
    """A submission and its JSON file.

    Args:
        path: the file.
        requests: the runs; in the order of the tasks if the job is an array.
        cluster: the profile, resolved.
        cluster_arguments: ``cluster=NAME`` and ``cluster.key=value``, for the job's record.
        code: the snapshot.
        folder: submitit's folder.
        name: of the job.
    """

    path: Path
    requests: tuple[JobRequest, ...]
    cluster: ClusterConfig
    cluster_arguments: tuple[str, ...]
    code: Path
    folder: Path
    name: str

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = TypeAdapter(RequestFile).dump_python(self, mode="json", exclude={"path"})
        write_json(self.path, {"format": FORMAT_VERSION, **content})

    @classmethod
    def read(cls, path: Path) -> "RequestFile":
        """Read the file.

        Raises:
            UserError: the file does not exist, or was written by another galaxydist version.
        """
        if not path.exists():
            raise UserError(f"{path} does not exist: is the folder of the runs on a file system that all nodes share?")
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
            raise UserError(f"{path} is not a submission of format {FORMAT_VERSION}. Submit the run again.")
        # From JSON text, because the profile is strict: it takes paths and tuples from JSON only.
        return TypeAdapter(RequestFile).validate_json(json.dumps({**content, "path": str(path)}))


# Submission guards: a lock, deferred signals, and an environment without variables of a job.

LOCK_NAME = ".submitting"
WAIT_S = 120.0
POLL_S = 0.5
# Profile key -> variable that sbatch would read if the key is not set.
_ADOPTED = {
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "reservation": "SBATCH_RESERVATION",
}
# These variables name the SLURM installation or cluster, not a job.
_INSTALLATION = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "SBATCH_")
_OF_A_RANK = frozenset({"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def submission_lock(folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Keep other commands from submitting runs of a folder between this one's check and its submission.

    On a file system without locks nothing is locked.

    Raises:
        UserError: another command has held the lock for ``wait_s`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, timeout=wait_s, poll_interval=POLL_S, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another command has been submitting runs of {folder} for {wait_s:.0f} s. Wait until it has ended, or end it, and "
            "run the command again."
        ) from None
    except (OSError, NotImplementedError):
        pass  # no locks on this file system
    try:
        yield
    finally:
        lock.release()


def adopt_settings(cluster: ClusterConfig, environ: Mapping[str, str]) -> ClusterConfig:
    """Return the profile with unset keys filled from the user's shell: SBATCH_ACCOUNT and others, data root.

    The batch script, also that of a resubmitted run, then contains them.
    """
    adopted: dict[str, object] = {
        key: environ[name] for key, name in _ADOPTED.items() if getattr(cluster, key) is None and environ.get(name)
    }
    if not any(item.startswith(f"{DATA_VARIABLE}=") for item in cluster.environment):
        adopted["environment"] = (*cluster.environment, f"{DATA_VARIABLE}={data_root(None, environ).absolute()}")
    return cluster.model_copy(update=adopted)


@contextmanager
def without_job_environment() -> Iterator[None]:
    """Hide variables of a surrounding job, and SBATCH_*, which would override the batch script."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(_OF_A_JOB) or name in _OF_A_RANK) and name not in _INSTALLATION
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP, so that every job that SLURM has accepted is also recorded in the run folder.

    SIGINT is also blocked: the terminal sends it to sbatch too, and child processes inherit the signal mask. The handlers are
    needed for threads of libraries, which may receive a signal instead of this one.
    """
    received: list[int] = []
    handlers = {deferred: signal.signal(deferred, lambda number, _frame: received.append(number)) for deferred in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        os.kill(os.getpid(), received[0])


def build_request(resolved: ResolvedRecipe, arguments: Sequence[str], *, is_trial: bool = False) -> JobRequest:
    """Build the request of a run from its resolved recipe and command line.

    Args:
        resolved: the recipe.
        arguments: ``recipe=NAME`` and ``key=value``.
        is_trial: the run is a trial of a search.
    """
    recipe = resolved.recipe
    run_dir = run_path(recipe).expanduser().absolute()
    return JobRequest(tuple(arguments), run_dir, resolved.path.absolute(), recipe.name, recipe.model.name, is_trial)


def check_idle(run_dir: Path) -> None:
    """Raise an error if a run is already queued or running.

    Raises:
        UserError: names the run's job, or the process that holds its folder.
    """
    jobs, lock_path = JobFiles(run_dir).jobs(), RunFolder(run_dir).lock_path
    states = read_states(list(dict.fromkeys(job.job_id for job in jobs if job.scheduler == "slurm")))
    job, found = newest_job(jobs, states)
    if job is not None and found is not None and found.is_active:
        raise UserError(
            f"{run_dir} is already {found.state.lower()} as job {job.job_id}. Follow it with `galaxydist status {run_dir}`, or "
            f"cancel it first with `galaxydist cancel {run_dir}`."
        )
    if (holder := lock_holder(lock_path, states)) is not None:
        raise UserError(
            f"{run_dir} is in use by {holder}, which was not started by galaxydist submit. Wait until it has ended, or stop it: "
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
    """Submit one run as a job, or several runs as one array.

    Args:
        requests: the runs, already checked.
        cluster: the profile.
        folder: for the submission's files (batch script, output, snapshot); all nodes must see it.
        name: of the job.
        parallel: most tasks of the array that run at a time; default: the profile's.
        after: id of a job that must end first.

    Returns:
        The job ids, in the order of the requests (``123`` or ``123_4``).

    Raises:
        UserError: SLURM refuses the job; contains SLURM's message.
    """
    recipes = {request.recipe_name: request.recipe_path for request in requests}
    sources = {name: path for request in requests for name, path in copied_sources(request.model_name).items()}
    code = take_snapshot(folder.absolute() / "code", recipes, sources)
    submission = _build_submission(requests, cluster, folder.absolute(), code, name)
    submission.write()
    return _send(submission, parallel=parallel, after=after)


def submit_again(submission: RequestFile, run_dir: Path, *, resubmits: str) -> str:
    """Resubmit one run of an earlier submission with the same code, for sites that do not allow requeueing.

    Args:
        submission: the earlier submission.
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
    # It must wait for the old job, whose ranks may still be writing.
    (job_id,) = _send(again, after=resubmits, resubmits=resubmits)
    return job_id


def script_of(
    requests: Sequence[JobRequest], cluster: ResolvedCluster, *, folder: Path, name: str, parallel: int | None = None
) -> str:
    """Return the batch script of a submission without writing or submitting anything.

    Args:
        requests, cluster, folder, name, parallel: as for ``submit_requests``.

    Raises:
        UserError: the profile is local, so there is no batch script.
    """
    folder = folder.absolute()
    submission = _build_submission(requests, cluster, folder, folder / "code" / "SNAPSHOT", name)
    submission = dataclasses.replace(submission, path=folder / "requests-ID.json")
    executor = _executor(submission, parallel) if cluster.config.scheduler == "slurm" else None
    if not isinstance(executor, SlurmExecutor):
        raise UserError("cluster=local starts processes on this machine, without a batch script")
    return executor.script(len(requests))


def _build_submission(
    requests: Sequence[JobRequest], cluster: ResolvedCluster, folder: Path, code: Path, name: str
) -> RequestFile:
    config = adopt_settings(cluster.config, os.environ)
    return RequestFile(_request_path(folder), tuple(requests), config, cluster.arguments, code, folder, name)


def _request_path(folder: Path) -> Path:
    return folder / f"requests-{secrets.token_hex(4)}.json"


def _executor(submission: RequestFile, parallel: int | None = None, after: str | None = None) -> JobExecutor:
    # It runs outside the container of the tasks, like SLURM's programs.
    python = sys.executable if submission.cluster.container else submission.cluster.python or sys.executable
    after_srun = f"{shlex.quote(python)} -P -m galaxydist.cluster.requeue {shlex.quote(str(submission.path))}"
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
    calls = [
        partial(train_task, job_arguments(request, submission.code), request.run_dir, is_trial=request.is_trial)
        for request in submission.requests
    ]
    sent_at = time.time()  # before a job can end
    with deferred_signals(), without_job_environment(), explain_refusal(cluster.name):
        jobs = executor.submit_array(calls) if len(calls) > 1 else [executor.submit(calls[0])]
        try:
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
        except BaseException:
            # The runs would be submitted again.
            if cluster.scheduler == "slurm":
                with suppress(SlurmUnavailableError):
                    cancel_jobs(job.job_id for job in jobs)
            raise
    return [job.job_id for job in jobs]


def ask_start(script: str, cluster_name: str) -> str:
    """Return sbatch's estimate (``--test-only``) of time and nodes of the job's start.

    Raises:
        UserError: SLURM would refuse the job, or does not answer.
    """
    with without_job_environment():
        done = run_slurm(["sbatch", "--test-only"], text=script)
    if done.returncode != 0:
        with explain_refusal(cluster_name):
            raise FailedSubmissionError(done.stderr)
    return " ".join(line.removeprefix("sbatch: ") for line in (done.stderr or done.stdout).splitlines())


def job_arguments(request: JobRequest, code: Path) -> tuple[str, ...]:
    """Return the arguments with the snapshot's copy of the recipe, which later edits do not change."""
    replaced = ("recipe=", "run.dir=", "run.root=")
    kept = [argument for argument in request.arguments if "=" in argument and not argument.startswith(replaced)]
    return (f"recipe={code / 'recipes' / f'{request.recipe_name}.yaml'}", *kept, f"run.dir={request.run_dir}")
