"""What the doctor says of preemption, from a cluster's settings; and what its own job asks for."""

import pytest

from galaxydist.cluster.profile import ClusterConfig
from galaxydist.cluster.site import Site, parse_site
from galaxydist.doctor.job import check_preemption, short_profile


def site(low: str, settings: str = "", high: str = "PriorityTier=10") -> Site:
    """A cluster whose jobs of ``high`` preempt those of ``low``."""
    return parse_site(
        {
            "config": f"ClusterName = c\nPreemptType = preempt/partition_prio\nPreemptMode = REQUEUE\n{settings}\n",
            "partitions": f"PartitionName=low Default=YES PriorityTier=1 {low}\nPartitionName=high {high}\n",
        }
    )


@pytest.mark.parametrize(
    ("low", "profile", "level", "said"),
    [
        ("GraceTime=15", {}, "ok", "partition low: SLURM sends SIGTERM 15 s before it ends and requeues the job"),
        ("GraceTime=15", {"requeue": "never"}, "ok", "15 s before it ends the job"),
        ("GraceTime=0", {}, "warning", "no warning before preemption (GraceTime=0): SLURM ends and requeues the job at once"),
        ("GraceTime=0 PreemptMode=CANCEL", {}, "warning", "(GraceTime=0): SLURM ends the job at once"),
        ("GraceTime=9", {}, "warning", "9 s before it ends and requeues the job, less than the 10 s that a save needs"),
        ("GraceTime=0 PreemptMode=OFF", {}, "ok", "partition low: its jobs are not preempted"),
        ("GraceTime=0 PreemptMode=SUSPEND", {}, "ok", "is suspended and resumed later"),
        ("GraceTime=0", {"partition": "high"}, "ok", "partition high: its jobs are not preempted"),
    ],
)
def test_check_preemption_reports_grace_time_and_requeue_of_the_partition(
    low: str, profile: dict[str, str], level: str, said: str
) -> None:
    (check,) = check_preemption(ClusterConfig.model_validate({"name": "mine", **profile}), site(low))
    assert check.name == "preemption" and check.level == level and said in check.text
    assert ("train.save_minutes" in check.remedy) == (level == "warning")
    assert ("submit it again" in check.remedy) == ("CANCEL" in low)


def test_check_preemption_reports_sigusr2_with_preempt_send_user_signal() -> None:
    (check,) = check_preemption(
        ClusterConfig(name="mine"), site("GraceTime=60", "SlurmctldParameters = preempt_send_user_signal")
    )
    assert check.level == "ok" and "SIGUSR2 60 s before" in check.text


def test_check_preemption_lists_every_partition_and_takes_the_worst_level() -> None:
    (check,) = check_preemption(ClusterConfig(name="mine", partition="high,low"), site("GraceTime=0"))
    assert check.level == "warning" and "train.save_minutes" in check.remedy
    assert [line.partition(":")[0] for line in check.text.splitlines()] == ["partition high", "partition low"]


def test_check_preemption_by_qos_without_accounting_warns_of_unknown_grace_time() -> None:
    by_qos = site("GraceTime=60", "PreemptType = preempt/qos")
    (check,) = check_preemption(ClusterConfig(name="mine"), by_qos)
    assert check.level == "warning" and "is unknown (qos)" in check.text


def test_check_preemption_is_empty_for_local_runs_and_unknown_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_preemption(ClusterConfig(name="mine", scheduler="local"), site("")) == []
    assert check_preemption(ClusterConfig(name="mine", partition="nosuch"), site("")) == []
    monkeypatch.setenv("PATH", "")
    (check,) = check_preemption(ClusterConfig(name="mine"))
    assert check.level == "warning" and check.text.startswith("unknown: There is no SLURM on this machine")


@pytest.mark.parametrize(
    ("asked", "short"),
    [
        ({"time": "1-00", "signal_s": 1800}, (15, 60)),
        ({"time": 2, "signal_s": 15, "requeue": "resubmit"}, (2, 15)),
    ],
)
def test_short_profile_of_the_doctor_has_a_short_time_limit_and_no_requeue(
    asked: dict[str, object], short: tuple[int, int]
) -> None:
    profile = ClusterConfig.model_validate({"name": "mine", "extra": ("exclusive",), **asked})
    own = short_profile(profile)
    assert (own.time_min, own.signal_s) == short and own.requeue == "never" and own.extra == ("exclusive",)
