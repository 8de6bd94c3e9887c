"""From a run to its file of predictions: parts of processes, sizes and skies, what is made again and what is not."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from galaxydist.cli.main import main
from galaxydist.evaluation import inference
from galaxydist.evaluation.counts import Counts
from galaxydist.evaluation.galaxy_table import GalaxyTable
from galaxydist.evaluation.inference import (
    MEASURED_WIDTH,
    ForwardPass,
    NotedBatches,
    PredictionWriter,
    measure,
    merge_predictions,
)
from galaxydist.evaluation.predictions import PredictionsInfo, RankFile, merge_rank_files, rank_file_path, read_predictions
from galaxydist.galaxy import Galaxy
from galaxydist.loading.augment import Normalise
from galaxydist.loading.loader import Batch, DecodeOptions, EvalLoader
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.writer.encode import resize_square
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.photometry import measure_images
from tests.helpers.blobs import BlobSurvey
from tests.helpers.prediction_files import CONTEXT
from tests.helpers.runs import quick_settings, read_evaluation, run_here, without_figures


def columns_of(samples: np.ndarray, num_classes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(len(samples))
    return {
        "sample": samples,
        "label": samples % num_classes,
        "predicted": samples % 2,
        "logits": rng.normal(size=(len(samples), num_classes)).astype(np.float32),
        "size": np.where(samples % 5 == 0, np.nan, samples / 10),
        "sky_brightness": samples / 100,
    }


@given(st.integers(0, 50), st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=25)
def test_rank_files_of_any_number_of_processes_merge_into_one_predictions_file(
    tmp_path_factory: pytest.TempPathFactory, num: int, batch_size: int, world_size: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    target = folder / "a.parquet"
    writers = [RankFile(rank_file_path(target, rank), 3) for rank in range(world_size)]
    for writer in writers:
        writer.__enter__()
    for number, first in enumerate(range(0, num, batch_size)):
        writers[number % world_size].append(columns_of(np.arange(first, min(first + batch_size, num))))
    for writer in writers:
        writer.finish()
    paths = [writer.path for writer in writers]
    rows = list(merge_rank_files(paths, 3, batch_size=batch_size, num_samples=num))
    assert np.array_equal(np.concatenate([np.empty(0, int), *(block["sample"] for block in rows)]), np.arange(num))
    for wrong in (num + 1, num - 1) if num else ():
        with pytest.raises(ValueError, match=r"are not there|more galaxies"):
            list(merge_rank_files(paths, 3, batch_size=batch_size, num_samples=wrong))
    catalogue = pa.table({"id": [f"g{n}" for n in range(num)], "ra": np.arange(num) / 7, "pxscale": np.full(num, 0.5)})
    info = PredictionsInfo(("a", "b", "c"), CONTEXT)
    merge_predictions(target, info, paths, catalogue, batch_size=batch_size)
    found = read_predictions(target)
    assert found.column("id").tolist() == catalogue.column("id").to_pylist()
    assert np.array_equal(found.column("ra"), np.arange(num) / 7)
    assert np.array_equal(found.column("size"), np.where(np.arange(num) % 5 == 0, np.nan, np.arange(num) / 20), equal_nan=True)
    assert found.info.units["size"] == ("arcsec" if num else "pixel")
    for writer in writers:
        writer.__exit__(None, None, None)
    assert [path.name for path in folder.iterdir()] == ["a.parquet"]


def test_sizes_are_in_pixels_where_the_scale_of_any_galaxy_is_unknown(tmp_path: Path) -> None:
    with RankFile(rank_file_path(tmp_path / "a.parquet", 0), 3) as part:
        part.append(columns_of(np.arange(4)))
        part.finish()
        info = PredictionsInfo(tuple("abc"), CONTEXT)
        for scale, resampling in (([0.2, 0.2, None, 0.2], 1.0), ([0.2, 0.0, 0.2, 0.2], 1.0), ([0.2] * 4, None)):
            catalogue = pa.table({"id": ["a", "b", "c", "d"], "pxscale": scale})
            target = tmp_path / "a.parquet"
            merge_predictions(target, info, [part.path], catalogue, batch_size=4, resampling=resampling)
            found = read_predictions(tmp_path / "a.parquet")
            assert found.info.units["size"] == "pixel" and found.column("size")[1:].tolist() == [0.1, 0.2, 0.3]


def test_truncated_rank_file_is_refused(tmp_path: Path) -> None:
    with RankFile(tmp_path / "part", 3) as part:
        part.append(columns_of(np.arange(4)))
        part.finish()
        with part.path.open("rb+") as file:
            file.truncate(part.path.stat().st_size - 1)
        with pytest.raises(ValueError, match="not a multiple of the data-type size"):
            list(merge_rank_files([part.path], 3, batch_size=4, num_samples=4))


def test_sizes_do_not_depend_on_how_small_an_image_was_decoded() -> None:
    y_HW, x_HW = np.mgrid[:256, :256] - 127.5
    for radius in (12.0, 30.0):
        light_HW = 20 + 180 * np.exp(-1.678 * np.hypot(x_HW, y_HW) / radius)
        whole = np.repeat(light_HW[None, :, :, None], 3, axis=3)
        full = measure_images(np.rint(whole).astype(np.uint8))
        assert full.size_px[0] == pytest.approx(radius, rel=0.1)
        for factor in (1, 2, 4):
            small = whole.reshape(1, 256 // factor, factor, 256 // factor, factor, 3).mean(axis=(2, 4))
            found = measure(np.rint(small).astype(np.uint8), 256)
            assert found.size_px[0] == pytest.approx(full.size_px[0], rel=0.08), (radius, factor)
            assert found.sky[0] == pytest.approx(full.sky[0], abs=0.01)
    odd = np.zeros((2, 131, 131, 3), np.uint8)  # no whole number of pixels makes it smaller
    assert MEASURED_WIDTH < 131 and len(measure(odd, 131).size_px) == 2


def test_predictions_are_read_from_the_device_only_after_later_batches_have_begun(tmp_path: Path) -> None:
    """The meta device has no values: reading one is an error."""
    images_BHWC = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    ids_B = torch.arange(2)
    batch = Batch(images_BHWC, ids_B, torch.ones(2), ids_B, ids_B, epoch=0, step=0)
    logits_BK = torch.zeros(2, 3, device="meta")
    with RankFile(tmp_path / "part", 3) as part, PredictionWriter(part, image_size=64, threads=1) as writer:
        writer.add(batch, logits_BK, logits_BK.argmax(1))
        writer.add(batch, logits_BK, logits_BK.argmax(1))
        with pytest.raises(NotImplementedError):
            writer.finish()


def test_images_that_wait_for_their_photometry_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of many cores, where a batch for each would be nearly a GB."""
    images_BHWC = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    monkeypatch.setattr(inference, "MAX_PENDING_BYTES", 2 * images_BHWC.nbytes)
    left = []
    with RankFile(tmp_path / "part", 3) as part, PredictionWriter(part, image_size=64, threads=16) as writer:
        written, append = 0, part.append

        def count(columns: dict[str, Any]) -> None:
            nonlocal written
            written += 1
            append(columns)

        monkeypatch.setattr(part, "append", count)
        for step in range(6):
            ids_B = torch.arange(4) + 4 * step
            batch = Batch(images_BHWC, ids_B % 3, torch.ones(4), ids_B, ids_B, epoch=0, step=step)
            writer.add(batch, torch.zeros(4, 3), ids_B % 3)
            left.append(step + 1 - written)
        writer.finish()
        (rows,) = merge_rank_files([part.path], 3, batch_size=4, num_samples=24)
    assert left == [1, 2, 2, 2, 2, 2] and rows["sample"].tolist() == [*range(24)]


