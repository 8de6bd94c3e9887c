"""Shards are plain WebDataset tars: ten lines of docs/shards.md train from them with webdataset alone."""

import re
from pathlib import Path

import pytest
import torch

from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies

PAGE = Path(__file__).parents[2] / "docs" / "shards.md"


@pytest.fixture(scope="module", params=["jpeg", "png", "raw"])
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("webdataset") / "shards"
    return write_shards(MemorySurvey(draw_galaxies(60)), folder, encoding=request.param, shard_size=8)


def test_webdataset_reads_every_galaxy_once(manifest: Manifest) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(manifest.dir.glob("train-*.tar"))]
    galaxies = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert len(galaxies) == manifest.splits["train"].num_samples
    assert [galaxy["cls"] for galaxy in galaxies] == manifest.labels("train").tolist()
    assert [galaxy["json"]["id"] for galaxy in galaxies] == [galaxy["__key__"] for galaxy in galaxies]
    assert all(galaxy[manifest.extension].shape == (32, 32, 3) for galaxy in galaxies)


def test_example_of_docs_shards_trains_with_plain_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    folder = re.search(r'"([^"]*)/train-\*\.tar"', snippet)
    assert folder, "the example names its shards as FOLDER/train-*.tar"
    write_shards(MemorySurvey(draw_galaxies(60)), tmp_path / folder[1], shard_size=8)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(snippet, str(PAGE), "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)
    assert read_manifest(tmp_path / folder[1]).splits["train"].num_samples > 0
