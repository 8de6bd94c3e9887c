"""A cluster as its SLURM describes it to one user: partitions with their limits and nodes, accounts, qos, preemption."""

import grp
import os
import pwd
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from galaxydist.cluster.profile import MIN_SIGNAL_S
from galaxydist.cluster.slurm import SlurmUnavailableError, run_slurm
from galaxydist.errors import UserError

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


# Asking the SLURM of this machine what it is: partitions, nodes, the user's accounts and groups, qos.
#
# Reading is apart from asking: ``parse_site`` takes the text that the commands printed, so that it can be read from a
# record too.

# Name -> the command; each prints text that is made for programs, in the same form since SLURM 20.
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
OPTIONAL = ("associations", "qos")  # a site without accounting, or one that keeps it to itself


class SiteUnknownError(UserError):
    """SLURM is not here, or does not answer."""


def read_site() -> Site:
    """Ask the SLURM of this machine.

    Raises:
        SiteUnknownError: there is none, or it does not answer.
    """
    user = _user_name()
    outputs: dict[str, str] = {}
    for name, command in COMMANDS.items():
        try:
            outputs[name] = _ask([part.format(user=user) for part in command])
        except SiteUnknownError:
            if name not in OPTIONAL:
                raise
    return replace(parse_site(outputs), user=user, groups=_groups(user))


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user id without a name, as in some containers
        return str(os.getuid())


def _groups(user: str) -> tuple[str, ...] | None:
    """The user's groups by name, as the system knows them (a process may have dropped some); None: they cannot be told."""
    try:
        return tuple(grp.getgrgid(number).gr_name for number in os.getgrouplist(user, os.getgid()))
    except (KeyError, OSError):
        return None


def _ask(command: Sequence[str]) -> str:
    program = command[0]
    if shutil.which(program) is None:
        raise SiteUnknownError(
            f"There is no SLURM on this machine ({program} is not on the PATH). Give the command on a login node of a cluster, "
            "or load the module that brings SLURM's programs."
        )
    try:
        done = run_slurm(command)
    except SlurmUnavailableError as error:
        raise SiteUnknownError(str(error)) from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise SiteUnknownError(f"SLURM does not answer: `{program}` said: {said}. See `scontrol ping`, and try again later.")
    return done.stdout


def parse_site(outputs: Mapping[str, str]) -> Site:
    """The cluster, from what ``COMMANDS`` printed; what is missing is not known.

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
    """Partition -> its groups of nodes. Nodes that differ in state alone are one group."""
    found: dict[str, dict[tuple[object, ...], NodeGroup]] = {}
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|", maxsplit=5)]
        if len(columns) < 6:
            continue
        name, count, cpus, memory, gres, features = columns
        group = NodeGroup(_leading(count), _leading(cpus), _leading(memory), parse_gpus(gres), _names(features) or ())
        key = (group.cpus, group.memory_mb, tuple(group.gpus.items()), group.features)
        groups = found.setdefault(name, {})
        groups[key] = replace(group, count=group.count + (groups[key].count if key in groups else 0))
    return {name: tuple(groups.values()) for name, groups in found.items()}


def parse_gpus(gres: str) -> dict[str, int]:
    """Type -> number of GPUs, of a node's gres: ``gpu:a100:4(S:0-1),nvme:1`` is ``{"a100": 4}``, ``gpu:2`` is ``{"": 2}``."""
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
        max_time_s=read_slurm_time_s(values.get("MaxTime", "")),
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
    """The default account on this cluster, and the associations there."""
    default = None
    found = []
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|")]
        if len(columns) < 6 or (cluster is not None and columns[0].lower() != cluster.lower()) or not columns[2]:
            continue
        default = columns[1] or default
        found.append(Association(columns[2], columns[3] or None, _names(columns[4]) or (), columns[5] or None))
    return default, tuple(found)


def _parse_qos(text: str) -> dict[str, Qos]:
    rows = [[column.strip() for column in line.split("|")] for line in text.splitlines()]
    return {row[0]: _parse_one_qos(row) for row in rows if len(row) >= 3}


def _parse_one_qos(row: Sequence[str]) -> Qos:
    grace, mode, preempts = row[3:6] if len(row) >= 6 else ("", "", "")
    return Qos(
        row[0],
        read_slurm_time_s(row[1]),
        _names(row[2]) or (),
        grace_s=read_slurm_time_s(grace),
        preempt_mode=None if mode.lower() in ("", "cluster", "off") else mode.upper(),
        preempts=_names(preempts) or (),
    )


def read_slurm_time_s(text: str) -> int | None:
    """Seconds of a time as SLURM prints it (``2-00:00:00``, ``00:30:00``, ``30:00``), None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 86_400 + hours * 3600 + minutes * 60 + seconds


def _leading(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def _limit(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _names(text: str) -> tuple[str, ...] | None:
    """The members of a list with commas; None where it is ALL or nothing at all."""
    names = tuple(name for name in text.split(",") if name and name not in ("(null)", "N/A"))
    return None if not names or names == ("ALL",) else names


# What SLURM does with a job whose nodes it gives to a more urgent one, and how long before it says so.
#
# The scheduler's own words: slurm.conf(5), PreemptType, PreemptMode, GraceTime, preempt_send_user_signal; sacctmgr(1) for
# qos.

# The recipe's key bounds what is lost where nobody is warned, or too late.
SAVE_REMEDY = "set train.save_minutes=10 in the recipe: at most so much is lost"


@dataclass(frozen=True)
class Preemption:
    """How jobs of a partition are preempted.

    Attributes:
        kind: ``partition_prio`` or ``qos``: what makes another job more urgent.
        mode: REQUEUE, CANCEL or SUSPEND.
        grace_s: seconds between the signal and the end; 0: no signal; None: SLURM does not tell.
        signal: the one that begins the grace.
    """

    kind: str
    mode: str
    grace_s: int | None
    signal: str

    @property
    def is_too_short(self) -> bool:
        """There is a signal, but not the time to write a checkpoint and leave."""
        return self.grace_s is not None and 0 < self.grace_s < MIN_SIGNAL_S


def find_preemption(site: Site, partition: Partition, qos: Qos | None) -> Preemption | None:
    """How jobs are preempted there; None: they are not.

    Args:
        site: the cluster.
        partition: of the job.
        qos: of the job; None: not known.
    """
    kind = site.settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    own_signal = "preempt_send_user_signal" in site.settings.get("SlurmctldParameters", "")
    signal = "SIGUSR2" if own_signal else "SIGTERM"
    if kind == "none":
        return None
    if kind == "qos":
        mode = _ending(qos.preempt_mode if qos is not None and qos.preempt_mode else site.settings.get("PreemptMode", ""))
        # Without the list of qos, any may come first.
        is_last = qos is None or any(qos.name in other.preempts for other in site.qos.values())
        return Preemption(kind, mode, qos.grace_s if qos is not None else None, signal) if mode and is_last else None
    mode = _ending(partition.preempt_mode)
    tiers = [other.tier for other in site.partitions.values()]
    is_first = None not in (*tiers, partition.tier) and all((tier or 0) <= (partition.tier or 0) for tier in tiers)
    return None if not mode or is_first else Preemption(kind, mode, partition.grace_s, signal)


def _ending(mode: str) -> str:
    """What becomes of the job, without what gang scheduling adds; empty: nothing."""
    return next((word for word in mode.upper().split(",") if word in ("REQUEUE", "CANCEL", "SUSPEND")), "")
