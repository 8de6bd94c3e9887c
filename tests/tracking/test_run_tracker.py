"""wandb's own offline files, read back: config, metrics on ``step``, each step once however often the run was killed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pytest

from galaxydist.errors import UserError
from galaxydist.recipe.schema import TrackerConfig
from galaxydist.runs.events import Event, append_event
from galaxydist.runs.folder import RunFolder, StoredRecipe
from galaxydist.tracking import run_tracker, wandb_sink
from galaxydist.tracking.follower import Destination, Follower
from galaxydist.tracking.run_tracker import RunTracker, Tracker
from galaxydist.tracking.sink import Row, RunEnd, RunInfo, Sink
from galaxydist.tracking.wandb_files import (
    BLOCK_SIZE,
    has_ended,
    mend_files,
    offline_files,
    read_history,
    read_records,
    stored_step,
)
from galaxydist.tracking.wandb_sink import choose_wandb_mode, has_wandb_key, wandb_address
from tests.helpers.forked_runs import forked, run_forked, train
from tests.helpers.runs import quick_settings, read_metrics, run_here
from tests.helpers.wandb_server import WandbServer

WANDB = {"tracker__name": "wandb", "tracker__mode": "offline"}
OFFLINE = Destination("wandb", TrackerConfig(mode="offline"), {})


def run_id(run_dir: Path) -> str:
    return str(json.loads((run_dir / "tracker.json").read_text())["run_id"])


def records(path: Path, kind: str) -> list[Any]:
    """The records of a kind."""
    return [getattr(record, kind) for _, record in read_records(path) if record.WhichOneof("record_type") == kind]


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of all offline files of a run, in the order in which ``wandb sync`` sends them."""
    rows = [row.item for path in offline_files(run_dir, run_id(run_dir)) for row in records(path, "history")]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def assert_each_step_once(run_dir: Path) -> None:
    """The files together hold what metrics.jsonl holds, a row for each step; and each is one that ``wandb sync`` takes whole."""
    expected: dict[int, dict[str, Any]] = {}
    for line in read_metrics(run_dir):
        expected.setdefault(line["step"], {}).update(line)
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == list(expected)
    for row in rows:
        assert {name: row[name] for name in expected[row["step"]]} == expected[row["step"]]
    for path in offline_files(run_dir, run_id(run_dir)):
        assert records(path, "run")
        assert max(end for end, _ in read_records(path)) == path.stat().st_size


def assert_plots_and_artifacts(run_dir: Path, path: Path) -> None:
    """Each validation has wandb's own plots and galaxies, the end has the data set as an input, and the model with its card."""
    validated = [row for row in read_rows(run_dir) if "val/accuracy" in row]
    assert len(validated) == 4
    for row in validated:
        plots = {"val/confusion_table", "val/recall_by_class_table", "val/calibration_table"}
        assert {row[f"{name}._type"] for name in plots} == {"table-file"}
        assert 0 <= row["val/recall/round"] <= 1
    assert [row["epoch"] for row in validated if "val/galaxies._type" in row] == [1, 4]
    times = [line["time/unix"] for line in RunFolder(run_dir).timing.read() if line["step"] % 3 == 0]
    assert [row["_timestamp"] for row in validated] == times
    used, model = (artifact for artifact in records(path, "artifact") if artifact.type in ("dataset", "model"))
    assert used.type == "dataset" and used.use_after_commit and "manifest_hash" in used.metadata
    assert not model.use_after_commit and "best" in model.aliases
    card, weights = (entry.local_path for entry in model.manifest.contents)
    assert "Classifier of galaxy morphology" in Path(card).read_text() and "Accuracy on the 24 galaxies" in Path(card).read_text()
    assert Path(weights).is_relative_to(run_dir) and Path(weights).stat().st_size > 1000


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # this process's own, which a forked run would use
    monkeypatch.setenv("HOME", str(tmp_path))


