"""Traces of a few steps."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from galaxydist.errors import UserError
from galaxydist.training import profiler
from galaxydist.training.profiler import StepProfiler, parse_steps


def train(profiler: StepProfiler, start: int, stop: int) -> None:
    """Steps with one matrix product each; before step ``n`` is one of its own shape, n x 7 times 7 x 7."""
    with profiler:
        for done in range(start, stop):
            torch.ones(done + 1, 7) @ torch.ones(7, 7)
            profiler.step_done(done + 1)


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def traced(path: Path) -> tuple[list[str], int]:
    """The marked steps, and how many matrix products there are in all."""
    names = [event["name"] for event in events(path) if event.get("ph") == "X"]
    return sorted({name for name in names if name.startswith("step ")}), names.count("aten::mm")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").glob("*")) if (folder / "profile").exists() else []


def test_profiler_traces_exactly_the_requested_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "galaxydist"):
        train(StepProfiler("3-5", tmp_path, 0), 0, 10)
    path = tmp_path / "profile" / "steps-3-5.json"
    assert files(tmp_path) == [path.name]
    assert traced(path) == (["step 3", "step 4", "step 5"], 3)
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]
    marks = {event["name"]: event for event in events(path) if event.get("ph") == "X" and event["name"].startswith("step ")}
    products = sorted((event for event in events(path) if event.get("name") == "aten::mm"), key=lambda event: event["ts"])
    for step, product in zip((3, 4, 5), products, strict=True):
        mark = marks[f"step {step}"]
        assert mark["ts"] <= product["ts"] and product["ts"] + product["dur"] <= mark["ts"] + mark["dur"]


def test_profiler_traces_a_single_requested_step(tmp_path: Path) -> None:
    train(StepProfiler("1", tmp_path, 0), 0, 3)
    assert traced(tmp_path / "profile" / "steps-1-1.json") == (["step 1"], 1)


@pytest.mark.parametrize(
    ("start", "stop", "name"),
    [(3, 10, "steps-4-5.json"), (0, 4, "steps-3-4.json"), (4, 10, "steps-5-5.json")],
    ids=["resumed within", "ended within", "resumed at the last"],
)
def test_profiler_of_a_partly_run_range_traces_the_steps_that_ran(start: int, stop: int, name: str, tmp_path: Path) -> None:
    train(StepProfiler("3-5", tmp_path, 0, start_step=start), start, stop)
    assert files(tmp_path) == [name]


@pytest.mark.parametrize(("text", "rank", "start"), [(None, 0, 0), ("3-5", 1, 0), ("3-5", 0, 5), ("30-50", 0, 0)])
def test_profiler_writes_no_trace_if_unset_on_other_ranks_or_outside_the_range(
    text: str | None, rank: int, start: int, tmp_path: Path
) -> None:
    train(StepProfiler(text, tmp_path, rank, start_step=start), start, start + 8)
    assert not (tmp_path / "profile").exists()


def test_profiler_of_a_failed_run_leaves_no_trace_and_can_start_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StepProfiler("1-3", tmp_path, 0) as profiler:
        profiler.step_done(1)
        raise RuntimeError
    assert not (tmp_path / "profile").exists()
    # The profiler was stopped: another one may start.
    train(StepProfiler("1-3", tmp_path, 0), 0, 3)
    assert files(tmp_path) == ["steps-1-3.json"]


def test_large_trace_is_gzipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "MAX_PLAIN_BYTES", 100)
    train(StepProfiler("2-3", tmp_path, 0), 0, 5)
    assert files(tmp_path) == ["steps-2-3.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "steps-2-3.json.gz").read_bytes()))
    assert {"step 2", "step 3"} <= {event["name"] for event in trace["traceEvents"] if "name" in event}


def test_kill_while_writing_a_trace_leaves_no_final_file(tmp_path: Path) -> None:
    """Killed at the rename, when everything is written but the name."""
    program = f"""
import os, sys, torch
from pathlib import Path
from galaxydist.training.profiler import StepProfiler
sys.addaudithook(lambda event, _: os.kill(os.getpid(), 9) if event == "galaxydist.rename" else None)
with StepProfiler("1-2", Path({str(tmp_path)!r}), 0) as profiler:
    for step in (1, 2, 3):
        torch.ones(3, 3) @ torch.ones(3, 3)
        profiler.step_done(step)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert [name for name in files(tmp_path) if not name.startswith(".")] == []
    train(StepProfiler("1-2", tmp_path, 0), 0, 3)
    assert files(tmp_path) == ["steps-1-2.json"]


def test_parse_steps_reads_ranges_and_refuses_invalid_ones() -> None:
    assert parse_steps("10-20") == range(10, 21) and parse_steps("7") == range(7, 8)
    for text in ("20-10", "0-3", "a", "1-2-3", "", "-5", "1.5"):
        with pytest.raises(UserError, match=r"train\.profile="):
            parse_steps(text)
