"""Probes: features are those of the model for each image, stored once, and classified without a look at the test labels."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.explore.encoder import Encoder, pixels_info
from galaxydist.explore.features_file import FeatureRows, FeaturesFile, read_features, write_features
from galaxydist.explore.probe import LabelledFeatures, choose, classify, nearest, regressions, render_result, training_parts
from galaxydist.galaxy import Galaxy
from galaxydist.models.build import build_model
from galaxydist.models.weights import write_weights
from galaxydist.recipe.schema import ModelConfig
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.simulate.survey import simulate_survey
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.blobs import BlobSurvey
from tests.helpers.damage import break_image
from tests.helpers.runs import quick_settings, run_here

TINY = ("data.image_size=32", "model.width=8", "data.crop=1")


def probe(*words: object) -> int:
    from accelerate.state import AcceleratorState, PartialState

    try:
        return main(["probe", *map(str, words)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def read_result(features: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(features.with_suffix(".json").read_text())
    return found


def score(result: dict[str, Any], features: str | None, method: str) -> dict[str, Any]:
    (row,) = [row for row in result["results"] if (row["features"], row["method"]) == (features, method)]
    return dict(row)


@dataclass(frozen=True)
class Relabelled(BlobSurvey):
    """Blobs with labels of one's choice by class; splits that are not kept have no galaxies."""

    given: tuple[int, ...] = (0, 1, 2)
    kept: tuple[str, ...] = ("train", "val", "test")

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array(self.given)[np.arange(self.num_galaxies) % 3]

    @property
    def splits(self) -> dict[str, NDArray[np.int64]]:
        return {name: rows if name in self.kept else rows[:0] for name, rows in BlobSurvey(self.num_galaxies).splits.items()}

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for galaxy in super().read(start, stop):
            yield replace(galaxy, label=None if galaxy.label == -1 else galaxy.label)


def shards(folder: Path, survey: BlobSurvey) -> Manifest:
    return write_shards(survey, folder / "shards", encoding="png", shard_size=16, workers=1)


def stored_images(manifest: Manifest, split: str) -> dict[str, NDArray[np.uint8]]:
    """Key -> pixels of a split's galaxies, by tarfile and PIL."""
    found = {}
    for number in range(manifest.splits[split].num_shards):
        with tarfile.open(manifest.shard_path(split, number)) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.partition(".")[0]] = np.asarray(Image.open(io.BytesIO(file.read())))
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_are_those_of_the_model_for_each_image_alone_whatever_the_batch_size(
    blobs: Path, tmp_path: Path, batch_size: int
) -> None:
    path, manifest = tmp_path / "f.parquet", read_manifest(blobs)
    assert probe("recipe=custom_cnn", blobs, *TINY, f"eval.batch_size={batch_size}", "--out", path) == 0
    torch.manual_seed(0)
    model: Any = build_model(ModelConfig(name="custom_cnn", width=8), 3, 32).eval()
    mean, std = np.array(manifest.channel_mean), np.array(manifest.channel_std)
    file = read_features(path)
    assert file.num_galaxies == 120 and file.split("train", 5).ids == file.split("train").ids[:5]
    for split in manifest.splits:
        rows, images = file.split(split), stored_images(manifest, split)
        assert rows.ids == read_catalogue(manifest, split, ["id"]).column("id").to_pylist()
        np.testing.assert_array_equal(rows.labels_B, manifest.labels(split))
        for name, features_D in zip(rows.ids, rows.features_BD, strict=True):
            image_HWC = (images[name] / 255 - mean) / std
            image_BCHW = torch.from_numpy(image_HWC.transpose(2, 0, 1)[None].astype(np.float32))
            with torch.inference_mode():
                wanted_D = model.stages(model.stem(image_BCHW)).mean(dim=(2, 3))[0].numpy()
            np.testing.assert_allclose(features_D, wanted_D, rtol=1e-5, atol=1e-5)


