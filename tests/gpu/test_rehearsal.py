"""The GPU checks on a CPU: all of them run to their end and pass, and one that hangs does not stop the others."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.check import CHECKS, Check, main, run_checks
from tests.gpu.rig import Rig, Row, equal
from tests.gpu.several_ranks import is_gone

pytestmark = pytest.mark.multiprocess


@pytest.mark.slow
def test_all_gpu_checks_pass_on_a_cpu_or_say_that_they_need_cuda(tmp_path: Path) -> None:
    code = main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "14"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = [row for check in summary["checks"] for row in check["rows"]]
    assert code == 0, [check["problem"] for check in summary["checks"]] + [row for row in rows if row["verdict"] == "fail"]
    assert [check["name"] for check in summary["checks"]] == [check.name for check in CHECKS]
    assert all(row["wanted"] for row in rows if row["verdict"] == "needs CUDA"), "each says why"
    assert {row["verdict"] for row in rows} == {"pass", "measured", "needs CUDA"}
    table = (tmp_path / "summary.md").read_text().splitlines()
    assert len(table) == 4 + len(rows) and table[0].startswith("card none")


def sleep(pid_file: str) -> None:
    import signal
    import subprocess

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(1000)


def fail() -> None:
    raise ValueError("no such thing")


def test_a_hanging_check_is_killed_with_its_processes_and_the_next_one_runs(tmp_path: Path) -> None:
    def hang(rig: Rig) -> Iterator[Row]:
        yield equal("before", 1, 1)
        with rig.start(sleep, str(tmp_path / "pid")) as ranks:
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.05)
            rig.deadline = time.monotonic() + 0.5
            rig.wait(ranks)

    def break_down(rig: Rig) -> Iterator[Row]:
        yield equal("differs", 1, 2)
        rig.call(fail)

    checks = [Check("hang", "Hang", 300, hang), Check("broken", "Broken", 300, break_down), Check("late", "Late", 0, break_down)]
    summary = run_checks(checks, "cpu", tmp_path, tmp_path, 600)
    assert summary.checks == json.loads((tmp_path / "summary.json").read_text())["checks"]
    hung, broken, late = summary.checks
    assert (hung["status"], [row["name"] for row in hung["rows"]]) == ("fail", ["before"]) and "time is up" in hung["problem"]
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert broken["status"] == "fail" and "ValueError: no such thing" in broken["problem"]
    assert [row["verdict"] for row in broken["rows"]] == ["fail"]
    (printed,) = (tmp_path / "errors" / "broken").rglob("*.err")
    assert "ValueError: no such thing" in printed.read_text()
    assert (late["problem"], late["rows"]) == ("time is up", [])
