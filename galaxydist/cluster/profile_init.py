"""Commented cluster profiles, generated from the SLURM configuration of a cluster."""

import json
import re
from collections.abc import Iterator

from galaxydist.cluster.partition_check import describe_gpus, time_text
from galaxydist.cluster.profile import EARLY_S, MB_IN_GB, MIN_SIGNAL_S, START_UP_S, is_mig
from galaxydist.cluster.site import CLOSED_STATES, UNTYPED, NodeGroup, Partition, Qos, Site, find_preemption
from galaxydist.errors import UserError
from galaxydist.recipe.scalars import BOOL, NULL

DAY_S = 86_400
# Some of a node's memory may be reserved for the system; sinfo does not show how much.
MEMORY_SHARE = 0.95
SIGNAL_S = 120
COMMENT_COLUMN = 32


def profile_text(site: Site, name: str, partition_name: str | None = None) -> str:
    """Return the text of a profile that loads and whose partition can run its jobs.

    Args:
        site: the cluster.
        name: of the profile.
        partition_name: the partition; default: one with GPUs (preferably the cluster's default), else the cluster's default.

    Raises:
        UserError: the partition does not exist, or the user can use none.
    """
    partition = _choose(site, partition_name)
    if not partition.nodes:
        raise UserError(
            f"Partition {partition.name} of {site.name} has no nodes; choose another with --partition: {_names(site)}"
        )
    _, account = _account(site, partition, site.accounts(partition.name))
    qos = site.qos.get(_qos(site, partition, account) or "")
    lines = [
        f"# Partition {partition.name} of {site.name}, as SLURM {site.settings.get('SLURM_VERSION', '')} describes it.",
        f"# Written by `galaxydist cluster init {name}`. Check it once; `galaxydist cluster show {name}` shows every key.",
        "#",
        *_table(site),
        *_identity(site, partition),
        *_nodes(site, partition),
        *_time(site, partition, qos),
        *_preemption(site, partition, qos),
        "# Settings that SLURM does not know:",
        _line("# interface", "ib0", "the fast network between nodes, if it is not detected"),
        _line("# modules", "[cuda]", "loaded on the nodes"),
        _line("# container", "apptainer exec --nv image.sif", ""),
        _line("# scratch", "$TMPDIR", "on a local disk of the node; `galaxydist doctor` checks it"),
    ]
    return "\n".join(_plain(line) for line in lines) + "\n"


def _choose(site: Site, wanted: str | None) -> Partition:
    if wanted is not None:
        if wanted not in site.partitions:
            raise UserError(f"--partition {wanted}: {site.name} has no such partition; it has {_names(site)}")
        return site.partitions[wanted]
    accounts = site.accounts()
    usable = [
        partition
        for partition in site.partitions.values()
        if partition.state in ("UP", "DOWN")
        and not partition.hidden
        and partition.nodes
        and not partition.root_only
        and not site.closed_to_user(partition)
        and _account(site, partition, accounts)[0]
    ]
    if not usable:
        raise UserError(f"{site.name} has no partition that you could use; name one with --partition: {_names(site)}")
    return max(usable, key=lambda partition: (partition.num_gpus > 0, partition.default, partition.num_gpus))


def _names(site: Site) -> str:
    return ", ".join(site.partitions) or "none"