def test_features_are_computed_in_the_precision_of_the_recipe(blobs: Path, tmp_path: Path) -> None:
    """As in an evaluation; a file says which, and is not taken for one of another precision."""
    found = {}
    for name in ("auto", "bf16", "fp64", "fp16"):
        path = tmp_path / f"{name}.parquet"
        assert probe("recipe=custom_cnn", blobs, *TINY, f"train.precision={name}", "--out", path) == 0
        found[name] = read_features(path)
    values = {name: file.split("test").features_BD for name, file in found.items()}
    assert {name: file.info.encoder.precision for name, file in found.items()} == {
        **{"auto": "no", "bf16": "bf16", "fp64": "fp64", "fp16": "no"}
    }
    assert np.array_equal(values["fp16"], values["auto"])
    for name, least, most in (("bf16", 1e-4, 2e-2), ("fp64", 0, 1e-5)):
        assert least <= np.abs(values[name] - values["auto"]).max() / np.abs(values["auto"]).max() <= most
    assert found["auto"].info.differences(found["bf16"].info) == ["precision is bf16, not no"]
    assert found["bf16"].info.differences(found["auto"].info) == ["precision is no, not bf16"]
    assert probe("recipe=custom_cnn", blobs, *TINY, "--out", tmp_path / "bf16.parquet") == 2


def test_features_are_read_from_the_device_when_the_next_batch_has_begun(blobs: Path) -> None:
    """The meta device has no values: reading one is an error."""
    seen: list[Tensor] = []

    def extract(images_BCHW: Tensor) -> Tensor:
        seen.append(images_BCHW)
        return torch.empty(len(images_BCHW), 2, device="meta")

    manifest, model = read_manifest(blobs), nn.Conv2d(3, 2, 3)
    world: Any = SimpleNamespace(device=torch.device("cpu"), cores=1, decode_threads=1)
    encoder = Encoder(pixels_info(manifest), extract, model, batch_size=8, channels_last=True)
    with pytest.raises(NotImplementedError):
        next(encoder.batches(manifest, "train", world))
    assert len(seen) == 2 and all(images_BCHW.is_inference() for images_BCHW in seen)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (*seen, model.weight))
    assert not model.weight.is_inference(), "d4_cnn keeps its kernels only for weights that have versions"


def test_second_probe_reads_the_stored_features_and_no_image(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(blobs.parent, tmp_path / "blobs")
    words = ("recipe=custom_cnn", tmp_path / "blobs", *TINY, "--data-dir", tmp_path / "root")
    assert probe(*words) == 0
    first = capsys.readouterr().out
    for tar in (tmp_path / "blobs").glob("*.tar"):
        tar.unlink()
    assert probe(*words) == 0
    assert capsys.readouterr().out == first
    assert "largest class" in first and "custom_cnn, logistic regression, C = " in first
    # Other weights, another size: other features, which need the images that are gone.
    assert probe(*words, "seed=1") == 2
    assert probe(*words[:2], "data.image_size=16", "model.width=8", *words[-2:]) == 2
    stored = sorted(path.name for path in (tmp_path / "root/features/blobs/original").iterdir())
    assert [name.partition("-")[0] for name in stored] == ["custom_cnn", "custom_cnn", "pixels"]


def test_features_averaged_over_d4_do_not_depend_on_the_orientation_of_the_galaxies(blobs: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Turned(BlobSurvey):
        def _draw(self, row: int) -> NDArray[np.uint8]:
            return np.ascontiguousarray(np.rot90(super()._draw(row)))

    turned = shards(tmp_path, Turned(name="turned"))
    for name, data in (("upright", blobs), ("turned", turned.path)):
        assert probe("recipe=custom_cnn", data, *TINY, "--tta", "d4", "--out", tmp_path / f"{name}.parquet") == 0
    upright, other = (read_features(tmp_path / f"{name}.parquet").split("test") for name in ("upright", "turned"))
    order = [other.ids.index(name) for name in upright.ids]
    np.testing.assert_allclose(upright.features_BD, other.features_BD[order], rtol=1e-4, atol=1e-5)


def test_trained_run_tells_classes_apart_better_than_the_largest_class_and_random_weights(blobs: Path, tmp_path: Path) -> None:
    run_dir, features = tmp_path / "run", tmp_path / "run.parquet"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=6)) == 0
    assert probe(run_dir, blobs, "--out", features) == 0
    result = read_result(features)
    largest = score(result, None, "largest_class")
    assert largest["balanced_accuracy"] == pytest.approx(1 / 3) and result["count"] == 24 and result["num_train"] == 72
    for method in ("logistic_regression", "nearest_neighbours"):
        row = score(result, "encoder", method)
        low, high = row["intervals"]["balanced_accuracy"]
        assert low <= row["balanced_accuracy"] <= high and low > largest["balanced_accuracy"]
        assert np.trace(row["confusion"]) / 24 == row["accuracy"]
    file = tmp_path / "weights.safetensors"
    assert main(["weights", "save", str(run_dir), str(file)]) == 0
    assert probe(file, blobs, "--out", tmp_path / "file.parquet") == 0
    of_file, of_run = (read_features(path).split("val").features_BD for path in (tmp_path / "file.parquet", features))
    np.testing.assert_allclose(of_file, of_run, atol=1e-6)
    encoder = read_features(features).info.encoder
    assert encoder.weights.startswith("run run, step ") and encoder.model == "custom_cnn" and encoder.num_features == 32


