"""The margin, a fourth split: it is stored, checked, counted and shown, and never trained or evaluated on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from galaxydist import api
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.explore.checks import find_neighbours
from galaxydist.explore.datasets import Positions, shard_population
from galaxydist.galaxy import MARGIN, SPLITS, EncodedImage
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.verify import check_shards, describe_equal_images
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.export import export_image_folders
from galaxydist.surveys.split import IN_MARGIN, NONE, TEST, TRAIN, VAL, rows_by_split
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, read_evaluation, run_here
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies


@dataclass(frozen=True)
class MarginSurvey(MemorySurvey):
    """A memory survey whose rows of no split are in the margin."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {**super().splits, MARGIN: np.arange(10, len(self.galaxies), 11)}


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as exit:  # argparse's own way to refuse an option
        return int(exit.code or 0)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_shards(MarginSurvey(draw_galaxies(60)), tmp_path / "shards", encoding="png", shard_size=8, workers=1)


def test_codes_name_the_margin_only_where_there_is_one() -> None:
    codes = np.array([TRAIN, IN_MARGIN, NONE, TEST, VAL, IN_MARGIN], np.int8)
    assert {name: rows.tolist() for name, rows in rows_by_split(codes).items()} == {
        "train": [0],
        "val": [4],
        "test": [3],
        "margin": [1, 5],
    }
    assert tuple(rows_by_split(codes[[0, 2, 3]])) == SPLITS


def test_the_margin_has_shards_of_its_own_and_no_part_in_the_pixel_statistics(tmp_path: Path, manifest: Manifest) -> None:
    without = write_shards(MemorySurvey(draw_galaxies(60)), tmp_path / "without", encoding="png", shard_size=8, workers=1)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 33,
        "val": 11,
        "test": 11,
        "margin": 5,
    }
    assert (manifest.dir / "margin-000000.tar").is_file()
    assert read_catalogue(manifest, MARGIN, ["id"])["id"].to_pylist() != []
    assert (manifest.channel_mean, manifest.channel_std) == (without.channel_mean, without.channel_std)
    for split in SPLITS:
        assert [row["sha256"].tobytes() for row in manifest.shards(split)] == [
            row["sha256"].tobytes() for row in without.shards(split)
        ]


