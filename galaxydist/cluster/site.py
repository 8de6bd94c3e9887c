"""Cluster description from SLURM: partitions, nodes, the user's accounts and qos, preemption."""

import grp
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import psutil

from galaxydist.cluster.profile import MIN_SIGNAL_S
from galaxydist.cluster.slurm import SlurmUnavailableError, parse_duration, run_slurm, split_rows

UNTYPED = ""
CLOSED_STATES = ("DRAIN", "INACTIVE")  # states of a partition that accepts no jobs


@dataclass(frozen=True)
class NodeGroup:
    """Identical nodes of a partition.

    Attributes:
        count: number of nodes.
        cpus: CPUs of each node.
        memory_mb: memory of each node in SLURM's MB.
        gpus: GPU type (``""`` if the cluster names no types) -> number in each node.
        features: features that ``constraint`` can name.
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
    """A partition; None means no limit, or not reported by SLURM.

    Attributes:
        preempt_mode: PreemptMode of its jobs.
        grace_s: seconds between a preemption's signal and the end of the job.
        tier: PriorityTier; jobs of a higher tier may preempt these.
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
    """An association of the user: an account to charge, its partition (None: any) and the allowed qos."""

    account: str
    partition: str | None
    qos: tuple[str, ...]
    default_qos: str | None

    @property
    def usual_qos(self) -> str | None:
        """The qos of a job that names none; SLURM's own default is ``normal``."""
        return self.default_qos or ("normal" if "normal" in self.qos else None)


@dataclass(frozen=True)
class Qos:
    """A quality of service; ``flags`` may lift the partition's limits.

    Attributes:
        grace_s: seconds between a preemption's signal and the end of the job; None: not reported by SLURM.
        preempt_mode: PreemptMode of its jobs; None: the cluster's PreemptMode.
        preempts: the qos whose jobs this one may preempt.
    """

    name: str
    max_time_s: int | None
    flags: tuple[str, ...]
    grace_s: int | None = None
    preempt_mode: str | None = None
    preempts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A cluster as one user sees it.

    Attributes:
        settings: of slurm.conf, as ``scontrol show config`` prints them.
        partitions: by name, in SLURM's order.
        default_account: the user's default account; None without accounting.
        associations: the user's associations; empty without accounting.
        qos: by name; empty without accounting.
        user: the user's name; empty if unknown.
        groups: the user's groups; None if unknown.
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

    def enforces(self, limit: str) -> bool:
        """Return True if SLURM enforces ``associations``, ``limits`` or ``qos`` (the last two include the first)."""
        enforced = set(self.settings.get("AccountingStorageEnforce", "").lower().split(","))
        implied = {"associations": {"limits", "qos", "safe", "wckeys", "all"}, "limits": {"safe", "all"}, "qos": {"all"}}
        return limit in enforced or not enforced.isdisjoint(implied[limit])

    def closed_to_user(self, partition: Partition) -> str:
        """Explain why a partition refuses the user (RootOnly, AllowGroups); empty if it does not, or if unknown."""
        slurm_user = self.settings.get("SlurmUser", "root").partition("(")[0]
        if self.user in ("", "root", slurm_user):  # root and SlurmUser may use every partition (slurm.conf(5), AllowGroups)
            return ""
        if partition.root_only:
            return "only root may submit there (RootOnly=YES)"
        allowed = partition.allow_groups
        if allowed is not None and self.groups is not None and not set(allowed) & set(self.groups):
            return f"it is for the groups {', '.join(allowed)}, and you are in {', '.join(self.groups) or 'none'}"
        return ""

    def accounts(self, partition: str | None = None) -> tuple[str, ...]:
        """Return the user's accounts for one partition, or for any."""
        found = (item.account for item in self.associations if partition is None or item.partition in (None, partition))
        return tuple(dict.fromkeys(found))

    def association(self, account: str | None, partition: str) -> Association | None:
        """Return the association that a job of this account and partition is charged to."""
        wanted = account or self.default_account
        found = [item for item in self.associations if item.account == wanted and item.partition in (None, partition)]
        return max(found, key=lambda item: item.partition is not None, default=None)

    def qos_of(self, qos: str | None, account: str | None, partition: str) -> Qos | None:
        """Return the qos of a job; None if unknown.

        Args:
            qos, account: given in the job's profile; None: the user's default.
            partition: the job's partition.
        """
        association = self.association(account, partition)
        return self.qos.get(qos or (association.usual_qos if association is not None else None) or "")


# ``parse_site`` is separate from ``read_site``, so that recorded output can be parsed too.