def test_shipped_network_by_its_name_knows_simulated_galaxies_that_it_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate_survey(tmp_path / "sim.h5", 150, 77, balanced=True)
    manifest = write_shards(open_survey(tmp_path / "sim.h5"), tmp_path / "shards")
    assert probe("custom_cnn", manifest.path, "--out", tmp_path / "f.parquet") == 0
    result = read_result(tmp_path / "f.parquet")
    assert result["encoder"]["weights"] == "shipped weights" and result["encoder"]["image_size"] == 80
    ours, pixels = (score(result, kind, "logistic_regression") for kind in ("encoder", "pixels"))
    assert ours["intervals"]["accuracy"][0] > max(0.4, pixels["accuracy"])
    assert "zoobot" not in capsys.readouterr().out
    result["encoder"]["model"], result["dataset"] = "hf-hub:mwalmsley/zoobot-encoder-convnext_nano", "galaxy10_decals"
    assert "note: zoobot" in render_result(result)


def test_models_of_timm_and_functions_of_ones_own_can_be_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = shards(tmp_path, BlobSurvey(num_galaxies=60))
    assert probe("timm/test_vit", manifest.path, "--random", "--out", tmp_path / "timm.parquet") == 0
    encoder = read_features(tmp_path / "timm.parquet").info.encoder
    assert encoder.image_size == 160 and encoder.num_features == 64 and "timm/test_vit (random weights, seed 0)" in encoder.title
    (tmp_path / "mine_probed.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    assert probe("mine_probed:build", manifest.path, "data.image_size=32", "--out", "own.parquet") == 0
    assert read_features(Path("own.parquet")).info.encoder.num_features == 12
    assert probe("mine_probed:build", manifest.path, "--pretrained", "--out", "own.parquet") == 2
    assert "weights of your own model are in a file of yours" in capsys.readouterr().err


OWN_MODEL = """
from torch import nn
def build(num_classes, image_size):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))
"""


def made(labels: Sequence[int], dimensions: int = 6, seed: int = 0, spread: float = 1.0) -> LabelledFeatures:
    """Clouds of features around a centre for each class."""
    dice = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 2, (max(labels) + 1, dimensions))
    labels_N = np.array(labels)
    return LabelledFeatures(centres[labels_N] + dice.normal(0, spread, (len(labels), dimensions)), labels_N)


def test_classification_does_not_depend_on_the_labels_of_the_test_galaxies() -> None:
    train, val, test = (made([0, 1, 2] * number, seed=seed) for seed, number in enumerate((30, 8, 20)))
    wrong = LabelledFeatures(test.features_ND, test.labels_N[::-1].copy())
    for chosen_on in (val, None):
        found, again = classify(train, chosen_on, test), classify(train, chosen_on, wrong)
        for method, (setting, predicted) in found.items():
            assert again[method][0] == setting
            np.testing.assert_array_equal(again[method][1], predicted)
            assert (predicted == test.labels_N).mean() > 0.8


