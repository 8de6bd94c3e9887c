"""Cluster profiles: what to ask a cluster for. YAML files, typed and strict like recipes; ``cluster.nodes=2`` changes one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from galaxydist.cluster.profile_checks import CHECKS, MIN_SIGNAL_S, read_time_s
from galaxydist.paths import shipped_dir
from galaxydist.recipe.fields import Schema
from galaxydist.recipe.resolve import ConfigError, ConfigKind, list_files, load_config
from galaxydist.recipe.schema import Count, Section

MB_IN_GB = 1024  # SLURM's M and G are powers of two


class ClusterError(ConfigError):
    """A cluster profile that cannot be used."""

    noun = "cluster profile"


class ClusterConfig(Section):
    """What to ask a cluster for, and how its nodes are set up. Read-only."""

    name: str = Field(..., description="profile name: the file's", min_length=1)
    scheduler: Literal["slurm", "local"] = Field("slurm", description="local: processes of this machine, to try things")
    partition: str | None = Field(
        None, description="partition, or several with commas (else the cluster's default)", min_length=1
    )
    account: str | None = Field(None, description="account that is charged (else your default)", min_length=1)
    qos: str | None = Field(None, description="quality of service (else the account's default)", min_length=1)
    constraint: str | None = Field(None, description="features that nodes must have, such as a100&ib", min_length=1)
    exclude: str | None = Field(None, description="nodes to keep away from, such as n[3,7-9]", min_length=1)
    nodelist: str | None = Field(None, description="nodes that must be among the job's", min_length=1)
    reservation: str | None = Field(None, description="reservation to run in", min_length=1)
    comment: str | None = Field(None, description="text that SLURM keeps with the job", min_length=1)
    nodes: Count = Field(1, description="nodes of a job")
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(0, description="GPUs of each node (0: train on CPUs)")
    gpu_request: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="how this cluster wants GPUs asked for: --gpus-per-node=4, or --gres=gpu:4"
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
        description="seconds before the time limit at which processes are told to save (SLURM may do it a minute earlier)",
    )
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    setup: tuple[str, ...] = Field((), description="shell lines of the batch script before the processes start")
    environment: tuple[str, ...] = Field((), description="NAME=VALUE of the processes")
    container: str | None = Field(
        None, description="words put in front of python, such as apptainer exec --nv image.sif", min_length=1
    )
    python: str | None = Field(None, description="python on the nodes (else the one that submits)", min_length=1)
    interface: str | None = Field(None, description="network interface between nodes, such as ib0 (else found)", min_length=1)
    extra: tuple[str, ...] = Field((), description="further options of sbatch: option=value, or option alone")
    srun: tuple[str, ...] = Field(
        (), description="further options of srun: option=value, or option alone, such as cpu-bind=cores or container-image=FILE"
    )
    requeue: Literal["auto", "resubmit", "never"] = Field(
        "auto",
        description="after preemption, time limit or crash: requeue the job, submit it anew (resubmit), or leave it (never)",
    )
    max_requeues: Annotated[int, Field(ge=0)] = Field(
        5, description="starts in a row without a new checkpoint after which a run no longer goes on by itself"
    )
    after: int | str | None = Field(
        None,
        description="job that must have ended well before this one starts: its id, or afterany:ID where it may end as it likes",
    )
    parallel: Count = Field(8, description="runs of a sweep at the same time")
    scratch: Path | None = Field(
        None,
        description="folder on a disk of the node's own, such as /local or $TMPDIR; `galaxydist doctor` looks at it, nothing "
        "else uses it (the recipe's data.cache_dir is where runs put copies)",
    )

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        return read_time_s(self.time)

    @property
    def time_min(self) -> int:
        """The time limit in minutes, SLURM's resolution, rounded up."""
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
        """MB of each node as SLURM counts them; 0: all that it has; None: the cluster's default."""
        return None if self.memory is None else round(self.memory * MB_IN_GB)


@dataclass(frozen=True)
class ResolvedCluster:
    """A cluster profile and where it came from.

    Attributes:
        config: the values.
        origins: key -> ``schema default``, ``slurm/clusters/a100.yaml:7``, ``command line`` or ``file name``.
        path: the profile's file.
        arguments: the ``cluster=`` and ``cluster.key=`` that it was read from.
    """

    config: ClusterConfig
    origins: Mapping[str, str]
    path: Path
    arguments: tuple[str, ...] = ()


CLUSTERS = ConfigKind(
    schema=Schema(ClusterConfig),
    checks=CHECKS,
    error=ClusterError,
    argument="cluster",
    examples=("a100", "nodes: 2", "cluster.nodes=2"),
    prefix="cluster.",
)


def load_cluster(arguments: Sequence[str], *, folders: Sequence[Path] | None = None) -> ResolvedCluster:
    """The cluster profile of a command line.

    Args:
        arguments: ``cluster=NAME`` or ``cluster=FILE.yaml``, then ``cluster.key=value`` for any key of the profile, in any order.
        folders: where names are looked up, first one first; default ``./slurm/clusters``, then those that ship with the package.

    Raises:
        ClusterError: with all problems at once, and where each came from.
    """
    resolved = load_config(CLUSTERS, arguments, _folders() if folders is None else folders)
    return ResolvedCluster(resolved.config, resolved.origins, resolved.path, tuple(arguments))


def list_clusters(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Profile name -> file, of every profile that ``cluster=NAME`` would find."""
    return list_files(_folders() if folders is None else folders)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The recipe's arguments and the cluster's (``cluster=NAME``, ``cluster.key=value``) of a command line, in their order."""
    recipe: list[str] = []
    cluster: list[str] = []
    for argument in arguments:
        key = argument.partition("=")[0]
        (cluster if key == "cluster" or key.startswith("cluster.") else recipe).append(argument)
    return recipe, cluster


def _folders() -> tuple[Path, Path]:
    return Path("slurm") / "clusters", shipped_dir("slurm") / "clusters"
