"""A rank that fails alone: it leaves at once with its message, and so do the others, under every launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import galaxydist
from galaxydist.checkpoints import store
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import Evaluator
from galaxydist.training import resume
from tests.helpers.forked_runs import ROOT, Ranks, forked, train, wait_for_exits
from tests.helpers.runs import ACCELERATE_2, LAUNCH, TORCHRUN_2, count_errors, quick_settings, read_evaluation, run_here
from tests.helpers.scripts.failing_model import block_for_ever

FAILING = "tests.helpers.scripts.failing_model:build"
MESSAGES = {
    "memory": "Out of memory on rank ",
    "user": "the disk of this node is full; free some",
    "bug": "KeyError: 'a bug'",
    "interrupt": "KeyboardInterrupt",
}
CODES = {"memory": 1, "user": 2, "bug": 1, "interrupt": 130}
# The default of train.hang_timeout is ten minutes: what ends sooner has not waited for it.
AT_ONCE_S = 300.0
STUCK = {"FAULT_STEP": "4", "OTHERS_STUCK": "1", "DEVICE_STUCK": "1"}


def settings_of(blobs: Path, run_dir: Path) -> list[str]:
    changes = {"model__name": FAILING, "model__width": None, "model__drop_rate": 0, "train__epochs": 100, "train__save_steps": 4}
    return quick_settings(blobs, run_dir, **changes)


def exit_codes(run: Ranks) -> list[int | None]:
    """Once all have left by themselves, as under an srun that does not end them."""
    wait_for_exits(run.processes, AT_ONCE_S)
    return run.exit_codes


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("fault", "size", "faulty"),
    [
        ("memory", 2, 1),
        pytest.param("user", 3, 2, marks=pytest.mark.slow),
        pytest.param("bug", 3, 0, marks=pytest.mark.slow),
        pytest.param("interrupt", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_alone_ends_the_run_at_once_with_its_message(
    fault: str, size: int, faulty: int, blobs: Path, tmp_path: Path
) -> None:
    """Nothing of it waits for a peer: the stand-ins for NCCL's destroy and for a wait for the device never return."""
    run_dir, named, stuck = tmp_path / "run", MESSAGES[fault], fault != "user"
    environ = {**STUCK, "FAULT": fault, "FAULTY_RANK": str(faulty), "OTHERS_STUCK": "1" if stuck else ""}
    with forked(train, settings_of(blobs, run_dir), folder=tmp_path / "out", size=size, environ=environ) as run:
        assert exit_codes(run) == [CODES[fault]] * size, run.text("err")
        said = [run.said(rank, "err") for rank in range(size)]
        pid = run.pids[faulty]
    if fault != "interrupt":
        assert named in said[faulty]
        failure = json.loads((run_dir / "failure.json").read_text())
        assert failure["kind"] == ("bad_input" if fault == "user" else "crash") and failure["step"] == 4
    if faulty:
        assert f"process {pid}) failed: {named}" in said[0] and count_errors(said[0]) == 1
        assert "Traceback" not in said[0]
    assert all("error" not in said[rank] for rank in range(1, size) if rank != faulty)
    assert not (run_dir / "lock.json").exists() and not (run_dir / "stacks").exists()
    # The checkpoint that rank 0 was writing is complete.
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None and newest.step == 4


def train_otherwise(settings: list[str]) -> int:
    """Rank 1 gets another weight decay, a cache of its own, and an older version that lacks a key."""
    if os.environ["RANK"] == "1":
        resume.__version__ = "0.0.1"
        resume.OF_ONE_RANK = (*resume.OF_ONE_RANK, "train.tf32")
        settings = [*settings, "optim.weight_decay=0.5", "data.cache_dir=elsewhere"]
    return train(settings)


