"""What SLURM does with a job whose nodes it gives to a more urgent one, and how long before it says so.

The scheduler's own words: slurm.conf(5), PreemptType, PreemptMode, GraceTime, preempt_send_user_signal; sacctmgr(1) for qos.
"""

from dataclasses import dataclass

from galaxydist.cluster.profile_checks import MIN_SIGNAL_S
from galaxydist.cluster.site import Partition, Qos, Site

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