# Name -> command. Each prints machine-readable text, in the same form since SLURM 20.
COMMANDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "config": ("scontrol", "show", "config"),
        "partitions": ("scontrol", "--all", "--oneliner", "show", "partition"),
        "nodes": ("sinfo", "--all", "--noheader", "--exact", "--format=%R|%D|%c|%m|%G|%f"),
        "associations": (
            *("sacctmgr", "--noheader", "--parsable2", "show", "user", "{user}", "withassoc"),
            "format=Cluster,DefaultAccount,Account,Partition,QOS,DefaultQOS",
        ),
        "qos": (
            *("sacctmgr", "--noheader", "--parsable2", "show", "qos"),
            "format=Name,MaxWall,Flags,GraceTime,PreemptMode,Preempt",
        ),
    }
)
OPTIONAL = ("associations", "qos")  # a site may have no accounting, or not show it


def read_site() -> Site:
    """Read the description of this machine's cluster from SLURM.

    Raises:
        SlurmUnavailableError: there is no SLURM, or it does not answer.
    """
    user = psutil.Process().username()  # the user id if it has no name, as in some containers
    outputs: dict[str, str] = {}
    for name, command in COMMANDS.items():
        try:
            outputs[name] = _run([part.format(user=user) for part in command])
        except SlurmUnavailableError:
            if name not in OPTIONAL:
                raise
    return replace(parse_site(outputs), user=user, groups=_groups(user))


def _groups(user: str) -> tuple[str, ...] | None:
    """Return all of the user's groups (this process may have dropped some); None if unknown."""
    try:
        return tuple(grp.getgrgid(number).gr_name for number in os.getgrouplist(user, os.getgid()))
    except (KeyError, OSError):
        return None


def _run(command: Sequence[str]) -> str:
    done = run_slurm(command)
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split())
        raise SlurmUnavailableError(
            f"SLURM does not answer: `{command[0]}` failed: {message}. See `scontrol ping`, and try again later."
        )
    return done.stdout


def parse_site(outputs: Mapping[str, str]) -> Site:
    """Parse the outputs of ``COMMANDS``; fields of a missing output stay unknown.

    Args:
        outputs: name of a command -> its standard output.
    """
    settings = _parse_config(outputs.get("config", ""))
    groups = _parse_nodes(outputs.get("nodes", ""))
    partitions = {}
    for line in outputs.get("partitions", "").splitlines():
        partition = _parse_partition(line, settings)
        if partition is not None:
            partitions[partition.name] = replace(partition, nodes=groups.get(partition.name, ()))
    default_account, associations = _parse_associations(outputs.get("associations", ""), settings.get("ClusterName"))
    return Site(settings, partitions, default_account, associations, _parse_qos(outputs.get("qos", "")))


