"""HDF5 files with images in any schema: which data sets are taken, class names, several files, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from galaxydist.cli.main import main
from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_arrays import ArrayOptions, PixelScaling
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.survey_sources import SourceOptions, open_survey
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.hdf5_images import GALAXY10_SDSS_CLASSES
from tests.helpers.survey_files import write_survey

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(60) % 4


def write(path: Path, attributes: dict[str, Any] | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as h5:
        h5.attrs.update(attributes or {})
        for name, values in columns.items():
            h5[name.replace("__", "/")] = values
    return path


def opened(path: Path, classes: str | None = None, **source: Any) -> TableSurvey:
    survey = open_survey(path, classes=classes, source=SourceOptions(**source))
    assert isinstance(survey, TableSurvey)
    return survey


def pixels_of(survey: TableSurvey, start: int = 0, stop: int = 60) -> np.ndarray:
    return np.stack([np.asarray(galaxy.image) for galaxy in survey.read(start, stop)])


@pytest.mark.parametrize(
    ("columns", "source"),
    [
        ({"images": PIXELS, "labels": LABELS}, {}),
        ({"X": PIXELS, "y": LABELS[:, None], "mean": PIXELS.mean(axis=0)}, {}),
        ({"train__data": np.moveaxis(PIXELS, -1, 1), "train__target": LABELS}, {"columns": ColumnNames(label="train/target")}),
        ({"cube": PIXELS, "label": np.eye(4, dtype=np.float32)[LABELS]}, {}),
        (
            {"a": PIXELS, "b": PIXELS[:, :12], "kind": np.eye(4)[LABELS]},
            {"arrays": ArrayOptions("a"), "columns": ColumnNames(label="kind")},
        ),
        ({"image": PIXELS.astype(np.uint16) * 10, "label": LABELS}, {"arrays": ArrayOptions(scaling=PixelScaling(0, 2550))}),
    ],
    ids=["usual", "sklearn", "groups", "only one, one-hot", "options", "uint16"],
)
def test_images_and_labels_are_found_by_name_shape_or_option(
    tmp_path: Path, columns: dict[str, Any], source: dict[str, Any]
) -> None:
    survey = opened(write(tmp_path / "zoo.h5", **columns), **source)
    assert survey.name == "zoo" and survey.labels.tolist() == LABELS.tolist() and survey.class_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(pixels_of(survey), PIXELS)
    np.testing.assert_array_equal(pixels_of(survey, 31, 34), PIXELS[31:34])


def test_all_columns_go_into_the_catalogue_and_records_become_columns(tmp_path: Path) -> None:
    records = np.array([(n, n / 2, b"SDSS") for n in range(60)], [("petrosian", ">i4"), ("size", "<f4"), ("origin", "S8")])
    names = np.array([f"J{n:03d}.5" for n in range(60)], h5py.string_dtype())
    path = write(
        tmp_path / "zoo.h5",
        images=PIXELS,
        labels=LABELS,
        object_id=names,
        catalogue=records,
        good=LABELS > 1,
        redshift=np.where(LABELS, 0.5, np.nan),
        psf=np.ones((60, 4)),
        other=np.arange(7),
        weight=np.ones(60, np.float16),
        loop=h5py.SoftLink("/"),
    )
    survey = opened(path)
    assert survey.ids[3] == "J003_5"
    catalogue = read_catalogue(write_shards(survey, tmp_path / "shards", workers=1), "train").to_pylist()
    number = int(catalogue[0]["source_id"][1:4])
    wanted = {"petrosian": number, "size": number / 2, "origin": "SDSS", "good": number % 4 > 1, "weight": 1.0}
    assert wanted.items() <= catalogue[0].items()
    assert catalogue[0]["redshift"] == (0.5 if number % 4 else None)
    assert not {"psf", "other", "images"} & set(catalogue[0])


def test_class_names_come_from_attributes_options_or_the_known_schemas(tmp_path: Path) -> None:
    names = ("spiral", "bar", "ring", "merger")
    for place, value in (("", list(names)), ("", '["spiral", "bar", "ring", "merger"]'), ("labels", "spiral, bar,ring,merger")):
        path = write(tmp_path / "zoo.h5", {} if place else {"class_names": value}, images=PIXELS, labels=LABELS)
        if place:
            with h5py.File(path, "r+") as h5:
                h5["labels"].attrs["classes"] = np.array(value.split(","), h5py.string_dtype()) if place else value
        assert opened(path).class_names == names
    assert opened(path, class_names=("a", "b", "c", "d", "e")).class_names[4] == "e"
    ten = np.arange(60) % 10
    sdss = np.zeros((60, 69, 69, 3), np.uint8)
    assert opened(write(tmp_path / "sdss.h5", images=sdss, ans=ten)).class_names == GALAXY10_SDSS_CLASSES
    assert opened(write(tmp_path / "mmu.h5", rgb_image=PIXELS, gz10_label=ten)).class_names == GALAXY10_CLASSES
    assert opened(write(tmp_path / "mine.h5", images=PIXELS, label=ten), classes="galaxy10").class_names == GALAXY10_CLASSES


def test_survey_file_keeps_its_own_reader_unless_an_option_asks_for_another(tmp_path: Path) -> None:
    path = tmp_path / "survey.h5"
    write_survey(path)
    assert opened(path).ids[0] == "sim-00000"
    assert opened(path, columns=ColumnNames(label="ans")).ids[0] == "survey-0000000"
    with h5py.File(path, "r+") as h5:
        del h5["redshift"]
    survey = opened(path)
    assert len(survey.labels) == 120 and survey.slab_length == 32


def test_folders_of_the_multimodal_universe_are_read_in_the_order_of_their_pixels(tmp_path: Path) -> None:
    bands = np.array([[b"des-g", b"des-r", b"des-i"]] * 60)
    fluxes = np.moveaxis(PIXELS, -1, 1)[:, [2, 1, 0]].astype(np.float32)
    ids = np.array([f"{n}-{n % 7}".encode() for n in range(60)])
    for cell, rows in ((9, slice(0, 25)), (100, slice(25, 27)), (2000, slice(27, 60))):
        write(
            tmp_path / "dr10" / f"healpix={cell}" / "001-of-001.hdf5",
            image_array=fluxes[rows],
            image_ivar=fluxes[rows],
            image_band=bands[rows],
            image_model=PIXELS[rows],
            object_id=ids[rows],
            label=LABELS[rows],
            **({"only_here": LABELS[rows]} if cell == 9 else {}),
        )
    arrays = ArrayOptions(bands=("i", "r", "g"), scaling=PixelScaling(0, 255))
    survey = opened(tmp_path, arrays=arrays)
    assert survey.extras["only_here"].null_count == 35
    np.testing.assert_array_equal(pixels_of(survey), PIXELS)
    np.testing.assert_array_equal(pixels_of(survey, 24, 30), PIXELS[24:30])
    np.testing.assert_array_equal(pixels_of(opened(tmp_path, arrays=ArrayOptions("image_model"))), PIXELS)
    before = survey.source_hash
    with h5py.File(tmp_path / "dr10" / "healpix=100" / "001-of-001.hdf5", "r+") as h5:
        h5["image_array"][1, 2, 3, 4] += 1
    assert opened(tmp_path, arrays=arrays).source_hash != before
    write(tmp_path / "dr10" / "healpix=7" / "a.hdf5", image_array=fluxes[:3, :, :8], image_band=bands[:3], label=LABELS[:3])
    with pytest.raises(UserError, match=r"'image_array' has the shape 25 x 3 x 16 x 16, in the first file it has N x 3 x 8 x 16"):
        opened(tmp_path, arrays=arrays)


def test_very_large_files_are_known_by_sizes_and_samples_of_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        write(tmp_path / name, images=np.concatenate([PIXELS, PIXELS]), labels=np.r_[LABELS, LABELS]) for name in ("a.h5", "b.h5")
    ]
    whole = opened(paths[0]).images.digest()
    assert whole == opened(paths[1]).images.digest()
    monkeypatch.setattr("galaxydist.surveys.tables.file_tree.MOST_HASHED_BYTES", 10_000)
    sampled = opened(paths[0])
    assert whole != sampled.images.digest() == opened(paths[1]).images.digest()
    with h5py.File(paths[1], "r+") as h5:
        h5["images"][70, 3, 3, 0] ^= 1
    assert opened(paths[1]).images.digest() != sampled.images.digest()
    assert not np.array_equal(
        np.isin(np.arange(60), sampled.splits["train"]), np.isin(np.arange(60, 120), sampled.splits["train"])
    )


@pytest.mark.parametrize(
    ("columns", "source", "message"),
    [
        ({"image": PIXELS, "X": PIXELS, "y": LABELS}, {}, r"several data sets .*X \(60 x 16 x 16 x 3 uint8\).*--image-column"),
        ({"spectra": np.zeros((60, 3000)), "y": LABELS}, {}, r"no data set with images; it has spectra \(60 x 3000 float64\)"),
        (
            {"image": PIXELS, "y": LABELS},
            {"arrays": ArrayOptions("picture")},
            r"no data set 'picture' \(--image-column\); it has",
        ),
        ({"image": PIXELS / 255, "y": LABELS}, {}, "float64, in the first images from 0 to 1 .*for example --scale 0 1"),
        ({"image": np.moveaxis(np.concatenate([PIXELS, PIXELS], -1), -1, 1), "y": LABELS}, {}, "6 bands without names"),
        ({"image": PIXELS, "y": np.ones((60, 4))}, {}, "neither a class number for each image nor a single 1 in each row"),
        ({"image": PIXELS, "y": np.linspace(0, 1, 60)}, {}, "numbers with fractions"),
        ({"image": PIXELS, "y": LABELS}, {"class_names": ("a", "b")}, "not a class number from 0 to 1"),
        ({"image": PIXELS, "size": LABELS}, {}, "has no label column"),
        ({"image": PIXELS[:0], "y": LABELS[:0]}, {}, "'image' has no images"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, columns: dict[str, Any], source: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "zoo.h5", **columns)
    with pytest.raises(UserError, match=message):
        opened(path, **source)


def test_columns_of_another_length_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="has no label column"):
        opened(write(tmp_path / "zoo.h5", image=PIXELS, y=LABELS[:30]))
    assert "'y' has 30 values for 60 images and is left out" in caplog.text


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [(truncate, "zoo.h5 is truncated"), (lambda path: path.write_text("x"), "CSV file, by its content, not an HDF5")],
)
def test_damaged_file_is_refused(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    path = write(tmp_path / "zoo.h5", images=PIXELS, y=LABELS)
    change(path)
    with pytest.raises(UserError, match=message):
        open_survey(path)


def test_damaged_chunk_is_a_damaged_image(tmp_path: Path) -> None:
    path = tmp_path / "zoo.h5"
    with h5py.File(path, "w") as h5:
        h5.create_dataset("images", data=PIXELS, chunks=(4, 16, 16, 3), compression="gzip")
        h5["y"] = LABELS
        where = h5["images"].id.get_chunk_info(14)
    survey = opened(path)
    with path.open("rb+") as stream:
        stream.seek(where.byte_offset + 20)
        stream.write(bytes(200))
    with pytest.raises(DamagedImageError, match=r"cannot read images of rows 56 \.\.\. 56"):
        list(survey.read(56, 57))
    manifest = write_shards(survey, tmp_path / "shards", max_errors=10, workers=1)
    assert sum(split.num_samples for split in manifest.splits.values()) == 56


def test_command_shards_floats_with_names_of_classes_and_refuses_the_rest_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--data-dir", str(tmp_path / "root")]
    path = write(tmp_path / "zoo.h5", image_array=np.moveaxis(PIXELS, -1, 1) / 100 - 1, label=LABELS)
    (tmp_path / "names.txt").write_text("\ufeffspiral\nbar\n\nring\nmerger\n", encoding="utf-8")
    for words, message in (
        ([], "--scale LOW HIGH"),
        (["--stretch", "asinh"], "give --scale LOW HIGH too"),
        (["--scale", "2", "1"], "a lower and a higher finite value"),
        (["--scale", "-1", "1.5", "--classes", "spiral"], "give galaxy10, two or more different names"),
        (["--scale", "-1", "1.5", "--classes", "spiral,bar"], "not a class number from 0 to 1"),
        (["--scale", "-1", "1.5", "--bands", "0,1"], "give three bands"),
        (["--scale", "-1", "1.5", "--bands", "2,1,9"], "has no 9"),
        (["--scale", "-1", "1.5", "--images", "x"], "holds its images itself"),
    ):
        assert main(["data", "shard", "--from", str(path), *words, *root]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("galaxydist: error:") == 1 and not captured.out
    assert not (tmp_path / "root").exists()
    words = ["--scale", "-1", "1.55", "--bands", "2,1,0", "--classes", str(tmp_path / "names.txt"), "--encoding", "raw"]
    assert main(["data", "shard", "--from", str(path), *words, *root]) == 0
    assert "(train" in capsys.readouterr().out
    assert main(["data", "explore", str(path), *words[:-2], "-o", str(tmp_path / "page.html"), *root]) == 0
    assert "merger" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 10_000
