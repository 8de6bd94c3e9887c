"""Surveys from tables of images: equality with class folders, splits, ids, labels and rows left out."""

import csv
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_arrays import ArrayOptions, PixelScaling
from galaxydist.surveys.image_table import TableOptions, TableSurvey, open_table
from galaxydist.surveys.sky_cells import split_by_cell
from galaxydist.surveys.survey_sources import SourceOptions, open_survey
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.listed_images import open_listed_images
from tests.helpers.image_data import pixels_of, write_hats, write_hdf5, write_hub, write_universe
from tests.helpers.survey_files import write_image
from tests.helpers.table_sources import contents, sample_rows, write_csv, write_fits, write_parquet


@pytest.fixture(scope="module")
def folder_form(real_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Any]:
    """Sixty real galaxies as class folders with a metadata.csv that gives the split: folder, rows, contents."""
    folder = tmp_path_factory.mktemp("forms") / "galaxies"
    rows = sample_rows(real_sample)
    for row in rows:
        target = folder / row["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(real_sample / row["file"], target)
    write_csv(folder / "metadata.csv", [{"id" if k == "objid" else k: v for k, v in row.items() if k != "label"} for row in rows])
    survey = open_survey(folder, classes="galaxy10")
    assert [len(survey.splits[split]) for split in ("train", "val", "test")] == [40, 10, 10]
    return folder, rows, contents(survey, folder.parent / "shards")


@pytest.mark.parametrize("form", ["csv", "tsv", "csv with a mark", "parquet", "fits"])
def test_table_gives_the_ids_labels_order_pixels_and_catalogue_of_class_folders(
    folder_form: tuple[Path, list[dict[str, Any]], Any], tmp_path: Path, form: str
) -> None:
    folder, rows, expected = folder_form
    write = {"parquet": write_parquet, "fits": write_fits}.get(form, write_csv)
    extra = {"tsv": {"delimiter": "\t"}, "csv with a mark": {"delimiter": ";", "encoding": "utf-8-sig"}}.get(form, {})
    path = write(tmp_path / f"table.{form[:3]}", rows, **extra)
    survey = open_survey(path, classes="galaxy10", source=SourceOptions(images=str(folder)))
    assert isinstance(survey, TableSurvey) and survey.class_names == GALAXY10_CLASSES
    survey = pickle.loads(pickle.dumps(survey))
    assert contents(survey, tmp_path / "shards") == expected


@pytest.mark.parametrize("form", ["hub", "hats", "hats without images", "universe", "hdf5", "hdf5 with float channels first"])
def test_data_with_images_inside_give_the_same_as_class_folders(
    folder_form: tuple[Path, list[dict[str, Any]], Any], tmp_path: Path, form: str
) -> None:
    folder, rows, expected = folder_form
    path = tmp_path / "data"
    source = SourceOptions()
    if form == "hub":
        write_hub(path, rows, folder, GALAXY10_CLASSES)
    elif form.startswith("hats"):
        write_hats(path, rows, folder, "" if "without" in form else "rgb_image")
        source = SourceOptions(images=str(folder) if "without" in form else None)
    elif form == "universe":
        write_universe(path, rows, pixels_of(rows, folder))
    elif form == "hdf5":
        path = write_hdf5(tmp_path / "data.h5", rows, pixels_of(rows, folder), chunks=(7, 256, 256, 3), compression="lzf")
    else:
        pixels = np.moveaxis(pixels_of(rows, folder), -1, 1).astype(">f4") / 2 - 1
        path = write_hdf5(tmp_path / "data.h5", rows, pixels, "X")
        source = SourceOptions(arrays=ArrayOptions(scaling=PixelScaling(-1, 126.5)))
    survey = open_survey(path, classes=None if form == "hub" else "galaxy10", source=source)
    assert isinstance(survey, TableSurvey) and survey.class_names == GALAXY10_CLASSES
    survey = pickle.loads(pickle.dumps(survey))
    assert contents(survey, tmp_path / "shards") == expected


def survey_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> TableSurvey:
    """A survey from rows with a column `file`; images that do not exist are made, but for those named `gone...`."""
    for row in rows:
        if row.get("file") and not row["file"].startswith("gone") and not (folder / row["file"]).exists():
            write_image(folder / row["file"], zlib.crc32(row["file"].encode()))
    table = pa.Table.from_pylist(rows)
    images, has_image = open_listed_images(table.column("file").combine_chunks(), str(folder), "t.csv", "file", None)
    return open_table(table, images, "t.csv", TableOptions("mine", **options), has_image)


def rows_of(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"file": f"{n}.png", "label": "ab"[n % 2], **{k: v[n] for k, v in columns.items()}} for n in range(count)]


