"""``load_predictor``: the numbers of the evaluation, from any kind of image, without the shards of the training."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import galaxydist
from galaxydist.errors import UserError
from galaxydist.evaluation.calibration import fit_temperature
from galaxydist.evaluation.predictions import PredictionsFile, read_predictions, softmax
from galaxydist.loading.training_data import StoredImages
from galaxydist.prediction.image_form import ImageForm, block_mean
from galaxydist.recipe.schema import DataConfig
from galaxydist.shards.writer.encode import resize_square
from tests.helpers.runs import captured_log
from tests.prediction.conftest import BlobRun, ScaledBlobs

ARCHIVE = Path(__file__).parents[1] / "data" / "before_redesign" / "runs.tar.xz"


@pytest.fixture(scope="module")
def predictor(blob_run: BlobRun) -> Any:
    return galaxydist.load_predictor(blob_run.run_dir, device="cpu")


@pytest.fixture(scope="module")
def stored_files(blob_run: BlobRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The images of the test split as their shards hold them, in storage order."""
    folder, files = tmp_path_factory.mktemp("files"), list[Path]()
    for shard in sorted(blob_run.manifest.parent.glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".jpg")]
            tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            files += [folder / name for name in names]
    return files


def evaluated(blob_run: BlobRun, split: str) -> PredictionsFile:
    return read_predictions(blob_run.run_dir / "evaluation" / f"{split}-predictions.parquet")


def test_files_get_the_logits_of_the_evaluation_and_calibrated_probabilities(
    blob_run: BlobRun, predictor: Any, stored_files: list[Path]
) -> None:
    known = evaluated(blob_run, "test")
    found = predictor(stored_files)
    whole = len(stored_files) // 7 * 7  # the evaluation's last batch is padded, which may change last bits
    assert whole >= 21 and np.array_equal(found.logits[:whole], known.column("logits")[:whole])
    np.testing.assert_allclose(found.logits, known.column("logits"), atol=1e-6)
    temperature = fit_temperature(evaluated(blob_run, "val"))
    assert temperature is not None and found.temperature == temperature.value != 1
    np.testing.assert_array_equal(found.probabilities, softmax(found.logits.astype(float) / temperature.value).astype(np.float32))
    assert found.predicted == [found.class_names[label] for label in known.column("predicted")]
    assert np.array_equal(found.confidence, found.probabilities.max(axis=1)) and len(found) == len(stored_files)


def test_arrays_tensors_and_pil_images_get_the_predictions_of_their_files(predictor: Any, stored_files: list[Path]) -> None:
    files = [*stored_files[:8]]
    known = predictor(files).logits
    opened = [Image.open(file) for file in files]
    pixels = np.stack([np.asarray(image) for image in opened])
    tensor = torch.from_numpy(pixels)
    for images in (pixels, [*pixels], opened, tensor, tensor.movedim(3, 1), [files[0], *opened[1:4], *pixels[4:]]):
        # Whole pixels are averaged, where libjpeg does it in its cosine transform and rounds otherwise.
        np.testing.assert_allclose(predictor(images).logits, known, atol=0.02)
    np.testing.assert_array_equal(predictor(pixels).logits, predictor(tensor).logits)
    np.testing.assert_array_equal(predictor(pixels[3]).logits[0], predictor([pixels[3]]).logits[0])
    np.testing.assert_array_equal(predictor(pixels / 255, scale=(0.0, 1.0)).logits, predictor(pixels).logits)
    rounded = (tensor / 255).bfloat16()
    np.testing.assert_array_equal(predictor(rounded, scale=(0, 1)).logits, predictor(rounded.float(), scale=(0, 1)).logits)
    assert predictor(str(files[2])).predicted == predictor(files).predicted[2:3]
    assert len(predictor([])) == 0 and predictor([]).probabilities.shape == (0, 3)


