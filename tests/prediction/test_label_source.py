"""``galaxydist predict``: the evaluation's numbers for any source, each galaxy once, on any number of processes."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import galaxydist
from galaxydist.bench.flaky_server import Behaviour, FileServer
from galaxydist.cli.main import main
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.galaxy import Galaxy
from galaxydist.prediction.image_form import ImageForm, OtherImagesError
from galaxydist.prediction.sources import ShardsToLabel
from galaxydist.prediction.trained_model import open_trained_model
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.simulate.survey import simulate_survey
from tests.helpers.forked_runs import forked, predict, run_forked
from tests.prediction.conftest import SIZE, BlobRun, ScaledBlobs


def run_predict(*arguments: object) -> int:
    from accelerate.state import AcceleratorState, PartialState

    try:
        return main(["predict", *map(str, arguments)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def write_images(folder: Path, count: int = 100) -> Path:
    """Blobs as JPEG files in two folders, with the same names in both."""
    for row, galaxy in enumerate(ScaledBlobs(num_galaxies=count).read(0, count)):
        path = folder / ("first" if row % 2 else "ü, second") / f"{row // 2}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(galaxy.image)).save(path, quality=95, subsampling=0)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def labelled(blob_run: BlobRun, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predictions of the images by one process, as Parquet and as CSV."""
    out = tmp_path_factory.mktemp("labelled") / "out.parquet"
    assert (
        run_predict(blob_run.run_dir, images, "-o", out)
        == run_predict(blob_run.run_dir, images, "-o", out.with_suffix(".csv"))
        == 0
    )
    return out


def test_shards_get_the_predictions_of_the_evaluation_bit_for_bit(blob_run: BlobRun, tmp_path: Path) -> None:
    known = read_predictions(blob_run.run_dir / "evaluation" / "test-predictions.parquet")
    out = tmp_path / "test.parquet"
    assert run_predict(blob_run.run_dir, blob_run.manifest.parent, "--split", "test", "-o", out, "--logits", "--top", 2) == 0
    table = pq.read_table(out)
    names = known.info.class_names
    logits = np.stack([table.column(f"logit_{name}").to_numpy() for name in names], axis=1)
    np.testing.assert_array_equal(logits, known.column("logits"))
    predictor = galaxydist.load_predictor(blob_run.run_dir)
    scaled = np.exp(logits.astype(float) / predictor.trained.temperature)
    found = np.stack([table.column(f"p_{name}").to_numpy() for name in names], axis=1)
    np.testing.assert_allclose(found, scaled / scaled.sum(axis=1, keepdims=True), rtol=1e-6)
    assert table.column("id").to_pylist() == [f"Blob {int(text.removeprefix('blob-'))}" for text in known.column("id")]
    assert table.column("label").to_pylist() == [names[label] for label in known.column("label")]
    assert set(table.column("split").to_pylist()) == {"test"} and table.column("predicted").equals(table.column("top_1"))
    record = json.loads(table.schema.metadata[b"galaxydist"])
    assert record["source"]["digest"] == known.info.context["manifest_hash"] and record["step"] == known.info.context["step"]
    assert record["temperature"] == predictor.trained.temperature and record["galaxies"] == len(table)
    whole = tmp_path / "all.csv"
    assert run_predict(blob_run.run_dir, blob_run.manifest, "-o", whole) == 0
    by_split = {split: [row["id"] for row in read_csv(whole) if row["split"] == split] for split in ("train", "val", "test")}
    assert [len(ids) for ids in by_split.values()] == [72, 24, 24] and by_split["test"] == table.column("id").to_pylist()


def test_shards_of_a_web_server_are_fetched_once(blob_run: BlobRun, tmp_path: Path) -> None:
    local, remote = tmp_path / "local.csv", tmp_path / "remote.csv"
    assert run_predict(blob_run.run_dir, blob_run.manifest, "-o", local) == 0
    with FileServer(blob_run.manifest.parent, Behaviour()) as server:
        words = ["-o", remote, "--data-dir", tmp_path / "data"]
        assert run_predict(blob_run.run_dir, server.url, *words) == 0
        shards = [path.name for path in blob_run.manifest.parent.glob("*.tar")]
        assert len(shards) >= 6 and {server.gets[name] for name in shards} == {1}
    assert remote.read_bytes() == local.read_bytes()


