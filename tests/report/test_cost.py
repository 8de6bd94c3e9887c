"""Device hours of runs: known numbers of constructed run folders, sums that add up, and a run that was really killed."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cli.main import main as galaxydist
from galaxydist.cluster.records import JobFiles, JobRecord, RestartRecord
from galaxydist.cluster.slurm import Allocation, parse_allocations
from galaxydist.report.cost import PARTS, RunHours, read_run_hours, total_hours
from galaxydist.runs.events import Event, append_event
from galaxydist.runs.folder import RunFolder, StoredRecipe
from tests.helpers.forked_runs import run_forked, train, train_watched
from tests.helpers.runs import quick_settings

GPU = "NVIDIA H200"
BATCH_SIZE = 10


class ConstructedRun:
    """A run folder of one step a second on two GPUs, of which a fifth of the time waits for data."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.folder.create()
        self.folder.write_recipe(StoredRecipe({"train.batch_size": BATCH_SIZE}, {}))

    def event(self, kind: Any, at: float, began: float, step: int | None = None, start: str | None = None, **more: Any) -> None:
        append_event(self.folder.events_path, Event(at, kind, "", step, start, {"began": began, **more}))

    def begin(self, began: float, at: float, step: int = 0, start: str | None = None, **more: Any) -> None:
        self.event("start", at, began, step, start, device="cuda", devices={GPU: 2}, cores=8, **more)

    def line(self, step: int, at: float | None, **shares: float) -> None:
        speed = {
            "time/img_s": float(BATCH_SIZE),
            "time/img_s_device": BATCH_SIZE / 2,
            "time/data_wait": 0.2,
            "gpu/memory_gb": 1.0,
        }
        self.folder.timing.append(step, {**speed, **shares, **({} if at is None else {"time/unix": at})})

    def hours(self, allocations: Mapping[str, list[Allocation]] | None = None, now: float = 1e9) -> RunHours:
        return read_run_hours(self.folder.path, "run", allocations, now=now)


def killed_and_continued(path: Path, start: str | None = None, again: str | None = None) -> ConstructedRun:
    """Killed after the line of step 30, with a checkpoint of step 20; then finished at step 40."""
    run = ConstructedRun(path)
    run.begin(1000.0, 1060.0, start=start)
    run.line(10, 1070.0)
    run.line(20, 1080.0)
    run.begin(1200.0, 1230.0, 20, again, cut_points=[[30, 1090.0]])
    run.line(30, 1240.0)
    run.line(40, 1250.0)
    run.event("finish", 1290.0, 1200.0, 40, again)
    run.folder.write_result({"step": 40})
    return run


def seconds(run: RunHours) -> list[dict[str, float]]:
    """The parts that are not 0, by start."""
    return [{part: round(value, 6) for part, value in start.seconds.items() if value > 1e-9} for start in run.starts]


def test_killed_start_is_divided_into_what_counts_and_what_was_lost(tmp_path: Path) -> None:
    hours = killed_and_continued(tmp_path).hours()
    first = {"startup": 60, "training": 16, "data_wait": 4, "lost": 10}
    assert seconds(hours) == [first, {"startup": 30, "training": 16, "data_wait": 4, "evaluation": 40}]
    (kind, found), *others = hours.device_hours().items()
    assert kind == GPU and not others and hours.notes == () and hours.queued_hours is None
    assert found["used"] == pytest.approx(2 * 180 / 3600) and found["lost"] == pytest.approx(2 * 10 / 3600)


