"""Export to PNG folders: what torchvision reads back, and that the way through folders changes nothing."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, Galaxy, Survey
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.export import export_image_folders
from galaxydist.surveys.folder_metadata import read_metadata, write_metadata
from galaxydist.surveys.image_files import decode_file
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.survey_files import run_with_file_limit, write_image, write_survey


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "simulated.h5"
    write_survey(path)
    return path


@pytest.fixture(scope="module")
def out_dir(source: Path) -> Path:
    export_image_folders(source, source.parent / "images", workers=2)
    return source.parent / "images"


def contents(survey: Survey) -> Mapping[str, tuple[Any, ...]]:
    """Everything that a survey says about each galaxy that stands in a split, by id."""
    split = {int(row): name for name, rows in survey.splits.items() for row in rows}
    result = {}
    for row, galaxy in enumerate(survey.read(0, len(survey.labels))):
        if row in split:
            pixels = galaxy.image if isinstance(galaxy.image, np.ndarray) else decode_file(galaxy.image.data, galaxy.id)
            result[galaxy.id] = (split[row], galaxy.label, galaxy.ra, galaxy.dec, dict(galaxy.extras), pixels.tobytes())
    return result


@pytest.mark.parametrize("variant", ["original", "balanced"])
def test_exported_image_folders_reopen_as_the_same_survey(source: Path, out_dir: Path, variant: str) -> None:
    expected = contents(open_survey(source, variant))
    tree = {"original": "simulated", "balanced": "simulated_balanced"}[variant]
    for path in (out_dir, out_dir / tree, out_dir / "simulated"):
        survey = open_survey(path, variant)
        found = contents(survey)
        assert survey.name == "simulated" and survey.class_names == GALAXY10_CLASSES
        assert found == expected and list(found) == list(expected)  # in the same order, too


@pytest.mark.parametrize("variant", ["original", "balanced"])
def test_shards_from_the_survey_file_and_from_its_export_are_byte_equal(
    source: Path, out_dir: Path, tmp_path: Path, variant: str
) -> None:
    for name, path in (("file", source), ("folder", out_dir)):
        write_shards(open_survey(path, variant), tmp_path / name, encoding="raw", image_size=32, shard_size=50, workers=1)
    tars = sorted(path.relative_to(tmp_path / "file") for path in (tmp_path / "file").rglob("*.tar"))
    assert len(tars) >= 3
    assert all((tmp_path / "file" / tar).read_bytes() == (tmp_path / "folder" / tar).read_bytes() for tar in tars)


def test_torchvision_reads_both_trees(out_dir: Path) -> None:
    from torchvision.datasets import ImageFolder

    for tree, splits in (("simulated", ("test", "train", "val")), ("simulated_balanced", ("test", "train"))):
        assert tuple(sorted(path.name for path in (out_dir / tree).iterdir() if path.is_dir())) == splits
        for split in splits:
            folder = ImageFolder(str(out_dir / tree / split))
            assert folder.classes == sorted(GALAXY10_CLASSES)
            assert folder[0][0].size == (256, 256) and folder[0][0].mode == "RGB"
    balanced = ImageFolder(str(out_dir / "simulated_balanced" / "train"))
    assert np.bincount(balanced.targets).tolist() == [10] * 10


def test_second_export_changes_no_file(source: Path, out_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    trees = export_image_folders(source, out_dir)
    assert [(tree.variant, tree.existed) for tree in trees] == [("original", True), ("balanced", True)]
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before
    assert trees[0].num_galaxies == {"train": 96, "val": 12, "test": 12}


def test_export_of_another_survey_replaces_the_older_export(source: Path, out_dir: Path, tmp_path: Path) -> None:
    write_survey(tmp_path / "s.h5", seed=1)
    export_image_folders(source, tmp_path / "out")
    trees = export_image_folders(tmp_path / "s.h5", tmp_path / "out")
    assert not any(tree.existed for tree in trees)
    assert contents(open_survey(tmp_path / "out")) == contents(open_survey(tmp_path / "s.h5"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in out_dir.iterdir())


def test_export_refuses_to_replace_foreign_folders(source: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "simulated" / "train" / "mine" / "1.png")
    with pytest.raises(UserError, match="did not write it"):
        export_image_folders(source, tmp_path)
    assert (tmp_path / "simulated" / "train" / "mine" / "1.png").exists()


def test_file_size_limit_during_export_leaves_no_file(source: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from galaxydist.errors import UserError
from galaxydist.surveys.export import export_image_folders
try:
    export_image_folders(Path({str(source)!r}), Path({str(tmp_path)!r}))
except UserError as error:
    print(error)
"""
    result = run_with_file_limit(code, 500)
    assert "no room left" in result.stdout and result.returncode == 0, result
    assert list(tmp_path.iterdir()) == []