@pytest.mark.multiprocess
def test_ranks_with_different_recipes_are_refused_with_one_message(blobs: Path, tmp_path: Path) -> None:
    settings = quick_settings(blobs, tmp_path / "run")
    with forked(train_otherwise, settings, folder=tmp_path / "out", size=2) as run:
        assert exit_codes(run) == [2, 2], run.text("err")
        assert count_errors(run.text("err")) == 1
        said = run.said(0, "err")
        assert "Rank 1 was started with other settings than rank 0: galaxydist=0.0.1 (on rank 0 " in said
        assert "optim.weight_decay=0.5 (on rank 0 " in said and "train.tf32=unknown (on rank 0 " in said
        assert "cache_dir" not in run.text("err")
    assert not (tmp_path / "run").exists()


def train_in_a_program(settings: list[str]) -> int:
    """A program that calls the Python API, and goes on after an error."""
    try:
        galaxydist.train(galaxydist.load_recipe(settings))
    except UserError:
        return 5
    return 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_program_that_calls_the_api_keeps_its_process_after_an_error_of_its_rank(blobs: Path, tmp_path: Path) -> None:
    environ = {**STUCK, "DEVICE_STUCK": "", "FAULT": "user", "FAULTY_RANK": "1"}
    settings = settings_of(blobs, tmp_path / "run")
    with forked(train_in_a_program, settings, folder=tmp_path / "out", size=2, environ=environ) as run:
        assert exit_codes(run) == [2, 5], run.text("err")  # the other rank hangs: its watchdog ends it
        assert f"process {run.pids[1]}) failed: {MESSAGES['user']}" in run.said(0, "err")


def evaluate(run_dir: str, fails: bool) -> int:
    """``galaxydist evaluate``, of which rank 1 fails alone or none."""

    def fail(*_: object) -> None:
        raise KeyError("a bug")

    if fails:
        torch.distributed.destroy_process_group = block_for_ever  # type: ignore[assignment]
        if os.environ["RANK"] == "1":
            Evaluator._run_inference = fail  # type: ignore[assignment, method-assign]
    return main(["evaluate", run_dir])


@pytest.mark.multiprocess
def test_evaluate_on_2_processes_counts_each_galaxy_once_or_ends_at_once(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1)) == 0
    (run_dir / "evaluation" / "test-predictions.parquet").unlink()
    before = read_evaluation(run_dir)
    with forked(evaluate, str(run_dir), True, folder=tmp_path / "fails", size=2) as run:
        assert exit_codes(run) == [1, 1], run.text("err")
        assert f"process {run.pids[1]}) failed: KeyError: 'a bug'" in run.said(0, "err") and "Traceback" in run.said(1, "err")
    with forked(evaluate, str(run_dir), False, folder=tmp_path / "out", size=2) as run:
        assert exit_codes(run) == [0, 0], run.text("err")
        assert "accuracy" in run.said(0) and run.said(1) == ""
    assert read_evaluation(run_dir)["confusion"] == before["confusion"]


PROCESSES_2 = (sys.executable, "-m", "galaxydist", "train", "--processes", "2")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("launcher", "fault", "code"),
    [(TORCHRUN_2, "user", 1), (ACCELERATE_2, "memory", 1), (PROCESSES_2, "user", 2)],
    ids=["torchrun", "accelerate", "processes"],
)
def test_launchers_end_with_the_message_of_the_rank_that_failed_alone(
    launcher: tuple[str, ...], fault: str, code: int, blobs: Path, tmp_path: Path
) -> None:
    environ = {**os.environ, **STUCK, "PYTHONPATH": str(ROOT), "FAULT": fault, "FAULTY_RANK": "1"}
    arguments = settings_of(blobs, tmp_path / "run")
    command = [*launcher, *([] if launcher is PROCESSES_2 else [str(LAUNCH)]), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stderr
    assert f"galaxydist: error (rank 1): {MESSAGES[fault]}" in done.stderr
    assert "Traceback" not in done.stderr.split("galaxydist: error")[0]
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["error"].startswith(MESSAGES[fault])
    assert not [process for process in psutil.process_iter() if _is_of(process, tmp_path)]


def _is_of(process: psutil.Process, tmp_path: Path) -> bool:
    try:
        return any(str(tmp_path) in word for word in process.cmdline())
    except psutil.Error:
        return False
