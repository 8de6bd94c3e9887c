"""Whole runs, in this process and through the real launchers: start, stop, continue, finish."""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from galaxydist.checkpoints import store
from galaxydist.errors import EXIT_BAD_INPUT, UserError
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.checkpoints import load_best
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import (
    ACCELERATE_2,
    TORCHRUN_2,
    launch,
    quick_settings,
    read_evaluation,
    read_losses,
    read_metrics,
    read_validations,
    run_here,
)


def saved_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None
    return newest.tensors


def check_files_for_trackers(folder: RunFolder, timing: list[dict[str, Any]]) -> None:
    """Validations with their galaxies, the time of each line, the state of the node, and the number of parameters."""
    assert sorted(line["time/unix"] for line in timing) == [line["time/unix"] for line in timing]
    assert 0 <= time.time() - timing[-1]["time/unix"] < 900
    logged = {line["step"]: line for line in read_metrics(folder.path) if "val/loss" in line}
    validations = read_validations(folder)
    assert [found.step for found in validations] == list(logged)
    for found in validations:
        confusion_KK = np.array(found.confusion_KK)
        assert confusion_KK.sum() == 24 == sum(each["count"] for each in found.calibration)
        assert confusion_KK.trace() / 24 == logged[found.step]["val/accuracy"]
        gaps = [each["count"] * abs(each["accuracy"] - each["confidence"]) for each in found.calibration if each["count"]]
        assert sum(gaps) / 24 == pytest.approx(logged[found.step]["val/ece"])
        assert np.mean([recall for recall in found.recall_K if recall is not None]) == pytest.approx(
            logged[found.step]["val/balanced_accuracy"]
        )
    assert {(each.sample, each.galaxy_id, each.label) for found in validations for each in found.galaxies} == {
        (each.sample, each.galaxy_id, each.label) for each in validations[0].galaxies
    }
    last = validations[-1]  # a split of 24 galaxies, all of which are in the table
    pairs = [(each.label, each.predicted) for each in last.galaxies]
    assert [[pairs.count((label, predicted)) for predicted in range(3)] for label in range(3)] == last.confusion_KK
    for each in last.galaxies:
        assert 1 / 3 <= each.probability <= 1 and each.image.stat().st_size < 12_000
        with Image.open(each.image) as image:
            assert (image.format, image.mode, image.width, image.height) == ("JPEG", "RGB", 32, 32)
    assert json.loads(folder.facts_path.read_text())["parameters"] > 1000


def test_run_learns_and_writes_metrics_timing_recipe_and_evaluation(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir)
    assert run_here(settings) == 0
    assert "1 process," in capsys.readouterr().err
    evaluation = read_evaluation(run_dir)
    assert evaluation["count"] == 24 == sum(map(sum, evaluation["confusion"]))
    assert evaluation["accuracy"] > 0.8
    assert evaluation["dataset"] == "blobs" and evaluation["split"] == "test"
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == sorted(steps) and steps[-1] == 36
    assert read_metrics(run_dir)[0].keys() == {"step", "epoch", "train/loss", "train/accuracy", "train/lr", "train/grad_norm"}
    timing = [json.loads(line) for line in (run_dir / "timing.jsonl").read_text().splitlines()]
    assert {"step", "time/img_s", "time/data_wait", "time/forward_backward", "time/optimizer"} <= timing[0].keys()
    assert json.loads((run_dir / "recipe.json").read_text())["recipe"]["train.epochs"] == 12
    assert not (run_dir / "lock.json").exists()
    check_files_for_trackers(RunFolder(run_dir), timing)

    figures = {"test-confusion.png", "test-classes.pdf", "learning-curves.png"}
    assert not figures & {path.name for path in (run_dir / "evaluation").iterdir()}
    assert run_here(quick_settings(blobs, run_dir, eval__figures="true")) == 0
    assert figures <= {path.name for path in (run_dir / "evaluation").iterdir()}
    again = capsys.readouterr()
    assert "finished" in again.err and "round" in again.out
    assert [line["step"] for line in read_metrics(run_dir)] == steps


def test_early_stopping_ends_the_run_with_its_best_checkpoint(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, optim__lr=1e-9, train__patience=2, train__metric="balanced_accuracy")) == 0
    newest = store.load(run_dir / "checkpoints")
    best = load_best(run_dir / "checkpoints")
    assert newest is not None and best is not None
    # A rate of nothing: the first validation stays the best, two more are waited for.
    assert (best.step, newest.step) == (3, 9)
    assert read_evaluation(run_dir)["checkpoint"] == best.path.name


