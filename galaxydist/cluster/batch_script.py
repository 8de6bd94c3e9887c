"""submitit executors of a cluster profile.

Unlike submitit's own, they end a job if one rank dies, requeue from the batch script, and start ranks with ``task.py``.
"""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.local import LocalJob

from galaxydist.cluster.profile import ClusterConfig
from galaxydist.cluster.slurm import SlurmUnavailableError, is_unavailable
from galaxydist.cluster.srun_messages import START_MARK, TOLD_TO_END
from galaxydist.cluster.worker import redirect_output
from galaxydist.errors import UserError

# Time limit of local runs, since submitit's local executor needs one.
YEAR_MIN = 525_600


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's SLURM executor, with ``task.py`` as the command of each task.

    For an array, submitit makes a new executor of this class and passes on only the parameters and this command.
    """

    @property
    def _submitit_command_str(self) -> str:
        # In the background, because bash runs a trap at once only while it is in ``wait`` (see ``_after_srun``).
        return _task_command(self.python, self.folder) + (" &" if self.parameters.get("teardown") else "")

    def script(self, num_tasks: int) -> str:
        """Return the batch script of a job, or of an array of several tasks."""
        if num_tasks > 1:
            self.parameters["map_count"] = num_tasks
        return self._make_submission_file_text(self._submitit_command_str, "ID")


class LocalExecutor(submitit.LocalExecutor):
    """submitit's local executor, with ``task.py`` as the command of each task."""

    @property
    def _submitit_command_str(self) -> str:
        return _task_command(self.python, self.folder)

    def _submit_command(self, command: str) -> LocalJob[Any]:
        # SIGINT is blocked here (``deferred_signals``) and in submitit's controller, which would pass it to the tasks a second
        # time and soon kill them. The tasks unblock it, since they receive it from the terminal themselves.
        # The controller outlives this command and must not keep its output pipe open.
        with redirect_output(Path(self.folder) / "controller.log"):
            return super()._submit_command(command)


JobExecutor = SlurmExecutor | LocalExecutor


def build_executor(
    cluster: ClusterConfig,
    folder: Path,
    *,
    name: str,
    code: Path,
    after_srun: str = "",
    parallel: int | None = None,
    after: str | None = None,
) -> JobExecutor:
    """Build the executor of a cluster profile.

    Args:
        cluster: the profile.
        folder: for submitit's files; all nodes must see it.
        name: of the job.
        code: the snapshot, put first on PYTHONPATH.
        after_srun: command that the batch script runs with srun's exit code, or with ``told-to-end`` on SIGTERM.
        parallel: most tasks of an array that run at a time.
        after: id of a job that must end first, successful or not.

    Raises:
        UserError: SLURM's programs are not on this machine.
    """
    folder = folder.absolute()
    shell = _setup(cluster, code)
    if cluster.scheduler == "local":
        local = LocalExecutor(folder, python=_python(cluster))
        local.update_parameters(
            tasks_per_node=cluster.num_tasks,
            gpus_per_node=cluster.gpus_per_node,
            timeout_min=YEAR_MIN,
            # submitit's job id is then the shell's process id. The trap keeps newer shells from replacing themselves by their
            # last command.
            setup=["trap : HUP", *shell],
        )
        return local
    try:
        slurm = SlurmExecutor(folder, python=_python(cluster))
    except RuntimeError as error:
        raise UserError(
            "There is no SLURM on this machine (srun is not on the PATH). Run the command on a login node of the cluster, or "
            "use cluster=local to run on this machine."
        ) from error
    slurm.update_parameters(
        job_name=name,
        # set +e, because after a profile's set -e the script would end before it has srun's exit code.
        setup=[*shell, "set +e", *(_before_srun(after_srun) if after_srun else ())],
        teardown=_after_srun(after_srun) if after_srun else None,
        wckey=None,  # sites that enforce wckeys would refuse submitit's default
        array_parallelism=parallel or cluster.parallel,
        dependency=_dependency(cluster, after),
        **_slurm_parameters(cluster),
    )
    return slurm