def test_export_removes_only_partial_folders_older_than_a_day(source: Path, tmp_path: Path) -> None:
    for name, age in (("old", 2 * 86400), ("new", 60)):
        folder = tmp_path / f".simulated.{name}.partial"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    export_image_folders(source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".simulated.new.partial",
        "simulated",
        "simulated_balanced",
    ]


def test_changed_export_is_warned_about_and_new_images_are_read(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_image_folders(source, tmp_path)
    tree = tmp_path / "simulated"
    next((tree / "train" / "merging").iterdir()).unlink()
    write_image(tree / "train" / "merging" / "mine.png")
    survey = open_survey(tree)
    assert "1 images of its metadata are missing, 1 images are not in it" in caplog.text
    extras = next(survey.read(119, 120)).extras
    assert {name: value for name, value in extras.items() if value is not None} == {
        "file": "train/merging/mine.png",
        "source_id": "mine",
    }


def test_a_folder_of_images_that_is_exported_keeps_its_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(10):
            write_image(tmp_path / "mine" / name / f"J{number}.5 {name}.png", number)
    export_image_folders(tmp_path / "mine", tmp_path / "out")
    before, after = (open_survey(tmp_path / name) for name in ("mine", "out"))
    found = {galaxy.id: galaxy.extras for galaxy in after.read(0, 20)}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine", "mine_balanced"]
    assert found == {galaxy.id: {"source_id": galaxy.extras["source_id"]} for galaxy in before.read(0, 20)}
    assert found["J3_5_a"] == {"source_id": "J3.5 a"}


def test_exports_are_named_after_their_data_sets_and_told_apart(tmp_path: Path) -> None:
    for name in ("mine", "galaxy10_decals"):
        for number in range(20):
            write_image(tmp_path / name / "ab"[number % 2] / f"{number}.png", number)
        export_image_folders(tmp_path / name, tmp_path / "out")
    names = ["Galaxy10_DECaLS", "Galaxy10_DECaLS_Balanced", "mine", "mine_balanced"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with pytest.raises(UserError, match="exports of several data sets, galaxy10_decals, mine: give the folder of one"):
        open_survey(tmp_path / "out")
    assert open_survey(tmp_path / "out" / "mine").name == "mine"


@pytest.mark.parametrize("names", [("E/S0", "../Sb"), ("E/S0", "E_S0")])
def test_classes_of_a_table_that_are_no_names_of_folders_stay_in_their_tree(tmp_path: Path, names: tuple[str, str]) -> None:
    lines = [f"{number}.png,{names[number % 2]}" for number in range(20)]
    for number in range(20):
        write_image(tmp_path / f"{number}.png", number)
    (tmp_path / "mine.csv").write_text("\n".join(["file,label", *lines]))
    if names[1] == "E_S0":
        with pytest.raises(UserError, match="classes that cannot be told apart as names of folders"):
            export_image_folders(tmp_path / "mine.csv", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_image_folders(tmp_path / "mine.csv", tmp_path / "out")
    assert open_survey(tmp_path / "out").class_names == ("E_S0", "Sb")


def test_balanced_export_cannot_be_opened_as_the_original_variant(out_dir: Path) -> None:
    with pytest.raises(UserError, match="only the balanced variant"):
        open_survey(out_dir / "simulated_balanced")


def test_foreign_dataset_json_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / name / "1.png")
    for text in ("{", "[]", json.dumps({"name": "x"})):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=r"dataset\.json was not written by"):
            open_survey(tmp_path)
    (tmp_path / "dataset.json").rename(tmp_path / "a" / "dataset.json")
    for number in range(2, 20):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    assert open_survey(tmp_path).class_names == ("a", "b"), "in a class folder it may be anything"


def test_exported_metadata_keeps_the_types_of_values(tmp_path: Path) -> None:
    extras = {
        "text": "a,b\n",
        "number-like": "12",
        "true-like": "true",
        "empty": "",
        "float": 0.1 + 0.2,
        "none": None,
        "flag": True,
    }
    galaxy = Galaxy("id", np.zeros((1, 1, 3), np.uint8), 3, 1e-7, None, extras)
    write_metadata(tmp_path, [("train/a/id.png", "val", galaxy)])
    [(file, row)] = read_metadata(tmp_path)[0].items()
    assert (file, row.id, row.split, row.ra, row.dec) == ("train/a/id.png", "id", "val", 1e-7, None)
    assert dict(row.extras) == extras