def test_a_table_has_the_most_probable_classes_in_order(predictor: Any, stored_files: list[Path]) -> None:
    found = predictor(stored_files[:5])
    rows = found.to_table(logits=True, top=2).to_pylist()
    assert [*rows[0]] == [
        *("predicted", "confidence", "top_1", "p_top_1", "top_2", "p_top_2", "p_round", "p_flat", "p_pair"),
        *("logit_round", "logit_flat", "logit_pair"),
    ]
    for row in rows:
        ranked = sorted(found.class_names, key=lambda name: -row[f"p_{name}"])
        assert [row["predicted"], row["top_1"], row["top_2"]] == [ranked[0], *ranked[:2]]
        assert row["confidence"] == row["p_top_1"] >= row["p_top_2"] == row[f"p_{ranked[1]}"]


def test_a_moved_run_needs_no_shards_and_other_weights_are_chosen_by_name(
    blob_run: BlobRun, predictor: Any, stored_files: list[Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(blob_run.run_dir, tmp_path / "moved"))
    recipe = (moved / "recipe.json").read_text().replace(str(blob_run.manifest), "/gone/manifest.json")
    (moved / "recipe.json").write_text(recipe)
    found = galaxydist.load_predictor(moved)
    np.testing.assert_array_equal(found(stored_files).probabilities, predictor(stored_files).probabilities)
    shutil.rmtree(moved / "evaluation")
    (moved / "result.json").unlink()
    with captured_log() as messages:
        stopped = galaxydist.load_predictor(moved, checkpoint="last", tta="d4")
    assert stopped.trained.step >= predictor.trained.step and stopped.trained.temperature is None
    assert "has not finished" in messages[0] and "not calibrated" in messages[1] and "--tta d4" in messages[1]
    turned = np.stack([np.rot90(np.asarray(Image.open(stored_files[0]))), np.asarray(Image.open(stored_files[0]))])
    upright, turned_back = stopped(turned).probabilities  # all turns of an image are averaged
    np.testing.assert_allclose(upright, turned_back, atol=5e-4)


def test_other_sizes_and_scales_are_refused_unless_asked_for(predictor: Any) -> None:
    pixels = next(ScaledBlobs().read(0, 1)).image
    assert isinstance(pixels, np.ndarray)
    large = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC))
    wide = np.pad(large, ((0, 0), (20, 20), (0, 0)))
    for image in (large, wide):
        with pytest.raises(UserError, match=r"image 0 is \d+ x 256 pixels, and the training images were 128 x 128"):
            predictor(image)
        np.testing.assert_allclose(predictor(image, resize=True).logits, predictor(pixels).logits, atol=0.05)
    with pytest.raises(UserError, match=r"image 1 has 0\.131 arcsec/pixel .* had 0\.262 .*rescale=True"):
        predictor([pixels, pixels], pxscale=[0.262, 0.131])
    np.testing.assert_array_equal(predictor([pixels], pxscale=0.27).logits, predictor([pixels]).logits)
    # 256 pixels of 0.131 arcsec show as much sky as 128 of 0.262; a border of more sky is cut off.
    rescaled = predictor([large, np.pad(large, ((30, 30), (30, 30), (0, 0)))], pxscale=0.131, rescale=True)
    np.testing.assert_allclose(rescaled.logits, np.repeat(predictor(large, resize=True).logits, 2, axis=0), atol=1e-6)
    with pytest.raises(UserError, match=r"shows 16\.8 arcsec of the sky, and the training images 33\.5"):
        predictor(pixels, pxscale=0.131, rescale=True)
    with pytest.raises(UserError, match="has no pixel scale"):
        predictor(pixels, rescale=True)


