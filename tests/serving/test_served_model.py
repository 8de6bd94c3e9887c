"""The app's engine: the same arrays and probabilities as the package's, without torch, in any number of threads."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from galaxydist.evaluation.inference import tta_images
from galaxydist.loading.augment import Normalise
from galaxydist.loading.training_data import StoredImages
from galaxydist.models.registry import architecture_of
from galaxydist.models.saliency import explain
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.predictor import load_predictor
from galaxydist.prediction.trained_model import ModelChoice
from galaxydist.serving.app.model import ServedModel, normalise, place_map, prepare, scaled_map, views_of
from galaxydist.serving.app.pictures import Picture, read_picture
from galaxydist.serving.app.published_model import CONFIG, ONNX, RESULTS, PictureForm, PublishedFolderError, read_measured
from galaxydist.surveys.image_files import parse_image
from tests.helpers.published import PublishedRun, galaxy_files

REAL = Path(__file__).parents[3] / "shared" / "data"
MEAN, STD = (0.167, 0.162, 0.158), (0.128, 0.118, 0.111)


@pytest.fixture(scope="module")
def folder(published_run: PublishedRun) -> Path:
    return published_run.folder


@pytest.fixture(scope="module")
def files(published_run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return galaxy_files(published_run, tmp_path_factory.mktemp("test_files"))


def pictures(files: list[Path]) -> list[Picture]:
    return [read_picture(file.read_bytes(), file.name) for file in files]


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


FORMS = [(256, 1.0, 1, 256), (224, 0.875, 1, 256), (160, 1.0, 1, 256), (80, 0.625, 2, 256), (40, 1.0, 4, 256), (224, 1.0, 1, 128)]


@pytest.mark.parametrize("size, crop, factor, stored", FORMS)
def test_pictures_are_prepared_bit_for_bit_as_an_evaluation_prepares_them(
    size: int, crop: float, factor: int, stored: int
) -> None:
    """Galaxy10's files of the stored size (also decoded smaller), and files that have to be cut and resampled."""
    if not REAL.is_dir():
        pytest.skip("needs the samples of real galaxies beside the repository")
    files = sorted(REAL.glob("galaxy10_decals_sample/*/*.jpg"))[::100] + sorted(REAL.glob("gz2_votes_sample/images/*.jpg"))[::100]
    known = ImageForm(StoredImages("galaxies", stored, "jpeg"), factor, resize=True)
    form = PictureForm(size, stored, factor, crop, MEAN, STD)
    evaluation = Normalise(MEAN, STD, size, crop)
    for file in files:
        data = file.read_bytes()
        expected = evaluation(torch.from_numpy(known.prepare(parse_image(data, file), file.name)[None].copy()))[0]
        np.testing.assert_array_equal(normalise(prepare(read_picture(data), form), form), expected.numpy())


@pytest.mark.parametrize("size", [7, 16, 40, 64, 99, 224, 256, 299])
@pytest.mark.parametrize("width", [20, 57, 128, 300, 512])
def test_noise_of_any_width_is_resampled_bit_for_bit_as_torch_does_it(width: int, size: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (width, width, 3)).astype(np.uint8)
    form = PictureForm(size, width, 1, 1.0, MEAN, STD)
    expected = Normalise(MEAN, STD, size)(torch.from_numpy(pixels[None]))[0]
    np.testing.assert_array_equal(normalise(prepare(Picture("noise", pixels), form), form), expected.numpy())


