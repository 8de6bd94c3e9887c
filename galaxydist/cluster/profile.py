"""Cluster profiles: typed YAML files with the resources and settings of a job.

They are checked as strictly as recipes; ``cluster.nodes=2`` on the command line changes one value.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from galaxydist.paths import shipped_dir
from galaxydist.recipe.fields import CrossFieldRule, Schema
from galaxydist.recipe.resolve import ConfigError, ConfigSpec, ResolvedConfig, list_files, load_config
from galaxydist.recipe.schema import Count, Section

# Time from the start of the job to the first step: 8 s on a laptop (`galaxydist bench startup`), longer if the nodes read
# Python over the network.
START_UP_S = 30
# Shortest time between the signal and the time limit, for writing a checkpoint and exiting.
MIN_SIGNAL_S = 10
# "Due to the resolution of event handling by Slurm, the signal may be sent up to 60 seconds earlier than specified" (sbatch(1)).
EARLY_S = 60
MAX_DAYS = 365

TIME_FORMS = "minutes, or HH:MM:SS, D-HH:MM:SS, D-HH (04:00:00 and 240 are four hours)"
_TIME = re.compile(
    r"(?:(?P<days>\d{1,4})-(?P<hours>\d{1,2})(?::(?P<minutes>\d{2})(?::(?P<seconds>\d{2}))?)?)|(?P<clock>\d{1,4}:\d{2}:\d{2})",
    re.ASCII,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_DEPENDENCY = re.compile(r"((after|afterany|afterok|afternotok):)?[0-9]+(_[0-9]+)?(:[0-9]+(_[0-9]+)?)*", re.ASCII)

# Set for each process by SLURM or by the process itself.
SET_FOR_EACH_PROCESS = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
}  # fmt: skip
INTERFACES = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}

# Option of sbatch -> profile key that sets it.
KEYS_OF_OPTIONS = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
    "nodelist": "nodelist", "reservation": "reservation", "comment": "comment", "nodes": "nodes", "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node", "gpus": "gpus_per_node", "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node", "cpus-per-task": "cpus_per_task", "mem": "memory", "time": "time", "signal": "signal_s",
    "requeue": "requeue", "no-requeue": "requeue", "export": "environment", "dependency": "after",
}  # fmt: skip
# Options of sbatch, and below of srun, that galaxydist sets itself.
OWN_OPTIONS = {
    "array", "output", "error", "open-mode", "job-name", "wrap", "chdir", "parsable", "test-only", "wait",
}  # fmt: skip
OWN_SRUN_OPTIONS = {"output", "error", "input", "unbuffered", "kill-on-bad-exit", "multi-prog", "test-only", "job-name", "chdir"}


def read_time_s(time: int | str) -> int:
    """Return a time limit in seconds.

    Args:
        time: minutes, or text in one of SLURM's unambiguous forms.

    Raises:
        ValueError: not one of these forms, not positive, or more than a year.
    """
    if isinstance(time, int) or re.fullmatch(r"[0-9]{1,9}", time):
        seconds = 60 * int(time)
    else:
        match = _TIME.fullmatch(time)
        if match is None:
            hint = "; SLURM reads 4:00 as four minutes" if re.fullmatch(r"\d{1,4}:\d{2}", time) else ""
            raise ValueError(f"must be {TIME_FORMS}{hint}")
        parts = [int(part) for part in match["clock"].split(":")] if match["clock"] else [
            int(match[name] or 0) for name in ("hours", "minutes", "seconds")
        ]  # fmt: skip
        hours, minutes, rest = parts
        if minutes > 59 or rest > 59 or (match["days"] and hours > 23):
            raise ValueError(f"has more minutes or seconds than 59, or more hours beside days than 23; it must be {TIME_FORMS}")
        seconds = int(match["days"] or 0) * 86_400 + hours * 3600 + minutes * 60 + rest
    if not 0 < seconds <= MAX_DAYS * 86_400:
        raise ValueError(f"must be more than 0 and at most {MAX_DAYS} days")
    return seconds


def _time(time: int | str) -> str | None:
    try:
        read_time_s(time)
    except ValueError as error:
        return str(error)
    return None


def _time_for_work(scheduler: str, time: int | str, signal_s: int) -> str | None:
    try:
        time_s = read_time_s(time)
    except ValueError:
        return None  # _time reports it
    if scheduler == "local":
        return None  # a local run has no time limit
    if signal_s >= time_s:
        return f"the signal to save would come {signal_s} s before the end of a job of {time_s} s; raise the limit"
    most = time_s - EARLY_S - START_UP_S
    if signal_s > most:
        later = f", or signal_s={most} or less" if most >= MIN_SIGNAL_S else ""
        return (
            f"a start takes {START_UP_S} s, and SLURM may send the signal to save {EARLY_S} s earlier than "
            f"{signal_s} s before the limit of {time_s} s, so that no step is done: set "
            f"{-(-(START_UP_S + EARLY_S + signal_s) // 60)} minutes or more{later}"
        )
    return None


def _local_nodes(scheduler: str, nodes: int) -> str | None:
    return (
        "there is one local machine; set nodes=1, or use a profile with scheduler: slurm"
        if scheduler == "local" and nodes > 1
        else None
    )


def _only_slurm(scheduler: str, *values: object) -> str | None:
    if scheduler == "local" and any(value is not None and value != () for value in values):
        return "local runs do not use it; remove it, or use a profile with scheduler: slurm"
    return None


def _gpu_type(gpu_type: str | None, gpus_per_node: int) -> str | None:
    if gpu_type is None:
        return None
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", gpu_type):
        return "give only the type: a100 for gpu:a100:4"
    if gpus_per_node > 1 and is_mig(gpu_type):
        return "its GPUs are MIG slices, of which CUDA shows a process only the first: set gpus_per_node=1"
    return None if gpus_per_node else "no GPUs are requested; set gpus_per_node too"


def is_mig(gpu_type: str) -> bool:
    """Return True if the type names a MIG slice, such as ``1g.10gb`` or ``a100_3g.20gb``.

    A process can use only one slice (NVIDIA, Multi-Instance GPU User Guide, "CUDA device enumeration").
    """
    return re.search(r"(^|[_.-])\d+g\.\d+gb", gpu_type) is not None


def _tasks(tasks_per_node: int, gpus_per_node: int) -> str | None:
    if gpus_per_node and tasks_per_node > gpus_per_node:
        return "two processes cannot share a GPU; set 0, which means one process a GPU"
    if gpus_per_node and 0 < tasks_per_node < gpus_per_node:
        return f"each process uses one GPU, so {gpus_per_node - tasks_per_node} a node would stay idle; request {tasks_per_node}"
    return None


def _environment(environment: tuple[str, ...], interface: str | None) -> str | None:
    names: list[str] = []
    for item in environment:
        name, equals, value = item.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            return f"{item!r} is not NAME=VALUE, such as NCCL_DEBUG=INFO"
        if "\n" in value or "\0" in value:
            return f"the value of {name} has more than one line"
        if name in names:
            return f"{name} is given twice; keep one"
        if name in SET_FOR_EACH_PROCESS or name.startswith(("SLURM_", "SBATCH_")):
            return f"{name} is set for each process of a job; remove it"
        if name in INTERFACES and interface is not None:
            return f"{name} and interface set the same; keep one"
        names.append(name)
    return None


def _environment_variables(environment: tuple[str, ...]) -> str | None:
    """Refuse ``$`` in values, which the batch script quotes, so that no shell expands it."""
    item = next((item for item in environment if "$" in item.partition("=")[2]), None)
    return (
        None if item is None else f"{item!r} is quoted, so no shell expands its $; write a line of setup instead: export {item}"
    )


def _options(options: tuple[str, ...], *, program: str, examples: str, own: set[str]) -> str | None:
    seen: set[str] = set()
    for item in options:
        option = item.partition("=")[0]
        if option.startswith("-"):
            return f"{item!r}: write the option without dashes, {item.lstrip('-')}"
        if not _OPTION.fullmatch(option) or "\n" in item or "\0" in item:
            return f"{item!r} is not an option of {program} like {examples}"
        if option in KEYS_OF_OPTIONS:
            return f"{option} has its own key: {KEYS_OF_OPTIONS[option]}"
        if option in own:
            return f"{option} is set by galaxydist; remove it"
        if option in seen:
            return f"{option} is given twice; keep one"
        seen.add(option)
    return None


def _after(after: int | str | None) -> str | None:
    if after is None or _DEPENDENCY.fullmatch(str(after)):
        return None
    return "must be the id of a job, such as 123 or 123_4, or afterany:123, which waits for a job whether it fails or not"


def _extra_gpus(extra: tuple[str, ...], gpu_request: str, gpus_per_node: int) -> str | None:
    if gpu_request == "gres" and gpus_per_node and any(item.startswith("gres=") for item in extra):
        return "it would replace the gres of the GPUs; use gpu_request=gpus-per-node together with another gres"
    return None


def _one_line(*values: str | None) -> str | None:
    return "must be one line" if any(value is not None and re.search(r"[\n\r\0]", value) for value in values) else None


def _modules(modules: tuple[str, ...]) -> str | None:
    bad = next((module for module in modules if not re.fullmatch(r"\S+", module)), None)
    return None if bad is None else f"{bad!r} is not one module; write a list like [cuda/12.4,python/3.11]"


def _words(value: str | None) -> str | None:
    try:
        shlex.split(value or "")
    except ValueError as error:
        return f"a shell cannot read it: {error}"
    return None


def _scratch(scratch: Path | None) -> str | None:
    if scratch is None or scratch.is_absolute() or str(scratch).startswith("$"):
        return None
    return "must be an absolute path, such as /local, or begin with a variable of the job, such as $TMPDIR"


_ONE_LINERS = (
    "partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation", "comment", "python", "interface",
)  # fmt: skip
_SLURM_ONLY = (*_ONE_LINERS[:8], "extra", "srun", "after")

_extra = partial(_options, program="sbatch", examples="mail-type=END or exclusive", own=OWN_OPTIONS)
_srun = partial(_options, program="srun", examples="cpu-bind=cores or container-image=FILE", own=OWN_SRUN_OPTIONS)

CHECKS = (
    CrossFieldRule(("time",), _time),
    CrossFieldRule(("scheduler", "time", "signal_s"), _time_for_work),
    CrossFieldRule(("scheduler", "nodes"), _local_nodes),
    *(CrossFieldRule(("scheduler", key), _only_slurm) for key in _SLURM_ONLY),
    CrossFieldRule(("gpu_type", "gpus_per_node"), _gpu_type),
    CrossFieldRule(("tasks_per_node", "gpus_per_node"), _tasks),
    CrossFieldRule(("environment", "interface"), _environment),
    CrossFieldRule(("environment",), _environment_variables),
    CrossFieldRule(("extra",), _extra),
    CrossFieldRule(("srun",), _srun),
    CrossFieldRule(("after",), _after),
    CrossFieldRule(("extra", "gpu_request", "gpus_per_node"), _extra_gpus),
    *(CrossFieldRule((key,), _one_line) for key in _ONE_LINERS),
    CrossFieldRule(("modules",), _modules),
    CrossFieldRule(("container",), _words),
    CrossFieldRule(("scratch",), _scratch),
)


MB_IN_GB = 1024  # SLURM's M and G are powers of two


class ClusterError(ConfigError):
    """An invalid cluster profile."""

    noun = "cluster profile"


class ClusterConfig(Section):
    """A cluster profile: the resources to request and the setup of the nodes. Read-only."""

    name: str = Field(..., description="profile name: the file's", min_length=1)
    scheduler: Literal["slurm", "local"] = Field("slurm", description="local: processes on this machine, for tests")
    partition: str | None = Field(
        None, description="partition, or several with commas (else the cluster's default)", min_length=1
    )
    account: str | None = Field(None, description="account to charge (else your default)", min_length=1)
    qos: str | None = Field(None, description="quality of service (else the account's default)", min_length=1)
    constraint: str | None = Field(None, description="features that nodes must have, such as a100&ib", min_length=1)
    exclude: str | None = Field(None, description="nodes to avoid, such as n[3,7-9]", min_length=1)
    nodelist: str | None = Field(None, description="nodes that the job must include", min_length=1)
    reservation: str | None = Field(None, description="reservation to run in", min_length=1)
    comment: str | None = Field(None, description="text that SLURM stores with the job", min_length=1)
    nodes: Count = Field(1, description="nodes of a job")
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(0, description="GPUs of each node (0: train on CPUs)")
    gpu_request: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="how GPUs are requested on this cluster: --gpus-per-node=4, or --gres=gpu:4"
    )
    gpu_type: str | None = Field(
        None, description="type of GPU, as sinfo's GRES column spells it: a100 in gpu:a100:4", min_length=1
    )
    tasks_per_node: Annotated[int, Field(ge=0)] = Field(
        0, description="processes on each node (0: one a GPU, or one without GPUs)"
    )
    cpus_per_task: Count | None = Field(
        None, description="CPUs of each process, which decode images (else the cluster's default)"
    )
    memory: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="GB of each node (0: all that it has; else the cluster's default)"
    )
    time: int | str = Field(60, description="time limit: minutes, or HH:MM:SS, D-HH:MM:SS, D-HH")
    signal_s: Annotated[int, Field(ge=MIN_SIGNAL_S, le=65_535)] = Field(
        120,
        description="seconds before the time limit of the signal to save (SLURM may send it a minute earlier)",
    )
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    setup: tuple[str, ...] = Field((), description="shell lines of the batch script before the processes start")
    environment: tuple[str, ...] = Field((), description="NAME=VALUE of the processes")
    container: str | None = Field(
        None, description="command in front of python, such as apptainer exec --nv image.sif", min_length=1
    )
    python: str | None = Field(None, description="python on the nodes (else the one that submits)", min_length=1)
    interface: str | None = Field(None, description="network interface between nodes, such as ib0 (else detected)", min_length=1)
    extra: tuple[str, ...] = Field((), description="further options of sbatch: option=value, or option alone")
    srun: tuple[str, ...] = Field(
        (), description="further options of srun: option=value, or option alone, such as cpu-bind=cores or container-image=FILE"
    )
    requeue: Literal["auto", "resubmit", "never"] = Field(
        "auto",
        description="after preemption, time limit or crash: requeue the job (auto), submit a new one (resubmit), or stop (never)",
    )
    max_requeues: Annotated[int, Field(ge=0)] = Field(
        5, description="consecutive starts without a new checkpoint after which a run is not restarted any more"
    )
    after: int | str | None = Field(
        None,
        description="job that must succeed before this one starts: its id; or afterany:ID, which may fail",
    )
    parallel: Count = Field(8, description="most runs of a sweep at a time")
    scratch: Path | None = Field(
        None,
        description="folder on a local disk of the node, such as /local or $TMPDIR, which only `galaxydist doctor` checks "
        "(runs keep copies of shards in the recipe's data.cache_dir)",
    )

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        return read_time_s(self.time)

    @property
    def time_min(self) -> int:
        """The time limit in minutes, rounded up (SLURM's resolution)."""
        return -(-self.time_s // 60)

    @property
    def tasks_on_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def num_tasks(self) -> int:
        """Processes of a job."""
        return self.nodes * self.tasks_on_node

    @property
    def memory_mb(self) -> int | None:
        """Memory of each node in SLURM's MB (2^20 bytes); 0: all of the node, None: the cluster's default."""
        return None if self.memory is None else round(self.memory * MB_IN_GB)


@dataclass(frozen=True)
class ResolvedCluster(ResolvedConfig[ClusterConfig]):
    """A cluster profile with the origin of each value.

    Attributes:
        arguments: its ``cluster=`` and ``cluster.key=`` arguments.
    """

    arguments: tuple[str, ...] = ()


CLUSTERS = ConfigSpec(
    schema=Schema(ClusterConfig),
    rules=CHECKS,
    error=ClusterError,
    argument="cluster",
    examples=("a100", "nodes: 2", "cluster.nodes=2"),
    prefix="cluster.",
)


def load_cluster(arguments: Sequence[str], *, folders: Sequence[Path] | None = None) -> ResolvedCluster:
    """Load the cluster profile of a command line.

    Args:
        arguments: ``cluster=NAME`` or ``cluster=FILE.yaml``, then ``cluster.key=value`` for any key of the profile, in any order.
        folders: searched for names, in this order; default ``./slurm/clusters``, then the package's.

    Raises:
        ClusterError: lists all problems with their origins.
    """
    resolved = load_config(CLUSTERS, arguments, _folders() if folders is None else folders)
    return ResolvedCluster(resolved.config, resolved.origins, resolved.path, arguments=tuple(arguments))


def list_clusters() -> dict[str, Path]:
    """Return profile name -> file for every profile that ``cluster=NAME`` would find."""
    return list_files(_folders())


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the recipe's and the cluster's arguments, in order."""
    recipe: list[str] = []
    cluster: list[str] = []
    for argument in arguments:
        key = argument.partition("=")[0]
        (cluster if key == "cluster" or key.startswith("cluster.") else recipe).append(argument)
    return recipe, cluster


def _folders() -> tuple[Path, Path]:
    return Path("slurm") / "clusters", shipped_dir("slurm") / "clusters"