def test_wandb_offline_files_hold_the_recipe_and_each_step_once_after_a_restart(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "my run"
    settings = quick_settings(blobs, run_dir, tracker__name="wandb", tracker__project="blobs", train__epochs=4)
    assert run_here(settings) == 0
    (path,) = offline_files(run_dir, run_id(run_dir))
    (run,) = records(path, "run")
    assert run.project == "blobs" and run.run_id == run_id(run_dir)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["epochs"] == 4 and config["model"]["name"] == "custom_cnn"
    assert_each_step_once(run_dir)
    rows = read_rows(run_dir)
    assert rows[-1]["step"] == 12 and {"val/accuracy", "val/loss", "time/img_s"} <= rows[-1].keys()
    assert f"wandb sync '{path.parent}'" in capsys.readouterr().out
    assert_plots_and_artifacts(run_dir, path)

    # Killed after its result was written and before wandb had all: the same command sends the rest, here all.
    path.write_bytes(path.read_bytes()[:7])
    RunFolder(run_dir).write_tracker(run_id=run_id(run_dir), stored_step=0, is_complete=False)
    assert run_here(settings) == 0
    assert_each_step_once(run_dir)
    assert offline_files(run_dir, run_id(run_dir)) != [path] and list((run_dir / "wandb-torn").iterdir())
    assert any("test/accuracy" in str(record) for record in records(offline_files(run_dir, run_id(run_dir))[0], "summary"))

    # The run is set back to before its end: it continues the same curve and logs no step twice.
    (run_dir / "result.json").unlink()
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    newest.rename(run_dir / "set-aside")
    capsys.readouterr()
    assert run_here(settings) == 0
    assert len(offline_files(run_dir, run_id(run_dir))) == 2
    assert_each_step_once(run_dir)
    assert f"wandb sync '{run_dir}/wandb'/offline-run-*-{run_id(run_dir)}" in capsys.readouterr().out


@pytest.mark.multiprocess
@pytest.mark.slow
def test_wandb_stores_each_step_once_after_repeated_kills(blobs: Path, tmp_path: Path) -> None:
    run_dir, chance = tmp_path / "run", random.Random(3)
    settings = quick_settings(blobs, run_dir, **WANDB, train__save_steps=3, train__log_every=1, train__epochs=20)
    metrics = run_dir / "metrics.jsonl"

    def num_lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def num_files() -> int:
        return len(list(run_dir.glob("wandb*/offline-run-*/*.wandb")))

    stops = ["kill", "terminate", "kill", "terminate all"]
    for number, stop in enumerate(stops):
        known = num_lines()
        assert num_files() == number
        with forked(train, settings, folder=tmp_path / f"log-{number}") as run:
            wait_until(lambda known=known, number=number: num_lines() > known + 4 and num_files() > number)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.2))
            (process,) = (psutil.Process(pid) for pid in run.pids)
            if stop == "terminate all":  # as a batch system does: wandb's own process too, which loses what it has
                for child in process.children(recursive=True):
                    child.send_signal(signal.SIGTERM)
            if stop == "kill":
                run.kill()
            else:
                process.terminate()
                wait_until(lambda run=run: run.exit_codes != [None])  # type: ignore[misc]
        assert run.exit_codes != [0], "it was done before the last kill came"
        if stop == "terminate" and "the tracker wandb failed" not in run.text("err"):  # which it might on a very slow machine
            assert read_rows(run_dir)[-1]["step"] == read_metrics(run_dir)[-1]["step"], "the last row came at the stop"
        assert "Traceback" not in run.text("err") and "socket.send" not in run.text("err")
    assert "the tracker wandb failed" in run.text("err")
    done = run_forked(train, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_each_step_once(run_dir)
    assert read_metrics(run_dir)[-1]["step"] == 60
    assert_complete_when_pushed(run_dir, tmp_path)
    assert num_files() == len(stops) + 1


@pytest.mark.multiprocess
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_wandb_stores_each_step_once_after_20_kills_with_pushes_between(blobs: Path, tmp_path: Path) -> None:
    run_dir, chance = tmp_path / "run", random.Random(4)
    settings = quick_settings(blobs, run_dir, **WANDB, train__save_steps=3, train__log_every=1, train__epochs=120)
    metrics = run_dir / "metrics.jsonl"
    for number in range(20):
        known = metrics.read_bytes() if metrics.exists() else b""
        with forked(train, settings, folder=tmp_path / f"log-{number}") as run:
            if chance.random() < 0.5:  # while it starts, or later
                time.sleep(chance.uniform(0, 1))
            else:
                wait_until(lambda known=known: metrics.exists() and metrics.read_bytes() != known)  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.3))
            run.kill()
        assert run.exit_codes == [-9], "it was done before the last kill came"
        if number % 3 == 0 and metrics.exists():
            assert push(run_dir, tmp_path).returncode == 0
    done = run_forked(train, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_complete_when_pushed(run_dir, tmp_path)


def push(run_dir: Path, home: Path) -> CompletedProcess[str]:
    return run_forked(push_offline, str(run_dir), environ={"HOME": str(home)})


def push_offline(run_dir: str) -> int:
    from galaxydist.cli.main import main

    return main(["track", "push", run_dir, "--mode", "offline"])


def assert_complete_when_pushed(run_dir: Path, home: Path) -> None:
    """After a push the files hold each step once, a second push changes nothing, and ``wandb sync`` gives a server each once."""
    assert push(run_dir, home).returncode == 0
    assert_each_step_once(run_dir)
    files = offline_files(run_dir, run_id(run_dir))
    before = [(path, path.read_bytes()) for path in files]
    assert "nothing new" in push(run_dir, home).stdout
    assert [(path, path.read_bytes()) for path in offline_files(run_dir, run_id(run_dir))] == before
    with WandbServer() as server:
        command = [sys.executable, "-m", "wandb", "sync", *(str(path.parent) for path in files)]
        environ = {**os.environ, **server.environ(), "HOME": str(home)}
        # In a folder of the test: wandb writes its own log there.
        synced = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, check=False)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert server.run.steps == list(dict.fromkeys(line["step"] for line in read_metrics(run_dir)))