@pytest.mark.parametrize("tta", ["none", "d4"])
def test_answers_have_the_probabilities_of_the_run(
    published_run: PublishedRun, folder: Path, files: list[Path], tmp_path: Path, tta: Any
) -> None:
    predictor = load_predictor(published_run.run_dir, {}, device="cpu", choice=ModelChoice(tta=tta))
    shutil.copytree(folder, tmp_path / "model")
    change_config(tmp_path / "model", lambda config: config["app"].update(tta=tta, temperature=predictor.trained.temperature))
    model = ServedModel.open(tmp_path / "model")
    found, known = model.predict(pictures(files)), predictor(files)
    np.testing.assert_allclose(np.stack([one.probabilities for one in found]), known.probabilities, atol=1e-5)
    assert [one.class_name for one in found] == known.predicted
    assert [one.confidence for one in found] == pytest.approx(known.confidence.tolist(), abs=1e-5)
    assert all(one.views.shape == (8, 3) and one.notes == () for one in found)
    larger = [np.asarray(Image.open(file).resize((90, 61), Image.Resampling.BICUBIC)) for file in files[:5]]
    resized = model.predict(larger)
    np.testing.assert_allclose(
        np.stack([one.probabilities for one in resized]), predictor(larger, resize=True).probabilities, atol=1e-5
    )
    assert "central square of 61 x 61" in resized[0].notes[0] and "training pictures had 32 pixels" in resized[0].notes[1]


def test_views_are_those_of_the_evaluations_augmentation_and_the_answer_counts_them(folder: Path, files: list[Path]) -> None:
    image = np.random.default_rng(8).random((3, 9, 9)).astype(np.float32)
    known = [view[0].numpy() for view in tta_images(torch.from_numpy(image)[None], "d4")]
    np.testing.assert_array_equal(views_of(image), np.stack(known))
    model = ServedModel.open(folder, threads=1)
    for answer in model.predict(pictures(files[:5])):
        assert answer.agreement == (answer.views.argmax(axis=1) == answer.label).sum()
        assert answer.spread == pytest.approx(np.ptp(answer.views[:, answer.label]))
        assert answer.views[0] == pytest.approx(answer.probabilities, abs=1e-6)


def test_many_users_at_once_get_the_answers_that_each_would_get_alone(folder: Path, files: list[Path]) -> None:
    model, asked = ServedModel.open(folder), pictures(files)
    alone = [model.predict([picture])[0] for picture in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda picture: model.predict([picture])[0], asked * 3))
    for number, answer in enumerate(together):
        np.testing.assert_array_equal(answer.probabilities, alone[number % len(asked)].probabilities)
        np.testing.assert_array_equal(answer.embedding, alone[number % len(asked)].embedding)
    assert model.predict([]) == []


@pytest.mark.parametrize("side, is_rollout", [(5, False), (4, True), (7, True)])
def test_maps_are_scaled_and_resized_as_the_gallery_shows_them(side: int, is_rollout: bool) -> None:
    """``models.saliency.explain``'s last lines, for patches of 16 pixels of which the last may lie beyond the edge."""
    size = {5: 40, 4: 64, 7: 100}[side]
    raw = np.random.default_rng(side).random((side, side)).astype(np.float32) + 0.5
    padded = 16 * side if is_rollout else size
    expected = functional.interpolate(torch.from_numpy(raw)[None, None], size=(padded, padded), mode="bilinear")[
        0, 0, :size, :size
    ]
    floor = expected.min() if is_rollout else 0
    np.testing.assert_allclose(
        scaled_map(raw, size, (padded, padded), is_rollout=is_rollout),
        (expected - floor) / (expected.max() - floor),
        atol=1e-6,
    )
    assert not scaled_map(np.zeros((3, 3), np.float32), 8, (8, 8), is_rollout=is_rollout).any()


