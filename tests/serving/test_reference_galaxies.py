"""Stored training galaxies: similar ones, and pictures that are unlike them, on real runs."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from galaxydist.errors import UserError
from galaxydist.evaluation.leakage import open_training_shards
from galaxydist.loading.decode import read_samples, read_stored_files
from galaxydist.loading.training_data import build_augment, find_cache, find_manifest
from galaxydist.models.features import extract_features
from galaxydist.prediction.trained_model import TrainedModel, open_trained_model
from galaxydist.serving.app.published_model import EXAMPLES, REFERENCE, THUMBNAILS, PublishedFolderError
from galaxydist.serving.app.reference_set import (
    PROFILE,
    SETS,
    TEXTURE,
    THUMBNAIL_SIDE,
    Reference,
    picture_statistics,
    read_examples,
)
from galaxydist.serving.reference_galaxies import (
    FALSE_ALARMS,
    SHRINKAGE,
    GalaxyReader,
    choose_galaxies,
    example_file,
    find_threshold,
    fit_gaussian,
    write_reference,
)
from galaxydist.serving.unlike_pictures import CENTRAL_STAR, KINDS, find_photographs
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, run_here
from tests.helpers.simulated_run import train_simulated


def read_shards(trained: TrainedModel) -> Manifest:
    data = trained.recipe.data
    return open_training_shards(trained.trained_on, find_manifest(data, Path()), None, find_cache(data, Path()))


@pytest.fixture(scope="module")
def blob_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("blobs")
    manifest = write_shards(BlobSurvey(), folder / "shards", encoding="png", shard_size=16, workers=1).path
    assert run_here(quick_settings(manifest, folder / "run", train__epochs=4, optim__lr=0.02)) == 0
    return open_trained_model(folder / "run", os.environ)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedModel, Path, dict[str, Any]]:
    """The model, the folder with its galaxies, and what was measured."""
    folder = tmp_path_factory.mktemp("simulated")
    trained = open_trained_model(train_simulated(folder)[0], os.environ)
    (folder / "out").mkdir()
    return trained, folder / "out", write_reference(trained, folder / "out", os.environ)


@pytest.mark.slow
def test_pictures_that_are_no_galaxies_are_found_and_test_galaxies_are_not(
    simulated: tuple[TrainedModel, Path, dict[str, Any]],
) -> None:
    """A network that was trained on nothing but simulated galaxies; photographs are those of scikit-learn and scikit-image."""
    trained, folder, measured = simulated
    unlike = measured["unlike"]
    assert unlike["validation"] == 100 and unlike["expected_false_alarms"] == 2 / 101
    alarms = unlike["false_alarms"]
    assert alarms["of"] == 100
    # The largest of each of the two distances of 100 validation galaxies: 1 in 101 is farther. More than this many of 100 happen
    # at most twice in 1,000 times.
    assert alarms["count"] <= 2 * stats.betabinom.ppf(0.999, 100, 1, 100)
    for kind in KINDS.keys() - {CENTRAL_STAR}:  # a star in the centre may look like a galaxy
        assert unlike["detected"][kind]["share"] >= 0.9, (kind, unlike["detected"])
    assert {"chelsea", "astronaut", "china"} <= set(find_photographs())
    # Through the reader, as the app asks.
    reference, reader = Reference.open(folder), GalaxyReader(trained, read_shards(trained))
    assert reference is not None
    (cat,) = reader.prepare([np.asarray(Image.open(find_photographs()["chelsea"]).convert("RGB"))])
    found = reference.novelty(cat)
    assert found is not None and found.is_unlike and found.share == 0 and found.num_validation == 100
    # No validation galaxy is beyond the largest distances, and each is one of those that are as far or farther.
    chosen = choose_galaxies(read_shards(trained), "val", 5, by_class=False)
    for galaxy in reader.read(chosen):
        seen = reference.novelty(galaxy)
        assert seen is not None and not seen.is_unlike and 0.01 <= seen.share <= 1 and seen.distance <= 1
    with pytest.raises(ValueError, match="size"):
        reference.novelty(np.zeros((256, 256, 3), np.uint8))


@pytest.mark.slow
def test_neighbours_have_the_thumbnails_of_their_galaxies(simulated: tuple[TrainedModel, Path, dict[str, Any]]) -> None:
    trained, folder, measured = simulated
    reference, shards = Reference.open(folder), read_shards(trained)
    assert reference is not None and len(reference) == 200 and measured["reference"]["thumbnails"]
    reader, chosen = GalaxyReader(trained, shards), choose_galaxies(shards, "train", 1000, by_class=True)
    seen = [*reader.read(chosen)]
    embeddings = reader.embed(seen)
    for row in (0, 17, 199):
        first, *others = reference.nearest(embeddings[row], k=4)
        assert (first.id, first.label, len(others)) == (chosen.ids[row], chosen.labels[row], 3)
        assert first.similarity == pytest.approx(1, abs=1e-3) and all(one.similarity <= first.similarity for one in others)
        assert first.thumbnail is not None and first.thumbnail.shape == (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
        side = THUMBNAIL_SIDE, THUMBNAIL_SIDE
        wanted = np.asarray(Image.fromarray(seen[row]).resize(side, Image.Resampling.LANCZOS), np.float64)
        assert np.abs(first.thumbnail - wanted).mean() < 4  # compressed as JPEG
    # The embedding is that of the whole preparation of an evaluation.
    ((_, (pixels,)),) = read_samples(shards, "train", chosen.samples[:1], (reader.factor,))
    normalise = build_augment(trained.recipe, trained.trained_on, threads=1).normalise
    expected = extract_features(trained.model, normalise(torch.from_numpy(pixels[None])))
    assert embeddings[:1] == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.slow
def test_examples_are_whole_test_galaxies_one_of_each_class(simulated: tuple[TrainedModel, Path, dict[str, Any]]) -> None:
    trained, folder, measured = simulated
    examples = read_examples(folder)
    assert [example.label for example in examples] == list(range(10)) and measured["reference"]["examples"] == 10
    shards = read_shards(trained)
    test = choose_galaxies(shards, "test", 1000, by_class=False)
    for example in examples:
        row = test.ids.index(example.id)
        ((_, data, pixels),) = read_stored_files(shards, "test", test.samples[row : row + 1])
        assert test.labels[row] == example.label and example.split == "test"
        assert example.path.read_bytes() == data and np.array_equal(np.asarray(Image.open(example.path)), pixels)
    examples[0].path.rename(folder / "moved.png")
    with pytest.raises(PublishedFolderError, match="missing"):
        read_examples(folder)
    (folder / "moved.png").rename(examples[0].path)


@pytest.mark.parametrize(
    "notes", [{}, {"comment": b"made at home"}, {"exif": b"Exif\0\0" + bytes(40)}, {"icc_profile": bytes(200)}]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_example_keeps_its_jpeg_file_unless_that_has_notes(kind: str, notes: dict[str, bytes]) -> None:
    pixels, buffer = np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **notes)
    content, ending = example_file(buffer.getvalue(), pixels)
    if kind == "JPEG" and not notes:
        assert (content, ending) == (buffer.getvalue(), "jpg")
    else:
        assert ending == "png" and np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)
        assert set(Image.open(io.BytesIO(content)).info) == set()


@pytest.mark.slow
def test_quick_form_for_the_app_measures_nothing_and_has_the_same_threshold_for_a_small_survey(
    simulated: tuple[TrainedModel, Path, dict[str, Any]], tmp_path: Path
) -> None:
    trained, folder, measured = simulated
    quick = write_reference(trained, tmp_path, os.environ, quick=True)
    assert {"false_alarms", "detected"}.isdisjoint(quick["unlike"])
    assert quick["unlike"]["thresholds"] == measured["unlike"]["thresholds"]
    assert (tmp_path / REFERENCE).read_bytes() == (folder / REFERENCE).read_bytes()


def test_data_of_unknown_licence_give_no_images_and_few_validation_galaxies_no_threshold(
    blob_model: TrainedModel, tmp_path: Path
) -> None:
    """24 validation galaxies: the largest of each of the two distances would be exceeded by 4 %."""
    measured = write_reference(blob_model, tmp_path, os.environ, count=30)
    assert measured == {"reference": {"galaxies": 30, "split": "train", "thumbnails": False, "examples": 0}, "unlike": {}}
    assert [path.name for path in tmp_path.iterdir()] == [REFERENCE]
    reference = Reference.open(tmp_path)
    assert reference is not None and np.bincount(reference.labels).tolist() == [10, 10, 10]
    embedding = np.ones(reference.num_features)
    assert reference.novelty(np.zeros((32, 32, 3), np.uint8)) is None and reference.nearest(embedding)[0].thumbnail is None
    assert reference.nearest(np.full(reference.num_features, np.nan)) == []
    with pytest.raises(ValueError, match="values"):
        reference.nearest(embedding[1:])
    assert read_examples(tmp_path) == []


def test_second_time_writes_the_same_bytes(blob_model: TrainedModel, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_reference(blob_model, tmp_path / name, os.environ, count=20)
    assert (tmp_path / "first" / REFERENCE).read_bytes() == (tmp_path / "second" / REFERENCE).read_bytes()


def test_missing_shards_are_named_and_leave_nothing(blob_model: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_reference(blob_model, tmp_path, os.environ, manifest=tmp_path / "nowhere" / "manifest.json")
    assert not list(tmp_path.iterdir())


def write_arrays(folder: Path, **changes: Any) -> Path:
    """Write galaxies drawn at random, as the writer does, and return the folder."""
    draws = np.random.default_rng(0)
    statistics = draws.normal(size=(40, 6)).astype(np.float32)
    gaussian = fit_gaussian(statistics)
    arrays: dict[str, Any] = {
        "format": np.int64(1),
        "embeddings": draws.normal(size=(40, 5)).astype(np.float16),
        "labels": np.zeros(40, np.int32),
        "ids": np.array([f"g{row}" for row in range(40)]),
        "distances": np.sort(gaussian.distances(statistics)).astype(np.float32),
    }
    for name in SETS:
        arrays |= {f"{name}_mean": gaussian.mean, f"{name}_whitening": gaussian.whitening, f"{name}_threshold": np.float64(2.0)}
    np.savez(folder / REFERENCE, **arrays | changes)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"format": np.int64(99)},
        {"embeddings": np.zeros((39, 6), np.float16)},
        {"embeddings": np.full((40, 5), np.nan, np.float16)},
        {"ids": np.array([object()] * 40)},
        {"labels": np.zeros(40)},
        {"texture_whitening": np.zeros((5, 7), np.float32)},
        {"profile_mean": np.zeros(7, np.float32)},
        {"distances": np.zeros(0, np.float32)},
        {"texture_threshold": np.zeros(3)},
        {"profile_threshold": np.float64(0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_damaged_arrays_are_an_error_that_says_so(changes: dict[str, Any], tmp_path: Path) -> None:
    assert Reference.open(write_arrays(tmp_path)) is not None
    with pytest.raises(PublishedFolderError, match="damaged"):
        Reference.open(write_arrays(tmp_path, **changes))


def test_damaged_files_are_an_error_and_a_damaged_sheet_gives_no_thumbnails(tmp_path: Path) -> None:
    whole = (write_arrays(tmp_path) / REFERENCE).read_bytes()
    for data in (b"", b"no zip", whole[:300], whole[: len(whole) // 2], whole[:-40], b"\x93NUMPY" + whole[6:]):
        (tmp_path / REFERENCE).write_bytes(data)
        with pytest.raises(PublishedFolderError, match="damaged"):
            Reference.open(tmp_path)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    (tmp_path / REFERENCE).write_bytes(single.getvalue())
    with pytest.raises(PublishedFolderError, match="damaged"):
        Reference.open(tmp_path)
    (tmp_path / REFERENCE).write_bytes(whole)
    (tmp_path / THUMBNAILS).mkdir()
    (tmp_path / THUMBNAILS / "000.jpg").write_bytes(b"\xff\xd8 no JPEG")
    reference = Reference.open(tmp_path)
    assert reference is not None and reference.thumbnail(0) is None and reference.thumbnail(39) is None
    (tmp_path / EXAMPLES).mkdir()
    (tmp_path / EXAMPLES / "examples.json").write_text('[{"file": "/etc/passwd"}]')
    with pytest.raises(PublishedFolderError, match="damaged"):
        read_examples(tmp_path)


def test_distance_is_mahalanobis_distance_with_a_little_of_the_unit_matrix() -> None:
    draws = np.random.default_rng(1)
    data = (draws.normal(size=(300, 20)) @ draws.normal(size=(20, 20)) + 5).astype(np.float32)
    spread = data.std(axis=0)
    correlation = (1 - SHRINKAGE) * np.corrcoef(data.T) + SHRINKAGE * np.eye(20)
    covariance, centred = correlation * spread * spread[:, None], data - data.mean(axis=0)
    wanted = np.sqrt((centred @ np.linalg.inv(covariance) * centred).mean(axis=1))
    assert fit_gaussian(data).distances(data) == pytest.approx(wanted, rel=1e-3)
    # Statistics that never change, and fewer galaxies than statistics.
    data[:, 3] = 7
    few = fit_gaussian(data[:10])
    off = data[:1].copy()
    off[0, 3] = 8
    assert few.distances(data[:10]).max() < 5 < few.distances(off)[0]


def test_statistics_do_not_change_when_a_picture_is_turned_or_flipped() -> None:
    picture = np.random.default_rng(4).integers(0, 256, (40, 40, 3), np.uint8)
    turned = [np.rot90(flipped, number) for number in range(4) for flipped in (picture, picture[:, ::-1])]
    for found in picture_statistics(np.stack(turned)).values():
        assert found == pytest.approx(np.broadcast_to(found[:1], found.shape), abs=2e-3)


def test_radial_profile_is_brightness_above_the_sky_from_the_centre_outwards_at_all_sizes() -> None:
    for size, rings in ((256, 5), (33, 5), (32, 5), (16, 4)):
        offsets = np.arange(size) - (size - 1) / 2
        disc = np.where(np.hypot(offsets[:, None], offsets) < 0.12 * size / 2, 153, 51).astype(np.uint8)
        picture = np.repeat(disc[..., None], 3, axis=2)
        picture[0, 0] = 255  # a star in the sky
        found = picture_statistics(picture[None])
        inner = 2 if rings == 5 else 1  # 16 pixels: none is within the first ring
        wanted = [np.arcsinh(0.4 / 0.02)] * inner + [0] * 3
        assert found[PROFILE][0] == pytest.approx(wanted, abs=1e-5), size
        assert np.isfinite(found[TEXTURE]).all()


def test_threshold_lets_a_further_galaxy_pass_as_often_as_promised() -> None:
    """Exact for any distribution of distances; here uniform ones, 4,000 times."""
    draws = np.random.default_rng(2)
    for count in (60, 399, 1000):
        rates = [1 - find_threshold(draws.uniform(size=count)) for _ in range(4000)]
        assert np.mean(rates) == pytest.approx(1 / (count + 1) if count < 199 else FALSE_ALARMS, rel=0.25)


def test_5_000_galaxies_of_2_048_features_are_searched_in_milliseconds(tmp_path: Path) -> None:
    import time

    draws = np.random.default_rng(3)
    embeddings = draws.normal(size=(5000, 2048)).astype(np.float16)
    np.savez(
        tmp_path / REFERENCE,
        format=np.int64(1),
        embeddings=embeddings,
        labels=np.zeros(5000, np.int32),
        ids=np.arange(5000).astype(str),
    )
    reference = Reference.open(tmp_path)
    assert reference is not None
    spent = time.process_time()
    for row in range(20):
        assert reference.nearest(embeddings[row])[0].id == str(row)
    assert (time.process_time() - spent) / 20 < 0.1
