"""Asking the SLURM of this machine what it is: partitions, nodes, the user's accounts and groups, qos.

Reading is apart from asking: ``parse_site`` takes the text that the commands printed, so that it can be read from a record too.
"""

import grp
import os
import pwd
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from galaxydist.cluster.programs import SchedulerAwayError, ask_slurm
from galaxydist.cluster.site import UNTYPED, Association, NodeGroup, Partition, Qos, Site
from galaxydist.errors import UserError

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
        done = ask_slurm(command)
    except SchedulerAwayError as error:
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
