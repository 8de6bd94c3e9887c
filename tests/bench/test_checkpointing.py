"""``galaxydist bench saving``: its figures hang together."""

import json
from pathlib import Path

import pytest

from galaxydist.cli.main import main


@pytest.mark.slow
def test_bench_saving_prints_consistent_json_for_every_task_and_removes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--every", "1", "--saves", "2", "--model", "custom_cnn", "--image-size", "16", "--batch-size", "2", "--folder"]
    assert main(["bench", "saving", *options, str(tmp_path / "out")]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [result["task"] for result in results] == ["saving.none", "saving.background", "saving.synchronous"]
    for result in results:
        assert result["elapsed_s"] >= 2 and result["num_steps"] >= 2
        assert result["wait_share"] == pytest.approx(result["waited_s"] / result["elapsed_s"], abs=1e-3)
    none, *saving = results
    assert none["step_slowdown"] == 0 and none["waited_s"] < 0.01 > none["signal_s"]
    assert all(0.001 < result["longest_wait_s"] < result["waited_s"] for result in saving)
    assert all(result["signal_s"] > 0.01 for result in saving)
    assert not (tmp_path / "out" / "saving").exists()
