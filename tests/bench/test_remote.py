"""``galaxydist bench remote`` in full, on a few blobs."""

import json
from pathlib import Path

import pytest

from galaxydist.cli.main import main


# Six interpreters; that loaders read each shard once from a failing server is proved by tests/end_to_end/test_remote_runs.py.
@pytest.mark.nightly
@pytest.mark.multiprocess
def test_bench_remote_reads_every_galaxy_once_and_each_shard_once_despite_failures(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--delay-ms", "5", "--fail-every", "4", "--step-ms", "1", "--batch-size", "8"]
    assert main(["bench", "remote", "--data", str(blobs), "--data-dir", str(tmp_path), *options]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(result["task"], result["ranks"]) for result in results] == [
        ("remote.cold", 1),
        ("remote.warm", 1),
        ("remote.cold", 2),
        ("remote.warm", 2),
    ]
    for result in results:
        assert result["is_exact"] and result["is_once_each"] and result["other_requests"] == 0
        assert 0 <= result["data_wait"] <= 1 and result["first_batch_s"] > 0
        assert result["shards_fetched"] == (5 if result["task"] == "remote.cold" else 0)
        assert result["gets"] == result["shards_fetched"] + result["failures"]
    assert sum(result["failures"] for result in results) >= 2
    assert not (tmp_path / "bench" / "remote" / "cache").exists()