@contextlib.contextmanager
def explain_refusal(cluster_name: str) -> Iterator[None]:
    """Turn a refusal of sbatch into a UserError with its message."""
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        message = " ".join(line.strip() for line in str(error).splitlines() if "error:" in line) or str(error).strip()
        if is_unavailable(message):
            raise SlurmUnavailableError(
                f"SLURM did not answer: {message}\nNothing is wrong with the run or the profile. Try again in a minute; `squeue "
                "--me` shows whether slurmctld has accepted the job all the same."
            ) from error
        raise UserError(
            f"SLURM did not accept the job: {message}\nChange the setting that it names in the profile {cluster_name} or on the "
            f"command line (cluster.partition, cluster.account, cluster.qos, cluster.time, ...); `galaxydist cluster show "
            f"{cluster_name}` shows the profile, `sinfo` and `sacctmgr show assoc user=$USER` what you can choose from."
        ) from error


def _slurm_parameters(cluster: ClusterConfig) -> dict[str, Any]:
    srun = ["--kill-on-bad-exit=1"]  # a dead rank must not leave the others waiting
    if cluster.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={cluster.cpus_per_task}")  # since SLURM 22.05 srun does not inherit it from the job
    srun += [f"--{option}" for option in cluster.srun]
    srun.append("--export=ALL")  # the tasks need the script's exports, and a site may have another default
    additional: dict[str, Any] = {"no-requeue" if cluster.requeue == "never" else "requeue": True}
    for option in cluster.extra:
        key, equals, value = option.lstrip("-").partition("=")
        additional[key] = value if equals else True
    if cluster.memory_mb is not None:
        additional["mem"] = f"{cluster.memory_mb}M"
    if cluster.reservation is not None:
        additional["reservation"] = cluster.reservation
    gpus = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else f"{cluster.gpus_per_node}"
    if cluster.gpus_per_node:
        additional |= {"gres": f"gpu:{gpus}"} if cluster.gpu_request == "gres" else {"gpus-per-node": gpus}
    parameters = {
        "time": cluster.time_min,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_on_node,
        "cpus_per_task": cluster.cpus_per_task,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "nodelist": cluster.nodelist,
        "comment": cluster.comment,
        "signal_delay_s": cluster.signal_s,
        "srun_args": srun,
        "additional_parameters": additional,
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _before_srun(command: str) -> list[str]:
    """Return shell lines that run ``command told-to-end`` on SIGTERM, while srun still runs."""
    return [
        f"told_to_end() {{ trap '' TERM; {command} {TOLD_TO_END}; }}",
        "trap told_to_end TERM",
        f'echo "{START_MARK}${{SLURM_RESTART_COUNT:-0}}" >&2',
    ]


def _after_srun(command: str) -> list[str]:
    """Return shell lines that wait for srun, also across signals, and run ``command`` with its exit code."""
    return [
        "srun_pid=$!",
        'wait "$srun_pid"; exit_code=$?',
        'while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; exit_code=$?; done',
        f'{command} "$exit_code"',
        "exit $?",
    ]


def _dependency(cluster: ClusterConfig, after: str | None) -> str | None:
    """Return sbatch's dependency: the profile's ``after``, and the previous job of a chain."""
    given = "" if cluster.after is None else str(cluster.after)
    if given and ":" not in given:
        given = f"afterok:{given}"
    return ",".join(filter(None, (given, f"afterany:{after}" if after else ""))) or None


def _python(cluster: ClusterConfig) -> str:
    python = shlex.quote(cluster.python or sys.executable)
    return f"{cluster.container} {python}" if cluster.container else python


def _task_command(python: str, folder: Path) -> str:
    return f"{python} -P -u -m galaxydist.cluster.task {shlex.quote(str(folder))}"


def _setup(cluster: ClusterConfig, code: Path) -> list[str]:
    """Return the lines of the batch script that run before the tasks start."""
    lines = [
        f"module load {name} || {{ echo 'galaxydist: module load' {name} failed >&2; exit 2; }}"
        for name in map(shlex.quote, cluster.modules)
    ]
    lines += [f"export {name}={shlex.quote(value)}" for name, _, value in (item.partition("=") for item in cluster.environment)]
    if cluster.interface is not None:
        lines += [f"export {name}={shlex.quote(cluster.interface)}" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    # Exported last, so that the snapshot comes first whatever the profile's lines do to PYTHONPATH.
    return [*lines, *cluster.setup, f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
