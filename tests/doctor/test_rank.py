"""Two real processes of the doctor's examination, over gloo: what they find, and where a rank stopped that does not come back."""

import os
import subprocess
from pathlib import Path

import pytest

from galaxydist.doctor.check import LEVELS, read_reports
from galaxydist.doctor.merge import merge_reports
from galaxydist.doctor.rank import Examination, examine
from tests.helpers.forked_runs import run_forked


def rank(folder: Path) -> None:
    examine(Examination(folder, data_dir=folder, scratch=folder, gpus_per_node=0), os.environ)


def examine_two(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, to their end."""
    return run_forked(rank, folder, size=2, environ={"WANDB_MODE": "offline", **environ})


@pytest.mark.multiprocess
@pytest.mark.slow
def test_examination_by_2_ranks_passes_and_leaves_only_their_reports(tmp_path: Path) -> None:
    done = examine_two(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = found = read_reports(tmp_path)
    assert first.is_done and second.is_done and first.versions == second.versions
    assert (first.clock_s, first.world_size, first.signal_error) == (0.0, 2, "no SLURM")
    assert second.clock_s is not None and abs(second.clock_s) < 0.5
    assert first.timings["gloo"].num_bytes == 64_000_000 and first.timings["gloo"].median_s > 0
    table = {check.name: check for check in merge_reports(found, 2, gpus_per_node=0)}
    assert LEVELS.index(max((check.level for check in table.values()), key=LEVELS.index)) < LEVELS.index("failure")
    for name in ("ranks", "versions", "rendezvous", "clocks", "shared files", "all-reduce, gloo", "interface"):
        assert table[name].level == "ok", table[name]
    # What it tried out is removed again.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.json", "rank-1.json"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_examination_with_a_missing_interface_fails_only_the_network_checks(tmp_path: Path) -> None:
    assert examine_two(tmp_path, GLOO_SOCKET_IFNAME="nosuch0").returncode == 0
    table = {check.name: check for check in merge_reports(read_reports(tmp_path), 2, gpus_per_node=0)}
    assert {name for name, check in table.items() if check.level == "failure"} >= {"interface", "all-reduce, gloo"}
    assert "nosuch0" in table["interface"].text and "cluster.interface" in table["interface"].remedy
    assert "nosuch0" in table["all-reduce, gloo"].text
    assert table["shared files"].level == table["clocks"].level == "ok"