def test_nearest_neighbours_vote_as_counted_one_by_one() -> None:
    train, test = made([0, 1, 2, 2] * 40, spread=3), made([0, 1, 2] * 400, seed=1, spread=3)
    for number, predicted in nearest(train, test, [100, 10, 3, 1]):
        for row in (0, 511, 512, 1199):
            cosine_N = [
                float(a @ test.features_ND[row] / np.linalg.norm(a) / np.linalg.norm(test.features_ND[row]))
                for a in train.features_ND
            ]
            votes = [0.0, 0.0, 0.0]
            for neighbour in np.argsort(cosine_N)[::-1][: int(number)]:
                votes[train.labels_N[neighbour]] += 1 + cosine_N[neighbour]
            assert predicted[row] == np.argmax(votes)


def test_choice_of_a_setting_is_the_best_on_the_counted_galaxies_and_the_simplest_of_equal_ones() -> None:
    train, val = made([0, 1] * 20), made([0, 1] * 10, seed=1)
    answers = {1: 0.5, 2: 0.75, 3: 0.75, 4: 0.5, 5: 1.0}

    def method(_: LabelledFeatures, counted: LabelledFeatures, settings: Sequence[int]) -> Any:
        for setting in settings:
            right = np.arange(len(counted)) < answers[setting] * len(counted)
            yield setting, np.where(right, counted.labels_N, 1 - counted.labels_N)

    assert choose(method, [1, 2, 3, 4, 5], [(train, val)], patience=1) == 2
    assert choose(method, [1, 2, 3, 4, 5], [(train, val)], patience=2) == 5


def test_parts_of_the_training_split_cover_it_once_with_equal_shares_of_each_class() -> None:
    train = made([0] * 50 + [1] * 10 + [2])
    pairs = training_parts(train)
    counted = np.concatenate([part.features_ND for _, part in pairs])
    assert sorted(counted[:, 0].tolist()) == sorted(train.features_ND[:, 0].tolist())
    assert all((part.labels_N == 0).sum() == 10 and (part.labels_N == 1).sum() == 2 for _, part in pairs)
    assert all(len(fitted) + len(part) == 61 for fitted, part in pairs)
    assert len(training_parts(made([0, 1] * 2500))) == 1
    # Classes that are missing in one part are no error.
    for labels in ([0, 1], [0, 1, 2], [0, 0, 0, 1, 2, 2]):
        assert set(classify(made(labels), None, train)["logistic_regression"][1].tolist()) <= set(labels)


def test_strongest_regularisation_comes_first_and_the_weakest_fits_the_training_galaxies_best() -> None:
    train = made([0, 1, 2] * 40, dimensions=30, spread=2.5)
    right = {
        strength: (predicted == train.labels_N).mean() for strength, predicted in regressions(train, train, (1e-6, 1e-2, 10.0))
    }
    assert list(right) == [1e-6, 1e-2, 10.0] and right[10.0] >= right[1e-2] >= right[1e-6] and right[10.0] > 0.95


