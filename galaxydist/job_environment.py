"""Environment of this process: ranks of launchers, SLURM's cores, job ids, Accelerate's settings, and the way to a page here.

This module does not import torch.
"""

import getpass
import math
import shlex
import signal
import socket
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from galaxydist.errors import EveryRankError, UserError

# Signals before a preemption, the time limit or scancel; Ctrl-C also asks a training to save and stop.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
STOP_SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
# From these, Accelerate would set up several CPU processes (get_cpu_distributed_information).
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# Ports of the ranks' rendezvous.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000

_USE_FSDP = "train.strategy=fsdp divides a model among the processes"
_TRUE = ("1", "on", "t", "true", "y", "yes")
# Settings that would make Accelerate deviate from the recipe, and what to do instead.
_REFUSED_FLAGS = {
    "ACCELERATE_USE_DEEPSPEED": _USE_FSDP,
    "ACCELERATE_USE_FSDP": _USE_FSDP,
    "ACCELERATE_USE_MEGATRON_LM": _USE_FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _USE_FSDP,
}
_REFUSED_VALUES = {
    "ACCELERATE_TORCH_DEVICE": "CUDA_VISIBLE_DEVICES chooses GPUs",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "start the processes with torchrun",
    "ACCELERATE_FP8_BACKEND": "train.precision has no 8-bit precision: use bf16",
}


@dataclass(frozen=True)
class LauncherRank:
    """Rank and world size that a launcher gave to this process.

    Args:
        rank: rank, from 0.
        size: world size.
        local_size: processes on this machine.
        local_rank: rank among them.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    local_rank: int = 0


def find_rank(environ: MutableMapping[str, str]) -> LauncherRank:
    """Return this process's rank and world size from the launcher's variables, which must be complete.

    Args:
        environ: the process's environment. Under ``srun`` with several tasks and no other launcher, torch's variables are added.

    Raises:
        UserError: variables are missing, are not numbers, or contradict one another.
    """
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and not any(name in environ for name in _NUMBERS):
        _set_torch_variables(environ, tasks)
    rank, size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    if tasks <= 1 and (rank, size) == (0, 1) and "LOCAL_RANK" not in environ:
        _check_single_process(environ)
        return LauncherRank()
    given = [name for name in (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if name in environ]
    missing = [name for name in _NEEDED if not environ.get(name)]
    if missing:
        raise _conflict(environ, given, f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    local_rank, local_size = _number(environ, "LOCAL_RANK", 0), _number(environ, "LOCAL_WORLD_SIZE", size)
    if not 0 < _number(environ, "MASTER_PORT", 0) < 2**16:
        raise _conflict(environ, ["MASTER_PORT"], "it must be a port, 1 to 65535")
    if rank >= size:
        raise _conflict(environ, given, "RANK must be less than WORLD_SIZE")
    if not local_rank < local_size <= size:
        raise _conflict(environ, given, "LOCAL_RANK must be less than LOCAL_WORLD_SIZE, and that not more than WORLD_SIZE")
    return LauncherRank(rank, size, local_size, local_rank)


def local_rank_of(environ: Mapping[str, str]) -> int:
    """Return the rank of this process among those of its machine, also under ``srun`` alone; 0 without a launcher."""
    given = (environ.get(name, "") for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return next((int(text) for text in given if text.isascii() and text.isdecimal()), 0)


def slurm_cores(environ: Mapping[str, str]) -> float:
    """Return the cores that SLURM gave to all tasks on this node together; infinity if the variables do not state it."""
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    tasks = _tasks_on_node(counts, environ.get("SLURM_NODEID", "0"))
    return int(per_task) * tasks if per_task.isdecimal() and tasks is not None else math.inf


def wants_cpu(environ: Mapping[str, str]) -> bool:
    """Return True if the launcher asks for CPU training (``accelerate launch --cpu``)."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE


def check_settings(environ: Mapping[str, str]) -> None:
    """Refuse launcher settings that would make Accelerate deviate from the recipe.

    Raises:
        EveryRankError: such settings are present; the text names all of them.
    """
    refused = {name: text for name, text in _REFUSED_FLAGS.items() if environ.get(name, "").lower() in _TRUE}
    refused |= {name: text for name, text in _REFUSED_VALUES.items() if environ.get(name, "NO") != "NO"}
    if refused:
        listed = "; ".join(f"{name}={environ[name]} ({remedy})" for name, remedy in refused.items())
        raise EveryRankError(
            f"The launcher has settings that only the recipe may make: {listed}. Take them out of the environment, or of the "
            "file that `accelerate config` wrote (`accelerate launch --multi_gpu ...` leaves DeepSpeed and FSDP out)."
        )