@dataclass(frozen=True)
class MixedScales(ScaledBlobs):
    """The first galaxy of the validation split has a pixel scale that no training galaxy has."""

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        other = int(self.splits["val"][0])
        for row, galaxy in enumerate(super().read(start, stop), start):
            yield replace(galaxy, extras={**galaxy.extras, "pxscale": 0.524}) if row == other else galaxy


def test_shards_with_another_pixel_scale_are_refused_unless_they_are_those_of_the_training(
    blob_run: BlobRun, tmp_path: Path
) -> None:
    manifest = write_shards(MixedScales(), tmp_path / "shards", workers=1)
    source, trained = ShardsToLabel(manifest, ("train", "val")), open_trained_model(blob_run.run_dir, os.environ)
    form = ImageForm.of(trained.stored, trained.recipe.data)
    with pytest.raises(OtherImagesError, match=r"1 of \d+ galaxies in the val split .* another pixel scale"):
        source.check(form, trained.trained_on.manifest_hash)
    source.check(form, manifest.hash)
    resampled = ShardsToLabel(replace(manifest, source_sides=(256, 256)), ("train",))
    with pytest.raises(OtherImagesError, match=r"72 of 72 .* \(0\.524 arcsec/pixel in the median\) .* \(0\.262 to 0\.262\)"):
        resampled.check(form, trained.trained_on.manifest_hash)


def test_tars_of_others_are_labelled_without_shards(blob_run: BlobRun, tmp_path: Path) -> None:
    known = read_predictions(blob_run.run_dir / "evaluation" / "test-predictions.parquet")
    (tmp_path / "tars").mkdir()
    for tar in blob_run.manifest.parent.glob("test-*.tar"):
        shutil.copy(tar, tmp_path / "tars" / f"others-{tar.name}")
    out = tmp_path / "out.parquet"
    pattern = "others-test-{000000..000001}.tar"
    # The last: as a shell expands others-*.tar.
    for sources in ([tmp_path / "tars"], [tmp_path / "tars" / pattern], sorted((tmp_path / "tars").glob("others-*.tar"))):
        assert run_predict(blob_run.run_dir, *sources, "-o", out, "--overwrite", "--logits") == 0
        table = pq.read_table(out)
        rows = {name: row for row, name in enumerate(known.column("id"))}
        order = [rows[name] for name in table.column("id").to_pylist()]
        found = np.stack([table.column(f"logit_{name}").to_numpy() for name in known.info.class_names], axis=1)
        np.testing.assert_allclose(found, known.column("logits")[order], atol=1e-6)
        assert len({*order}) == 24


def test_folder_gets_a_row_for_each_file_in_natural_order(blob_run: BlobRun, labelled: Path, images: Path) -> None:
    table, rows = pq.read_table(labelled), read_csv(labelled.with_suffix(".csv"))
    files = table.column("file").to_pylist()
    assert files == [f"{folder}/{number}.jpg" for folder in ("first", "ü, second") for number in range(50)]
    assert table.column_names == ["id", "file", "predicted", "confidence", "p_round", "p_flat", "p_pair"]
    assert len({*table.column("id").to_pylist()}) == 100 and [row["file"] for row in rows] == files
    found = galaxydist.load_predictor(blob_run.run_dir)([images / file for file in files])
    np.testing.assert_allclose(
        np.array([[row[f"p_{name}"] for name in found.class_names] for row in rows], float), found.probabilities, atol=1e-6
    )
    assert [row["predicted"] for row in rows] == table.column("predicted").to_pylist() == found.predicted
    assert json.loads(labelled.with_name("out.csv.json").read_text())["source"]["rows"] == 100


def forked_output(words: Sequence[str], folder: Path, size: int, *, suffix: str = ".csv", one_core: bool = False) -> bytes:
    """The output of ``size`` processes that are not disturbed."""
    out = folder / f"by-{size}{suffix}"
    done = run_forked(predict, [*words, "-o", str(out)], None, one_core, size=size)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("100 galaxies labelled") == 1
    return out.read_bytes()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_output_is_the_same_on_any_number_of_processes(blob_run: BlobRun, images: Path, tmp_path: Path) -> None:
    words = [str(blob_run.run_dir), str(images)]
    # On one core each process has one thread; such a small network adds up in another order with two.
    one, two, three = (forked_output(words, tmp_path, size, one_core=True) for size in (1, 2, 3))
    assert one == two == three and len(one.splitlines()) == 101
    tables = [forked_output(words, tmp_path, size, suffix=".parquet", one_core=True) for size in (1, 2)]
    assert tables[0] == tables[1]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("size", "then"), [(1, 2), (2, 1)])
