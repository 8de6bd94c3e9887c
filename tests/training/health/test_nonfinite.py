"""Numbers that are not finite: all ranks stop at the same step and name its galaxies, or skip the step without a trace."""

import json
from pathlib import Path

import pytest
import torch

from galaxydist.checkpoints import store
from tests.helpers.forked_runs import run_forked
from tests.helpers.runs import count_errors, quick_settings, read_metrics
from tests.helpers.scripts.poisoned_launch import train_poisoned


def poisoned(rank: int, steps: set[int], settings: list[str], size: int = 1, what: str = "image") -> tuple[int, str]:
    """Return the exit code and standard error of a run whose images, or whose loss, are spoilt in some steps."""
    done = run_forked(train_poisoned, rank, steps, settings, None, what, size=size)
    return done.returncode, done.stderr


@pytest.mark.multiprocess
def test_nonfinite_loss_stops_all_ranks_at_the_same_step_naming_its_galaxies(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, errors = poisoned(1, {4}, quick_settings(blobs, run_dir, train__log_every=1), 2)
    assert code == 1
    assert count_errors(errors) == 1 and "at step 4 (from 0)" in errors and "train.on_nonfinite=skip" in errors
    listed = json.loads((run_dir / "nonfinite-step-00000004.json").read_text())
    assert listed["step"] == 4 and len(set(listed["galaxies"])) == 24
    assert all(name in errors for name in listed["galaxies"][:8]) and "and 16 more" in errors
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None and newest.step == 3
    # The step after it was under way when it became known; nothing of it was written.
    assert [line["step"] for line in read_metrics(run_dir) if "train/loss" in line] == [1, 2, 3, 4]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("size", "what"), [(1, "image"), (2, "image"), (2, "loss")])
def test_skipped_nonfinite_step_leaves_weights_and_optimizer_unchanged(size: int, what: str, blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = {"train__epochs": 1, "train__save_steps": 1, "train__on_nonfinite": "skip", "train__log_every": 1}
    code, errors = poisoned(0, {2}, quick_settings(blobs, run_dir, **options), size, what)
    assert code == 0, errors
    assert errors.count("The step is skipped (1 of at most 10)") == 1
    last, before = (store.read_sound(path) for path in store.list_checkpoints(run_dir / "checkpoints"))
    assert (last.step, before.step) == (3, 2)
    assert any(name.endswith("running_var") for name in last.tensors) and any(name.endswith("/exp_avg") for name in last.tensors)
    # The moving average takes in the weights of each step, also where they are those of the step before; and the validation in
    # between makes the ranks' own statistics equal, whose mean stays what it was.
    for name in last.tensors:
        if name.endswith(("running_mean", "running_var")) and name.startswith("model/"):
            assert torch.allclose(last.tensors[name], before.tensors[name], rtol=1e-6), name
        elif not name.startswith(("ema/", "ranks/")):
            assert torch.equal(last.tensors[name], before.tensors[name]), name
    (line,) = [line for line in read_metrics(run_dir) if line["step"] == 3 and "train/loss" in line]
    assert line["train/loss"] is None and line["train/nonfinite"] == 1


@pytest.mark.multiprocess
def test_more_nonfinite_steps_than_max_nonfinite_stop_the_run_across_restarts(blobs: Path, tmp_path: Path) -> None:
    settings = quick_settings(blobs, tmp_path / "run", train__on_nonfinite="skip", train__max_nonfinite=1, train__epochs=3)
    code, errors = poisoned(0, {1, 7}, settings)
    assert code == 1
    assert "at step 7 (from 0)" in errors and "2 such steps, more than train.max_nonfinite=1" in errors
    # The first one is remembered by the checkpoint of step 6.
    assert "train.max_nonfinite=1" in poisoned(0, {7}, settings)[1]
    assert poisoned(0, {99}, settings)[0] == 0
