"""Whether a run is warned before SLURM preempts it: not tried, but read from the cluster's settings."""

from galaxydist.cluster.doctor.check import LEVELS, Check, ok, warning
from galaxydist.cluster.partition_check import chosen_partitions
from galaxydist.cluster.profile import MIN_SIGNAL_S, ClusterConfig
from galaxydist.cluster.site import SAVE_REMEDY, Partition, Preemption, Site, SiteUnknownError, find_preemption, read_site
from galaxydist.errors import UserError

NAME = "preemption"


def check_preemption(cluster: ClusterConfig, site: Site | None = None) -> list[Check]:
    """What a preempted run of this profile can save; nothing for local runs and partitions that sbatch refuses anyway.

    Args:
        cluster: the profile.
        site: the cluster; default: this machine's SLURM is asked.
    """
    if cluster.scheduler == "local":
        return []
    try:
        site = site or read_site()
        names = chosen_partitions(cluster, site)
    except SiteUnknownError as error:
        return [warning(NAME, f"not known: {error}", "look at PreemptMode and GraceTime in `scontrol show partition`")]
    except UserError:
        return []
    found = [_judge(cluster, site, site.partitions[name]) for name in names]
    if len(found) < 2:
        return found
    worst = max(found, key=lambda check: LEVELS.index(check.level))
    return [Check(NAME, worst.level, "\n".join(check.text for check in found), worst.remedy)]


def _judge(cluster: ClusterConfig, site: Site, partition: Partition) -> Check:
    qos = site.qos_of(cluster.qos, cluster.account, partition.name)
    preemption = find_preemption(site, partition, qos)
    where = f"partition {partition.name}"
    if preemption is None:
        return ok(NAME, f"{where}: its jobs are not preempted")
    if preemption.mode == "SUSPEND":
        return ok(NAME, f"{where}: a preempted job is suspended, and goes on later (PreemptMode=SUSPEND)")
    end, remedy = _end(cluster, preemption), SAVE_REMEDY
    if preemption.mode == "CANCEL":
        remedy += "; then submit it again"
    if preemption.grace_s is None:
        return warning(NAME, f"{where}: SLURM does not tell how long before it {end} ({preemption.kind}) it says so", remedy)
    if preemption.grace_s == 0:
        return warning(NAME, f"{where}: no warning before preemption (GraceTime=0): SLURM {end} at once", remedy)
    text = f"{where}: SLURM sends {preemption.signal} {preemption.grace_s} s before it {end}"
    if preemption.is_too_short:
        return warning(NAME, f"{text}, less than the {MIN_SIGNAL_S} s that a save needs", remedy)
    return ok(NAME, text)


def _end(cluster: ClusterConfig, preemption: Preemption) -> str:
    is_requeued = preemption.mode == "REQUEUE" and cluster.requeue != "never"
    return "ends and requeues the job" if is_requeued else "ends the job"
