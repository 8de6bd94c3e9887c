"""wandb's own offline files, read back: config, metrics on ``step``, one curve over a stop and a restart."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from galaxydist.training.tracking import NullTracker, build_tracker, choose_wandb_mode
from tests.runs import quick_settings, run_here

BLOCK = 32_768
FILE_HEADER = 7
RECORD_HEADER = 7


def read_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes, a protobuf message a record."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    place, message = FILE_HEADER, b""
    while place + RECORD_HEADER <= len(data):
        if BLOCK - place % BLOCK < RECORD_HEADER:
            place += BLOCK - place % BLOCK
            continue
        _crc, length, kind = struct.unpack("<IHB", data[place : place + RECORD_HEADER])
        message += data[place + RECORD_HEADER : place + RECORD_HEADER + length]
        place += RECORD_HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def whole_records(path: Path) -> list[Any]:
    """All records, once wandb's own process has written the last."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = list(read_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no last record")


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in whole_records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in row} for row in rows]


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_offline_files_hold_the_recipe_and_one_curve_over_a_restart(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, tracker__name="wandb", tracker__project="blobs", train__epochs=4)
    assert run_here(settings) == 0
    (path,) = offline_runs(run_dir)
    (run,) = (record.run for record in whole_records(path) if record.WhichOneof("record_type") == "run")
    assert run.project == "blobs" and run.run_id == json.loads((run_dir / "tracker.json").read_text())["run_id"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["epochs"] == 4 and config["model"]["name"] == "custom_cnn"
    rows = history(path)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}) and rows[-1]["step"] == 12
    assert all(row["train/loss"] > 0 for row in rows if "train/loss" in row)
    assert {"val/accuracy", "val/loss"} <= rows[-1].keys()

    # The run is set back to before its end, as after a kill: it continues the same curve and logs no step twice.
    (run_dir / "result.json").unlink()
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    newest.rename(run_dir / "set-aside")
    assert run_here(settings) == 0
    again = [path for path in offline_runs(run_dir) if path != offline_runs(run_dir)[0]]
    assert len(again) == 1 and again[0].name == path.name
    assert [row["step"] for row in history(again[0])] == []


def test_without_a_key_wandb_stays_offline(tmp_path: Path) -> None:
    assert choose_wandb_mode({"HOME": str(tmp_path)}) == "offline"


def test_a_key_without_a_server_stays_offline() -> None:
    # Port 9 of this machine: nobody listens.
    assert choose_wandb_mode({"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}) == "offline"


def test_a_tracker_that_cannot_start_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from galaxydist.recipe.schema import TrackerConfig

    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    config = TrackerConfig(name="wandb", mode="offline")
    options = {"run_id": "abc", "name": "x", "recipe": {}, "logged_step": 0, "environ": {}}
    tracker = build_tracker(config, folder=blocked / "run", **options)
    assert isinstance(tracker, NullTracker)
    assert "wandb could not start" in caplog.text
