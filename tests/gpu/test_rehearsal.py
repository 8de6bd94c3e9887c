"""The GPU checks on a CPU: all of them run to their end and pass, and one that hangs or is stopped leaves its results."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import check
from tests.gpu.check import CHECKS, Check, main, run_checks
from tests.gpu.rig import Rig, Row, equal
from tests.gpu.several_ranks import is_gone
from tests.gpu.speed import MEMORY_CARD, fitting, why_not_compiled

pytestmark = pytest.mark.multiprocess


@pytest.mark.slow
def test_all_gpu_checks_pass_on_a_cpu_or_say_that_they_need_cuda(tmp_path: Path) -> None:
    code = main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "14"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = [row for check in summary["checks"] for row in check["rows"]]
    assert code == 0, [check["problem"] for check in summary["checks"]] + [row for row in rows if row["verdict"] == "fail"]
    assert [check["name"] for check in summary["checks"]] == [one.name for one in CHECKS]
    assert all(row["wanted"] for row in rows if row["verdict"] == "needs CUDA"), "each says why"
    assert {row["verdict"] for row in rows} == {"pass", "measured", "needs CUDA"}
    table = (tmp_path / "summary.md").read_text().splitlines()
    assert len(table) == 4 + len(rows) and table[0].startswith("card none")


def test_both_commands_of_the_page_run_all_checks_and_have_time_for_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    commands = [re.findall(r"[a-z]+", names) for names in re.findall(r"make gpu-check GPU_CHECK='--only ([a-z ]+) --out", text)]
    assert len(commands) == 2 and [name for names in commands for name in names] == [one.name for one in CHECKS]
    seconds = {one.name: one.seconds for one in CHECKS}
    assert max(sum(seconds[name] for name in names) for names in commands) <= 540
    table = re.findall(r"(?m)^\| `([a-z]+)` \|", text)
    assert table == [*seconds]


@pytest.mark.parametrize(("card", "expected"), [(80, 128), (16, 128), (12, 96), (6, 48), (0.5, 8)])
def test_batches_follow_the_memory_of_the_card(card: float, expected: int) -> None:
    assert fitting(128, int(card * 2**30), MEMORY_CARD) == expected


def test_a_machine_without_a_compiler_is_the_reason_of_a_row_that_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", "")
    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        assert "needs a C++ compiler" in why_not_compiled("cpu")
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


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


def stop(_: Rig) -> Iterator[Row]:
    yield equal("before", 1, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_signal_ends_the_checks_with_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a machine that is lent ends a command."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(check, "CHECKS", (Check("stopped", "Stopped", 300, stop), Check("next", "Next", 300, stop)))
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "failed: stopped; not run: next (run them with --only next)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    stopped, later = json.loads((tmp_path / "summary.json").read_text())["checks"]
    assert (stopped["status"], stopped["problem"], [row["name"] for row in stopped["rows"]]) == (
        "fail",
        "interrupted",
        ["before"],
    )
    assert (later["status"], later["problem"], later["rows"]) == ("not run", "interrupted", [])
    assert "| Next | interrupted | | | not run |" in (tmp_path / "summary.md").read_text()


def test_checks_that_are_not_begun_in_time_are_told(tmp_path: Path) -> None:
    summary = run_checks([Check("late", "Late", 300, lambda _: iter(()))], "cpu", tmp_path, tmp_path, 0)
    assert [(found["status"], found["problem"]) for found in summary.checks] == [("not run", "the time of all checks is over")]
