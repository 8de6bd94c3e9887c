"""From requests to jobs: the snapshot, the batch script, the run folder's record. Light: a job sends itself again with it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

from submitit.core.utils import FailedSubmissionError

from galaxydist.atomic_files import read_json, write_json
from galaxydist.cluster.executor import JobExecutor, SlurmExecutor, build_executor, explain_refusal
from galaxydist.cluster.profile import ClusterConfig, ResolvedCluster
from galaxydist.cluster.records import JobFiles, JobRecord
from galaxydist.cluster.running_jobs import lock_holder, newest_job
from galaxydist.cluster.slurm import SlurmUnavailableError, cancel_jobs, read_states, run_slurm
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.worker import train_task
from galaxydist.errors import UserError
from galaxydist.paths import DATA_VARIABLE, data_root
from galaxydist.recipe.identity import run_path
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.runs.folder import RunFolder

# What was asked for in one submission: kept beside the job, so that its batch script knows which runs it is about.

FORMAT_VERSION = 2


@dataclass(frozen=True)
class JobRequest:
    """One run to submit.

    Args:
        arguments: ``recipe=NAME`` and ``key=value``, as for launch.py.
        run_dir: its run folder.
        recipe_path: the recipe's file.
        recipe_name: what it is called in the snapshot.
    """

    arguments: tuple[str, ...]
    run_dir: Path
    recipe_path: Path
    recipe_name: str


@dataclass(frozen=True)
class RequestFile:
    """A submission.

    Args:
        path: where it is written.
        requests: its runs; in an array in the order of the tasks.
        cluster: the profile, resolved.
        cluster_arguments: ``cluster=NAME`` and ``cluster.key=value``, for the record.
        code: the snapshot.
        folder: submitit's.
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
        """Write it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        plain = {
            "format": FORMAT_VERSION,
            "requests": [_plain(asdict(request)) for request in self.requests],
            "cluster": self.cluster.model_dump(mode="json"),
            "cluster_arguments": list(self.cluster_arguments),
            "code": str(self.code),
            "folder": str(self.folder),
            "name": self.name,
        }
        write_json(self.path, plain)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it.

        Raises:
            UserError: it is not there or of another galaxydist: the snapshot of its submission reads it.
        """
        if not path.exists():
            raise UserError(f"{path} is not there: is the folder of the runs on a file system that all nodes share?")
        plain = read_json(path)
        if not isinstance(plain, dict) or plain.get("format") != FORMAT_VERSION:
            raise UserError(f"{path} is not a submission of format {FORMAT_VERSION}. Submit the run again.")
        return cls(
            path=path,
            requests=tuple(
                JobRequest(tuple(item["arguments"]), Path(item["run_dir"]), Path(item["recipe_path"]), item["recipe_name"])
                for item in plain["requests"]
            ),
            cluster=ClusterConfig.model_validate_json(json.dumps(plain["cluster"])),  # strict: paths and tuples from JSON only
            cluster_arguments=tuple(plain["cluster_arguments"]),
            code=Path(plain["code"]),
            folder=Path(plain["folder"]),
            name=plain["name"],
        )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(item) if isinstance(item, Path) else item for key, item in value.items()}


# What a submission needs around it: nobody else who sends the same runs, no signal between SLURM's answer and our record of
# it,
# and no variables of the shell that would change the job.

LOCK_NAME = ".submitting"
WAIT_S = 120.0
POLL_S = 0.5
# sbatch takes these from the shell where the profile says nothing of them.
_TAKEN = {
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "reservation": "SBATCH_RESERVATION",
}
# Which SLURM, not which job.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "SBATCH_")
_OF_A_RANK = frozenset({"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def submission_lock(folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Keep other commands from sending runs of a folder while this one looks what is queued and sends.

    On a file system without locks it goes on without.

    Raises:
        UserError: another command has been at it for ``wait_s`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (folder / LOCK_NAME).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another command has been submitting runs of {folder} for {wait_s:.0f} s. Wait until it has ended, or "
                        "end it, and give the command again."
                    ) from None
            time.sleep(POLL_S)
        yield


def adopt_settings(cluster: ClusterConfig, environ: Mapping[str, str]) -> ClusterConfig:
    """The profile, with what the user's shell says where it says nothing itself: to sbatch (SBATCH_ACCOUNT and the like), and of
    the data root, which was looked at here. It then stands in the batch script, and the same in that of a job sent again."""
    taken: dict[str, object] = {
        key: environ[name] for key, name in _TAKEN.items() if getattr(cluster, key) is None and environ.get(name)
    }
    if not any(item.startswith(f"{DATA_VARIABLE}=") for item in cluster.environment):
        taken["environment"] = (*cluster.environment, f"{DATA_VARIABLE}={data_root(None, environ).absolute()}")
    return cluster.model_copy(update=taken)


@contextmanager
def without_job_environment() -> Iterator[None]:
    """Without variables of a job that this process is part of, and without SBATCH_*, which would win over the batch script."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(_OF_A_JOB) or name in _OF_A_RANK) and name not in _KEPT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a lost terminal wait until this is done: a job that SLURM has taken must also stand in the run folder.

    What is started meanwhile does not hear SIGINT either: the terminal sends it to sbatch too, and a blocked signal stays blocked
    in what is started. The handlers are for threads of libraries, which may take a signal in the place of this one.
    """
    heard: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        heard.append(number)

    handlers = {number: signal.signal(number, remember) for number in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signal.SIGINT in heard:
        raise KeyboardInterrupt
    if heard:
        os.kill(os.getpid(), heard[0])


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
    if (holder := lock_holder(lock_path, states)) is not None:
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
    calls = [partial(train_task, _job_arguments(request, submission.code), request.run_dir) for request in submission.requests]
    sent_at = time.time()  # before a job can end
    with deferred_signals(), without_job_environment(), explain_refusal(cluster.name):
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
    with without_job_environment():
        done = run_slurm(["sbatch", "--test-only"], text=script)
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
            with contextlib.suppress(SlurmUnavailableError):
                cancel_jobs(job_ids)
        raise


def _job_arguments(request: JobRequest, code: Path) -> tuple[str, ...]:
    """The same recipe from the snapshot: a file that is edited later does not change the run."""
    replaced = ("recipe=", "run.dir=", "run.root=")
    kept = [argument for argument in request.arguments if "=" in argument and not argument.startswith(replaced)]
    return (f"recipe={code / 'recipes' / f'{request.recipe_name}.yaml'}", *kept, f"run.dir={request.run_dir}")
