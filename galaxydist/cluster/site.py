"""What SLURM says of a cluster: partitions with their limits and nodes, the user's accounts, qos, preemption.

Reading is apart from asking: ``parse_site`` takes the text that the commands printed, so that it can be read from a record too.
"""

import os
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from galaxydist.errors import UserError

PATIENCE_S = 30
UNTYPED = ""
TAKES_NO_JOBS = ("DRAIN", "INACTIVE")  # states of a partition

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
        "qos": ("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,MaxWall,Flags"),
    }
)
OPTIONAL = ("associations", "qos")  # a site without accounting, or one that keeps it to itself


class SiteUnknownError(UserError):
    """SLURM is not here, or does not answer."""


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
    """A partition; None where there is no limit, or SLURM does not tell."""

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
    """A quality of service; ``flags`` may lift the partition's limits."""

    name: str
    max_time_s: int | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """A cluster, as one user sees it.

    Attributes:
        settings: slurm.conf's, as ``scontrol show config`` has them.
        partitions: by name, in SLURM's order.
        default_account: the user's, None without accounting.
        associations: the user's; empty without accounting.
        qos: by name; empty without accounting.
    """

    settings: Mapping[str, str]
    partitions: Mapping[str, Partition]
    default_account: str | None = None
    associations: tuple[Association, ...] = ()
    qos: Mapping[str, Qos] = field(default_factory=dict)

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

    def accounts(self, partition: str | None = None) -> tuple[str, ...]:
        """The user's accounts, for one partition or for any."""
        found = (item.account for item in self.associations if partition is None or item.partition in (None, partition))
        return tuple(dict.fromkeys(found))

    def association(self, account: str | None, partition: str) -> Association | None:
        """The one that a job of this account in this partition would be charged to."""
        wanted = account or self.default_account
        found = [item for item in self.associations if item.account == wanted and item.partition in (None, partition)]
        return max(found, key=lambda item: item.partition is not None, default=None)


def read_site() -> Site:
    """Ask the SLURM of this machine.

    Raises:
        SiteUnknownError: there is none, or it does not answer.
    """
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user id without a name, as in some containers
        user = str(os.getuid())
    outputs: dict[str, str] = {}
    for name, command in COMMANDS.items():
        try:
            outputs[name] = _ask([part.format(user=user) for part in command])
        except SiteUnknownError:
            if name not in OPTIONAL:
                raise
    return parse_site(outputs)


def _ask(command: Sequence[str]) -> str:
    # Which partitions and columns a user likes to see is no matter here.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SINFO_")}
    program = command[0]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False, env=environ
        )
    except FileNotFoundError:
        raise SiteUnknownError(
            f"There is no SLURM on this machine ({program} is not on the PATH). Give the command on a login node of a cluster, "
            "or load the module that brings SLURM's programs."
        ) from None
    except subprocess.TimeoutExpired:
        raise SiteUnknownError(f"SLURM did not answer within {PATIENCE_S} s ({' '.join(command)}). Try again later.") from None
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
    return {row[0]: Qos(row[0], read_slurm_time_s(row[1]), _names(row[2]) or ()) for row in rows if len(row) >= 3}


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
