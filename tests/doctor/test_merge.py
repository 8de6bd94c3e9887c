"""From the reports of ranks to one table: what is alike is said once, what differs is named by host."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from galaxydist.doctor.check import Check, RankReport, Timing, failure, ok, read_reports, warning
from galaxydist.doctor.merge import (
    check_addresses,
    check_bandwidth,
    check_clocks,
    check_cpus,
    check_gpu_shares,
    check_meeting,
    check_presence,
    check_same_versions,
    check_shared_files,
    check_signals,
    merge_checks,
    merge_reports,
)
from galaxydist.doctor.rank import RankChannel, time_shared_files, time_signal


def healthy(rank: int) -> RankReport:
    """One of four ranks on two machines of two GPUs each."""
    node = rank // 2
    return RankReport(
        rank,
        4,
        host=f"n{node + 1}",
        machine=f"boot-{node}",
        part="done",
        finished=["start", "node", "rendezvous", "clocks", "shared files", "signal", "all-reduce, gloo"],
        checks=[ok("Python", "3.11.7"), ok("memory", f"{20 + node}.0 GB free")],
        versions={"Python": "3.11.7", "torch": "2.14.1"},
        cores=8,
        cpus_per_task=8,
        visible_gpus="2,3",
        slurm_gpus="2,3",
        num_gpus=2,
        gpu=f"GPU-{rank}",
        interface="ib0",
        address=f"10.0.0.{node + 1}",
        store="n1:29500",
        meeting_s=1.5,
        timings={"gloo": Timing(64_000_000, 0.064), "nccl": Timing(64_000_000, 0.004)},
        clock_s=0.001 * rank,
        round_trip_s=0.0002,
        seen_s=0.1,
        renamed_s=0.2,
        signal_s=0.3,
    )


def reports(**changes: dict[int, object]) -> list[RankReport]:
    """Four healthy ranks, but for some fields of some ranks."""
    return [
        replace(healthy(rank), **{name: values[rank] for name, values in changes.items() if rank in values}) for rank in range(4)
    ]


def one(checks: Sequence[Check]) -> Check:
    (check,) = checks
    return check


def test_reports_of_healthy_ranks_merge_into_a_table_without_warnings() -> None:
    table = merge_reports(reports(), 4, gpus_per_node=2)
    assert {check.level for check in table} == {"ok"}
    texts = {check.name: check.text for check in table}
    assert texts["ranks"] == "4 on n1, n2: all finished"
    assert texts["all-reduce, gloo"].endswith("1.00 GB/s, that is bytes / seconds; bus 1.50 GB/s, times 2 (n - 1) / n")
    assert "16.00 GB/s" in texts["all-reduce, nccl"]
    assert texts["interface"] == "n1 10.0.0.1 (ib0), n2 10.0.0.2 (ib0)"
    assert texts["memory"] == "20.0 GB free (n1; similar elsewhere)"


def test_merged_checks_name_the_hosts_and_ranks_that_differ() -> None:
    found = reports()
    for report in found[2:]:
        report.checks = [ok("Python", "3.11.7"), warning("memory", "1.0 GB free", "buy more")]
    python, memory = merge_checks(found)
    assert python == ok("Python", "3.11.7")
    assert memory == warning("memory", "n2: 1.0 GB free\nn1: 20.0 GB free", "buy more")
    found[3].checks = [ok("Python", "3.11.7"), failure("memory", "none", "buy much more")]
    (memory,) = merge_checks(found)[1:]
    assert memory.level == "failure" and memory.text.startswith("n2 (rank 3): none\nn2 (rank 2): 1.0 GB free")
    assert memory.remedy == "buy much more\nbuy more"


def test_different_library_versions_between_ranks_are_a_failure() -> None:
    check = check_same_versions(reports(versions={2: {"Python": "3.11.7", "torch": "2.11.0"}, 3: {"Python": "3.11.7"}}))
    assert check.level == "failure"
    assert check.text == "torch: 2.14.1 on n1, 2.11.0 on n2 (rank 2), missing on n2 (rank 3)"


def test_missing_and_aborted_ranks_are_a_failure_naming_their_last_part() -> None:
    found = reports(part={2: "shared files"}, error={2: "RuntimeError: gone"})[:3]
    check = check_presence(found, 4)
    assert check.level == "failure"
    assert check.text == "ranks 3 wrote no report; rank 2 (n2) ended in the part 'shared files': RuntimeError: gone"
    assert merge_reports([], 2, 0)[0].level == "failure"
    # A rank that wrote nothing but that it began.
    assert merge_reports([RankReport(0, 1, "n1", "boot-0")], 1, 0)[0].level == "failure"


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "ok"),
        ({"cores": {0: 1}}, "warning"),
        ({"cores": {0: 64}}, "ok"),
        ({"cpus_per_task": dict.fromkeys(range(4))}, "ok"),
    ],
)
def test_check_cpus_warns_of_fewer_cores_than_requested(changes: dict[str, dict[int, object]], level: str) -> None:
    assert check_cpus(reports(**changes)).level == level


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", "one of its own (2 visible)"),
        # A control group hides the others, so that the job's GPUs are counted from 0.
        ({"visible_gpus": dict.fromkeys(range(4), "0,1")}, "ok", ""),
        ({"visible_gpus": {3: "0"}, "num_gpus": {3: 1}}, "ok", ""),
        # Another job's.
        ({"visible_gpus": {3: "4,5"}}, "failure", "CUDA_VISIBLE_DEVICES=4,5, but SLURM gave GPUs 2,3 on n2 (rank 3)"),
        # All of the node's eight.
        ({"visible_gpus": {1: None}, "num_gpus": {1: 8}}, "failure", "(not set)"),
        ({"visible_gpus": {1: "0,1"}, "num_gpus": {1: 8}}, "failure", "another job's"),
        # Slices and unique ids have no numbers: as many as were given.
        (
            {"visible_gpus": dict.fromkeys(range(4), "MIG-1,MIG-2"), "num_gpus": dict.fromkeys(range(4), 1)},
            "ok",
            "one of its own (1 visible)",
        ),
        ({"visible_gpus": {0: "GPU-8932f937,GPU-4d2c8e5a"}}, "ok", "one of its own"),
        ({"visible_gpus": {0: "MIG-1,MIG-2,MIG-3"}}, "failure", "but SLURM gave GPUs 2,3 on n1 (rank 0)"),
        ({"gpu": {1: "GPU-0"}}, "failure", "ranks 0, 1 on n1 share one GPU"),
        ({"num_gpus": {2: 0, 3: 0}}, "failure", "none visible to torch on n2"),
        ({"gpu": {2: None}}, "failure", "2 visible on n2 (rank 2), but none that this rank can use"),
        ({"gpu": {2: None}, "gpu_problem": {2: "CUDA error: busy"}}, "failure", "this rank can use: CUDA error: busy"),
    ],
)
def test_check_gpu_shares_fails_for_shared_missing_or_foreign_gpus(
    changes: dict[str, dict[int, object]], level: str, words: str
) -> None:
    check = check_gpu_shares(reports(**changes), 2)
    assert check.level == level and words in check.text


@pytest.mark.parametrize(
    ("find", "changes", "level", "words"),
    [
        (
            check_addresses,
            {"address": {2: "127.0.1.1", 3: "127.0.1.1"}, "interface": {2: None, 3: None}},
            "failure",
            "127.0.1.1 (by its name) on n2",
        ),
        (check_addresses, {"address": {0: None}}, "failure", "no interface ib0 with an address on n1 (rank 0)"),
        # All nodes of a mini cluster are one machine, so the loopback address reaches them.
        (
            check_addresses,
            {"address": dict.fromkeys(range(4), "127.0.0.1"), "machine": dict.fromkeys(range(4), "boot-0")},
            "ok",
            "all on one machine",
        ),
        (check_meeting, {}, "ok", "4 ranks joined at n1:29500"),
        (check_meeting, {"meeting_s": {3: None}}, "failure", "n2 (rank 3) did not join"),
        (check_clocks, {}, "ok", "3.0 ms"),
        (check_clocks, {"clock_s": {2: -90.0, 3: -90.0}}, "warning", "-90.0 s against rank 0 on n2"),
        # What a slow round trip leaves open is not held against the clock.
        (check_clocks, {"clock_s": {3: 1.5}, "round_trip_s": {3: 2.0}}, "ok", ""),
        (check_shared_files, {}, "ok", "within 0.20 s"),
        (check_shared_files, {"seen_s": {2: None, 3: None}}, "failure", "not seen on n2"),
        (check_shared_files, {"renamed_s": {1: None}}, "failure", "old contents on n1 (rank 1)"),
        (check_shared_files, {"renamed_s": {1: 30.0}}, "warning", "30.00 s"),
        (check_signals, {}, "ok", "within 0.3 s"),
        (check_signals, {"signal_s": {3: None}}, "failure", "SIGUSR2 did not reach n2 (rank 3)"),
        # It ended before.
        (check_signals, {"signal_s": {3: None}, "finished": {3: ["start", "node"]}}, "ok", ""),
        (
            check_signals,
            {"signal_s": dict.fromkeys(range(4)), "signal_error": dict.fromkeys(range(4), "denied")},
            "warning",
            "denied",
        ),
    ],
)
def test_checks_between_ranks_have_the_level_and_text_of_their_findings(
    find: Callable[[Sequence[RankReport]], Sequence[Check]], changes: dict[str, dict[int, object]], level: str, words: str
) -> None:
    check = one(find(reports(**changes)))
    assert check.level == level and words in check.text
    assert bool(check.remedy) == (level != "ok")


def test_missing_scancel_inside_a_container_is_a_warning_without_blaming_the_site() -> None:
    found = reports(signal_s=dict.fromkeys(range(4)), signal_error=dict.fromkeys(range(4), "sh: scancel: not found"))
    (outside,) = check_signals(found)
    assert "administrators" in outside.remedy
    (inside,) = (check for check in merge_reports(found, 4, 2, in_container=True) if check.name == "signal")
    assert inside.level == "warning" and "from inside the container (sh: scancel: not found)" in inside.text
    assert "administrators" not in inside.remedy and "scancel --signal=USR2 JOB" in inside.remedy


def test_single_rank_has_no_checks_between_ranks_except_failures() -> None:
    (alone, *_) = reports(machine={0: "boot-0"})
    alone.world_size = 1
    table = {check.name: check for check in merge_reports([alone], 1, gpus_per_node=1)}
    assert {check.level for check in table.values()} == {"ok"}
    assert not table.keys() & {"rendezvous", "clocks", "shared files", "all-reduce, gloo", "all-reduce, nccl"}
    assert "not measured" in table["between ranks"].text and {"interface", "signal"} <= table.keys()
    # What does not even work with oneself is told.
    alone.timings = {"gloo": Timing(error="Unable to find address for: nosuch0")}
    table = {check.name: check for check in merge_reports([alone], 1, gpus_per_node=1)}
    assert table["all-reduce, gloo"].level == "failure" and "between ranks" not in table


def test_check_signals_without_slurm_is_empty() -> None:
    assert check_signals(reports(signal_s=dict.fromkeys(range(4)), signal_error=dict.fromkeys(range(4), "no SLURM"))) == []


def test_check_bandwidth_warns_of_slow_nccl_between_machines_and_fails_if_broken() -> None:
    slow = {"gloo": Timing(64_000_000, 0.064), "nccl": Timing(64_000_000, 0.064)}
    gloo, nccl = check_bandwidth(reports(timings=dict.fromkeys(range(4), slow)))
    assert (gloo.level, nccl.level) == ("ok", "warning") and "cluster.interface" in nccl.remedy
    # On one machine nothing is said of a network.
    here = {"timings": dict.fromkeys(range(4), slow), "machine": dict.fromkeys(range(4), "boot-0")}
    assert [check.level for check in check_bandwidth(reports(**here))] == ["ok", "ok"]
    broken = {"gloo": Timing(error="Connection refused")}
    gloo, nccl = check_bandwidth(reports(timings={2: broken, 3: broken}))
    assert gloo.level == "failure" and gloo.text == "n2: Connection refused" and nccl.level == "failure"


def test_rank_reports_are_read_back_as_written(tmp_path: Path) -> None:
    found = [replace(report, part="clocks") for report in reports()]
    for report in reversed(found):
        report.write(tmp_path, "clocks")
    assert read_reports(tmp_path) == found


def together(
    size: int, work: Callable[[RankChannel], object], clocks: Sequence[Callable[[], float]] | None = None
) -> list[object]:
    """Ranks as threads, over a real store; what each gives."""
    server = TCPStore("127.0.0.1", 0, size, True, timeout=timedelta(seconds=300), wait_for_workers=False)
    found: list[object] = [None] * size

    def be(rank: int) -> None:
        store = server if rank == 0 else TCPStore("127.0.0.1", server.port, size, False, timeout=timedelta(seconds=300))
        channel = RankChannel(store, rank, size, clocks[rank]) if clocks else RankChannel(store, rank, size)
        found[rank] = work(channel)
        channel.close()

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_clocks_are_measured_against_rank_0() -> None:
    import time

    found = together(3, lambda channel: channel.measure_clock(), [time.time, lambda: time.time() + 100, lambda: time.time() - 7])
    offsets = [offset for offset, _ in found]  # type: ignore[attr-defined]
    assert offsets == pytest.approx([0, 100, -7], abs=1)


def test_signal_received_before_the_test_does_not_count_as_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scancel says that it has sent one, and nothing comes."""
    (tmp_path / "scancel").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environ = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}

    def look(channel: RankChannel) -> tuple[float | None, str | None]:
        arrivals = [time.monotonic()]  # of the signal before the time limit, for example
        return time_signal(channel, arrivals, environ, limit_s=0.5)

    assert together(2, look) == [(None, None), (None, None)]


def test_shared_file_check_distinguishes_shared_from_separate_folders(tmp_path: Path) -> None:
    shared = together(2, lambda channel: time_shared_files(channel, tmp_path, limit_s=10))
    for seen, renamed in shared:  # type: ignore[attr-defined]
        assert seen is not None and renamed is not None
    assert list(tmp_path.iterdir()) == []

    apart = [tmp_path / "of rank 0", tmp_path / "of rank 1"]
    for folder in apart:
        folder.mkdir()
    first, second = together(2, lambda channel: time_shared_files(channel, apart[channel.rank], limit_s=0.5))
    assert first[0] is not None and first[1] is None  # type: ignore[index]
    assert second[0] is None and second[1] is not None  # type: ignore[index]