def test_killed_predictions_continue_on_another_number_of_processes(
    blob_run: BlobRun, images: Path, tmp_path: Path, size: int, then: int
) -> None:
    out = tmp_path / "out.csv"
    words = [str(blob_run.run_dir), str(images)]
    undisturbed = forked_output(words, tmp_path, size)
    words += ["-o", str(out)]
    with forked(predict, words, 3, folder=tmp_path / "first", size=size) as ranks:
        assert -9 in ranks.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.csv.partial").glob("chunk-*.parquet")}
    assert 1 <= len(kept) < 3 and not out.exists()
    done = run_forked(predict, words, size=then)
    assert done.returncode == 0 and f"continuing: {len(kept)} of 3 chunks" in done.stderr, done.stderr
    assert out.read_bytes() == undisturbed
    assert {path.name for path in tmp_path.glob("out*")} == {"out.csv", "out.csv.json"}


def interrupted_at(number: int) -> None:
    """Interrupt this process once, as Ctrl-C does, right before the N-th file from now gets its name."""
    left = [number]

    def hook(name: str, _: tuple[object, ...]) -> None:
        if name == "galaxydist.rename" and left[0]:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    sys.addaudithook(hook)


def test_other_predictions_are_not_continued(blob_run: BlobRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_images(tmp_path / "images", 40), tmp_path / "out.csv"
    words = [str(blob_run.run_dir), str(folder), "-o", str(out)]
    interrupted_at(3)
    assert run_predict(*words) == 130
    assert (tmp_path / "out.csv.partial").is_dir()
    image = folder / "first" / "0.jpg"
    os.utime(image, (1, 1))
    assert run_predict(*words) == 2
    text = capsys.readouterr().err
    assert "holds the beginning of other predictions (source.digest" in text and "--overwrite" in text
    assert run_predict(*words, "--tta", "d4") == 2 and "tta: " in capsys.readouterr().err
    assert run_predict(*words, "--overwrite") == 0 and len(read_csv(out)) == 40
    assert not (tmp_path / "out.csv.partial").exists()


def test_odd_images_are_labelled_and_damaged_ones_listed(blob_run: BlobRun, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    source = images / "first" / "1.jpg"
    image = Image.open(source)
    data = source.read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, one in {
        "grey.png": image.convert("L"),
        "cmyk.jpg": image.convert("CMYK"),
        "rgba.png": image.convert("RGBA"),
    }.items():
        one.save(folder / name)
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "animated.gif", save_all=True, append_images=[image.convert("L")])
    (folder / "whole.JPG").write_bytes(data)
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(folder / "deep.png")
    damaged = {"cut.jpg": data[: len(data) // 2], "text.jpg": b"no image", "zero.png": b""}
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    out = tmp_path / "out.csv"
    assert run_predict(blob_run.run_dir, folder, "-o", out) == 0
    rows = read_csv(out)
    files = [row["file"] for row in rows]
    assert sorted(files) == ["animated.gif", "cmyk.jpg", "grey.png", "rgba.png", "turned.jpg", "whole.JPG"]
    listed = read_csv(tmp_path / "out.damaged.csv")
    for name in (*damaged, "deep.png"):
        assert sum(str(folder / name) in row["reason"] for row in listed) == 1, name
    assert len(listed) == 4 and json.loads((tmp_path / "out.csv.json").read_text())["damaged"] == 4
    found = galaxydist.load_predictor(blob_run.run_dir)([folder / file for file in files])
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], found.confidence, atol=1e-6)


def test_ids_and_columns_of_a_table_survive(blob_run: BlobRun, images: Path, tmp_path: Path) -> None:
    table = [
        ["objid", "file", "note", "predicted", "mag", "ra", "dec", "pxscale"],
        ["587722981736906813", "first/1.jpg", 'a "quoted", note', "spiral", "17.25", "10.5", "-3", "0.262"],
        ["000000000000000012", "ü, second/3.jpg", "µ-Gruß", "", "", "11.5", "-4", "0.262"],
        ["587722981736906815", "first/none.jpg", "no image", "x", "1", "1", "1", "0.262"],
    ]
    text = io.StringIO()
    csv.writer(text).writerows(table)
    path, out = tmp_path / "table.csv", tmp_path / "out.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    assert run_predict(blob_run.run_dir, path, "--images", images, "-o", out) == 0
    rows = read_csv(out)
    assert [*rows[0]][:2] == ["id", "file"] and [row["id"] for row in rows] == [table[1][0], table[2][0]]
    assert [row["note"] for row in rows] == [table[1][2], table[2][2]] and [row["mag"] for row in rows] == ["17.25", ""]
    assert [row["predicted_"] for row in rows] == ["spiral", ""] and {row["predicted"] for row in rows} <= {
        "round",
        "flat",
        "pair",
    }
    assert [(row["ra"], row["dec"]) for row in rows] == [("10.5", "-3"), ("11.5", "-4")]
    assert [row["reason"] for row in read_csv(tmp_path / "out.damaged.csv")] == ["row 3 (587722981736906815): without an image"]
    path.write_text(text.getvalue().replace("0.262", "0.5"), encoding="utf-8")
    assert run_predict(blob_run.run_dir, path, "--images", images, "-o", out, "--overwrite") == 2
    assert len(read_csv(out)) == 2  # as before
    for option in ("--resize", "--rescale"):
        assert run_predict(blob_run.run_dir, path, "--images", images, "-o", out, "--overwrite", option) == 0
    assert (
        run_predict(blob_run.run_dir, path, "-o", path, "--overwrite") == 2 and path.read_text(encoding="utf-8").count("\n") == 4
    )


def test_survey_file_of_another_size_is_resampled_if_asked(
    blob_run: BlobRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    survey, out = tmp_path / "survey.h5", tmp_path / "out.parquet"
    simulate_survey(survey, 30, 1, 1, balanced=True)
    assert run_predict(blob_run.run_dir, survey, "-o", out) == 2
    # The same pixel scale on twice the width shows twice the sky: resampled, it is another scale.
    said = capsys.readouterr().err
    assert f"has 0.524 arcsec/pixel (pxscale) at {SIZE} x {SIZE} pixels" in said and "--rescale" in said and "--resize" in said
    assert [path.name for path in tmp_path.iterdir()] == ["survey.h5"]
    assert run_predict(blob_run.run_dir, survey, "-o", out, "--resize") == 0
    table = pq.read_table(out)
    assert len(table) == 30 and {"id", "ra", "dec", "redshift", "ans", "pxscale"} <= {*table.column_names}


def test_wrong_input_is_one_message_and_leaves_nothing(
    blob_run: BlobRun, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "out.csv", blob_run.run_dir
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    for folder in (empty, broken):
        folder.mkdir()
    (broken / "a.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no table")
    (tmp_path / "mine.csv.partial").mkdir()
    (tmp_path / "mine.csv.partial" / "thesis.tex").touch()
    before = sorted(path.name for path in tmp_path.iterdir())

    def refused(*arguments: object) -> str:
        assert run_predict(*arguments) == 2, arguments
        text = capsys.readouterr().err
        assert text.count("galaxydist: error:") == 1 and sorted(path.name for path in tmp_path.iterdir()) == before
        return text

    for arguments, message in (
        ((run, images, "-o", tmp_path / "out.txt"), "written as .csv or .parquet; name it like"),
        ((run, images, "-o", tmp_path), "is a folder; give the name of a file"),
        ((run, images, "-o", "/proc/out.csv"), "not allowed: No such file or directory (/proc/out.csv.partial.lock)"),
        ((run, images, "-o", tmp_path / "mine.csv", "--overwrite"), "is in the way: it holds thesis.tex"),
        ((run, images, "-o", tmp_path / "no" / "out.csv"), "there is no folder"),
        ((tmp_path / "norun", images, "-o", out), "there is no such folder"),
        ((tmp_path, images, "-o", out), "is not a run folder"),
        ((run, tmp_path / "nothing", "-o", out), "there is no such file or folder, and no shards of that name"),
        ((run, empty, "-o", out), "has no images (.avif"),
        ((run, broken, "-o", out), "none of the 1 images"),
        ((run, images, "--split", "test", "-o", out), "--split test is for shards"),
        ((run, blob_run.manifest, "--split", "tst", "-o", out), "has galaxies in train, val, test"),
        ((run, blob_run.manifest, "--images", "x", "-o", out), "are for tables, not for shards"),
        ((run, images, "--resize", "--rescale", "-o", out), "give one of them"),
        ((run, blob_run.manifest, "--rescale", "-o", out), "shards are labelled as they are stored"),
        ((run, tmp_path / "notes.txt", "-o", out), "notes.txt"),
        ((run, images / "first" / "1.jpg", tmp_path / "notes.txt", "-o", out), "notes.txt is not an image"),
    ):
        assert message in refused(*arguments), arguments
