"""Whole runs through the real launchers: start, stop, continue, finish, and everything that a run folder then holds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from galaxydist.runs import checkpoints
from galaxydist.shards.write import write_shards
from tests.blobs import BlobSurvey

ROOT = Path(__file__).parents[1]
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TWO_BY_ACCELERATE = (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small data set of blobs."""
    folder = tmp_path_factory.mktemp("blobs") / "shards"
    return write_shards(BlobSurvey(), folder, encoding="png", shard_size=16, workers=1).path


@pytest.fixture
def settings(blobs: Path, tmp_path: Path) -> list[str]:
    """A run of a few seconds."""
    return [
        "recipe=custom_cnn",
        f"data.manifest={blobs}",
        f"run.dir={tmp_path / 'run'}",
        "data.image_size=32",
        "data.num_streams=8",
        "model.width=4",
        "train.batch_size=24",
        "train.epochs=12",
        "train.log_every=2",
        "eval.batch_size=7",
        "optim.lr=0.01",
        "tracker.name=none",
    ]


def on_one_core() -> None:
    """One core for each worker of the test run: threads that wait for one another on busy cores are slow."""
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})


def launch(launcher: tuple[str, ...], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run launch.py under a launcher, to its end."""
    command = [*launcher, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, preexec_fn=on_one_core)


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluation" / "test.json").read_text())
    return found


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}


def weights(run_dir: Path) -> Mapping[str, Any]:
    newest = checkpoints.load(run_dir / "checkpoints")
    assert newest is not None
    return newest.tensors


def test_a_run_learns_and_leaves_everything_in_its_folder(settings: list[str], tmp_path: Path) -> None:
    done = launch(PYTHON, settings)
    assert done.returncode == 0, done.stderr
    assert "1 process" in done.stdout
    run_dir = tmp_path / "run"
    evaluation = read_evaluation(run_dir)
    assert evaluation["count"] == 24 == sum(map(sum, evaluation["confusion"]))
    assert evaluation["accuracy"] > 0.8
    assert evaluation["dataset"] == "blobs" and evaluation["split"] == "test"
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == sorted(steps) and steps[-1] == 36
    assert {"train/loss", "train/accuracy", "train/lr", "time/img_s", "time/data_wait"} <= read_metrics(run_dir)[0].keys()
    assert json.loads((run_dir / "recipe.json").read_text())["recipe"]["train.epochs"] == 12
    assert not (run_dir / "lock.json").exists()

    again = launch(PYTHON, settings)
    assert again.returncode == 0 and "finished" in again.stdout and "round" in again.stdout
    assert [line["step"] for line in read_metrics(run_dir)] == steps


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", [(*TORCHRUN, "2"), TWO_BY_ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_take_the_steps_of_one(launcher: tuple[str, ...], settings: list[str], tmp_path: Path) -> None:
    one_dir, two_dir = tmp_path / "one", tmp_path / "two"
    # A ViT has no batch statistics, so that one and two processes compute the same sums.
    settings = [*settings[2:], "recipe=vit_scratch", settings[1]]
    settings = [item for item in settings if not item.startswith(("run.dir", "train.epochs", "model.width", "optim.lr"))]
    settings += ["train.epochs=2", "model.drop_path_rate=0.0", "train.label_smoothing=0.1", "train.class_weights=balanced"]
    settings = [item for item in dict((item.partition("=")[0], item) for item in settings).values()]
    for run_dir, how, world in ((one_dir, PYTHON, "1 process,"), (two_dir, launcher, "2 processes,")):
        done = launch(how, [*settings, f"run.dir={run_dir}"])
        assert done.returncode == 0, done.stderr
        assert world in done.stdout
    one, two = losses(one_dir), losses(two_dir)
    assert one.keys() == two.keys()
    assert [two[step] for step in one] == pytest.approx([one[step] for step in one], rel=1e-3)
    assert read_evaluation(two_dir)["count"] == 24


@pytest.mark.multiprocess
def test_evaluation_on_two_processes_is_bit_equal(settings: list[str], tmp_path: Path) -> None:
    done = launch(PYTHON, settings)
    assert done.returncode == 0, done.stderr
    alone = read_evaluation(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "evaluation" / "test.json").unlink()
    done = launch((*TORCHRUN, "2"), settings)
    assert done.returncode == 0, done.stderr
    assert "2 processes," in done.stdout
    assert read_evaluation(tmp_path / "run")["confusion"] == alone["confusion"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_stopped_run_continues_to_the_very_same_weights(number: int, settings: list[str], tmp_path: Path) -> None:
    settings = [*settings, "train.ema=0.9", "model.drop_rate=0.2"]
    whole = launch(PYTHON, [*settings[:2], f"run.dir={tmp_path / 'whole'}", *settings[3:]])
    assert whole.returncode == 0, whole.stderr
    run_dir = tmp_path / "run"
    process = subprocess.Popen([*PYTHON, str(ROOT / "launch.py"), *settings], preexec_fn=on_one_core)
    try:
        wait_for_steps(run_dir, 4)
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else 75)
    finally:
        process.kill()
        process.wait()
    stopped = checkpoints.load(run_dir / "checkpoints")
    assert stopped is not None and 0 < stopped.step < 36
    done = launch(PYTHON, settings)
    assert done.returncode == 0, done.stderr
    assert f"from step {stopped.step}" in done.stdout
    expected, found = weights(tmp_path / "whole"), weights(run_dir)
    assert expected.keys() == found.keys()
    assert all(bool((expected[name] == found[name]).all()) for name in expected)
    assert read_evaluation(run_dir)["confusion"] == read_evaluation(tmp_path / "whole")["confusion"]
    assert [line["step"] for line in read_metrics(run_dir)].count(36) == 2  # one of training, one of validation


def wait_for_steps(run_dir: Path, step: int) -> None:
    """Until metrics.jsonl has a line of that step."""
    deadline = time.monotonic() + 60
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and any(line["step"] >= step for line in read_metrics(run_dir)):
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get so far within a minute")