# Neither batch statistics nor dropout, so that micro-batches and processes compute the same sums.
NOTHING_SHARED: Mapping[str, object] = {
    "model__norm": "group",
    "model__drop_rate": 0.0,
    "train__epochs": 1,
    "train__log_every": 1,
}


def test_micro_batches_give_the_same_losses_as_whole_batches(blobs: Path, tmp_path: Path) -> None:
    common = {**NOTHING_SHARED, "train__class_weights": "balanced"}
    assert run_here(quick_settings(blobs, tmp_path / "whole", **common)) == 0
    assert run_here(quick_settings(blobs, tmp_path / "parts", **common, train__micro_batch=7)) == 0
    whole, parts = read_losses(tmp_path / "whole"), read_losses(tmp_path / "parts")
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)


def train_speechless(settings: list[str], is_closed: bool) -> int:
    """launch.py with a terminal that knows ASCII only, or whose reader has gone away."""
    if is_closed:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
    sys.stdout = os.fdopen(1, "w", encoding="ascii", closefd=False)
    return train(settings)


@pytest.mark.multiprocess
def test_run_survives_an_ascii_terminal_and_a_closed_stdout(tmp_path: Path) -> None:
    survey = BlobSurvey(size=12, class_names=("r\xf6und", "flat", "\u53cc"))  # too small to be measured, too
    shards = write_shards(survey, tmp_path / "shards", encoding="png", shard_size=16, workers=1)
    settings = quick_settings(shards.path, tmp_path / "run", data__image_size=16, train__epochs=1)
    done = run_forked(train_speechless, settings, False)
    assert done.returncode == 0, done.stderr
    assert "r\\xf6und" in done.stdout and read_evaluation(tmp_path / "run")["classes"][0] == "r\xf6und"
    for path in (tmp_path / "run" / "result.json", tmp_path / "run" / "evaluation" / "test.json"):
        path.unlink()
    done = run_forked(train_speechless, settings, True)
    assert (done.returncode, done.stdout) == (0, "")
    assert read_evaluation(tmp_path / "run")["count"] == 24 and (tmp_path / "run" / "result.json").exists()


def test_failing_evaluation_stops_the_run_before_any_file_is_written(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("no such thing as figures")

    monkeypatch.setattr("galaxydist.evaluation.evaluator.write_evaluation", fail)
    assert run_here(quick_settings(blobs, tmp_path / "run")) == EXIT_BAD_INPUT
    assert "no such thing as figures" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_finished_run_trains_further_only_with_more_epochs_and_unchanged_keys(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"optim__schedule": "constant", "optim__warmup": 0.0, "train__epochs": 4}
    assert run_here(quick_settings(blobs, tmp_path / "whole", **common)) == 0
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, **{**common, "train__epochs": 2})) == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*.json")}
    refused = {"train__epochs": 1}, {"train__epochs": 2, "optim__lr": 0.02}
    for changes, words in zip(refused, ("has trained 2 epochs", "optim.lr: 0.01 in the run folder, 0.02 now"), strict=True):
        force = "[train.epochs,optim.lr]"
        assert run_here(quick_settings(blobs, run_dir, **{**common, **changes}, resume__force=force)) == EXIT_BAD_INPUT
        assert words in capsys.readouterr().err
        assert {path: path.read_bytes() for path in run_dir.rglob("*.json")} == before
    settings = quick_settings(blobs, run_dir, **common, resume__force="[train.epochs]")
    assert run_here(settings) == 0
    assert "from step 6" in capsys.readouterr().err
    assert json.loads((run_dir / "result.json").read_text())["step"] == 12
    expected, found = saved_tensors(tmp_path / "whole"), saved_tensors(run_dir)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert run_here(settings) == 0
    assert "is finished" in capsys.readouterr().err


def test_a_run_that_stopped_early_trains_on_with_more_patience(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, optim__lr=1e-9, train__patience=1)) == 0
    longer = {"optim__lr": 1e-9, "train__epochs": 20, "resume__force": "[train.epochs,train.patience]"}
    assert run_here(quick_settings(blobs, run_dir, **longer, train__patience=1)) == EXIT_BAD_INPUT
    assert json.loads((run_dir / "result.json").read_text())["step"] == 6
    assert run_here(quick_settings(blobs, run_dir, **longer, train__patience=3)) == 0
    assert json.loads((run_dir / "result.json").read_text())["step"] == 12


