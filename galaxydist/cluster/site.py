"""A cluster as its SLURM describes it to one user: partitions with their limits and nodes, accounts, qos, preemption."""

from collections.abc import Mapping
from dataclasses import dataclass, field

UNTYPED = ""
TAKES_NO_JOBS = ("DRAIN", "INACTIVE")  # states of a partition


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that are alike.

    Attributes:
        count: how many.
        cpus: of each.
        memory_mb: of each, in SLURM's MB.
        gpus: type (``""`` where this cluster has none) -> how many, of each.
        features: for ``constraint``.
    """

    count: int
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    features: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        return sum(self.gpus.values())


@dataclass(frozen=True)
class Partition:
    """A partition; None where there is no limit, or SLURM does not tell.

    Attributes:
        preempt_mode: what becomes of its preempted jobs.
        grace_s: seconds between a preemption's signal and the end.
        tier: PriorityTier; jobs of a higher one may preempt these.
    """

    name: str
    nodes: tuple[NodeGroup, ...] = ()
    default: bool = False
    hidden: bool = False
    state: str = "UP"
    max_time_s: int | None = None
    min_nodes: int = 0
    max_nodes: int | None = None
    max_cpus_per_node: int | None = None
    max_memory_mb: int | None = None
    allow_accounts: tuple[str, ...] | None = None
    deny_accounts: tuple[str, ...] = ()
    allow_qos: tuple[str, ...] | None = None
    deny_qos: tuple[str, ...] = ()
    preempt_mode: str = "OFF"
    grace_s: int = 0
    tier: int | None = None
    allow_groups: tuple[str, ...] | None = None
    root_only: bool = False

    @property
    def num_gpus(self) -> int:
        return sum(group.count * group.num_gpus for group in self.nodes)


@dataclass(frozen=True)
class Association:
    """What the user may charge: an account, perhaps in one partition only, with these qos."""

    account: str
    partition: str | None
    qos: tuple[str, ...]
    default_qos: str | None

    @property
    def usual_qos(self) -> str | None:
        """What a job gets that names none; SLURM's own default is ``normal``."""
        return self.default_qos or ("normal" if "normal" in self.qos else None)


@dataclass(frozen=True)
class Qos:
    """A quality of service; ``flags`` may lift the partition's limits.

    Attributes:
        grace_s: seconds between a preemption's signal and the end; None: SLURM does not tell.
        preempt_mode: what becomes of a preempted job; None: the cluster's PreemptMode.
        preempts: the qos whose jobs may be preempted by those of this one.
    """

    name: str
    max_time_s: int | None
    flags: tuple[str, ...]
    grace_s: int | None = None
    preempt_mode: str | None = None
    preempts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A cluster, as one user sees it.

    Attributes:
        settings: slurm.conf's, as ``scontrol show config`` has them.
        partitions: by name, in SLURM's order.
        default_account: the user's, None without accounting.
        associations: the user's; empty without accounting.
        qos: by name; empty without accounting.
        user: who asks; empty: not known.
        groups: the user's; None: not known.
    """

    settings: Mapping[str, str]
    partitions: Mapping[str, Partition]
    default_account: str | None = None
    associations: tuple[Association, ...] = ()
    qos: Mapping[str, Qos] = field(default_factory=dict)
    user: str = ""
    groups: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return self.settings.get("ClusterName", "?")

    @property
    def default_partition(self) -> Partition | None:
        return next((partition for partition in self.partitions.values() if partition.default), None)

    def enforces(self, what: str) -> bool:
        """Whether SLURM holds jobs to ``associations``, ``limits`` or ``qos`` (the last two include the first)."""
        enforced = set(self.settings.get("AccountingStorageEnforce", "").lower().split(","))
        implied = {"associations": {"limits", "qos", "safe", "wckeys", "all"}, "limits": {"safe", "all"}, "qos": {"all"}}
        return what in enforced or not enforced.isdisjoint(implied[what])

    @property
    def may_use_all(self) -> bool:
        """The user is root or the one that slurmctld runs as, whom no partition keeps out (slurm.conf(5), AllowGroups)."""
        return self.user in ("root", self.settings.get("SlurmUser", "root").partition("(")[0])

    def closed_to_user(self, partition: Partition) -> str:
        """Why the user's jobs are not taken there, as far as groups say; empty: they are, or it is not known."""
        if not self.user or self.may_use_all:
            return ""
        if partition.root_only:
            return "only root may submit there (RootOnly=YES)"
        allowed = partition.allow_groups
        if allowed is not None and self.groups is not None and not set(allowed) & set(self.groups):
            return f"it is for the groups {', '.join(allowed)}, and you are in {', '.join(self.groups) or 'none'}"
        return ""

    def accounts(self, partition: str | None = None) -> tuple[str, ...]:
        """The user's accounts, for one partition or for any."""
        found = (item.account for item in self.associations if partition is None or item.partition in (None, partition))
        return tuple(dict.fromkeys(found))

    def association(self, account: str | None, partition: str) -> Association | None:
        """The one that a job of this account in this partition would be charged to."""
        wanted = account or self.default_account
        found = [item for item in self.associations if item.account == wanted and item.partition in (None, partition)]
        return max(found, key=lambda item: item.partition is not None, default=None)

    def qos_of(self, qos: str | None, account: str | None, partition: str) -> Qos | None:
        """What a job that names these would have; None: not known.

        Args:
            qos, account: that it names.
            partition: where it goes.
        """
        association = self.association(account, partition)
        return self.qos.get(qos or (association.usual_qos if association is not None else None) or "")