def test_begin_end_and_queue_come_from_the_records_of_the_job_or_from_accounting(tmp_path: Path) -> None:
    run = killed_and_continued(tmp_path, "7.0", "7.1")
    files = JobFiles(tmp_path)
    files.append_job(JobRecord("7", "slurm", "a100", 940.0, 1, 2, 60, tmp_path, tmp_path))
    files.append_restart(RestartRecord("7", 0, 137, 30, "killed", "requeue", "", 1100.0, 20))
    hours = run.hours()
    assert [start.queued_s for start in hours.starts] == [60, 100] and seconds(hours)[0]["lost"] == 20
    text = (
        "7|1970-01-01T00:15:00|1970-01-01T00:15:50|1970-01-01T00:18:25|16|billing=16,cpu=16,gres/gpu:h200=2,gres/gpu=2,node=1\n"
        "7|1970-01-01T00:18:30|1970-01-01T00:19:50|1970-01-01T00:21:40|16|billing=16,gres/gpu=2\n"
        "7|1970-01-01T00:30:00|Unknown|Unknown|0|\n8|1970-01-01T00:30:00|Unknown|Unknown|0|\n"
    )
    zone = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    try:
        allocations = parse_allocations(text, ["7"])
    finally:
        os.environ.pop("TZ") if zone is None else os.environ.update(TZ=zone)
        time.tzset()
    first, second, waiting = allocations["7"]
    assert first == Allocation(900, 950, 1105, 16, 2) and second == Allocation(1110, 1190, 1300, 16, 2)
    assert waiting == Allocation(1800, None, None, 0, 0) and len(allocations) == 1
    hours = run.hours(allocations)
    assert [start.queued_s for start in hours.starts] == [50, 80]
    killed, finished = seconds(hours)
    assert killed == {"startup": 110, "training": 16, "data_wait": 4, "lost": 25}
    assert finished == {"startup": 40, "training": 16, "data_wait": 4, "evaluation": 40, "unknown": 10}


def test_stop_with_everything_saved_loses_nothing_and_a_crash_before_training_is_start_up(tmp_path: Path) -> None:
    run = ConstructedRun(tmp_path)
    run.begin(1000.0, 1010.0)
    run.line(10, 1020.0, **{"time/checkpoint": 0.5})  # ten seconds of training and ten for the checkpoint do not fit into ten
    run.event("stop", 1025.0, 1000.0, 15)
    run.event("failure", 2030.0, 2000.0)
    run.begin(3000.0, 3010.0, 15)
    (tmp_path / "checkpoints" / "step-00000015-000001").mkdir(parents=True)
    first, crash, last = seconds(run.hours())
    assert first["startup"] == 10 and "lost" not in first and sum(first.values()) == 25
    assert crash == {"startup": 30}
    assert last["startup"] == 10  # it has ended without a trace, or does its first steps: nothing was logged
    assert run.hours().device_hours().keys() == {GPU}


def test_validation_between_two_lines_is_told_from_training(tmp_path: Path) -> None:
    run = ConstructedRun(tmp_path)
    run.begin(1000.0, 1000.0)
    run.line(10, 1010.0)
    run.folder.metrics.append(10, {"val/accuracy": 0.5})
    run.line(20, 1027.0)
    run.line(30, 1039.0)
    run.event("finish", 1039.0, 1000.0, 30)
    run.folder.write_result({"step": 30})
    assert seconds(run.hours()) == [{"training": 24, "data_wait": 6, "evaluation": 7, "unknown": 2}]

    pruned = ConstructedRun(tmp_path / "pruned")
    pruned.begin(1000.0, 1000.0)
    pruned.line(10, 1010.0)
    pruned.event("pruned", 1013.0, 1000.0, 10)
    (pruned.folder.checkpoints_dir / "step-00000010-000001").mkdir(parents=True)
    assert seconds(pruned.hours()) == [{"training": 8, "data_wait": 2, "evaluation": 3}]


def test_run_of_an_earlier_version_says_what_is_not_known(tmp_path: Path) -> None:
    run = ConstructedRun(tmp_path)
    run.line(10, None)
    run.line(40, None)
    hours = run.hours()
    assert seconds(hours) == [{"training": 32, "data_wait": 8}] and hours.device_hours().keys() == {"GPU"}
    assert "is unknown" in hours.notes[0]
    JobFiles(tmp_path).append_job(JobRecord("7", "slurm", "a100", 940.0, 1, 2, 60, tmp_path, tmp_path))
    hours = run.hours({"7": [Allocation(940, 1000, 1060, 16, 4)]})
    assert seconds(hours) == [{"training": 32, "data_wait": 8, "unknown": 20}]
    assert hours.device_hours()["GPU"]["used"] == pytest.approx(4 * 60 / 3600)
    assert run.hours(None).starts and ConstructedRun(tmp_path / "new").hours().starts == ()