# 25 is uneven between two.
UNEVEN: Mapping[str, object] = {**NOTHING_SHARED, "train__batch_size": 25, "train__class_weights": "balanced"}


def assert_two_took_the_steps_of_one(done: CompletedProcess[str], run_dir: Path, blobs: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert "2 processes," in done.stderr
    assert run_here(quick_settings(blobs, run_dir.with_name("one"), **UNEVEN)) == 0
    one, two = read_losses(run_dir.with_name("one")), read_losses(run_dir)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    assert read_evaluation(run_dir)["count"] == 24


@pytest.mark.multiprocess
def test_two_forked_processes_have_the_losses_of_one(blobs: Path, tmp_path: Path) -> None:
    done = run_forked(train, quick_settings(blobs, tmp_path / "two", **UNEVEN), size=2)
    assert_two_took_the_steps_of_one(done, tmp_path / "two", blobs)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN_2, ACCELERATE_2], ids=["torchrun", "accelerate"])
def test_two_processes_of_torchrun_or_accelerate_have_the_losses_of_one(
    launcher: tuple[str, ...], blobs: Path, tmp_path: Path
) -> None:
    done = launch(launcher, quick_settings(blobs, tmp_path / "two", **UNEVEN))
    assert_two_took_the_steps_of_one(done, tmp_path / "two", blobs)


@pytest.mark.multiprocess
def test_evaluation_on_2_processes_has_the_same_confusion_and_close_logits(blobs: Path, tmp_path: Path) -> None:
    """The confusion matrix is bit-equal; the logits are close.

    The two runs have different numbers of threads in each process, which changes the order of sums within an image. With one
    thread everywhere the logits are bit-equal too: see ``test_numbers_of_any_number_of_processes_are_bit_equal``.
    """
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, train__epochs=2)
    assert run_here(settings) == 0
    alone, predictions = read_evaluation(run_dir), run_dir / "evaluation" / "test-predictions.parquet"
    logits_NK = read_predictions(predictions).column("logits")
    (run_dir / "result.json").unlink()
    predictions.unlink()  # without them the evaluation is made again
    done = run_forked(train, settings, size=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes," in done.stderr
    assert read_evaluation(run_dir)["confusion"] == alone["confusion"]
    assert np.allclose(read_predictions(predictions).column("logits"), logits_NK, rtol=1e-4, atol=1e-4)


LIVELY: Mapping[str, object] = {"train__ema": 0.9, "model__drop_rate": 0.2, "train__epochs": 4}
LAST_STEP = 12


@pytest.fixture(scope="module")
def whole(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(quick_settings(blobs, run_dir, **LIVELY)) == 0
    return run_dir


def train_and_send(settings: list[str], number: int, step: int) -> int:
    """Train as launch.py does; in that step a signal comes, and torch's deterministic mode is printed."""
    from galaxydist.training.step import TrainStep

    take_step = TrainStep.__call__

    def interrupted(self: TrainStep, batch: Any, now: int) -> Any:
        if now == step:
            print("deterministic mode", torch.get_deterministic_debug_mode())
            os.kill(os.getpid(), number)
        return take_step(self, batch, now)

    TrainStep.__call__ = interrupted  # type: ignore[method-assign]
    return train(settings)


@pytest.mark.parametrize(("number", "deterministic"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_run_stopped_by_a_signal_and_continued_is_bit_equal(
    number: int, deterministic: bool, blobs: Path, whole: Path, tmp_path: Path
) -> None:
    """On a CPU also to a run without ``train.deterministic``."""
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, **LIVELY, train__deterministic=str(deterministic).lower())
    done = run_forked(train_and_send, settings, number, 7)
    assert done.returncode == (130 if number == signal.SIGINT else 75), done.stderr
    assert f"deterministic mode {2 * deterministic}" in done.stdout
    stopped = store.load(run_dir / "checkpoints")
    assert stopped is not None and 7 <= stopped.step < LAST_STEP
    assert run_here(settings) == 0
    expected, found = saved_tensors(whole), saved_tensors(run_dir)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert read_evaluation(run_dir)["confusion"] == read_evaluation(whole)["confusion"]
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == sorted(steps) and steps.count(LAST_STEP) == 2  # one line of training, one of validation
