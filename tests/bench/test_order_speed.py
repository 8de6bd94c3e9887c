"""``galaxydist bench order``: runs in a process of its own; its figures are plausible and its counts exact."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galaxydist.bench.order_speed import (
    WORLD_SIZE,
    OpeningJob,
    galaxy10_store,
    measure_fetches,
    measure_opening,
    measure_quality,
    survey_store,
    write_sparse_shards,
)
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.order import EpochOrder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tmp")
    command = [sys.executable, "-m", "galaxydist.cli.main", "bench", "order", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={"TMPDIR": str(folder)}, check=True, timeout=120)
    assert done.stderr == "" and list(folder.iterdir()) == []
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.multiprocess
def test_bench_order_prints_json_for_every_task(results: list[dict[str, Any]]) -> None:
    assert [result["task"] for result in results] == ["order.quality"] * 3 + ["order.open", "order.fetch"]


@pytest.mark.multiprocess
def test_opening_10_million_samples_needs_no_torch_and_under_300_mb(results: list[dict[str, Any]]) -> None:
    opening = results[3]
    assert opening["num_samples"] == 10_000_000 and opening["torch"] is False and opening["same"] is True
    assert 0 < opening["open_s"] < opening["inside_s"] < opening["process_s"]
    assert 10 < opening["peak_mb"] < 300
    assert 0 < opening["batch_ms"]["median"] <= opening["batch_ms"]["max"] and opening["batch_ms"]["max_processor"] > 0


def test_an_epoch_is_shuffled_like_a_random_permutation() -> None:
    store = galaxy10_store()
    assert store.sorted_labels.size == 14_188 and np.bincount(store.sorted_labels).size == 10
    found = measure_quality(store)
    order, random = found["order"], found["random"]
    assert order.keys() == random.keys()
    assert order["rank_correlation"] < 0.03
    for name in ("recurring_mates", "written_run", "written_batch_spread", "written_rank_spread"):
        assert order[name] == pytest.approx(random[name], abs=0.1), name
    # One place of each of 192 stretches of a class-sorted file: every batch has the whole's mix of classes, in runs.
    assert order["sorted_batch_spread"] < 0.1 and order["sorted_run"] > 5


def test_quality_measures_detect_an_unshuffled_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage order itself: correlation 1, the same batches again, runs of whole classes."""
    monkeypatch.setattr(EpochOrder, "samples", lambda _, positions: np.asarray(positions))
    order = measure_quality(survey_store(20, 960), batch_size=192)["order"]
    assert order["rank_correlation"] == pytest.approx(1.0)
    assert order["recurring_mates"] == pytest.approx(100, rel=0.02)  # 100 batches: 100 times chance
    assert order["sorted_run"] == 1920 and order["sorted_longest_run"] > 2000
    assert order["sorted_batch_spread"] > 100 and order["sorted_rank_spread"] > 100 / WORLD_SIZE


@pytest.mark.parametrize(("num_streams", "batch_size"), [(10, 20), (20, 30), (4, 20)])
def test_planned_fetches_equal_the_shards_of_the_samples_read(num_streams: int, batch_size: int) -> None:
    """Worked out sample by sample for every node: no shard has so few of its samples in a stream that none is the node's."""
    job = OpeningJob(5, 2, 40, 500)
    (found,) = measure_fetches(job, [(num_streams, batch_size)])["choices"]
    order = EpochOrder([500] * 40, seed=0, epoch=0, num_streams=num_streams)
    positions = np.arange(order.num_positions)
    shards, nodes = order.samples(positions) // 500, positions % batch_size % 10 // 2
    fetched = [np.unique(shards[nodes == node]).size for node in range(5)]
    assert found["shards_per_node"] == {"min": min(fetched), "median": np.median(fetched), "max": max(fetched)}
    assert found["fetches_per_shard"] == sum(fetched) / 40


@pytest.mark.parametrize(("num_streams", "batch_size", "fetches"), [(48, 48, 1), (24, 48, 2), (16, 48, 3), (48, 72, 2)])
def test_fetches_per_shard_follow_the_common_divisor_of_streams_and_batch(
    num_streams: int, batch_size: int, fetches: int
) -> None:
    (found,) = measure_fetches(OpeningJob(12, 4, 3000, 1000), [(num_streams, batch_size)])["choices"]
    assert found["divides_streams"] == (num_streams == 48) and found["divides_batch"] == (batch_size == 48)
    assert fetches <= found["fetches_per_shard"] < fetches * 1.05
    assert found["held_per_node"] <= found["held_by_one"] < 48 * 10


@pytest.mark.multiprocess
def test_opening_a_billion_samples_needs_no_torch_and_under_300_mb(tmp_path: Path) -> None:
    found = measure_opening(tmp_path, 100_000, 10_000, repeats=1, num_batches=5)
    assert found["num_samples"] == 10**9 and found["torch"] is False
    assert found["peak_mb"] < 300
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file()) < 20e6


def test_sparse_shards_have_a_valid_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(write_sparse_shards(tmp_path / "shards", 7, 30))
    assert manifest.split("train").num_samples == 210 and manifest.shards("train")["samples"].tolist() == [30] * 7
    assert len({row.tobytes() for row in manifest.shards("train")["sha256"]}) == 7
    assert manifest.labels("train").shape == manifest.offsets("train").shape == (210,)
