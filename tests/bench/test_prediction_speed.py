"""The benchmark of predictions as users run it, in the smallest run: that all ways give the same logits, never how fast."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

from galaxydist.cli.main import main
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey


@pytest.mark.slow
def test_benchmark_of_predictions_compares_shards_files_and_the_bare_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_shards(BlobSurvey(), tmp_path / "shards", shard_size=16, workers=1).path
    words = ["--data", str(manifest), "--recipe", "custom_cnn", "--images", "72", "--rounds", "1", "--image-size", "32"]
    try:
        assert main(["bench", "predict", *words, "--data-dir", str(tmp_path)]) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [one["task"] for one in found] == ["predict.shards", "predict.files"]
    assert all(one["images"] == 72 and one["ratio"] > 0 for one in found)