def test_check_reads_the_margin(manifest: Manifest) -> None:
    assert check_shards(manifest.path).splits[MARGIN].num_samples == 5
    (manifest.dir / "margin-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"margin-000000\.tar"):
        check_shards(manifest.path)


def test_a_damaged_image_of_the_margin_is_left_out_and_listed(tmp_path: Path) -> None:
    galaxies = [*draw_galaxies(60)]
    galaxies[10] = replace(galaxies[10], image=EncodedImage(b"no image", "png", "ten.png"))
    survey = MarginSurvey(tuple(galaxies))
    with pytest.raises(UserError, match="1 of the 60 images cannot be read"):
        write_shards(survey, tmp_path / "shards", encoding="png", workers=1)
    shards = write_shards(survey, tmp_path / "shards", encoding="png", workers=1, max_errors=1)
    assert shards.splits[MARGIN].num_samples == 4
    assert (shards.dir / "left_out.csv").read_text().splitlines()[1].startswith("margin,b,")


def test_a_remote_margin_is_checked_with_the_other_splits(tmp_path: Path, manifest: Manifest) -> None:
    cache = CacheConfig(tmp_path / "cache")
    assert [*check_shards(f"file://{manifest.path}", cache).splits] == [*SPLITS, MARGIN]
    (manifest.dir / "margin-000000.tar").unlink()
    with pytest.raises(UserError, match=r"margin-000000\.tar"):
        check_shards(f"file://{manifest.path}", CacheConfig(tmp_path / "other"))


def test_an_image_of_the_margin_that_equals_one_of_another_split_is_no_leak(tmp_path: Path) -> None:
    galaxies = [*draw_galaxies(60)]
    galaxies[10] = replace(galaxies[10], image=galaxies[0].image)  # margin and train
    shards = write_shards(MarginSurvey(tuple(galaxies)), tmp_path / "margin", encoding="png", workers=1)
    assert not any("more than one split" in line for line in describe_equal_images(shards))
    galaxies[3] = replace(galaxies[3], image=galaxies[0].image)  # and test
    shards = write_shards(MarginSurvey(tuple(galaxies)), tmp_path / "test", encoding="png", workers=1)
    assert "1 image is in more than one split" in describe_equal_images(shards)[0]


def test_explore_counts_the_margin_and_its_neighbours_are_not_across_splits(manifest: Manifest) -> None:
    population = shard_population(manifest)
    assert population.split_names == (*SPLITS, MARGIN)
    assert sum(population.counts()[MARGIN]) == 5
    first = [int(np.flatnonzero(population.split_N == number)[0]) for number in range(4)]  # one galaxy of each split
    ra = np.arange(len(population)) * 1.0
    ra[first] = [200, 200.001, 300, 300.001]  # train beside val, test beside the margin
    near = find_neighbours(population, Positions(ra, np.zeros(len(ra)), ra))
    assert {tuple(pair): across for pair, across in zip(near.pairs_P2.tolist(), near.across_P.tolist(), strict=True)} == {
        (first[0], first[1]): True,
        (first[2], first[3]): False,
    }


def test_explore_prints_and_shows_the_margins_galaxies(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert (
        main(["data", "explore", str(manifest.path), "-o", str(page), "--sample", "4", "--data-dir", str(tmp_path / "root")]) == 0
    )
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["class", "train", "val", "test", "margin"]
    assert "margin 5" in page.read_text()


@dataclass(frozen=True)
class MarginBlobs(BlobSurvey):
    """Blobs of which the last ones of each split are in the margin."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        splits = super().splits
        return {
            **{name: rows[:-3] for name, rows in splits.items()},
            MARGIN: np.sort([*(rows[-3:] for rows in splits.values())], None),
        }


def test_a_run_trains_and_is_evaluated_without_the_margins_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(MarginBlobs(), tmp_path / "shards", encoding="png", shard_size=16, workers=1)
    for path in shards.dir.glob("margin-*"):
        path.unlink()
    assert run_here(quick_settings(shards.path, tmp_path / "run", train__epochs=1)) == 0
    assert read_evaluation(tmp_path / "run")["count"] == shards.splits["test"].num_samples == 21
    capsys.readouterr()
    with pytest.raises(UserError, match="not evaluated on the split margin"):
        api.evaluate(tmp_path / "run", MARGIN)
    for command, *rest, text in (
        ("evaluate", "--split", MARGIN, "a model is not evaluated on the split margin: its galaxies are within"),
        ("gallery", "--split", MARGIN, "a model is not evaluated on the split margin: its galaxies are within"),
        ("evaluate", "--split", "tset", "'tset' is no split; choose from train, val, test"),
        ("evaluate", MARGIN, "a model is not evaluated on the split margin: its galaxies are within"),
        ("evaluate", "val", "val is a split: give it as --split val"),
    ):
        assert exit_code([command, str(tmp_path / "run"), *rest]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "run/evaluation/margin.json").exists()


def write_tree(folder: Path) -> Path:
    """A folder of class folders with splits and a margin: 4 train, 2 val, 2 test and 3 margin images of each of two classes."""
    dice = np.random.default_rng(0)
    for split, count in (("train", 4), ("valid", 2), ("test", 2), (MARGIN, 3)):
        for name in ("spiral", "smooth"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(dice.integers(0, 255, (16, 16, 3), np.uint8))
                image.save(folder / split / name / f"{split}-{name}-{number}.png")
    return folder


def ids_by_split(source: Path, **options: str) -> dict[str, list[str]]:
    survey = open_survey(source, **options)
    galaxies = [*survey.read(0, len(survey.labels))]
    return {name: sorted(galaxies[row].id for row in rows) for name, rows in survey.splits.items()}


def test_a_folder_may_have_a_margin_which_an_export_keeps(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "mine")
    found = ids_by_split(source)
    assert {name: len(ids) for name, ids in found.items()} == {"train": 8, "val": 4, "test": 4, "margin": 6}
    assert all(name.startswith("margin-") for name in found[MARGIN])
    exported = export_image_folders(source, tmp_path / "out", workers=1)
    assert exported[0].num_galaxies == {"train": 8, "val": 4, "test": 4, "margin": 6}
    assert len([*(tmp_path / "out/mine/margin").rglob("*.png")]) == 6
    assert ids_by_split(tmp_path / "out") == found
    assert MARGIN not in ids_by_split(source, variant="balanced")


def test_a_table_may_have_a_margin(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "mine")
    files = sorted(source.rglob("*.png"))
    lines = [f"{path.relative_to(source)},{path.parent.name},{path.parent.parent.name}" for path in files]
    table = tmp_path / "mine" / "table.csv"
    table.write_text("\n".join(["file,label,split", *lines]))
    assert ids_by_split(table) == ids_by_split(source)
    plain = tmp_path / "plain"
    for path in files:
        (plain / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(plain / path.parent.name / path.name)
    names = [f"{path.name},{path.parent.parent.name}" for path in files]
    (plain / "metadata.csv").write_text("\n".join(["file,split", *names]))
    assert {name: len(ids) for name, ids in ids_by_split(plain).items()} == {"train": 8, "val": 4, "test": 4, "margin": 6}
