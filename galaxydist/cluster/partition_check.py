"""Checks that a partition can meet a profile's requests."""

import re
from collections.abc import Callable, Iterator

from galaxydist.cluster.profile import MB_IN_GB, ClusterConfig
from galaxydist.cluster.site import CLOSED_STATES, UNTYPED, NodeGroup, Partition, Site, read_site
from galaxydist.cluster.slurm import SlurmUnavailableError, check_controller, is_slurm_here
from galaxydist.errors import UserError


def check_partition(config: ClusterConfig, site: Site | None = None) -> None:
    """Raise an error if a profile's partition cannot meet its requests.

    Nothing is checked for local runs, or if SLURM's programs are missing or fail.

    Args:
        config: the profile.
        site: the cluster; default: read from this machine's SLURM.

    Raises:
        UserError: the partition cannot run the job, or slurmctld is down.
    """
    if config.scheduler == "local":
        return
    if site is None:
        if is_slurm_here():
            check_controller()
        try:
            site = read_site()
        except SlurmUnavailableError:
            return  # sbatch will report the cause
    names = chosen_partitions(config, site)
    if not names:
        return
    found = {name: list(_problems(config, site, site.partitions[name])) for name in names}
    if all(found.values()):  # SLURM chooses a partition that can run the job
        raise UserError("\n".join(line for name in names for line in _lines(config, site.partitions[name], found[name])))


def chosen_partitions(config: ClusterConfig, site: Site) -> list[str]:
    """Return the partitions that the job may run in; empty if SLURM reports none.

    Raises:
        UserError: a partition does not exist, or there is no default partition.
    """
    if not site.partitions:
        return []
    visible = ", ".join(name for name, partition in site.partitions.items() if not partition.hidden)
    if config.partition is None:
        if site.default_partition is None:
            raise UserError(
                f"cluster={config.name}: {site.name} has no default partition; set cluster.partition, one of {visible}"
            )
        return [site.default_partition.name]
    names = [name.strip() for name in config.partition.split(",") if name.strip()]
    unknown = [name for name in names if name not in site.partitions]
    if unknown:
        raise UserError(
            f"cluster.partition={config.partition}: {site.name} has no partition {', '.join(unknown)}; it has {visible}"
        )
    return names


def describe_group(group: NodeGroup) -> str:
    """Return text such as ``2 nodes with 4 a100, 128 CPUs and 976 GB``."""
    nodes = f"{group.count} node{'s' if group.count != 1 else ''}"
    return f"{nodes} with {describe_gpus(group)}, {group.cpus} CPUs and {group.memory_mb // MB_IN_GB} GB"


def describe_gpus(group: NodeGroup) -> str:
    """Return text such as ``4 a100``, ``2 GPUs``, ``2 v100 and 1 t4`` or ``no GPUs``."""
    return " and ".join(f"{count} {kind or 'GPUs'}" for kind, count in group.gpus.items()) or "no GPUs"


def time_text(seconds: int) -> str:
    """Format seconds as SLURM does: ``04:00:00``, ``2-00:00:00``."""
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def _lines(config: ClusterConfig, partition: Partition, problems: list[str]) -> Iterator[str]:
    yield f"Partition {partition.name} cannot run what cluster={config.name} requests:"
    yield from (f"  cluster.{problem}" for problem in problems)
    yield f"It has {'; '.join(map(describe_group, partition.nodes)) or 'no nodes'}."


def _problems(config: ClusterConfig, site: Site, partition: Partition) -> Iterator[str]:
    if partition.state in CLOSED_STATES:
        yield f"partition={partition.name}: it accepts no jobs now ({partition.state})"
    closed = site.closed_to_user(partition)
    if closed:
        yield f"partition={partition.name}: {closed}"
    yield from _account_problems(config, site, partition)
    yield from _time_problems(config, site, partition)
    yield from _node_problems(config, site, partition)


def _account_problems(config: ClusterConfig, site: Site, partition: Partition) -> Iterator[str]:
    accounts = site.accounts(partition.name)
    if config.account is not None and site.enforces("associations") and accounts and config.account not in accounts:
        yield f"account={config.account}: it is not one of your accounts there; you have {', '.join(accounts)}"
        return
    account = config.account or site.default_account
    if account is not None and site.enforces("associations"):
        if partition.allow_accounts is not None and account not in partition.allow_accounts:
            yield f"account={account}: this partition is for {', '.join(partition.allow_accounts)}"
        elif partition.allow_accounts is None and account in partition.deny_accounts:
            yield f"account={account}: this partition excludes it"
    association = site.association(config.account, partition.name)
    qos = config.qos or (association.usual_qos if association is not None else None)
    if qos is None or not site.enforces("qos"):
        return
    given = f"qos={config.qos}" if config.qos else f"qos=null, which means {qos} for you"
    if site.qos and qos not in site.qos:
        yield f"{given}: there is no such qos; there are {', '.join(site.qos)}"
    elif association is not None and association.qos and qos not in association.qos:
        yield f"{given}: account {association.account} has {', '.join(association.qos)}"
    elif partition.allow_qos is not None and qos not in partition.allow_qos:
        yield f"{given}: this partition accepts {', '.join(partition.allow_qos)}"
    elif partition.allow_qos is None and qos in partition.deny_qos:
        yield f"{given}: this partition excludes it"