def overruled_settings(environ: Mapping[str, str], precision: str) -> list[str]:
    """Return a sentence for each launcher setting that the recipe overrides.

    Args:
        environ: the process's environment; ``accelerate launch`` always sets these variables, so their values are compared.
        precision: precision of the run.
    """
    found = []
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", precision):
        found.append(f"ACCELERATE_MIXED_PRECISION={asked} has no effect: the precision is {precision} by train.precision")
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        found.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} has no effect: train.batch_size is the batch of a step, and "
            "train.micro_batch cuts it"
        )
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        found.append(f"ACCELERATE_DYNAMO_BACKEND={backend} has no effect: train.compile decides")
    return found


def _check_single_process(environ: Mapping[str, str]) -> None:
    """Raise ``UserError`` if the variables of SLURM or MPI name other processes."""
    if _number(environ, "SLURM_PROCID", 0) > 0:
        given = [name for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if name in environ]
        raise _conflict(environ, given, "this is not the first task, and SLURM_STEP_NUM_TASKS names no others")
    several = [name for name in _MPI_VARIABLES if _number(environ, name, 1) > 1]
    if several:
        raise _conflict(environ, several, "mpirun is not supported, and each of its processes would train alone")


def _conflict(environ: Mapping[str, str], names: Sequence[str], problem: str) -> UserError:
    given = " ".join(f"{name}={environ[name]}" for name in names)
    unset = " ".join(f"-u {name}" for name in names)
    return UserError(
        f"The launcher's variables do not fit together: {given}: {problem}. torchrun, accelerate launch and srun set all that "
        f"belong together. To train in one process, take these away: env {unset} python launch.py ..."
    )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise _conflict(environ, [name], "it is not a number")
    return int(text)


def _set_torch_variables(environ: MutableMapping[str, str], tasks: int) -> None:
    """Set torch's variables from those of a SLURM job step."""
    given = ["SLURM_STEP_NUM_TASKS", *(name for name in _SRUN_VARIABLES if name in environ)]
    missing = [name for name in _SRUN_VARIABLES if not environ.get(name)]
    if missing:
        raise _conflict(environ, given, f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    on_node = _tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], environ["SLURM_NODEID"])
    if on_node is None:
        raise _conflict(environ, given, "SLURM_STEP_TASKS_PER_NODE does not tell the tasks of this node")
    if (rank := _number(environ, "SLURM_PROCID", 0)) >= tasks:
        raise _conflict(environ, given, "SLURM_PROCID must be less than SLURM_STEP_NUM_TASKS")
    environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(_number(environ, "SLURM_LOCALID", 0)),
        WORLD_SIZE=str(tasks),
        LOCAL_WORLD_SIZE=str(on_node),
    )
    environ.setdefault("MASTER_ADDR", _first_host(environ))
    step = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}"  # several steps of a job may run at a time
    environ.setdefault("MASTER_PORT", str(master_port(step, restart_of(environ))))


def master_port(job_id: str, restart: int) -> int:
    """Return a port for this start of this job or job step, below Linux's ephemeral ports (32768 and above)."""
    return _FIRST_PORT + crc32(f"{job_id}.{restart}".encode()) % _NUM_PORTS


def _tasks_on_node(counts: str, node: str) -> int | None:
    """Return the tasks of a node from SLURM's compressed list (``4(x2),3``), or None if the list is malformed or too short."""
    found: list[int] = []
    try:
        for part in counts.split(","):
            number, _, times = part.partition("(x")
            found += [int(number)] * int(times.rstrip(")") or 1)
        return found[int(node)]
    except (ValueError, IndexError):
        return None


def _first_host(environ: Mapping[str, str]) -> str:
    """Return the first node of the job step; scontrol expands the host list."""
    nodes = environ["SLURM_STEP_NODELIST"]
    if "[" not in nodes:
        return nodes.split(",")[0]
    answer = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
    return answer.stdout.split()[0]


def job_of(environ: Mapping[str, str]) -> str | None:
    """Return the id of the process's batch job, ``123`` or ``123_4`` for an array task; None outside a job.

    The SLURM_JOB_ID of an array task may be the id of the whole array. The pods of a JobSet have its id in JOBSET_UID
    (containers/jobset.yaml).
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID") or environ.get("JOBSET_UID")


def restart_of(environ: Mapping[str, str]) -> int:
    """Return how often SLURM, or the controller of a JobSet, has restarted the process's job."""
    count = environ.get("SLURM_RESTART_COUNT") or environ.get("JOBSET_RESTART_ATTEMPT", "")
    return int(count) if count.isdecimal() else 0


def start_of(environ: Mapping[str, str]) -> str | None:
    """Return the id of one start of a job, such as ``123_4.0``; None outside a job."""
    job_id = job_of(environ)
    return f"{job_id}.{restart_of(environ)}" if job_id is not None else None


def tunnel_command(port: int) -> str:
    """Return the command that makes a page of this machine visible under the same port of a user's own one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = "USER"
    return shlex.join(["ssh", "-N", "-L", f"{port}:localhost:{port}", f"{user}@{socket.gethostname()}"])
