"""``galaxydist track push`` of run folders: finished, killed, old and running ones, to offline files and to a server."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from galaxydist.cli import track
from galaxydist.cli.main import main
from galaxydist.recipe.schema import TrackerConfig
from galaxydist.runs.code_version import CodeVersion
from galaxydist.runs.folder import RunFolder, StoredRecipe
from galaxydist.runs.lock import RunLock
from galaxydist.tracking import push
from galaxydist.tracking.push import Push, PushOptions
from galaxydist.tracking.run_info import build_end, build_info
from galaxydist.tracking.tensorboard_sink import RESULTS_FILE, event_files, read_rows
from galaxydist.tracking.wandb_files import offline_files, read_history
from galaxydist.training import run_summary
from tests.helpers.runs import quick_settings, run_here
from tests.helpers.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    import wandb

    with WandbServer() as server:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_SILENT")
        wandb.teardown()  # it keeps the address that it read first
        yield server
        wandb.teardown()


@pytest.fixture(scope="module")
def trained(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a tracker, of code with uncommitted changes."""
    run_dir, code = tmp_path_factory.mktemp("one") / "run", tmp_path_factory.mktemp("code")
    version = CodeVersion("c" * 40, has_changes=True, diff=b"-x = 1\n+x = 2\n")
    for name, content in version.files().items():
        (code / name).write_bytes(content)
    secret = "https://hooks.example.org/secret-token"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_summary, "PACKAGE_DIR", code / "galaxydist")  # a snapshot
        assert run_here(quick_settings(blobs, run_dir, train__epochs=2, tracker__webhook=secret), dict(os.environ)) == 0
    return run_dir


def stored_steps(run: Path) -> list[int]:
    """The steps of all offline files of a run, in the order in which ``wandb sync`` sends them."""
    files = offline_files(run, RunFolder(run).read_tracker()["run_id"])
    return [step for path in files for step in read_history(path).elements()]


def files_of(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in offline_files(run, RunFolder(run).read_tracker()["run_id"])}


def make_run(folder: Path, steps: int, **recipe: object) -> RunFolder:
    """A run folder of an early version: a recipe and metrics, and nothing else."""
    run = RunFolder(folder)
    run.create()
    run.write_recipe(StoredRecipe({"name": "cnn", "model.name": "cnn", **recipe}, {}))
    for step in range(2, steps + 1, 2):
        run.metrics.append(step, {"train/loss": 1 / step})
    return run


def test_two_pushes_give_what_one_gives_and_later_steps_follow(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "runs" / "finished")
    old = make_run(tmp_path / "runs" / "old", 10)
    (tmp_path / "runs" / "new").mkdir()
    RunFolder(tmp_path / "runs" / "new").write_recipe(StoredRecipe({"name": "cnn"}, {}))
    make_run(tmp_path / "runs" / "broken", 4).metrics_path.write_text('{"step": 2}\ndamaged\n{"step": 4}\n')
    command = ["track", "push", str(tmp_path / "runs")]
    assert main(command) == 1  # one is broken
    shown = capsys.readouterr()
    assert "finished: 4 rows sent; wandb: offline" in shown.out and "new: there is nothing to send yet" in shown.out
    assert "not sent: " in shown.err and "damaged line: b'damaged'" in shown.err
    assert stored_steps(run) == [2, 3, 4, 6] and stored_steps(old.path) == [2, 4, 6, 8]
    before = files_of(run) | files_of(old.path)
    assert main(command) == 1 and "finished: nothing new" in capsys.readouterr().out
    assert files_of(run) | files_of(old.path) == before

    old.metrics.append(12, {"train/loss": 0.1})
    assert main(["track", "push", str(old.path)]) == 0
    assert stored_steps(old.path) == [2, 4, 6, 8, 10] and len(files_of(old.path)) == 2
    assert main(["track", "push", str(old.path), "--project", "other"]) == 1
    assert "is of wandb's project galaxydist, and project other was asked for" in capsys.readouterr().err