def _time_problems(config: ClusterConfig, site: Site, partition: Partition) -> Iterator[str]:
    qos = site.qos_of(config.qos, config.account, partition.name)
    lifted = qos is not None and "PartitionTimeLimit" in qos.flags
    if partition.max_time_s is not None and config.time_s > partition.max_time_s and not lifted:
        yield f"time={config.time}: its limit is {time_text(partition.max_time_s)}"
    if qos is not None and qos.max_time_s is not None and config.time_s > qos.max_time_s and site.enforces("limits"):
        yield f"time={config.time}: the limit of qos {qos.name} is {time_text(qos.max_time_s)}"


def _node_problems(config: ClusterConfig, site: Site, partition: Partition) -> Iterator[str]:
    qos = site.qos.get(config.qos or "")
    flags = qos.flags if qos is not None else ()
    if partition.max_nodes is not None and config.nodes > partition.max_nodes and "PartitionMaxNodes" not in flags:
        yield f"nodes={config.nodes}: a job may have at most {partition.max_nodes} there"
    if config.nodes < partition.min_nodes and "PartitionMinNodes" not in flags:
        yield f"nodes={config.nodes}: a job must have at least {partition.min_nodes} there"
    if not partition.nodes:
        return
    tests: list[Callable[[NodeGroup], bool]] = []
    for problem, test in _requirements(config, partition):
        if any(map(test, partition.nodes)):
            tests.append(test)
        else:
            yield problem
    count = sum(group.count for group in partition.nodes if all(test(group) for test in tests))
    if count < min(config.nodes, partition.max_nodes or config.nodes):
        yield f"nodes={config.nodes}: it has {count} that meet all other requests"


def _requirements(config: ClusterConfig, partition: Partition) -> Iterator[tuple[str, Callable[[NodeGroup], bool]]]:
    """Yield the requirements on a node: (message if no node meets it, test of a node group)."""
    kind = config.gpu_type
    if config.gpus_per_node:
        kinds = sorted({kind for group in partition.nodes for kind in group.gpus} - {UNTYPED})
        if kind is not None and kinds and kind not in kinds:
            yield f"gpu_type={kind}: its nodes have {', '.join(kinds)}", lambda group: kind in group.gpus
        else:
            most = max(_gpus(group, kind) for group in partition.nodes)
            number = f"at most {most}" if most else "none"
            yield (
                f"gpus_per_node={config.gpus_per_node}: its nodes have {number}{f' of type {kind}' if kind else ''}",
                lambda group: _gpus(group, kind) >= config.gpus_per_node,
            )
    cpus = config.tasks_on_node * (config.cpus_per_task or 1)
    cpu_limit = partition.max_cpus_per_node
    most = max(min(group.cpus, cpu_limit or group.cpus) for group in partition.nodes)
    yield (
        f"{'cpus_per_task' if config.cpus_per_task else 'tasks_per_node'}={config.cpus_per_task or config.tasks_per_node}: "
        f"{config.tasks_on_node} processes need {cpus} CPUs of a node, and a job can have at most {most} there",
        lambda group: min(group.cpus, cpu_limit or group.cpus) >= cpus,
    )
    if config.memory_mb is not None:
        memory_mb, memory_limit = config.memory_mb, partition.max_memory_mb
        most = max(min(group.memory_mb, memory_limit or group.memory_mb) for group in partition.nodes)
        yield (
            f"memory={config.memory:g}: a job can have at most {most / MB_IN_GB:.1f} GB of a node there",
            lambda group: min(group.memory_mb, memory_limit or group.memory_mb) >= (memory_mb or group.memory_mb),
        )
    if config.constraint is not None and re.fullmatch(r"[\w.-]+", config.constraint):  # expressions are left to SLURM
        features = sorted({feature for group in partition.nodes for feature in group.features})
        if features:
            constraint = config.constraint
            yield f"constraint={constraint}: its nodes have {', '.join(features)}", lambda group: constraint in group.features


def _gpus(group: NodeGroup, kind: str | None) -> int:
    return group.num_gpus if kind is None or not group.gpus.keys() - {UNTYPED} else group.gpus.get(kind, 0)