class ListSink:
    """Keeps rows in a list; its program may break or hang."""

    def __init__(self, stored_step: int = 0, *, breaks_at: int = 1000, hangs_at: int = 1000) -> None:
        self.stored_step = stored_step
        self.breaks_at, self.hangs_at = breaks_at, hangs_at
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.alerts: list[str] = []
        self.end: RunEnd | None = None
        self.is_abandoned = threading.Event()
        self.over = threading.Event()

    def send(self, row: Row) -> None:
        if row.step >= self.breaks_at:
            raise BrokenPipeError("the server\nis away")
        if row.step >= self.hangs_at:
            self.over.wait()
        self.rows.append((row.step, dict(row.values)))

    def flush(self) -> None: ...

    def alert(self, event: Event) -> None:
        self.alerts.append(event.kind)

    def close(self, end: RunEnd) -> str:
        self.end = end
        return "there"

    def abandon(self) -> None:
        self.is_abandoned.set()


@dataclass(frozen=True)
class ListDestination(Destination):
    sink: ListSink = field(default_factory=ListSink)

    def open(self, _: RunInfo) -> Sink:
        return self.sink


def follow(folder: RunFolder, sink: ListSink) -> RunTracker:
    """The tracker of a run, with a sink of ours."""
    destination = ListDestination("trackio", TrackerConfig(), {}, sink=sink)
    return RunTracker(lambda: Follower(folder, destination, "abc", alerts_since=10.0), folder, "trackio", "abc")


def started_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.write_recipe(StoredRecipe({"name": "cnn", "tracker.project": "galaxydist"}, {}))
    return folder


def store(folder: RunFolder) -> str:
    """Send a whole run to wandb's offline files."""
    run_id = folder.read_tracker().get("run_id", "abc")
    return Follower(folder, OFFLINE, run_id).close(is_finished=True)