def test_rows_without_image_label_or_split_are_left_out_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(12, split=["train"] * 8 + ["val"] * 2 + ["test"] * 2)
    rows[3]["file"], rows[5]["label"], rows[6]["label"], rows[8]["split"], rows[11]["file"] = "gone.png", "", None, " ", None
    rows[5] |= {"file": "gone too.png", "label": "a class of this row alone"}
    survey = survey_of(tmp_path, rows)
    assert survey.class_names == ("a", "b")
    assert "5 of 12 rows are left out: 3 without an image, 1 without a split, 1 without a label" in caplog.text
    assert {name: found.tolist() for name, found in survey.splits.items()} == {
        "train": [0, 1, 2, 4, 7],
        "val": [9],
        "test": [10],
    }
    manifest = write_shards(survey, tmp_path / "shards", image_size=20, workers=1)
    assert [line[-1] for line in csv.reader((manifest.dir / "left_out.csv").open())] == [
        "reason",
        "row 4 (gone): without an image",
        "row 6 (gone too): without an image",
        "row 7 (6): without a label",
        "row 9 (8): without a split",
        "row 12 (mine-0000011): without an image",
    ]
    assert sum(split.num_samples for split in manifest.splits.values()) == 7


def test_split_without_positions_is_a_hash_of_the_id_that_new_galaxies_do_not_change(tmp_path: Path) -> None:
    def splits(rows: list[dict[str, Any]]) -> dict[str, str]:
        survey = survey_of(tmp_path, rows)
        return {survey.ids[row]: name for name, found in survey.splits.items() for row in found.tolist()}

    rows = rows_of(60)
    before = splits(rows)
    assert {name for name, split in before.items() if split == "test"} == {"42", "21", "15", "59", "43", "6", "36"}
    after = splits([{"file": f"new{n}.png", "label": "c"} for n in range(5)] + rows[::-1])
    assert before.items() <= after.items()


def test_split_of_positions_on_many_cells_is_by_cell_with_a_margin(tmp_path: Path) -> None:
    dice = np.random.default_rng(1)
    ra, dec = dice.uniform(0, 360, 400), np.degrees(np.arcsin(dice.uniform(-1, 1, 400)))
    ra[0], dec[0] = 315.0, np.degrees(np.arcsin(2 / 3))  # a corner of cells
    rows = rows_of(400, ra=ra.tolist(), dec=dec.tolist())
    for row in rows:
        row["file"] = f"{int(row['file'][:-4]) % 20}.png"  # equal images, whose galaxies cells put into several splits
    survey = survey_of(tmp_path, rows, columns=ColumnNames(id="none"))
    codes = split_by_cell(ra, dec, survey.ids)
    found = np.select([np.isin(np.arange(400), survey.splits[name]) for name in ("train", "val", "test", "margin")], [0, 1, 2, 3])
    assert ((found == codes) | (found == 3)).all() and (found == 3).any() and set(found[codes == 1]) == {1, 3}


def test_equal_files_of_a_table_stay_in_one_split_and_with_two_labels_in_train(tmp_path: Path) -> None:
    rows = rows_of(60)
    for n in range(60):
        write_image(tmp_path / f"{n}.png", n)
    for n in range(30):
        shutil.copy(tmp_path / f"{n}.png", tmp_path / f"{59 - n}.png")
        rows[59 - n]["label"] = rows[n]["label"]
    rows[0]["label"], rows[59]["label"] = "a", "b"
    survey = survey_of(tmp_path, rows)
    code = {row: name for name, found in survey.splits.items() for row in found.tolist()}
    assert all(code[n] == code[59 - n] for n in range(30)) and len(survey.splits["test"]) > 0
    dropped = survey_of(tmp_path, rows, conflicting="drop")
    assert sum(map(len, dropped.splits.values())) == 58


def test_classes_with_few_galaxies_are_a_warning_and_stay_in_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(60, ra=np.linspace(10, 50, 60).tolist(), dec=[0.0] * 60)
    rows[7]["label"], rows[20]["label"] = "lens", "ring"
    survey = survey_of(tmp_path, rows)
    assert {7, 20} <= set(survey.splits["train"].tolist())
    assert [len(found) for found in survey.splits.values()] == [48, 6, 6]
    assert "t.csv: test has no images of 2 of 4 classes: lens, ring" in caplog.text
    for row in rows:
        row["split"] = "train"
    assert {7, 20} <= set(survey_of(tmp_path, rows).splits["train"].tolist())


