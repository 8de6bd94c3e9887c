"""Damaged shards: opening and checking say what is wrong, and where."""

import ast
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.tar import parse_index
from galaxydist.shards.verify import check_shards
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(MemorySurvey(draw_galaxies(40)), tmp_path_factory.mktemp("written") / "shards", shard_size=8).dir


@pytest.fixture
def manifest(written: Path, tmp_path: Path) -> Manifest:
    return read_manifest(shutil.copytree(written, tmp_path / "shards"))


def first_keys(shard: Path) -> list[str]:
    return [sample[0].name.partition(".")[0] for sample in parse_index(shard.with_suffix(".idx").read_text())]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_check_shards_accepts_undamaged_shards(manifest: Manifest) -> None:
    assert check_shards(manifest.path) == check_shards(manifest.dir) == manifest


def test_a_damaged_image_names_shard_and_galaxy(manifest: Manifest) -> None:
    shard = manifest.shard_path("train", 1)
    place = int(manifest.shards("train")["samples"][0]) + 2
    overwrite(shard, int(manifest.offsets("train")[place]), b"\0" * 200)
    with pytest.raises(UserError) as error:
        check_shards(manifest.path)
    assert f"shard {shard}: its checksum is not the manifest's" in str(error.value)
    assert f"shard {shard}, galaxy {first_keys(shard)[2]}: its image does not decode" in str(error.value)
    assert "make the shards anew with: galaxydist data shard" in str(error.value)


def test_raw_images_are_checked_without_the_parser_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """np.load parses headers with ``ast``, which fails now and then in several threads of Python 3.11."""
    manifest = write_shards(MemorySurvey(draw_galaxies(40)), tmp_path / "shards", encoding="raw", shard_size=8)
    parse = ast.literal_eval

    def parse_in_main_thread(text: str) -> object:
        assert threading.current_thread() is threading.main_thread()
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", parse_in_main_thread)
    check_shards(manifest.path)
    shard, offset = manifest.shard_path("train", 0), int(manifest.offsets("train")[1])
    overwrite(shard, offset + 1, b"X")
    with pytest.raises(
        UserError, match=rf"galaxy {re.escape(first_keys(shard)[1])}: its image is not a \.npy file of \d+ x \d+ x 3 uint8"
    ):
        check_shards(manifest.path)


def test_a_truncated_tar_names_every_galaxy_that_is_lost(manifest: Manifest) -> None:
    shard = manifest.shard_path("val", 0)
    keys = first_keys(shard)
    with shard.open("r+b") as file:
        file.truncate(int(manifest.offsets("val")[2]) + 10)
    with pytest.raises(UserError) as error:
        check_shards(manifest.path)
    assert f"where the manifest says {manifest.shards('val')['bytes'][0]}" in str(error.value)
    for number, key in enumerate(keys):
        assert (f"galaxy {key}: " in str(error.value)) == (number >= 2)


def test_check_shards_names_a_missing_shard_and_a_damaged_index(manifest: Manifest) -> None:
    manifest.shard_path("train", 0).unlink()
    manifest.shard_path("train", 1).with_suffix(".idx").write_text("v1.1 3\n")
    with pytest.raises(UserError) as error:
        check_shards(manifest.path)
    assert f"{manifest.shard_path('train', 0)}: No such file" in str(error.value)
    assert "train-000001.idx: damaged index" in str(error.value)


def test_check_shards_finds_labels_that_disagree_with_the_tars(manifest: Manifest) -> None:
    path = manifest.dir / "columns" / "train.labels.npy"
    labels = np.load(path)
    labels[[3, 4]] = labels[[4, 3]]
    np.save(path, labels)
    with pytest.raises(UserError) as error:
        check_shards(manifest.path)
    key = first_keys(manifest.shard_path("train", 0))[3]
    assert f"{path}: its checksum is not the manifest's" in str(error.value)
    assert f"galaxy {key}: its .cls is" in str(error.value)


def test_check_shards_finds_a_key_in_two_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer refuses twins, so it is made blind to them here."""
    monkeypatch.setattr("galaxydist.shards.writer.writer._check_unique_ids", lambda _: None)
    galaxies = draw_galaxies(40)
    twins = (*galaxies[:20], *galaxies[:20])
    manifest = write_shards(MemorySurvey(twins), tmp_path / "shards", shard_size=8)
    with pytest.raises(UserError, match=r"galaxy g-0000\+x is in .*\.tar and in .*\.tar"):
        check_shards(manifest.path)


def test_read_manifest_refuses_a_missing_or_invalid_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shards at .*manifest.json; make them with: galaxydist data shard"):
        read_manifest(tmp_path / "nowhere" / "manifest.json")
    (tmp_path / "manifest.json").write_text("{]")
    with pytest.raises(UserError, match="is not a manifest"):
        read_manifest(tmp_path)


def test_read_manifest_refuses_a_newer_format_and_missing_keys(manifest: Manifest) -> None:
    content = json.loads(manifest.path.read_text())
    manifest.path.write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(UserError, match=r"format version 2, this galaxydist reads version 1: update galaxydist"):
        read_manifest(manifest.path)
    del content["encoding"]
    manifest.path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"damaged \(KeyError\('encoding'\)\)"):
        read_manifest(manifest.path)


def test_read_manifest_refuses_missing_truncated_or_wrong_columns(manifest: Manifest) -> None:
    path = manifest.dir / "columns" / "train.offsets.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"train.offsets.npy is damaged"):
        read_manifest(manifest.path)
    np.save(path, np.zeros(3, "<i8"))
    with pytest.raises(UserError, match=r"train.offsets.npy holds \(3,\) of int64, the manifest says"):
        read_manifest(manifest.path)
    path.unlink()
    with pytest.raises(UserError, match=r"train.offsets.npy is missing"):
        read_manifest(manifest.path)


def test_unknown_split_is_refused_with_the_list_of_splits(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="has no split 'dev'; it has train, val, test"):
        manifest.split("dev")