def test_a_map_is_placed_where_the_network_saw_it_in_the_picture() -> None:
    form = PictureForm(image_size=40, stored_size=128, factor=2, crop=0.625, mean=MEAN, std=STD)
    map_TT = np.zeros((40, 40), np.float32)
    map_TT[10:14, 20:24] = 1
    placed = place_map(map_TT, (300, 256), form)  # the square 22 ... 278; of 64 decoded pixels, 12 ... 52 are seen, each of 4
    rows, columns = (np.flatnonzero(placed.max(axis=axis) > 0.5) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (22 + 4 * 22, 22 + 4 * 26 - 1, 4 * 32, 4 * 36 - 1)
    whole = place_map(np.ones((40, 40), np.float32), (300, 256), form)
    assert whole.sum() == 160 * 160 and whole[22 + 48, 48] == 1 == whole[22 + 207, 207]
    same = np.random.default_rng(0).random((40, 40)).astype(np.float32)
    np.testing.assert_allclose(place_map(same, (40, 40), replace(form, stored_size=40, factor=1, crop=1.0)), same, atol=1e-6)


def test_saliency_is_that_of_the_gallery(published_run: PublishedRun, folder: Path, files: list[Path]) -> None:
    model = ServedModel.open(folder)
    if model.config.saliency is None:
        assert all(answer.saliency is None for answer in model.predict(pictures(files[:2])))
        return
    trained = load_predictor(published_run.run_dir, {}, device="cpu").trained
    for picture in pictures(files[:6]):
        (answer,) = model.predict([picture])
        images = torch.from_numpy(normalise(prepare(picture, model.config.form), model.config.form))[None]
        known = explain(trained.model, architecture_of(trained.recipe.model, trained.model), images, torch.tensor([answer.label]))
        assert known is not None and known.method == model.config.saliency and answer.saliency is not None
        placed = place_map(known.maps_BHW[0].numpy(), picture.pixels.shape[:2], model.config.form)
        np.testing.assert_allclose(answer.saliency, placed, atol=1e-4)
    assert model.predict(pictures(files[:1]), saliency=False)[0].saliency is None


def test_folders_that_cannot_be_served_are_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(PublishedFolderError, match="is not a published model"):
        ServedModel.open(tmp_path)
    without = copy("without")
    (without / ONNX).unlink()
    with pytest.raises(PublishedFolderError, match="without --no-onnx"):
        ServedModel.open(without)
    damaged = copy("damaged")
    (damaged / ONNX).write_bytes((damaged / ONNX).read_bytes()[:1000])
    change_config(damaged, lambda config: config["galaxydist"].update(files={}))
    with pytest.raises(PublishedFolderError, match="cannot be opened by onnxruntime"):
        ServedModel.open(damaged)
    change_config(damaged, lambda config: config["galaxydist"].update(files={ONNX: "0" * 64}))
    with pytest.raises(PublishedFolderError, match="SHA-256"):
        ServedModel.open(damaged)
    other = change_config(copy("other"), lambda config: config["app"].update(classes=["one", "two"]))
    with pytest.raises(PublishedFolderError, match="does not belong to its config"):
        ServedModel.open(other)


def test_results_of_another_form_or_of_other_classes_are_left_out(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / RESULTS).read_text())
    found = read_measured(folder, 3)
    assert found is not None and sum(found.called) == found.count == content["test"]["count"]
    assert found.accuracy.value == content["test"]["accuracy"] and found.accuracy.interval is not None
    assert read_measured(folder, 4) is None and read_measured(tmp_path, 3) is None
    without = json.loads(json.dumps(content))
    without["test"] |= {"intervals": None}
    without["test"]["per_class"] |= {"intervals": None, "precision": [None, 0.5, 1]}
    (tmp_path / RESULTS).write_text(json.dumps(without))
    found = read_measured(tmp_path, 3)
    assert found is not None and found.accuracy.interval is None and found.precision[0] is None and found.precision[1] is not None
    for damaged in (
        [],
        {"test": None},
        {"test": {**content["test"], "accuracy": "good"}},
        {"test": {**content["test"], "per_class": {}}},
    ):
        (tmp_path / RESULTS).write_text(json.dumps(damaged))
        assert read_measured(tmp_path, 3) is None


def test_links_to_files_elsewhere_are_refused_but_those_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    shutil.copytree(folder, snapshot)
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert ServedModel.open(snapshot).config == ServedModel.open(folder).config
    (tmp_path / "private.txt").write_text("secret")
    (snapshot / "more.png").symlink_to(tmp_path / "private.txt")
    with pytest.raises(PublishedFolderError, match=r"more\.png is a link to .*private\.txt"):
        ServedModel.open(snapshot)
    (snapshot / "more.png").unlink()
    (snapshot / "more").symlink_to("..")
    with pytest.raises(PublishedFolderError, match="outside of the folder"):
        ServedModel.open(snapshot)