def test_run_tracker_sends_only_missing_steps_and_complete_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tracker, "INTERVAL_S", 0.01)
    folder = started_folder(tmp_path)
    for step in (2, 4, 6):
        folder.metrics.append(step, {"train/loss": 1 / step})
        folder.timing.append(step, {"time/img_s": 100.0 * step})
    folder.metrics.append(6, {"val/loss": None, "val/accuracy": 0.5})
    sink = ListSink(stored_step=2)
    tracker = follow(folder, sink)
    whole = [(4, {"train/loss": 0.25, "time/img_s": 400.0})]
    wait_until(lambda: sink.rows == whole)  # of step 6 more may come
    folder.metrics.append(8, {"train/loss": 0.1, "train/lr": float("nan")})
    append_event(folder.events_path, Event(5.0, "hang", "of an earlier start, known", step=1))
    append_event(folder.events_path, Event(20.0, "loss_spike", "now", step=8))
    tracker.wake()
    whole += [(6, {"train/loss": 1 / 6, "time/img_s": 600.0, "val/accuracy": 0.5, "events/hang": 1})]
    wait_until(lambda: sink.rows == whole and sink.alerts == ["loss_spike"])
    # Stopped: the row of step 8 may lack its validation; the next start sends it.
    assert tracker.finish(1) is None and sink.rows == whole
    assert sink.end is not None and (sink.end.exit_code, dict(sink.end.summary)) == (1, {})
    assert folder.read_tracker("trackio") == {"run_id": "abc", "stored_step": 6, "is_complete": False}
    folder.write_result({"step": 8, "test/accuracy": 0.75, "data_origin": {"licence": "CC0"}})
    sink = ListSink(stored_step=6)
    assert follow(folder, sink).finish(0) == "there" and sink.rows == [(8, {"train/loss": 0.1, "events/loss_spike": 1})]
    assert sink.end is not None and sink.end.summary == {"test/accuracy": 0.75}
    assert folder.read_tracker("trackio") == {"run_id": "abc", "stored_step": 8, "is_complete": True}

    sink = ListSink(breaks_at=6)
    assert follow(folder, sink).finish(0) is None and [step for step, _ in sink.rows] == [2, 4] and sink.is_abandoned.wait(60)
    assert caplog.text.count("the tracker trackio failed (the server). metrics.jsonl has every number") == 1
    assert f"galaxydist track push {tmp_path} --to trackio" in caplog.text


def test_a_tracker_that_hangs_delays_neither_a_step_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tracker, "FINISH_S", 0.2)
    folder = started_folder(tmp_path)
    folder.metrics.append(2, {"train/loss": 0.5})
    sink = ListSink(hangs_at=2)
    tracker = follow(folder, sink)
    for step in range(4, 2000, 2):
        folder.metrics.append(step, {"train/loss": 0.5})
        tracker.wake()  # returns at once
    assert tracker.finish(0) is None
    assert "the tracker trackio failed (it did not answer within 0.2 s)" in caplog.text
    sink.over.set()


def test_truncated_wandb_file_is_repaired_and_its_lost_steps_are_sent_again(tmp_path: Path) -> None:
    folder = started_folder(tmp_path / "run")
    for step in range(1, 200):
        folder.metrics.append(step, {"train/loss": 1 / step, "name/" + "x" * 200: 1.0})
    store(folder)
    (path,) = offline_files(folder.path, "abc")
    whole = path.read_bytes()
    assert len(whole) > 2 * BLOCK_SIZE and read_history(path) == Counter(range(1, 200)) and has_ended(path)
    ends = {0: 0} | {end: step for step, end in enumerate((e for e, r in read_records(path) if r.HasField("history")), 1)}
    chance = random.Random(0)
    for cut in [8, BLOCK_SIZE - 3, BLOCK_SIZE, BLOCK_SIZE + 3, *chance.sample(range(2000, len(whole)), 20)]:
        path.write_bytes(whole[:cut])
        held = max(step for end, step in ends.items() if end <= cut)
        assert stored_step(folder.path, "abc") == held and not has_ended(path)
        said = mend_files(folder.path, "abc")
        if cut == 8:
            assert "moved to" in said[0] and offline_files(folder.path, "abc") == []
            path.parent.mkdir()
            continue
        assert stored_step(folder.path, "abc") == held and mend_files(folder.path, "abc") == []
        assert whole.startswith(path.read_bytes()) and (bool(said) == (path.stat().st_size < cut))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1  # a bad disk: what follows cannot be trusted
    path.write_bytes(damaged)
    assert 0 < stored_step(folder.path, "abc") < 150
    RunFolder(folder.path).write_tracker(run_id="abc", stored_step=0, is_complete=False)
    store(folder)
    assert len(offline_files(folder.path, "abc")) == 2
    assert sum((Counter(read_history(path)) for path in offline_files(folder.path, "abc")), Counter()) == Counter(range(1, 200))