def test_noted_batches_are_ready_when_the_loader_is(run_of_known: tuple[Path, Path]) -> None:
    """So that evaluation, too, copies the next batch ahead only if it does not have to wait for it."""
    with EvalLoader(read_manifest(run_of_known[1]), "test", batch_size=8, decode=DecodeOptions(prefetch=2)) as loader:
        noted = NotedBatches(loader)
        assert not noted.is_ready()
        first = next(noted)
        loader.close()
        assert not noted.is_ready() and [*noted.read] == [first]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_evaluation_of_a_batch_on_a_gpu_never_waits_for_it(tmp_path: Path) -> None:
    device, images_BHWC = torch.device("cuda"), torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    samples_B = torch.arange(4)
    batch = Batch(images_BHWC, samples_B % 3, torch.ones(4), samples_B, samples_B, epoch=0, step=0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().to(device)
    normalise = Normalise((0.1,) * 3, (0.1,) * 3, 64)
    forward = ForwardPass(model, normalise, torch.float32, contextlib.nullcontext, torch.channels_last, "d4")
    counts = Counts(3, device, subset_N=np.array([True, False, True, True]))
    world: Any = SimpleNamespace(run_on_main=lambda work: work())
    manifest: Any = SimpleNamespace(labels=lambda _: np.array([0, 1, 2, 0], np.int32))
    table = GalaxyTable(world, RunFolder(tmp_path), manifest, "val")
    with RankFile(tmp_path / "part", 3) as part, PredictionWriter(part, image_size=64, threads=1) as writer:
        for is_strict in (False, True):  # the first time, libraries are set up
            labels_B, weights_B, there_BHWC = (t.to(device) for t in (batch.labels_B, batch.weights_B, images_BHWC))
            try:
                torch.cuda.set_sync_debug_mode("error" if is_strict else "default")
                with torch.inference_mode():
                    logits_BK = forward(there_BHWC)
                    predicted = counts.add(logits_BK, labels_B, weights_B, samples_B)
                    writer.add(batch, logits_BK, predicted.classes_B)
                    table.add(batch, predicted)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        writer.finish()
    assert counts.count == 6


@dataclass(frozen=True)
class KnownBlobs(BlobSurvey):
    """Blobs with sky positions, redshifts (a third unknown) and a pixel scale."""

    size: int = 64
    pxscale: float | None = 0.262

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row, galaxy in enumerate(super().read(start, stop), start):
            extras = {"row": row, "redshift": None if row % 3 == 0 else row / 1000, "pxscale": self.pxscale}
            extras |= {"source_id": f"Blob {row}", "file": f"blobs/Blob {row}.png"}
            yield replace(galaxy, ra=10.0 + row / 10, dec=-20.0, extras=extras)


@pytest.fixture(scope="module")
def run_of_known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of some epochs on galaxies that were resampled to half their size, and its manifest."""
    folder = tmp_path_factory.mktemp("known")
    survey = KnownBlobs(num_galaxies=240)
    path = write_shards(survey, folder / "shards", encoding="png", image_size=32, shard_size=16, workers=1).path
    assert run_here(quick_settings(path, folder / "run", train__epochs=3)) == 0
    return folder / "run", path


def evaluate(*arguments: object) -> int:
    from accelerate.state import AcceleratorState, PartialState

    try:
        return main(["evaluate", *map(str, arguments)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def test_run_writes_predictions_of_its_test_and_validation_galaxies(run_of_known: tuple[Path, Path]) -> None:
    run_dir, manifest_path = run_of_known
    manifest, survey = read_manifest(manifest_path), KnownBlobs(num_galaxies=240)
    evaluation = read_evaluation(run_dir)
    for split in ("test", "val"):
        found = read_predictions(run_dir / "evaluation" / f"{split}-predictions.parquet")
        rows = np.array([int(name.removeprefix("blob-")) for name in found.column("id")])
        assert sorted(rows) == survey.splits[split].tolist()
        assert np.array_equal(found.column("label"), rows % 3) and np.array_equal(found.column("label"), manifest.labels(split))
        assert found.column("sample").tolist() == list(range(48))
        assert np.array_equal(found.column("predicted"), found.column("logits").argmax(1))
        assert found.column("file").tolist() == [f"blobs/Blob {row}.png" for row in rows]
        assert found.column("source_id").tolist() == [f"Blob {row}" for row in rows]
        assert np.allclose(found.column("ra"), 10 + rows / 10) and (found.column("dec") == -20).all()
        expected = np.where(rows % 3 == 0, np.nan, rows / 1000)
        assert np.allclose(found.column("redshift"), expected, equal_nan=True)
        images = np.stack([resize_square(survey._draw(row), 32) for row in rows])
        assert np.allclose(found.column("size"), measure_images(images).size_px * 2 * 0.262, equal_nan=True)
        assert found.info.units["size"] == "arcsec" and found.info.versions["torch"] == torch.__version__.split("+")[0]
        assert found.info.context["step"] == evaluation["step"] and found.info.class_names == manifest.class_names
    confusion_KK = np.zeros((3, 3), int)
    test = read_predictions(run_dir / "evaluation" / "test-predictions.parquet")
    np.add.at(confusion_KK, (test.column("label"), test.column("predicted")), 1)
    assert evaluation["confusion"] == confusion_KK.tolist() and evaluation["loss"] == test.info.loss
    assert evaluation["calibration"]["temperature"]["count"] == 48
    assert list(evaluation["against"]) == ["redshift", "size", "sky_brightness"]
    assert not (run_dir / "evaluation" / "val.json").exists()
    assert not [path for path in (run_dir / "evaluation").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_evaluate_recreates_only_missing_or_damaged_files(
    run_of_known: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of_known[0] / "evaluation"
    predictions, written = folder / "test-predictions.parquet", folder / "test.json"
    whole, text = predictions.read_bytes(), written.read_text()
    assert evaluate(run_of_known[0]) == 0  # the run itself drew no figures
    assert written.read_text() == text and (folder / "test-confusion.png").is_file()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert evaluate(run_of_known[0]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    for damage in (None, whole[:-30]):
        predictions.unlink() if damage is None else predictions.write_bytes(damage)
        assert evaluate(run_of_known[0]) == 0
        assert predictions.read_bytes() == whole and written.read_text() == text
    written.write_text(json.dumps({**json.loads(text), "format": 1}))
    before = predictions.stat().st_mtime_ns
    assert evaluate(run_of_known[0]) == 0
    assert written.read_text() == text and predictions.stat().st_mtime_ns == before, "numbers again, predictions not"
    assert evaluate(run_of_known[0], "--split", "val") == 0
    printed = capsys.readouterr().out
    assert "48 galaxies of the validation split (the evaluated galaxies themselves)" in printed
    assert json.loads((folder / "val.json").read_text())["count"] == 48
    # Without the model: the same numbers.
    out = run_of_known[0].parent / "out"
    assert main(["evaluate", "--predictions", str(predictions), "--out", str(out)]) == 0
    assert (out / "test.json").read_text() == text


def test_evaluation_on_other_data_uses_the_temperature_of_the_run(
    run_of_known: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, manifest_path = run_of_known

    @dataclass(frozen=True)
    class Others(KnownBlobs):
        def read(self, start: int, stop: int) -> Iterator[Galaxy]:
            for galaxy in super().read(start, stop):
                texts = {"redshift": "0.1?", "pxscale": "unknown", "source_id": 7}
                yield replace(galaxy, id=f"other{galaxy.id}", ra=200 + (galaxy.ra or 0), extras=texts)

    survey = Others(num_galaxies=60, size=32, name="other", variant="balanced")
    other = write_shards(survey, tmp_path / "shards", encoding="png", workers=1).path
    with without_figures():
        assert evaluate(run_dir, f"data.manifest={other}") == 0
    assert "left out: redshift: no galaxy has it" in capsys.readouterr().out
    folder = run_dir / "evaluation" / "other-balanced"
    found = json.loads((folder / "test.json").read_text())
    assert found["count"] == 12 and found["variant"] == "balanced"
    fitted = found["calibration"]["temperature"]
    assert fitted["fitted_on"]["manifest_hash"] == read_manifest(manifest_path).hash and fitted["count"] == 48
    assert fitted["value"] == read_evaluation(run_dir)["calibration"]["temperature"]["value"]
    predictions = read_predictions(folder / "test-predictions.parquet")
    assert predictions.info.units["size"] == "pixel" and set(predictions.column("source_id")) == {"7"}
    # By its predictions alone: the validation split's lie in the folder above.
    assert main(["evaluate", "--predictions", str(folder / "test-predictions.parquet"), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "test.json").read_text()) == found


def test_evaluate_finds_a_run_by_name_and_a_variant_beside_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turning = ("clockwise", "anticlockwise", "edge-on")
    for variant, num_galaxies in (("original", 120), ("balanced", 60)):
        survey = BlobSurvey(variant=variant, num_galaxies=num_galaxies, class_names=turning)
        write_shards(survey, tmp_path / variant, encoding="png", workers=1)
    run_dir = tmp_path / "runs" / "named"
    assert run_here(quick_settings(tmp_path / "original" / "manifest.json", run_dir, train__epochs=1)) == 0
    warning = "the classes clockwise, anticlockwise are mirror images of one another"
    assert f"{warning}, which a model cannot tell apart with data.augment.flip=true\n" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with without_figures():
        assert evaluate("named", "data.variant=balanced") == 0
    assert "blobs (balanced), test split, custom_cnn, N = 12" in capsys.readouterr().out


def test_failed_evaluation_leaves_no_predictions_and_no_rank_files(
    run_of_known: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_shards(KnownBlobs(num_galaxies=60, name="torn"), tmp_path / "shards", encoding="png", workers=1)
    shard = manifest.shard_path("train", 0)
    offset = int(manifest.offsets("train")[20])
    with shard.open("rb+") as file:
        file.seek(offset)
        file.write(b"\0" * 200)
    assert evaluate(run_of_known[0], f"data.manifest={manifest.path}", "--split", "train") == 2
    assert "galaxy" in capsys.readouterr().err
    folder = run_of_known[0] / "evaluation" / "torn-original"
    assert list(folder.iterdir()) == []