def test_labels_are_numbers_in_order_names_in_natural_order_or_the_names_of_numbers(tmp_path: Path) -> None:
    for values, names in (
        ([10, 2, 2, 10], ("2", "10")),
        ([1.0, 0.0, None, 1.0], ("0", "1")),
        ([1, 0, -1, 1], ("0", "1")),
        (["class10", "class2", "nan", "class2"], ("class2", "class10")),
        ([True, False, True, True], ("false", "true")),
        (["007", "7", "007", "7"], ("007", "7")),
    ):
        rows = [{"file": f"{n}.png", "label": value, "split": "train"} for n, value in enumerate([*values, *values])]
        survey = survey_of(tmp_path, rows)
        assert survey.class_names == names
        wanted = [-1 if v in (None, "nan", -1) else names.index(str(v).lower().removesuffix(".0")) for v in values]
        assert survey.labels.tolist() == [*wanted, *wanted]
    rows = [{"file": f"{n}.png", "label": n % 3} for n in range(9)]
    named = survey_of(tmp_path, rows, class_names=("spiral", "bar", "ring", "none"))
    assert named.class_names[2] == "ring" and named.labels.tolist() == [0, 1, 2] * 3
    with pytest.raises(UserError, match=r"column 'label': 2 is not a class number from 0 to 1"):
        survey_of(tmp_path, rows, class_names=("spiral", "bar"))


def test_unlabelled_table_has_no_classes_and_one_split(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.png", "mag": 17.5 + n} for n in range(5)]
    survey = survey_of(tmp_path, rows, is_labelled=False)
    manifest = write_shards(survey, tmp_path / "shards", image_size=20, workers=1)
    assert manifest.class_names == () and manifest.splits["test"].num_samples == 5 and manifest.splits["train"].num_samples == 0
    with pytest.raises(UserError, match=r"t\.csv has no label column: name it with --label, or give --unlabelled .*file, mag"):
        survey_of(tmp_path, rows)


def test_ids_come_from_the_id_column_or_the_file_and_are_unique_and_safe(tmp_path: Path) -> None:
    rows = [{"file": f"{n % 2}/{n // 2}.png", "label": "ab"[n % 2], "iauname": f"J1.{n}+2", "split": "train"} for n in range(4)]
    survey = survey_of(tmp_path, rows)
    assert list(survey.ids) == ["J1_0+2", "J1_1+2", "J1_2+2", "J1_3+2"]
    assert next(survey.read(1, 2)).extras == {"source_id": "J1.1+2", "file": "1/0.png"}
    assert list(survey_of(tmp_path, rows, columns=ColumnNames(id="none")).ids) == ["0-0", "1-0", "0-1", "1-1"]
    rows[3]["iauname"] = "J1.1+2"
    with pytest.raises(
        UserError, match=r"column 'iauname': 1 ids occur more than once, the first is 'J1\.1\+2' in rows 2, 4; corr"
    ):
        survey_of(tmp_path, rows)
    rows[3]["file"] = "gone.png"  # a row that is left out may have any id
    assert len(survey_of(tmp_path, rows).left_out) == 1


def test_source_hash_of_a_table_changes_with_images_labels_and_columns_alone(tmp_path: Path) -> None:
    rows = rows_of(12, split=["train"] * 12, mag=[*range(11), None], note=[*"abcdefghijk", None])
    first = survey_of(tmp_path, rows).source_hash
    assert survey_of(tmp_path, rows).source_hash == first
    hashes = {first, survey_of(tmp_path, rows[::-1]).source_hash}
    for name, value in (("mag", 99), ("note", "ab"), ("label", "b")):
        hashes.add(survey_of(tmp_path, [{**rows[0], name: value}, *rows[1:]]).source_hash)
    write_image(tmp_path / "0.png", 77)
    hashes.add(survey_of(tmp_path, rows).source_hash)
    assert len(hashes) == 6


def test_part_of_a_survey_is_small_and_reads_the_same_rows(tmp_path: Path) -> None:
    rows = rows_of(600, note=[f"{n} " * 50 for n in range(600)])
    for row in rows:
        row["file"] = f"{row['label']}/{int(row['file'][:-4]) % 10}.png"
    table = survey_of(tmp_path, rows, columns=ColumnNames(id="none"))
    folder = open_survey(tmp_path)
    for survey, start, stop in ((table, 270, 275), (folder, 7, 9)):
        part = survey.part(start, start + 40 if survey is table else stop).part(start, stop)
        data = pickle.dumps(part)
        assert len(data) < len(pickle.dumps(survey)) * (0.1 if survey is table else 0.75)
        galaxies = list(pickle.loads(data).read(start, stop))
        expected = list(survey.read(start, stop))
        assert [(g.id, g.label, g.extras) for g in galaxies] == [(g.id, g.label, g.extras) for g in expected]
        assert [g.image.data for g in galaxies] == [g.image.data for g in expected]