def test_learning_curve_fits_a_fraction_of_each_class(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = made([0] * 50 + [1] * 10 + [2])
    part = train.first(0.1)
    np.testing.assert_array_equal(part.labels_N, [0] * 5 + [1, 2])
    np.testing.assert_array_equal(part.features_ND, train.features_ND[[0, 1, 2, 3, 4, 50, 60]])
    assert probe("recipe=custom_cnn", blobs, *TINY, "--fractions", "0.25,1", "--out", tmp_path / "f.parquet") == 0
    rows = read_result(tmp_path / "f.parquet")["results"]
    assert [row["num_train"] for row in rows[1:]] == [18, 18, 72, 72] * 2
    printed = capsys.readouterr().out
    assert "(N = 18)" in printed and "chosen on parts of the training split" in printed  # 24 validation galaxies are too few
    monkeypatch.setattr("galaxydist.explore.probe.LEAST_VALIDATION", 24)
    assert probe("recipe=custom_cnn", blobs, *TINY, "--out", tmp_path / "f.parquet") == 0
    assert "chosen on the validation split" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        probe("recipe=custom_cnn", blobs, "--fractions", "0.5,2")


@pytest.mark.parametrize(
    ("survey", "message"),
    [
        (Relabelled(given=(1, 1, 1)), "one class of labelled training galaxies (flat)"),
        (Relabelled(given=(-1, -1, -1)), "0 labelled galaxies in its train split (72 have no label)"),
        (Relabelled(kept=("train", "val")), "0 labelled galaxies in its test split"),
        (Relabelled(num_galaxies=30, given=(0, -1, -1)), "6 labelled galaxies in its train split (12 have no label)"),
    ],
)
def test_data_without_enough_labels_are_refused_before_any_image_is_read(
    survey: BlobSurvey, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = shards(tmp_path, survey)
    assert probe("recipe=custom_cnn", manifest.path, *TINY, "--data-dir", tmp_path / "root") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("galaxydist: error") == 1 and not (tmp_path / "root").exists()


def test_probe_without_a_validation_split_chooses_inside_the_training_split_and_leaves_unlabelled_galaxies_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = shards(tmp_path, Relabelled(given=(0, 2, -1), kept=("train", "test")))
    assert probe("recipe=custom_cnn", manifest.path, *TINY, "--out", tmp_path / "f.parquet") == 0
    assert "chosen on parts of the training split" in capsys.readouterr().out
    result = read_result(tmp_path / "f.parquet")
    assert result["num_train"] == 48 and result["count"] == 16 and read_features(tmp_path / "f.parquet").num_galaxies == 96


def test_galaxy_that_cannot_be_read_ends_the_probe_and_leaves_no_file(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(shutil.copytree(blobs.parent, tmp_path / "blobs"))
    _, key = break_image(manifest, "val", 3)
    assert probe("recipe=custom_cnn", manifest.path, *TINY, "--out", tmp_path / "out" / "f.parquet") == 2
    error = capsys.readouterr().err
    assert key in error and error.count("galaxydist: error") == 1 and list((tmp_path / "out").iterdir()) == []


def test_wrong_words_are_refused_with_one_message(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, features, nameless = (tmp_path / name for name in ("table.parquet", "f.parquet", "w.safetensors"))
    foreign.write_bytes(b"not Parquet")
    write_weights(nameless, {"a": torch.zeros(1)})
    assert probe("recipe=custom_cnn", blobs, *TINY, "--out", features) == 0
    before = features.read_bytes()
    for words, message in (
        (("custom_cnn", blobs, blobs), "give a model and a data set"),
        (("custom_cm", blobs), "custom_cm"),
        (("custom_cnn", tmp_path / "nothing"), "there is no such path"),
        (("resnet18", blobs, "--data-dir", tmp_path), "weights fetch recipe=resnet18"),
        (("convnext_nano", blobs, "--data-dir", tmp_path), "weights fetch timm/convnext_nano"),  # a recipe by its name
        (("vit", blobs, "--random", "data.image_size=100"), "vit needs a multiple of 16 pixels; try 96 or 112"),
        (("custom_cnn", blobs, "model.width=-1"), "model.width"),
        (("model.safetensors", blobs), "weights model.safetensors: no such file"),
        ((nameless, blobs), "does not say which model it belongs to: give the recipe"),
        ((nameless, blobs, "--pretrained"), "both choose the weights"),
        (("timm/resnet999", blobs), "no such model; did you mean timm/resnet"),
        (("timm/resnet18", blobs), "name them: timm/NAME.TAG"),
        (("recipe=custom_cnn", blobs, *TINY, "--out", tmp_path / "f.json"), "features are a Parquet file"),
        (("recipe=custom_cnn", blobs, *TINY, "--out", foreign), "not a whole Parquet file"),
        (("recipe=custom_cnn", blobs, *TINY, "seed=1", "--out", features), "has other features (weights_sha256 is"),
        (("recipe=custom_cnn", blobs, "model.weights=none.safetensors", "--random"), "--random and model.weights both choose"),
    ):
        capsys.readouterr()
        assert probe(*words) == 2, words
        error = capsys.readouterr().err
        assert message in error and error.count("galaxydist: error") == 1, error
    assert features.read_bytes() == before and foreign.read_bytes() == b"not Parquet"
    assert probe("recipe=custom_cnn", blobs, *TINY, "seed=1", "--out", features, "--overwrite") == 0
    assert features.read_bytes() != before


def test_features_that_are_not_finite_are_refused(blobs: Path, tmp_path: Path) -> None:
    assert probe("recipe=custom_cnn", blobs, *TINY, "--out", tmp_path / "f.parquet") == 0
    info = read_features(tmp_path / "f.parquet").info
    values_BD = np.zeros((2, 64), np.float32)
    values_BD[1, 5] = np.nan
    with pytest.raises(UserError, match=r"not finite \(nan or inf\) for 1 of 2 galaxies, such as b"):
        write_features(tmp_path / "g.parquet", info, [FeatureRows("test", ["a", "b"], np.zeros(2, np.int32), values_BD)])
    assert not (tmp_path / "g.parquet").exists()


def explore(*words: object) -> int:
    return main(["data", "explore", *map(str, words)])


def test_exploration_maps_the_features_of_a_file_and_names_galaxies_without_any(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe("recipe=custom_cnn", blobs, *TINY, "--out", tmp_path / "random.parquet") == 0
    file = read_features(tmp_path / "random.parquet")
    write_features(tmp_path / "perfect.parquet", file.info, perfect(file))
    capsys.readouterr()
    assert explore(blobs, "--features", tmp_path / "perfect.parquet", "--out", tmp_path / "page") == 0
    answer = capsys.readouterr()
    found = json.loads((tmp_path / "page" / "survey.json").read_text())["map"]
    assert found["agreement"] == 1.0 and found["galaxies"] == 117
    assert "64 features of custom_cnn (random weights, seed 0)" in (tmp_path / "page" / "explore.html").read_text()
    assert "3 galaxies of the sample have no features" in answer.err and "map: 100 %" in answer.out


def perfect(file: FeaturesFile) -> list[FeatureRows]:
    """Features that say the class, of all galaxies but three."""
    known = np.eye(64, dtype=np.float32)
    parts = [file.split(name) for name in ("train", "val", "test")]
    return [FeatureRows(rows.split, rows.ids[1:], rows.labels_B[1:], known[rows.labels_B[1:]]) for rows in parts]


def test_galaxy_whose_neighbours_all_have_another_class_has_a_doubtful_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = shards(tmp_path, BlobSurvey(num_galaxies=90))
    assert probe("recipe=custom_cnn", manifest.path, *TINY, "--out", tmp_path / "random.parquet") == 0
    file = read_features(tmp_path / "random.parquet")
    parts = perfect(file)
    wrong = parts[0].ids[4]
    parts[0].features_BD[4] = parts[0].features_BD[parts[0].labels_B != parts[0].labels_B[4]][0]
    write_features(tmp_path / "f.parquet", file.info, parts)
    capsys.readouterr()
    assert explore(manifest.path, "--features", tmp_path / "f.parquet", "--out", tmp_path / "page") == 0
    (found,) = json.loads((tmp_path / "page" / "survey.json").read_text())["map"]["doubtful"]
    assert found["id"] == wrong and found["votes"] == 10 and found["neighbours"] != found["label"]
    assert f"1 doubtful labels, which none of the neighbours has: {wrong}" in capsys.readouterr().out
    assert f'alt="doubtful label: {wrong}"' in (tmp_path / "page" / "explore.html").read_text()


def test_features_of_other_shards_are_refused_by_the_exploration(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shards(tmp_path, BlobSurvey(num_galaxies=60))
    assert probe("recipe=custom_cnn", other.path, *TINY, "--out", tmp_path / "f.parquet") == 0
    for words, message in (
        ((blobs, "--features", tmp_path / "f.parquet"), f"not of {blobs}"),
        ((blobs, "--features", tmp_path / "no.parquet"), "there is no such file"),
        ((blobs, "--features", other.dir / "columns" / "train.catalogue.parquet"), "something else than features"),
    ):
        capsys.readouterr()
        assert explore(*words, "-o", tmp_path / "page.html") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("galaxydist: error") == 1 and not (tmp_path / "page.html").exists()