POSITIVE = st.floats(0.0, 500.0)
SHARE = st.floats(0.0, 1.0)


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Starts with steps and shares that need not fit together, each perhaps killed, perhaps set back to any step."""
    return [
        {
            "gap": draw(st.floats(1.0, 500.0)),
            "startup": draw(POSITIVE),
            "resume": draw(st.integers(0, 100)),
            "lines": draw(st.lists(st.tuples(st.integers(1, 30), POSITIVE, SHARE, SHARE, st.booleans()), max_size=4)),
            "end": draw(st.sampled_from(["stop", "finish", "failure", "hang", None])),
        }
        for _ in range(draw(st.integers(1, 4)))
    ]


@given(histories())
def test_parts_of_any_history_add_up_to_the_time_of_each_start(
    tmp_path_factory: pytest.TempPathFactory, history: list[dict[str, Any]]
) -> None:
    run = ConstructedRun(tmp_path_factory.mktemp("history"))
    now, spans = 1000.0, []
    for facts in history:
        now += facts["gap"]
        began, step = now, facts["resume"]
        now += facts["startup"]
        run.folder.timing.cut_back(step)
        run.begin(began, now, step)
        for count, wait, data_wait, checkpoint, has_validation in facts["lines"]:
            step, now = step + count, now + wait
            run.line(step, now, **{"time/data_wait": data_wait, "time/checkpoint": checkpoint})
            if has_validation:
                run.folder.metrics.append(step, {"val/loss": 1.0})
        if facts["end"] is not None:
            run.event(facts["end"], now, began, step)
        spans.append(now - began)
    run.folder.write_result({"step": 1})
    hours = run.hours()
    assert len(hours.starts) == len(spans)
    for start, span, facts in zip(hours.starts, spans, history, strict=True):
        assert set(start.seconds) <= set(PARTS) and all(value >= 0 for value in start.seconds.values())
        if facts["end"] is not None:
            assert start.used_s == pytest.approx(span, abs=1e-3)
    total = total_hours([hours, hours]).get(GPU, {})
    assert total["used"] == pytest.approx(2 * 2 * sum(start.used_s for start in hours.starts) / 3600)
    assert total["used"] == pytest.approx(math.fsum(total[part] for part in PARTS))


@pytest.mark.multiprocess
def test_run_that_was_killed_and_continued_reports_what_it_used_and_lost(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "vit"
    settings = quick_settings(blobs, run_dir, train__save_every=2, train__log_every=1)
    started = time.time()
    # It kills itself before the second checkpoint, of step 12, gets its name.
    killed = run_forked(train_watched, settings, None, ("step-00000012", 0))
    spent = time.time() - started
    assert killed.returncode == -9
    started = time.time()
    assert run_forked(train, settings).returncode == 0
    spent_again = time.time() - started
    assert galaxydist(["cost", str(run_dir.parent), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    first, second = content["runs"][0]["starts"]
    assert 0 < first["seconds"]["lost"] < sum(first["seconds"].values()) < spent + 2
    assert second["seconds"]["lost"] == 0 and second["seconds"]["training"] > 0 and second["seconds"]["evaluation"] > 0
    assert sum(second["seconds"].values()) < spent_again + 2
    assert content["total"]["CPU core"]["used"] > 0 and content["notes"] == []
    assert galaxydist(["cost", str(run_dir.parent)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["run", "devices"] and "lost" in table[0]
    assert [line.split()[0] for line in table[1:]] == ["vit", "all", "share"]
    assert galaxydist(["cost", str(blobs.parent)]) == 2
    assert "There is no run in" in capsys.readouterr().err
