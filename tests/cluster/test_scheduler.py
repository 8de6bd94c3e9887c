"""What SLURM's programs print, read; the text was recorded from SLURM 22.05."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.slurm import (
    UNKNOWN,
    JobState,
    SlurmUnavailableError,
    _find_ended,
    cancel_jobs,
    expand_ids,
    is_slurm_here,
    parse_duration,
    parse_sacct,
    parse_squeue,
    read_states,
)

SQUEUE = """\
5|PENDING|0|UNLIMITED||BeginTime|
2_1|PENDING|0|10:00||Resources|
2_0|PENDING|1|10:00||BeginTime|
2_[4-5,7%2]|PENDING|0|10:00||JobArrayTaskLimit|
3|PENDING|0|1-00:00:00||Nodes required for job are DOWN, DRAINED or reserved | for jobs|
8|RUNNING|0|UNLIMITED|n2|None|
1|RUNNING|2|364-23:59:15|n[1-2]|None|
9|COMPLETING|0|0:00|n1|None|
10|TIMEOUT|0|0:00|n1|TimeLimit|
11|FAILED|0|59:58|n1|NonZeroExitCode|
6|CANCELLED|0|UNLIMITED||Priority|
"""

SACCT = """\
3|CANCELLED by 0|None assigned|None
5|CANCELLED|None assigned|BeginTime
2_0|PREEMPTED|n2|None
2_[1-4%2]|CANCELLED by 987654321|None assigned|None
8|OUT_OF_MEMORY|n2|None
1|REQUEUED|n1|None
10|NODE_FAIL|n1|None
11|RUNNING|n1|None
12|COMPLETED|n[1-2]|None
13|TIMEOUT|n1|None
"""


def test_parse_squeue_reads_states_reasons_nodes_and_restarts() -> None:
    states = parse_squeue(SQUEUE)
    assert states["5"] == JobState("PENDING", "BeginTime")
    assert states["2_0"] == JobState("PENDING", "BeginTime", restarts=1)
    assert states["8"] == JobState("RUNNING", nodes="n2")
    assert states["1"] == JobState("RUNNING", "", 364 * 86400 + 86399 - 44, "n[1-2]", 2)
    assert states["10"] == JobState("TIMEOUT", "TimeLimit", nodes="n1")
    assert states["6"] == JobState("CANCELLED")  # what it waited for before is no reason
    assert [states[f"2_{index}"].reason for index in (4, 5, 7)] == ["JobArrayTaskLimit"] * 3
    assert "2_6" not in states
    assert states["3"].reason == "Nodes required for job are DOWN, DRAINED or reserved | for jobs"


def test_only_pending_and_running_jobs_are_active() -> None:
    active = {job_id for job_id, state in parse_squeue(SQUEUE).items() if state.is_active}
    assert active == {"5", "2_0", "2_1", "2_4", "2_5", "2_7", "3", "8", "1", "9"}


def test_parse_sacct_reads_final_states_and_who_cancelled() -> None:
    states = parse_sacct(SACCT)
    assert states["3"] == JobState("CANCELLED", "by root")
    assert states["5"] == JobState("CANCELLED")
    assert states["2_0"] == JobState("PREEMPTED", nodes="n2")
    assert states["2_3"] == JobState("CANCELLED", "by user 987654321")
    assert states["12"] == JobState("COMPLETED", nodes="n[1-2]")
    assert {states[job_id].state for job_id in ("8", "10", "13")} == {"OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT"}
    assert states["1"].is_active


def test_job_that_only_sacct_lists_as_running_is_unknown() -> None:
    state = parse_sacct(SACCT)["11"]
    assert state.state == UNKNOWN
    assert "RUNNING" in state.reason


def test_array_task_missing_from_sacct_counts_as_cancelled_before_start() -> None:
    states = parse_sacct("17_[1-2,4%1]|PENDING|None assigned|None\n17_0|COMPLETED|n1|None\n19|FAILED|n1|None\n20|PENDING||\n")
    cancelled = JobState("CANCELLED", "before it started")
    assert [_find_ended(f"17_{index}", states) for index in (0, 3, 4)] == [states["17_0"], cancelled, cancelled]
    assert _find_ended("19", states) == states["19"]
    assert _find_ended("19_0", states) is None  # under the array's id stands its last task
    assert (_find_ended("20", states) or cancelled).state == UNKNOWN


def test_parse_squeue_and_parse_sacct_ignore_malformed_lines() -> None:
    assert parse_squeue("slurm_load_jobs error: x\n\n1|2\n") == {}
    assert parse_sacct("sacct: error\n\n1|2\n") == {}


@given(st.sets(st.integers(0, 1000), min_size=1), st.sampled_from(["", "%2", "%10"]))
def test_expand_ids_lists_every_task_of_an_array(indices: set[int], limit: str) -> None:
    text = ",".join(map(str, sorted(indices)))
    assert expand_ids(f"12_[{text}{limit}]") == [f"12_{index}" for index in sorted(indices)]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[3]", ["12_3"]),
        ("12_[0-2,5%1]", ["12_0", "12_1", "12_2", "12_5"]),
        ("12_[0-6:3]", ["12_0", "12_3", "12_6"]),
        ("12_[1-2,...]", ["12_1", "12_2"]),
    ],
)
def test_expand_ids_reads_single_ids_ranges_steps_and_limits(text: str, ids: list[str]) -> None:
    assert expand_ids(text) == ids


@given(st.integers(0, 400 * 86400))
def test_parse_duration_inverts_slurm_formatting(seconds: int) -> None:
    days, rest = divmod(seconds, 86400)
    hours, minutes, left = rest // 3600, rest // 60 % 60, rest % 60
    short = f"{minutes}:{left:02d}" if not (days or hours) else f"{hours}:{minutes:02d}:{left:02d}"
    assert parse_duration(f"{days}-{hours:02d}:{minutes:02d}:{left:02d}" if days else short) == seconds


@pytest.mark.parametrize("text", ["UNLIMITED", "NOT_SET", "INVALID", ""])
def test_parse_duration_of_unlimited_or_unset_is_none(text: str) -> None:
    assert parse_duration(text) is None


def test_job_queries_without_slurm_raise_slurm_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not is_slurm_here()
    assert read_states([]) == {}
    assert cancel_jobs([]) == {}
    with pytest.raises(SlurmUnavailableError, match="no SLURM on this machine"):
        read_states(["1"])
    with pytest.raises(SlurmUnavailableError, match="no SLURM on this machine"):
        cancel_jobs(["1"])
