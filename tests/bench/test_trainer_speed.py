"""The benchmarks of training as users run them, in the smallest runs: that both sides do the same, never how fast."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from galaxydist.bench.common import Lap
from galaxydist.bench.startup import last_step
from galaxydist.bench.tracking_speed import Switching
from galaxydist.bench.trainer_speed import TOLERANCES, Turns, bare_turns, compare_losses
from galaxydist.cli.main import main


@pytest.fixture
def own_world() -> Iterator[None]:
    """What Accelerate keeps of a process does not outlast the test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that a benchmark ends with."""
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("{"))
    assert first > 0, "a line for people comes first"
    return [json.loads(line) for line in lines[first:]]


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 11])
def test_each_turn_of_the_bare_loop_is_taken_once_and_in_order(rounds: int) -> None:
    taken = [bare_turns(turn, rounds) for turn in range(rounds + 1)]
    assert [number for turns in taken for number in turns] == [*range(rounds)]
    assert all(abs(number - turn) <= 1 for turn, turns in enumerate(taken) for number in turns)


class Recorder:
    """The steps that a bare loop was asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.taken: list[range] = []

    def prepare(self, _steps: range) -> Lap:
        return Lap(0.5, 0.5)

    def run(self, steps: range) -> Lap:
        self.taken.append(steps)
        return Lap(1.0, 1.0)


def test_turns_time_all_steps_but_the_first_ones_of_a_turn() -> None:
    bare: Any = Recorder()
    turns = Turns(bare, steps=3, rounds=3, untimed=2)
    ends = []
    for step in range(16):
        ends.append(turns(step))
        time.sleep(0.2 * (step % 5 == 1) + 0.01 * (step % 5 == 3))  # the last untimed step takes long
    assert ends == [False] * 15 + [True]
    assert bare.taken == [range(3), range(3, 6), range(6, 9)]
    assert all(0.01 <= seconds < 0.2 for seconds in turns.seconds(turns.trainer_laps)) and len(turns.trainer_laps) == 3
    with_augmentation, without = turns.shares(augmented=True), turns.shares(augmented=False)
    assert with_augmentation == pytest.approx([1.5 * share for share in without])


def test_compare_losses_refuses_other_losses_and_step_counts() -> None:
    lines = [{"step": 2, "train/loss": 2.0}, {"step": 3, "train/loss": 1.0}]
    assert compare_losses(lines, [2.5, 1.5, 1.00001], "no") == pytest.approx(1e-5, rel=1e-3)
    for bare in ([2.5, 1.501, 1.0], [2.5, 1.5, 1.2], [2.5, 1.5], [2.5, 1.5, 1.0, 1.0]):
        with pytest.raises(AssertionError):
            compare_losses(lines, bare, "no")


def test_compare_losses_tolerates_the_rounding_of_each_precision() -> None:
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}]
    for first, accepted in ((1e-11, {"fp64", "no", "tf32", "bf16"}), (3e-4, {"tf32", "bf16"}), (0.03, {"bf16"}), (0.1, set())):
        found = set()
        for precision in TOLERANCES:
            with contextlib.suppress(AssertionError):
                compare_losses(lines, [1 + first, 1.0], precision)
                found.add(precision)
        assert found == accepted


def test_last_step_ignores_a_half_written_line(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2')
    assert last_step(tmp_path) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("own_world")
def test_bench_trainer_compares_runs_with_equal_losses(capsys: pytest.CaptureFixture[str]) -> None:
    models = ["custom_cnn", "timm/test_resnet"]  # one of them has a width
    small = ["--models", *models, "--image-size", "32", "--batch-size", "8", "--width", "4", "--precision", "fp64"]
    results = run(capsys, "trainer", "--rounds", "2", "--steps", "3", *small)
    assert [result["model"] for result in results] == models
    for result in results:
        assert result["task"] == "trainer" and result["ours"] > 0 and result["bare"] > 0 and result["augment_s"] > 0
        assert result["ratio_least"] <= result["ratio"] <= result["ratio_greatest"]
        assert result["ratio_to_bare"] < result["ratio"] and result["ratio_loader"] > 0
        assert result["tracker"] == "wandb offline"
        assert 0 <= result["loss_difference"] < 1e-9
        assert (result["image_size"], result["batch_size"], result["steps"], result["rounds"]) == (32, 8, 3, 2)


# These two start eight interpreters, and what they do is proved by tests of the trainer.
@pytest.mark.nightly
@pytest.mark.multiprocess
def test_bench_scaling_runs_1_and_2_processes(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "custom_cnn", "--image-size", "32", "--batch-size", "4"]
    (result,) = run(capsys, "scaling", "--processes", "2", "--rounds", "1", "--steps", "2", *small)
    assert result["task"] == "scaling" and result["processes"] == 2 and result["world_sizes"] == [1, 2]
    assert result["one"] > 0 and result["ratio"] == pytest.approx(result["several"] / result["one"], rel=2e-3)
    assert result["threads"] == 1


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_startup_measures_fresh_and_continued_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--num-galaxies", "100", "--rounds", "1", "--step", "2"]
    settings = ["train.batch_size=16", "train.epochs=40", "data.image_size=32", "model.width=4"]
    (result,) = run(capsys, "startup", "--data-dir", str(tmp_path), *small, *settings)
    assert result["task"] == "startup" and result["recipe"] == "demo" and result["step"] >= 2
    assert result["fresh_s"] > 0 and result["resume_s"] > 0
    assert result["difference_s"] == pytest.approx(result["resume_s"] - result["fresh_s"], abs=2e-2)
    assert not (tmp_path / "bench" / "startup" / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("own_world")
def test_bench_tracking_compares_steps_with_and_without_wandb(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--image-size", "32", "--batch-size", "4", "--log-every", "1"]
    (result,) = run(capsys, "tracking", "--rounds", "2", "--steps", "3", *small)
    assert (result["task"], result["rounds"], result["steps"]) == ("tracking", 2, 3)
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"] and result["step_s"] > 0
    assert result["rows"] > 0, "wandb has stored rows of the turns in which it is on"


def test_ctrl_c_in_a_benchmark_of_steps_ends_it_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Switching, step: int) -> bool:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return False

    monkeypatch.setattr(Switching, "__call__", interrupt)
    assert main(["bench", "tracking", "--rounds", "1", "--steps", "3", "--image-size", "32", "--batch-size", "4"]) == 130
    assert capsys.readouterr().err.endswith("galaxydist: interrupted\n")
