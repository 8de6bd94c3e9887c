"""A run's weights as one file, another run that starts from it, and a run judged on other shards than its own."""

from pathlib import Path

import pytest
import torch

from galaxydist.checkpoints import store
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import EvaluationData, evaluate_run
from galaxydist.evaluation.run_model import evaluation_weights
from galaxydist.models.weights import read_statistics, read_weights
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, read_evaluation, run_here, without_figures


@pytest.fixture(scope="module")
def run_dir(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 36 steps."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(quick_settings(blobs, run_dir, train__ema=0.9, eval__checkpoint="last")) == 0
    return run_dir


def test_saved_weights_of_a_run_initialise_another_run(run_dir: Path, blobs: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights" / "blobs.safetensors"
    assert main(["weights", "save", str(run_dir), str(file)]) == 0
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None
    expected = evaluation_weights(newest.tensors, newest.state)
    found = read_weights(file)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    manifest = read_manifest(blobs)
    assert read_statistics(file) == (manifest.channel_mean, manifest.channel_std)
    # A rate of nothing keeps what it started from; only the batch statistics move, and the galaxies are the same.
    again = tmp_path / "again"
    settings = quick_settings(blobs, again, model__weights=file, optim__lr=1e-12, train__epochs=1, eval__checkpoint="last")
    assert run_here(settings) == 0
    assert abs(read_evaluation(again)["accuracy"] - read_evaluation(run_dir)["accuracy"]) <= 0.25
    assert read_evaluation(again)["accuracy"] > 0.5


def test_evaluation_on_other_shards_is_stored_beside_the_runs_own(run_dir: Path, tmp_path: Path) -> None:
    own = read_evaluation(run_dir)
    other = write_shards(BlobSurvey(name="others", num_galaxies=90), tmp_path / "others", encoding="png", workers=1)
    with without_figures():
        judged = evaluate_run(run_dir, "test", {}, EvaluationData(other.path))
    assert judged["dataset"] == "others" and judged["count"] == other.splits["test"].num_samples
    assert judged["accuracy"] > 0.6
    assert (run_dir / "evaluation" / "others-original" / "test.json").exists()
    assert read_evaluation(run_dir) == own
    renamed = BlobSurvey(class_names=("round", "flat", "double"))
    with pytest.raises(UserError, match="double"):
        evaluate_run(run_dir, "test", {}, EvaluationData(write_shards(renamed, tmp_path / "renamed", workers=1).path))
