"""A run evaluated on the test splits of its survey's other data sets, too."""

import json
from pathlib import Path

import pytest

from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, read_evaluation, run_here


def test_finished_run_is_evaluated_on_every_requested_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant, num_galaxies in (("original", 120), ("balanced", 60)):
        survey = BlobSurvey(variant=variant, num_galaxies=num_galaxies)
        write_shards(survey, tmp_path / "shards" / variant, encoding="png", shard_size=16, workers=1)
    run_dir = tmp_path / "run"
    manifest = tmp_path / "shards" / "original" / "manifest.json"
    arguments = quick_settings(manifest, run_dir, train__epochs=1)
    assert run_here(arguments) == 0
    own, other = run_dir / "evaluation" / "test.json", run_dir / "evaluation" / "blobs-balanced" / "test.json"
    assert own.exists() and not other.exists()
    # The finished run is evaluated on what is missing.
    assert run_here([*arguments, "eval.variants=[original,balanced]"]) == 0
    found = json.loads(other.read_text())
    assert (found["variant"], found["count"]) == ("balanced", 12)
    assert (read_evaluation(run_dir)["variant"], read_evaluation(run_dir)["count"]) == ("original", 24)
    assert found["step"] == read_evaluation(run_dir)["step"]
    capsys.readouterr()


def test_missing_evaluation_variant_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    for folder, text in (("original", "balanced"), ("elsewhere", "eval.variants=balanced")):
        path = write_shards(BlobSurvey(), tmp_path / folder, encoding="png", shard_size=16, workers=1).path
        assert run_here(quick_settings(path, run_dir, eval__variants="[balanced]")) == 2
        assert text in capsys.readouterr().err
    assert not run_dir.exists()