def test_inputs_that_are_no_images_are_refused(predictor: Any, tmp_path: Path, blob_run: BlobRun) -> None:
    ambiguous = torch.zeros(2, 3, 128, 3, dtype=torch.uint8)
    for images, message in (
        (np.zeros((128, 128), np.uint8), "not H x W x 3"),
        (np.zeros((128, 128, 3), np.float32), "its pixels are float32"),
        ([np.zeros((1, 2, 128, 128, 3), np.uint8)], "not H x W x 3"),
        ([np.zeros((2, 128, 128, 3), np.uint8)], "a single image"),
        (ambiguous, "B x 3 x H x W or B x H x W x 3"),
        (7, "int is not an image"),
        (tmp_path / "none.jpg", "none.jpg cannot be read"),
        (Image.new("I;16", (128, 128)), "image 0 has pixels of kind 'I;16'"),
    ):
        with pytest.raises(UserError, match=message):
            predictor(images)
    with pytest.raises(UserError, match="8 bits already"):
        predictor(np.zeros((128, 128, 3), np.uint8), scale=(0, 1))
    pixels = np.zeros((128, 128, 3), np.uint8)
    for options, message in (
        ({"scale": "0 1"}, "scale='0 1' is not two numbers"),
        ({"pxscale": [1, 2, 3]}, r"pxscale=\[1, 2, 3\] is not a number in arcsec/pixel, or one for each of the 1 images"),
    ):
        with pytest.raises(UserError, match=message):
            predictor(pixels, **options)
    for choice, message in (({"checkpoint": "first"}, "'first' is not one of best, last"), ({"tta": "d5"}, "one of none, d4")):
        with pytest.raises(UserError, match=message):
            galaxydist.load_predictor(blob_run.run_dir, **choice)
    for device, message in (("gpu", "cannot be used"), ("cuda:99", "cannot be used"), ("mps", "computes on cpu or cuda")):
        with pytest.raises(UserError, match=message):
            galaxydist.load_predictor(blob_run.run_dir, device=device)
    with pytest.raises(UserError, match="is not a run folder"):
        galaxydist.load_predictor(tmp_path)


def test_block_means_are_rounded_means() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    expected = np.floor(pixels.reshape(2, 2, 4, 3, 4, 3).mean(axis=(2, 4)) + 0.5)
    assert np.array_equal(block_mean(pixels, 4), expected)


def test_a_run_of_an_earlier_version_needs_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALAXYDIST_DATA", "data")
    predictor = galaxydist.load_predictor("continued")
    assert predictor.trained.stored.image_size == 16 and predictor(np.zeros((16, 16, 3), np.uint8)).probabilities.sum() == 1
    Path("data/shards").rename("elsewhere")
    with pytest.raises(UserError, match=r"earlier version of galaxydist, which did not record the size .* no shards at"):
        galaxydist.load_predictor("continued")
    moved = galaxydist.load_predictor("continued", trained_on="elsewhere/blobs/original")
    assert moved.trained.stored == predictor.trained.stored


def test_sizes_that_the_training_images_were_resampled_from_are_taken() -> None:
    stored = StoredImages("blobs", image_size=32, encoding="png", source_sides=(48, 64), pxscale=(0.2, 0.2, 0.2))
    form = ImageForm.of(stored, DataConfig(image_size=32))
    image = next(ScaledBlobs(size=60).read(0, 1)).image
    assert isinstance(image, np.ndarray)
    assert np.array_equal(form.prepare(image, "a"), resize_square(image, 32))
    with pytest.raises(UserError, match="the training images were 48 to 64 pixels"):
        form.prepare(image[:40, :40], "a")
    assert form.prepare(image[:32, :32], "a").shape == (32, 32, 3)
    # 48 to 64 pixels of 0.2 arcsec are stored as 32 of 0.3 to 0.4.
    assert form.prepare(image, "a", 0.2).shape == form.prepare(image[:32, :32], "a", 0.35).shape
    with pytest.raises(UserError, match=r"a has 0\.2 arcsec/pixel \(pxscale\) at 32 x 32 pixels, .* had 0\.3 to 0\.4\. "):
        form.prepare(image[:32, :32], "a", 0.2)
