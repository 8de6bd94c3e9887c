"""Samples of foreign tars as a survey: labels, ids, splits and properties, and equality with class folders."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galaxydist.errors import UserError
from galaxydist.loading.decode import read_samples
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.tar_index import IndexOptions, index_tars
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_table import TableOptions, TableSurvey
from galaxydist.surveys.survey_sources import open_survey
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.tar_images import read_tar_table
from galaxydist.surveys.tables.tar_scan import ScanOptions, find_tars, scan_tars
from tests.helpers.foreign_tars import drawn_image, drawn_tars, write_tar
from tests.helpers.table_sources import sample_rows, write_csv


def survey_of(patterns: str | dict[str | None, str], **options: Any) -> TableSurvey:
    locations = find_tars({None: patterns} if isinstance(patterns, str) else patterns)
    columns = ColumnNames(**{kind: options.pop(kind) for kind in ("label", "id", "split", "ra", "dec") if kind in options})
    return read_tar_table(scan_tars(locations, ScanOptions()), locations, columns).survey(TableOptions("t", columns, **options))


def sample_tar(path: Path, count: int = 8, **texts: Any) -> Path:
    """A tar of drawn images with a text for each extension given, from the number of the sample."""
    files = []
    for number in range(count):
        files.append((f"{number:03d}.png", drawn_image(number)))
        files += [(f"{number:03d}.{name.replace('__', '.')}", value(number)) for name, value in texts.items()]
    return write_tar(path, files)


def as_json(**values: Any) -> Any:
    return lambda number: json.dumps({name: value(number) for name, value in values.items()}).encode()


def names_by_id(survey: TableSurvey) -> dict[str, str]:
    return {name: survey.class_names[label] for name, label in zip(survey.ids, survey.labels.tolist(), strict=True)}


def test_galaxy10_as_tars_gives_the_same_as_class_folders_written_anew_and_in_place(real_sample: Path, tmp_path: Path) -> None:
    folder, rows = tmp_path / "galaxies", sample_rows(real_sample)
    for row in rows:
        (folder / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(real_sample / row["file"], folder / row["file"])
    write_csv(folder / "metadata.csv", [{"id" if k == "objid" else k: v for k, v in row.items() if k != "label"} for row in rows])
    expected = write_shards(open_survey(folder, classes="galaxy10"), tmp_path / "expected", encoding="raw", workers=1)
    for number in range(3):
        files = []
        for row in rows[20 * number : 20 * number + 20]:
            properties = {key: value for key, value in row.items() if key not in ("file", "label")}
            files += [
                (f"./{row['objid']}.image.jpg", (folder / row["file"]).read_bytes()),
                (f"./{row['objid']}.labels.json", json.dumps(properties).encode()),
                (f"./{row['objid']}.cls", str(row["label"]).encode()),
            ]
        write_tar(tmp_path / f"tars/gz-{number}.tar", files)
    pattern = f"{tmp_path}/tars/gz-{{0..2}}.tar"
    survey = pickle.loads(pickle.dumps(survey_of(pattern, classes="galaxy10", id="objid")))
    anew = write_shards(survey, tmp_path / "anew", encoding="raw", workers=1)
    options = TableOptions("t", ColumnNames(id="objid"), classes="galaxy10")
    in_place = index_tars(find_tars({None: pattern}), tmp_path / "in_place", options, IndexOptions())
    assert in_place.encoding == "jpeg"
    assert contents(anew) == contents(expected)
    assert sorted(contents(in_place)) == sorted(contents(expected))
    for found in (anew, in_place):
        assert (found.channel_mean, found.channel_std) == (expected.channel_mean, expected.channel_std)


def contents(manifest: Manifest) -> list[Any]:
    """Split, id, label, properties and pixels of each galaxy in the order of storage; the file is named after its source."""
    found = []
    for split in manifest.splits:
        rows = read_catalogue(manifest, split).drop_columns(["file"]).to_pylist()
        images = [pixels.tobytes() for _, (pixels,) in read_samples(manifest, split, np.arange(len(rows)))]
        for row, label, image in zip(rows, manifest.labels(split).tolist(), images, strict=True):
            found.append((split, row["id"], label, json.dumps(row, sort_keys=True), image))
    return found


def test_labels_are_class_numbers_or_names_in_cls_or_json(tmp_path: Path) -> None:
    names = ("spiral", "ring", "edge on")
    numbered = survey_of(str(sample_tar(tmp_path / "a.tar", 30, cls=lambda n: b"%d\n" % (n % 11))))
    assert numbered.class_names == tuple(map(str, range(11))) and numbered.labels.tolist() == [n % 11 for n in range(30)]
    named = survey_of(str(sample_tar(tmp_path / "b.tar", cls=lambda n: names[n % 3].encode())))
    assert named.class_names == ("edge on", "ring", "spiral")
    texts = {"json": as_json(kind=lambda n: names[n % 3], smooth=lambda n: n), "meta__json": as_json(smooth=lambda n: -n)}
    path = str(sample_tar(tmp_path / "c.tar", **texts))
    for given in ("kind", "json:kind", "KIND"):
        assert names_by_id(survey_of(path, label=given)) == names_by_id(named), given
    assert survey_of(path, label="kind").extras.column_names == ["source_id", "json:smooth", "meta.json:smooth", "file"]
    with pytest.raises(
        UserError, match=r"no column 'smooth' \(--label\); did you mean .*json:smooth\? .* kind, json:smooth, meta"
    ):
        survey_of(path, label="smooth")
    with pytest.raises(UserError, match=r"c.tar has no column 'clas' \(--label\). Its columns are kind, json:smooth"):
        survey_of(path, label="clas")
    with pytest.raises(UserError, match=r"d.tar has no label with a usual name: name .* with --label.* It has smooth"):
        survey_of(str(sample_tar(tmp_path / "d.tar", json=as_json(smooth=lambda n: n))))
    with pytest.raises(UserError, match=r"column 'cls' has numbers with fractions \(0\.5\), which are no classes"):
        survey_of(str(sample_tar(tmp_path / "f.tar", cls=lambda n: b"%d.5" % (n % 3))))
    with pytest.raises(UserError, match=r"votes \(--label\) is empty or has lists or values of several types"):
        survey_of(str(sample_tar(tmp_path / "e.tar", json=as_json(votes=lambda n: [n]))), label="votes")


def test_damaged_json_names_tar_and_sample(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.tar: the .json of 002 is damaged"):
        survey_of(str(sample_tar(tmp_path / "a.tar", cls=lambda n: b"%d" % (n % 2), json=lambda n: b"{" if n == 2 else b"{}")))


def test_samples_without_image_or_label_are_left_out(tmp_path: Path) -> None:
    files = [(f"{n}.png", drawn_image(n)) for n in range(6)] + [("6.cls", b"a"), ("7.png", drawn_image(7)), ("7.cls", b"b")]
    files[2:2] = [("1.cls", b"a")]
    survey = survey_of(str(write_tar(tmp_path / "a.tar", files)), split="none")
    assert {row.id: row.reason for row in survey.left_out}["6"] == "without an image"
    assert sorted(survey.ids[row] for rows in survey.splits.values() for row in rows.tolist()) == ["1", "7"]


@pytest.mark.parametrize("form", ["pattern", "name", "folder", "member", "key"])
def test_split_is_that_of_the_pattern_the_name_the_folder_or_a_key(tmp_path: Path, form: str) -> None:
    splits = {"train": 8, "val": 4, "test": 4}
    patterns: dict[str | None, str] = {}
    for split, count in splits.items():
        path = {"name": f"gz_{split}_0_8.tar", "folder": f"{split}/0.tar"}.get(form, f"{split[:2]}.tar")
        prefix = f"./{split}/" if form == "member" else ""
        files = [(f"{prefix}{n}.png", drawn_image(n)) for n in range(count)]
        pairs = [pair for n, file in enumerate(files) for pair in (file, (f"{file[0][:-3]}cls", b"%d" % (n % 2)))]
        if form == "key":
            key = [(f"{n}.json", json.dumps({"part": split}).encode()) for n in range(count)]
            pairs = [one for n in range(count) for one in (*pairs[2 * n : 2 * n + 2], key[n])]
        write_tar(tmp_path / path, pairs)
        patterns[split] = str(tmp_path / path)
    given: dict[str, Any] = {"split": "part"} if form == "key" else {}
    survey = survey_of(patterns if form == "pattern" else str(tmp_path), **given)
    assert {split: rows.size for split, rows in survey.splits.items()} == splits
    assert len(set(survey.ids)) == 16  # the keys begin anew in each tar
    assert survey_of(str(tmp_path), split="none").splits["train"].size > 8


def test_folders_in_the_tars_are_the_labels_where_nothing_else_is(tmp_path: Path) -> None:
    files = [(f"./g/{'ring' if n % 2 else 'bar'}/{n}.png", drawn_image(n)) for n in range(8)]
    assert survey_of(str(write_tar(tmp_path / "a.tar", files))).class_names == ("bar", "ring")


def test_equal_images_stay_in_one_split(tmp_path: Path) -> None:
    for number in range(2):
        drawn_tars(tmp_path / str(number), 60, 30)
    survey = survey_of(f"{tmp_path}/*/*.tar")
    split_of = {row: split for split, rows in survey.splits.items() for row in rows.tolist()}
    assert all(split_of[row] == split_of[row + 60] for row in range(60)) and survey.splits["test"].size