def test_the_end_of_the_wandb_file_is_waited_for_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own ``finish`` returns while its process writes: the end is waited for."""
    asked: list[bool] = []

    def ended_later(path: Path) -> bool:
        asked.append(has_ended(path))
        return len(asked) > 3 and asked[-1]

    monkeypatch.setattr(wandb_sink, "has_ended", ended_later)
    folder = started_folder(tmp_path / "run")
    folder.metrics.append(1, {"train/loss": 1.0})
    line = store(folder)
    assert "wandb sync" in line and len(asked) > 3 and folder.read_tracker()["is_complete"]
    monkeypatch.setattr(wandb_sink, "has_ended", lambda _: False)
    monkeypatch.setattr(wandb_sink, "WRITING_S", 0.0)
    with pytest.raises(TimeoutError, match="after 0 s wandb had not written the end of "):
        store(folder)
    assert not folder.read_tracker()["is_complete"]


def test_wandb_without_a_key_stays_offline(tmp_path: Path) -> None:
    assert choose_wandb_mode({"HOME": str(tmp_path)}) == "offline"


def test_wandb_finds_its_server_and_key_where_wandb_login_puts_them(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("machine wandb.example.org:8080 login user password key\n")
    (tmp_path / "keys").chmod(0o644)
    environ = {"NETRC": str(tmp_path / "keys"), "WANDB_BASE_URL": "http://wandb.example.org:8080"}
    assert has_wandb_key(environ) and wandb_address(environ) == ("wandb.example.org", 8080)
    assert not has_wandb_key({"NETRC": environ["NETRC"]}) and wandb_address({}) == ("api.wandb.ai", 443)
    assert wandb_address({"WANDB_BASE_URL": "http://wandb.example.org/"}) == ("wandb.example.org", 80)
    with pytest.raises(UserError, match="WANDB_BASE_URL is not the address of a server"):
        wandb_address({"WANDB_BASE_URL": "http://host:port"})


def test_wandb_with_a_key_but_no_server_stays_offline() -> None:
    # Port 9 of this machine: nobody listens.
    assert choose_wandb_mode({"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}) == "offline"


def test_a_tracker_that_cannot_start_does_not_stop_the_training(
    blobs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise OSError("no room for wandb")

    monkeypatch.setattr(wandb, "init", fail)
    assert run_here(quick_settings(blobs, tmp_path / "run", **WANDB, train__epochs=1)) == 0
    assert caplog.text.count("the tracker wandb failed (no room for wandb)") == 1


def test_a_run_that_fails_does_not_wait_for_a_tracker_that_hangs(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs, over = threading.Event(), threading.Event()

    class HangingTracker(Tracker):
        def finish(self, exit_code: int) -> str | None:
            assert exit_code == 1
            hangs.set()
            over.wait()
            return None

    def fail(*_: object) -> int:
        raise UserError("the disk is full")

    monkeypatch.setattr("galaxydist.training.trainer.start_tracker", lambda *_, **__: HangingTracker())
    monkeypatch.setattr("galaxydist.training.health.rank_exit.TRACKER_S", 0.1)
    monkeypatch.setattr("galaxydist.training.loop.TrainLoop.run", fail)
    try:
        assert run_here(quick_settings(blobs, tmp_path / "run")) == 2
        assert hangs.is_set() and "the disk is full" in capsys.readouterr().err
        assert not (tmp_path / "run" / "lock.json").exists()
    finally:
        over.set()