def test_a_server_is_asked_what_it_has_and_gets_no_secret(
    trained: Path, tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "runs" / "one")
    assert main(["track", "push", str(run), "--project", "blobs", "--entity", "team"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{run}: 4 rows sent; wandb: http://127.0.0.1:") and shown.err == ""
    assert (server.run.entity, server.run.project, server.run.steps, server.run.exit_code) == ("team", "blobs", [2, 3, 4, 6], 0)
    first = server.run.history
    timing = {line["step"]: line["time/unix"] for line in RunFolder(run).timing.read()}
    assert [row["_timestamp"] for row in first] == [timing[row["step"]] for row in first]
    assert server.run.summary["test/accuracy"] == json.loads((run / "result.json").read_text())["test/accuracy"]
    kinds = {artifact.kind if hasattr(artifact, "kind") else artifact.type for artifact in server.artifacts.values()}
    assert {"dataset", "model"} <= kinds and len(server.run.used) == 1
    sent = json.dumps([server.run.attributes, server.run.config, server.run.summary, first], default=str)
    assert "secret-token" not in sent and server.alerts == []
    assert server.run.config["run"]["commit"] == "c" * 40 and server.run.config["run"]["uncommitted_changes"] is True
    assert server.run.uploads["code.diff"] == b"-x = 1\n+x = 2\n"

    (run / "tracker.json").write_text((run / "tracker.json").read_text().replace('"stored_step": 6', '"stored_step": 0'))
    assert main(["track", "push", str(run), "--project", "blobs", "--entity", "team"]) == 0
    shown = capsys.readouterr()
    assert server.run.history == first and "one: 0 rows sent" in shown.out and shown.err == ""


def test_a_run_that_sends_itself_is_left_out_and_a_watched_one_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = make_run(tmp_path / "runs" / "own", 6, **{"tracker.name": "wandb"})
    other = make_run(tmp_path / "runs" / "other", 6, **{"tracker.name": "none"})
    locks = [RunLock(run.lock_path, host=os.uname().nodename, pid=os.getpid(), clock=time.time) for run in (own, other)]
    for lock in locks:
        lock.acquire()
    seen: list[list[int]] = []

    def go_on(_: float) -> None:
        """Write a row, then the result, then end the process: one of them between two looks."""
        seen.append(stored_steps(other.path))
        step = 6 + 2 * len(seen)
        other.metrics.append(step, {"train/loss": 1 / step})
        if len(seen) == 3:
            other.write_result({"step": step})
            for lock in locks:
                lock.release()

    # Not time.sleep itself, which wandb's threads call too; and SLURM is asked at each look.
    monkeypatch.setattr(push, "time", SimpleNamespace(sleep=go_on, time=time.time, monotonic=time.monotonic))
    monkeypatch.setattr(track, "SLURM_S", 0.0)
    try:
        assert main(["track", "push", str(tmp_path / "runs"), "--watch"]) == 0
    finally:
        for lock in locks:
            lock.release()
    shown = capsys.readouterr().out
    assert stored_steps(other.path) == [2, 4, 6, 8, 10, 12] and len(files_of(other.path)) == 1
    assert stored_steps(own.path) == [2, 4]  # once it had ended
    assert shown.startswith("following 1 run; Ctrl-C ends it\n")  # the other sends itself
    assert "other: 6 rows sent" in shown and "own: 2 rows sent" in shown


def test_runs_of_a_folder_are_a_group_and_the_model_is_sent_if_the_recipe_says_so(trained: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(trained, tmp_path / "alone" / "run"))
    info = build_info(run, TrackerConfig(), "abc")
    assert (info.group, info.name) == (None, "run") and build_end(run, info, 0, []).model is not None
    make_run(tmp_path / "alone" / "other", 4, seed=7)
    info = build_info(run, TrackerConfig(), "abc")
    assert (info.group, info.name) == ("alone", "custom_cnn seed=0 dataset=galaxy10_decals original")
    shutil.move(tmp_path / "alone", tmp_path / "runs")
    run = RunFolder(tmp_path / "runs" / "run")
    info = build_info(run, TrackerConfig(), "abc")
    assert (info.group, info.name) == (None, "run")
    stored = run.read_recipe()
    run.write_recipe(StoredRecipe({**stored.recipe, "tracker.log_model": False}, stored.origins))
    end = build_end(run, build_info(run, TrackerConfig(), "abc"), 0, [])
    assert (end.model, end.model_card) == (None, "") and "test/accuracy" in end.summary


def test_a_run_that_goes_on_after_it_was_sent_or_failed_is_sent_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", 4)
    watch = Push(PushOptions("tensorboard", os.environ))
    watch.update([run.path], ())  # it was stopped
    assert "1 row sent" in watch.report.sent[run.path]
    run.metrics.append(6, {"train/loss": 0.1})
    run.timing.path.write_text("damaged\n")
    watch.update([run.path], [run.path])
    assert "damaged line" in watch.report.failed[run.path]
    run.timing.path.unlink()
    watch.update([run.path], [run.path])
    assert watch.report.failed  # it is not tried at each look
    monkeypatch.setattr(push, "RETRY_S", 0.0)
    watch.update([run.path], [run.path])
    assert not watch.report.failed
    run.metrics.append(8, {"train/loss": 0.1})
    run.write_result({"step": 8, "test/accuracy": 0.5})
    watch.update([run.path], ())
    assert "tensorboard" in watch.report.sent[run.path]
    assert [step for path in event_files(run.path / "tensorboard") for step, _, _ in read_rows(path)] == [2, 4, 6, 8]
    assert (run.path / "tensorboard" / RESULTS_FILE).stat().st_mtime >= run.result_path.stat().st_mtime


def test_a_run_that_cannot_be_sent_does_not_disturb_the_others_of_a_watch(tmp_path: Path) -> None:
    good, bad = (make_run(tmp_path / name, 6) for name in ("a", "b"))
    bad.timing.path.write_text("damaged\n")
    runs = [good.path, bad.path]
    watch = Push(PushOptions("wandb", os.environ))
    for step in (8, 10):
        watch.update(runs, runs)
        good.metrics.append(step, {"train/loss": 0.1})
    watch.close()
    assert list(watch.report.failed) == [bad.path] and len(files_of(bad.path)) == 1
    assert stored_steps(good.path) == [2, 4, 6, 8] and len(files_of(good.path)) == 1
