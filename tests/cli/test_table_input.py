"""`data shard --from TABLE` with what people give it: one message, exit code 2, and nothing half-written."""

import csv
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from galaxydist.cli.main import main
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import read_manifest
from tests.helpers.runs import quick_settings, run_here
from tests.helpers.survey_files import write_image

FILES = [f"images/{number}.png" for number in range(12)]
LABELS = [*"ab"] * 6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve images in `images/`."""
    folder = tmp_path_factory.mktemp("tables")
    for number, file in enumerate(FILES):
        write_image(folder / file, number, size=(16, 16))
    return folder


def table(path: Path, **columns: list[object]) -> None:
    """A CSV table of the images, or of other cells where columns say so."""
    found = {"file": FILES, "label": LABELS, **columns}
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(found)
        rows.writerows(zip(*found.values(), strict=True))


def header(path: Path) -> None:
    path.write_text("file,label\n")


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / FILES[0], "0.png")


def excel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("table.csv", "file,label\n")


def truncated_parquet(path: Path) -> None:
    pq.write_table(pa.table({"file": FILES, "label": LABELS}), path)
    path.write_bytes(path.read_bytes()[:-20])


def truncated_fits(path: Path) -> None:
    from astropy.table import Table

    Table({"file": FILES, "label": LABELS}).write(path, format="fits")
    path.write_bytes(path.read_bytes()[: 2 * 2880 + 50])


def fits_image(path: Path) -> None:
    from astropy.io import fits

    fits.PrimaryHDU(np.zeros((4, 4))).writeto(path)


def json_lines_of_lists(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"file": file, "label": [label]}) for file, label in zip(FILES, LABELS, strict=True)))


def empty_parquet_of_arrays(path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.list_(pa.list_(pa.float32()))), "label": pa.array([], "string")}), path)


def with_columns(**columns: list[object]) -> Callable[[Path], None]:
    return lambda path: table(path, **columns)


def with_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (table, ["--label", "lable"], "has no column 'lable' (--label); did you mean label? Its columns are file, label"),
        (table, ["--file", "path"], "has no column 'path' (--file)"),
        (table, ["--images", "/nowhere"], "none of the 12 images exists; the first, 'images/0.png' in column 'file', would be"),
        (table, ["--variant", "balanced", "--fold", "1/3"], "a cross-validation uses the original variant"),
        (table, ["--scale", "0", "1"], "is a table without images"),
        (with_columns(category=LABELS), [], "2 columns may hold the label, label, category: choose one with --label"),
        (with_columns(label=[n / 7 for n in range(12)]), [], "has numbers with fractions (0.14285714285714285), which are"),
        (with_columns(label=["a"] * 12), [], "column 'label' has only the class 'a'; a classifier needs at least two classes"),
        (with_columns(label=[""] * 12), [], "column 'label' has no labels"),
        (with_columns(ra=["10:30:01"] * 12, dec=["-5"] * 12), [], "the position '10:30:01' is sexagesimal (hours or degrees"),
        (with_columns(ra=["10h30m1.5s"] * 12, dec=["-5"] * 12), [], "the position '10h30m1.5s' is sexagesimal"),
        (with_columns(ra=["east"] * 12, dec=["-5"] * 12), [], "the position 'east' is not a number; give decimal degrees"),
        (with_columns(ra=[10] * 12, dec=[-95] * 12), [], "ra=10, dec=-95 is not a sky position (12 of 12 are invalid)"),
        (with_columns(alpha=[10] * 12), ["--ra", "alpha"], "--ra alpha names one coordinate; name the other with --dec"),
        (with_columns(file=[""] * 12), [], "column 'file' is empty, so that no row has an image; name another one with --file"),
        (with_columns(id=[n // 2 for n in range(12)]), [], "6 ids occur more than once, the first is '0' in rows 1, 2"),
        (with_columns(id=[*range(11), ""]), [], "1 rows have no id, the first is row 12"),
        (with_columns(split=["holdout"] * 12), [], "the split 'holdout' is not train, val or test"),
        (with_columns(split=["train"] * 12), ["--fold", "1/3"], "has a split of its own"),
        (header, [], "has no rows, only the header file, label"),
        (with_bytes(b""), [], "is empty (0 bytes)"),
        (with_bytes(b"\n\n"), [], "has no header line"),
        (with_bytes(b"file,label\n0.png,a,b\n"), [], "is not a table of comma-, semicolon- or tab-separated cells"),
        (with_bytes("file,label\n0.png,\xe9\n".encode("cp1252")), [], 'is not UTF-8 text'),
        (with_bytes("file,label\n".encode("utf-16")), [], "is a UTF-16 text file, by its content"),
        (with_bytes(b"<!DOCTYPE html><html>"), [], "is a web page, by its content"),
        (with_bytes(b'[{"file": 1}]'), [], "is a JSON file, by its content"),
        (zipped, [], "is a zip archive, by its content"),
        (excel, [], 'is an Excel workbook, by its content, not a table of images'),
        (truncated_parquet, [], "is truncated or damaged ("),
        (json_lines_of_lists, [], "column 'label' has values of type list<item: string>, not single numbers or text; name"),
        (empty_parquet_of_arrays, [], "the column 'image' has no image in its first rows"),
        (truncated_fits, [], "is a truncated or damaged FITS file"),
        (fits_image, [], "is a FITS image, by its content"),
    ],
)  # fmt: skip
def test_table_that_cannot_be_used_is_refused_with_one_message(
    images: Path, make: Callable[[Path], None], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = images / "mine.csv"
    path.unlink(missing_ok=True)
    make(path)
    command = ["data", "shard", "--from", str(path), "--out", str(images / "out"), "--data-dir", str(images / "root"), *options]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("galaxydist: error:") == 1 and not captured.out
    assert sorted(file.name for file in images.iterdir() if file.name != "root") == ["images", "mine.csv"]


@pytest.mark.slow
def test_gz2_catalogue_shards_as_it_is_and_a_recipe_trains_on_it(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = real_data / "gz2_votes_sample" / "catalogue.csv"
    if not catalogue.is_file():
        pytest.skip("../shared/data/gz2_votes_sample is not on this machine")
    command = ["data", "shard", "--from", str(catalogue), "--image-size", "32", "--data-dir", str(tmp_path), "--workers", "1"]
    assert main(command) == 0 and main(command) == 0
    manifest = read_manifest(tmp_path / "shards" / "gz2_votes_sample" / "original")
    assert "(there already)" in capsys.readouterr().out
    assert sum(split.num_samples for split in manifest.splits.values()) == 1000 and len(manifest.class_names) == 128
    assert "15 galaxies are in train, since their 15 classes would have no training galaxy" in caplog.text
    assert "test has no images of 102 of 128 classes: A, Ec(m)" in caplog.text
    with catalogue.open(newline="") as stream:
        given = {row["objid"]: row for row in csv.DictReader(stream)}
    for row in read_catalogue(manifest, "test").to_pylist():
        line = given[row["id"]]
        assert row["id"] == row["source_id"] and row["file"] == line["file"] and row["asset_id"] == int(line["asset_id"])
        assert row["t04_spiral_a08_spiral_debiased"] == float(line["t04_spiral_a08_spiral_debiased"] or "nan")
    settings = quick_settings(manifest.path, tmp_path / "run", train__epochs=1, train__batch_size=390)
    assert run_here(settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2


def test_columns_keep_their_types_and_digits(images: Path, tmp_path: Path) -> None:
    path = images / "types.csv"
    table(
        path,
        Objid=[f"{n}.50" for n in range(12)],
        plate=[f"{n:05d}" for n in range(12)],
        specobjid=[299489676444788736 + n for n in range(12)],
        huge=[10**20 + n for n in range(12)],
        z=["0.1", "NaN", "", "--", *["1e-3"] * 8],
        is_edge=["True", "false", *["TRUE"] * 10],
        date=["2020-01-02"] * 12,
        odd=["0x1F", *["7"] * 11],
        id=[f" {n} " for n in range(12)],
        ra=[""] * 12,
        dec=[""] * 12,
    )
    assert main(["data", "shard", "--from", str(path), "--out", str(tmp_path / "s"), "--id", "objid", "--workers", "1"]) == 0
    rows = {row["source_id"]: row for row in read_catalogue(read_manifest(tmp_path / "s"), "train").to_pylist()}
    row = rows["1.50"]
    assert row["plate"] == "00001" and row["specobjid"] == 299489676444788737 and row["huge"] == "100000000000000000001"
    assert (row["z"], row["is_edge"], row["date"], row["odd"], row["id_"]) == (None, False, "2020-01-02", "7", 1)


def test_unlabelled_table_becomes_one_split_that_data_check_reads(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = images / "new.csv"
    path.write_text("\n".join(["path", *FILES]))
    command = ["data", "shard", "--from", str(path), "--out", str(tmp_path / "s"), "--workers", "1"]
    assert main(command) == 2
    assert "has no label column: name it with --label, or give --unlabelled" in capsys.readouterr().err
    assert main([*command, "--unlabelled"]) == 0 and main(["data", "check", str(tmp_path / "s")]) == 0
    assert main(["data", "explore", str(path), "--data-dir", str(tmp_path)]) == 2
    assert main(["train", *quick_settings(tmp_path / "s" / "manifest.json", tmp_path / "run")]) == 2
    assert "these shards have no training galaxies" in capsys.readouterr().err and not (tmp_path / "run").exists()