def _parse_config(text: str) -> dict[str, str]:
    found = (re.fullmatch(r"\s*([A-Za-z_]\w*)\s+=\s?(.*?)\s*", line) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def _parse_nodes(text: str) -> dict[str, tuple[NodeGroup, ...]]:
    """Return partition -> node groups. Nodes that differ only in their state form one group."""
    found: dict[str, dict[tuple[object, ...], NodeGroup]] = {}
    for name, count, cpus, memory, gres, features in split_rows(text, 6):
        group = NodeGroup(_leading(count), _leading(cpus), _leading(memory), parse_gpus(gres), _names(features) or ())
        key = (group.cpus, group.memory_mb, tuple(group.gpus.items()), group.features)
        groups = found.setdefault(name, {})
        groups[key] = replace(group, count=group.count + (groups[key].count if key in groups else 0))
    return {name: tuple(groups.values()) for name, groups in found.items()}


def parse_gpus(gres: str) -> dict[str, int]:
    """Parse a node's gres into GPU type -> number: ``gpu:a100:4(S:0-1),nvme:1`` is ``{"a100": 4}``, ``gpu:2`` is ``{"": 2}``."""
    gpus: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = (part.strip() for part in item.split(":") if part.strip() != "no_consume")
        if name != "gpu":
            continue
        count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
        kind = rest[0] if rest else UNTYPED
        gpus[kind] = gpus.get(kind, 0) + count
    return gpus


def _parse_partition(line: str, settings: Mapping[str, str]) -> Partition | None:
    values = dict(item.partition("=")[::2] for item in line.split())
    if "PartitionName" not in values:
        return None
    preempts = settings.get("PreemptType", "preempt/none") != "preempt/none"
    return Partition(
        values["PartitionName"],
        default=values.get("Default") == "YES",
        hidden=values.get("Hidden") == "YES",
        state=values.get("State", "UP"),
        max_time_s=parse_duration(values.get("MaxTime", "")),
        min_nodes=_limit(values.get("MinNodes")) or 0,
        max_nodes=_limit(values.get("MaxNodes")),
        max_cpus_per_node=_limit(values.get("MaxCPUsPerNode")),
        max_memory_mb=_limit(values.get("MaxMemPerNode")),
        allow_accounts=_names(values.get("AllowAccounts", "ALL")),
        deny_accounts=_names(values.get("DenyAccounts", "")) or (),
        allow_qos=_names(values.get("AllowQos", "ALL")),
        deny_qos=_names(values.get("DenyQos", "")) or (),
        preempt_mode=values.get("PreemptMode", settings.get("PreemptMode", "OFF")) if preempts else "OFF",
        grace_s=_limit(values.get("GraceTime")) or 0,
        tier=_limit(values.get("PriorityTier")),
        allow_groups=_names(values.get("AllowGroups", "ALL")),
        root_only=values.get("RootOnly") == "YES",
    )


def _parse_associations(text: str, cluster: str | None) -> tuple[str | None, tuple[Association, ...]]:
    """Return the user's default account and associations on this cluster."""
    default = None
    found = []
    for its_cluster, its_default, account, partition, qos, default_qos in split_rows(text, 6):
        if account and (cluster is None or its_cluster.lower() == cluster.lower()):
            default = its_default or default
            found.append(Association(account, partition or None, _names(qos) or (), default_qos or None))
    return default, tuple(found)


def _parse_qos(text: str) -> dict[str, Qos]:
    found = {}
    for name, limit, flags, grace, mode, preempts in split_rows(text, 6):
        found[name] = Qos(
            name,
            parse_duration(limit),
            _names(flags) or (),
            grace_s=parse_duration(grace),
            preempt_mode=None if mode.lower() in ("", "cluster", "off") else mode.upper(),
            preempts=_names(preempts) or (),
        )
    return found


def _leading(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def _limit(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _names(text: str) -> tuple[str, ...] | None:
    """Return the members of a comma-separated list; None if it is ALL or empty."""
    names = tuple(name for name in text.split(",") if name and name not in ("(null)", "N/A"))
    return None if not names or names == ("ALL",) else names


# Preemption: see slurm.conf(5), PreemptType, PreemptMode, GraceTime, preempt_send_user_signal; sacctmgr(1) for qos.

# Bounds the loss if a preemption's signal is missing or too late.
SAVE_REMEDY = "set train.save_minutes=10 in the recipe: then at most 10 minutes are lost"


@dataclass(frozen=True)
class Preemption:
    """Preemption of the jobs of a partition.

    Attributes:
        kind: the cluster's PreemptType: ``partition_prio`` or ``qos``.
        mode: REQUEUE, CANCEL or SUSPEND.
        grace_s: seconds between the signal and the end of the job; 0: no signal; None: not reported by SLURM.
        signal: the signal at the start of the grace time.
    """

    kind: str
    mode: str
    grace_s: int | None
    signal: str

    @property
    def is_too_short(self) -> bool:
        """True if there is a signal, but too little time to write a checkpoint and exit."""
        return self.grace_s is not None and 0 < self.grace_s < MIN_SIGNAL_S


def find_preemption(site: Site, partition: Partition, qos: Qos | None) -> Preemption | None:
    """Return how jobs of a partition are preempted; None if they are not.

    Args:
        site: the cluster.
        partition: of the job.
        qos: of the job; None if unknown.
    """
    kind = site.settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    signal = "SIGUSR2" if "preempt_send_user_signal" in site.settings.get("SlurmctldParameters", "") else "SIGTERM"
    if kind == "none":
        return None
    if kind == "qos":
        mode = _ending(qos.preempt_mode if qos is not None and qos.preempt_mode else site.settings.get("PreemptMode", ""))
        # If the qos are unknown, another one may preempt the job.
        is_last = qos is None or any(qos.name in other.preempts for other in site.qos.values())
        return Preemption(kind, mode, qos.grace_s if qos is not None else None, signal) if mode and is_last else None
    mode = _ending(partition.preempt_mode)
    tiers = [other.tier for other in site.partitions.values()]
    is_first = None not in (*tiers, partition.tier) and all((tier or 0) <= (partition.tier or 0) for tier in tiers)
    return None if not mode or is_first else Preemption(kind, mode, partition.grace_s, signal)


def _ending(mode: str) -> str:
    """Return the REQUEUE, CANCEL or SUSPEND of a PreemptMode (not GANG); empty if there is none."""
    return next((word for word in mode.upper().split(",") if word in ("REQUEUE", "CANCEL", "SUSPEND")), "")