def _table(site: Site) -> Iterator[str]:
    """Yield a commented table of all partitions and their node groups."""
    rows = [("partition", "nodes", "GPUs of a node", "CPUs", "memory", "longest job")]
    for partition in site.partitions.values():
        if not partition.hidden:
            longest = "no limit" if partition.max_time_s is None else time_text(partition.max_time_s)
            title = partition.name + ("*" if partition.default else "")
            for group in partition.nodes:
                memory = f"{group.memory_mb // MB_IN_GB} GB"
                rows.append((title, str(group.count), describe_gpus(group), str(group.cpus), memory, longest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "# " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    if site.default_partition is not None:
        yield "# (*: the default)"


def _identity(site: Site, partition: Partition) -> Iterator[str]:
    closed = f"it accepts no jobs now ({partition.state})" if partition.state in CLOSED_STATES else ""
    yield _line("partition", _yaml(partition.name), site.closed_to_user(partition) or closed)
    accounts = site.accounts(partition.name)
    possible, account = _account(site, partition, accounts)
    if not possible:
        allowed = ", ".join(partition.allow_accounts or ())
        yield _line(
            "# account",
            "",
            f"no account of yours may use this partition; {f'it is for {allowed}' if allowed else 'ask the site'}",
        )
    elif account is not None:
        yield _line("account", _yaml(account), f"accepted by this partition; yours: {', '.join(accounts)}")
    elif site.default_account is not None:
        yield _line("# account", _yaml(site.default_account), f"your default; yours: {', '.join(accounts)}")
    association = site.association(account, partition.name)
    if association is None:
        return
    qos = _qos(site, partition, account)
    if qos != association.usual_qos and qos is not None and partition.allow_qos is not None:
        yield _line("qos", _yaml(qos), f"this partition accepts {', '.join(partition.allow_qos)}")
    elif association.qos:
        yield _line("# qos", _yaml(association.usual_qos or association.qos[0]), f"yours: {_qos_text(site, association.qos)}")


def _account(site: Site, partition: Partition, accounts: tuple[str, ...]) -> tuple[bool, str | None]:
    """Return (True, account or None for the default) if the user may use the partition, else (False, None)."""

    def is_accepted(account: str) -> bool:
        return (
            account in partition.allow_accounts
            if partition.allow_accounts is not None
            else account not in partition.deny_accounts
        )

    if not accounts or site.default_account is None or not site.enforces("associations"):
        return True, None
    if site.default_account in accounts and is_accepted(site.default_account):
        return True, None
    fitting = next(filter(is_accepted, accounts), None)
    return fitting is not None, fitting


def _qos(site: Site, partition: Partition, account: str | None) -> str | None:
    """Return the qos of a job: the association's default, or one that the partition allows."""
    association = site.association(account, partition.name)
    if association is None:
        return None
    if partition.allow_qos is None or association.usual_qos in partition.allow_qos:
        return association.usual_qos
    return next((qos for qos in association.qos if qos in partition.allow_qos), association.usual_qos)


def _qos_text(site: Site, names: tuple[str, ...]) -> str:
    limits = {name: site.qos[name].max_time_s if name in site.qos else None for name in names}
    return ", ".join(name if limit is None else f"{name} (at most {time_text(limit)})" for name, limit in limits.items())


def _nodes(site: Site, partition: Partition) -> Iterator[str]:
    group = max(partition.nodes, key=_preference)
    least = max(1, partition.min_nodes)
    most = min(group.count, partition.max_nodes or group.count)
    yield _line("nodes", str(least), f"a job can have up to {most}" if most > least else "")
    cpus = min(group.cpus, partition.max_cpus_per_node or group.cpus)
    kind = _gpu_kind(group)
    tasks = 1 if is_mig(kind) else min(group.gpus.get(kind, 1), max(1, cpus))
    if group.num_gpus:
        yield from _gpus(site, partition, group, tasks)
    else:
        yield _line("tasks_per_node", "1", "processes; this partition has no GPUs")
    share = max(1, cpus // max(group.num_gpus, 1))
    yield _line("cpus_per_task", str(share), f"of {cpus} CPUs of a node")
    memory_mb = min(group.memory_mb, partition.max_memory_mb or group.memory_mb)
    memory = int(MEMORY_SHARE * memory_mb * (tasks / group.num_gpus if group.num_gpus else 1)) // MB_IN_GB
    if memory:
        yield _line("memory", str(memory), f"GB of each node, which has {group.memory_mb // MB_IN_GB}; 0 means all")
    features = sorted({feature for group in partition.nodes for feature in group.features})
    if features:
        yield _line("# constraint", _yaml(features[0]), f"features of its nodes: {', '.join(features)}")


def _gpus(site: Site, partition: Partition, group: NodeGroup, tasks: int) -> Iterator[str]:
    kind = _gpu_kind(group)
    use = "MIG slices, of which CUDA shows a process only one" if is_mig(kind) else "one process each"
    yield _line("gpus_per_node", str(tasks), f"{use}; a node has {describe_gpus(group)}")
    if "cons_tres" in site.settings.get("SelectType", ""):
        yield _line("# gpu_request", "gres", "if --gpus-per-node is refused")
    else:
        yield _line("gpu_request", "gres", f"safer with {site.settings.get('SelectType', 'an unknown SelectType')}")
    kinds = sorted({kind for group in partition.nodes for kind in group.gpus} - {UNTYPED})
    if kind != UNTYPED:
        key = "gpu_type" if len(kinds) > 1 else "# gpu_type"
        yield _line(key, _yaml(kind), f"there are {', '.join(kinds)}" if len(kinds) > 1 else "the only type")


def _preference(group: NodeGroup) -> tuple[bool, int, int]:
    """Return the sort key of node groups: whole GPUs before MIG slices, then by count."""
    has_whole = bool(group.num_gpus) and not is_mig(_gpu_kind(group))
    return has_whole, group.count * group.num_gpus, group.count * group.cpus


def _gpu_kind(group: NodeGroup) -> str:
    """Return the most frequent GPU type of a node; whole GPUs before MIG slices."""
    return max(group.gpus, key=lambda kind: (not is_mig(kind), group.gpus[kind]), default=UNTYPED)


def _time(site: Site, partition: Partition, qos: Qos | None) -> Iterator[str]:
    limits = {
        "the partition allows": partition.max_time_s,
        f"qos {qos.name} allows" if qos else "": qos.max_time_s if qos else None,
    }
    known = {name: limit for name, limit in limits.items() if limit}
    seconds = max(60, min(DAY_S, *known.values()) if known else DAY_S)
    text = ", ".join(f"{name} {time_text(limit)}" for name, limit in known.items()) or "there is no limit"
    if seconds < START_UP_S + EARLY_S + MIN_SIGNAL_S:
        raise UserError(
            f"{text}: too short for training, since a start takes {START_UP_S} s and SLURM may end it {EARLY_S + MIN_SIGNAL_S} s "
            f"early; choose another partition with --partition: {_names(site)}"
        )
    yield _line("time", time_text(seconds), text)
    signal_s = max(MIN_SIGNAL_S, min(SIGNAL_S, (seconds - START_UP_S - EARLY_S) // 2))
    yield _line(
        "signal_s" if signal_s != SIGNAL_S else "# signal_s", str(signal_s), "seconds before the limit at which runs save"
    )


def _preemption(site: Site, partition: Partition, qos: Qos | None) -> Iterator[str]:
    found = find_preemption(site, partition, qos)
    if found is None:
        yield "# Jobs of this partition are not preempted."
    else:
        grace = "an unknown time" if found.grace_s is None else f"{found.grace_s} s"
        yield f"# Preemption ({found.kind}): {found.mode}, with {grace} between the signal and the end."
        if found.mode != "SUSPEND" and (not found.grace_s or found.is_too_short):
            yield "# That is too short for a save: the recipe's train.save_minutes=10 bounds the loss to 10 minutes."
    yield _line("# requeue", "auto", "resubmit if the site forbids `scontrol requeue`")


def _line(key: str, value: str, comment: str) -> str:
    start = f"{key}: {value}"
    return f"{start:{COMMENT_COLUMN - 1}} # {comment}" if comment else start


def _yaml(text: str) -> str:
    """Return the text as a YAML scalar, quoted if needed."""
    word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", text) and not NULL.fullmatch(text) and not BOOL.fullmatch(text)
    return text if word else json.dumps(text)


def _plain(line: str) -> str:
    """Replace line breaks and unprintable characters by ``?``."""
    return re.sub(r"[^\x20-\x7e\u00a0-\ud7ff]", "?", line)
