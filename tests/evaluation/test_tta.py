"""Test-time augmentation: the eight flips and quarter turns, their mean probability, and exact evaluations with it."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from galaxydist.cli.main import main
from galaxydist.distributed import World, init_distributed
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import evaluate_run
from galaxydist.evaluation.inference import evaluate_split, mean_log_probabilities, tta_images
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.evaluation.results_files import read_evaluation as read_evaluation_file
from galaxydist.evaluation.results_files import render_evaluation, write_evaluation
from galaxydist.loading.loader import DecodeOptions, EvalLoader
from galaxydist.loading.training_data import TrainingData, build_augment
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.forked_runs import command, forked, run_forked, train
from tests.helpers.runs import quick_settings, read_evaluation, read_metrics, run_here


@pytest.fixture
def world() -> Iterator[World]:
    from accelerate.state import AcceleratorState, PartialState

    yield init_distributed("no", {})
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


class Brightest(nn.Module):
    """Looks at each channel's extremes and nothing else: the same from every side, to the last bit."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return 4 * images_BCHW.amax((2, 3)) - 3 * images_BCHW.amin((2, 3)) * torch.tensor([1.0, -1.0, 0.5])


class Corner(nn.Module):
    """Looks at one side of the image."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW[:, :, 10:14, 14:24].mean((2, 3)) * torch.tensor([3.0, -2.0, 0.5])


def recipe_of(manifest: Manifest, tta: str) -> Recipe:
    settings = quick_settings(manifest.location, Path("unused"), eval__tta=tta)
    return load_recipe(settings).recipe


def evaluate(world: World, model: nn.Module, manifest: Manifest, tta: str, split: str = "test") -> dict[str, Any]:
    recipe = recipe_of(manifest, tta)
    augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=1)
    return evaluate_split(world, model, manifest, split, augment=augment, recipe=recipe)


def test_d4_views_are_all_flips_and_quarter_turns() -> None:
    images_BCHW = torch.randn(2, 3, 5, 5)
    found = list(tta_images(images_BCHW, "d4"))
    assert found[0] is images_BCHW
    quarters = [images_BCHW.numpy()]
    for _ in range(3):
        quarters.append(np.rot90(quarters[-1], axes=(2, 3)))
    expected = {image.tobytes() for quarter in quarters for image in (quarter, quarter[..., ::-1])}
    assert {view.numpy().tobytes() for view in found} == expected and len(expected) == 8
    assert [view is images_BCHW for view in tta_images(images_BCHW, "none")] == [True]


def test_d4_views_keep_the_memory_format() -> None:
    images_BCHW = torch.randn(2, 3, 6, 6)
    last_BCHW = images_BCHW.to(memory_format=torch.channels_last)
    for view, other in zip(tta_images(images_BCHW, "d4"), tta_images(last_BCHW, "d4"), strict=True):
        assert view.is_contiguous() and other.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, other)


def test_mean_log_probabilities_averages_probabilities() -> None:
    logits_VBK = [torch.randn(6, 4, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16) * 2]
    found_BK = mean_log_probabilities(logits_VBK)
    expected_BK = torch.stack([logits_BK.double().softmax(1) for logits_BK in logits_VBK]).mean(0)
    assert torch.allclose(found_BK.softmax(1), expected_BK, rtol=1e-12) and torch.allclose(
        found_BK.exp(), expected_BK, rtol=1e-12
    )
    assert mean_log_probabilities(logits_VBK[:1]) is logits_VBK[0]


def test_mean_log_probabilities_does_not_underflow() -> None:
    sure, surer = torch.tensor([[0.0, 2000.0]]), torch.tensor([[0.0, 3000.0]])
    assert mean_log_probabilities([sure, surer])[0, 0].item() == pytest.approx(-2000 - math.log(2))
    assert mean_log_probabilities([sure, torch.full((1, 2), math.nan)]).isnan().all()


def test_tta_of_an_invariant_model_gives_the_same_evaluation(world: World, blobs: Path) -> None:
    manifest = read_manifest(blobs)
    plain, mean = (evaluate(world, Brightest(), manifest, tta) for tta in ("none", "d4"))
    assert mean["confusion"] == plain["confusion"] and mean["count"] == 24
    assert mean["loss"] == pytest.approx(plain["loss"], rel=1e-9)


def test_tta_evaluation_equals_the_mean_probability_computed_by_hand(world: World, blobs: Path) -> None:
    manifest, model = read_manifest(blobs), Corner()
    recipe = recipe_of(manifest, "d4")
    augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=1)
    confusion_KK, loss = np.zeros((3, 3), int), 0.0
    with EvalLoader(manifest, "test", batch_size=24, decode=DecodeOptions(image_size=32, threads=1)) as reader:
        batch = next(reader)
    for image_CHW, label in zip(augment.normalise(batch.images_BHWC).numpy(), batch.labels_B.tolist(), strict=True):
        probability_K = np.zeros(3)
        for turns in range(4):
            for mirrored in (False, True):
                view_CHW = np.rot90(image_CHW, turns, axes=(1, 2))
                view_CHW = view_CHW[:, ::-1] if mirrored else view_CHW
                weight_K = np.exp(model(torch.from_numpy(view_CHW.copy())[None])[0].double().numpy())
                probability_K += weight_K / weight_K.sum() / 8
        confusion_KK[label, probability_K.argmax()] += 1
        loss -= math.log(probability_K[label])
    found, plain = evaluate(world, model, manifest, "d4"), evaluate(world, model, manifest, "none")
    assert found["confusion"] == confusion_KK.tolist()
    assert found["loss"] == pytest.approx(loss / 24, rel=1e-6)
    assert abs(found["loss"] - plain["loss"]) > 1e-3


@pytest.mark.parametrize("tta", ["none", "d4"])
def test_an_evaluation_that_misses_a_galaxy_fails(world: World, tmp_path: Path, tta: str) -> None:
    manifest = write_shards(BlobSurvey(), tmp_path / "shards", encoding="png", workers=1)
    assert evaluate(world, Brightest(), manifest, tta)["count"] == 24
    path = tmp_path / "shards" / "columns" / "test.labels.npy"
    labels = np.load(path)
    labels[5] = -1
    np.save(path, labels)
    with pytest.raises(UserError, match=r"23 galaxies were counted in the test split .*, but its manifest has 24"):
        evaluate(world, Brightest(), read_manifest(tmp_path / "shards"), tta)


def test_evaluations_with_and_without_tta_have_separate_files(tmp_path: Path) -> None:
    context = {"dataset": "blobs", "variant": "original", "split": "test", "model": "vit", "recipe": "vit"}
    names = ("a", "b")
    plain = write_evaluation(tmp_path, metrics_from_counts([[2, 0], [1, 1]], 2.0, names), context, figures=False)
    averaged = metrics_from_counts([[2, 0], [0, 2]], 1.0, names)
    averaged = write_evaluation(tmp_path, averaged, {**context, "tta": "d4"}, figures=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test-d4.json", "test.json"]
    assert read_evaluation_file(tmp_path, "test") == read_evaluation_file(tmp_path, "test", "none") == plain
    assert read_evaluation_file(tmp_path, "test", "d4") == averaged
    (tmp_path / "test-d4-confusion.png").touch()
    (tmp_path / "test-confusion.png").touch()
    for evaluation, stem, others in ((plain, "test", "test-d4"), (averaged, "test-d4", "test")):
        printed = render_evaluation(evaluation, tmp_path)
        assert f"{stem}.json" in printed and f"{tmp_path}/{stem}-confusion.png" in printed
        assert f"{others}-confusion.png" not in printed and ("averaged over D4" in printed) == (stem == "test-d4")


@pytest.mark.slow
def test_evaluate_with_tta_d4_writes_beside_the_plain_evaluation_and_reuses_both(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1)) == 0
    folder = run_dir / "evaluation"
    plain = (folder / "test.json").read_bytes()
    # The run itself draws no figures (eval.figures=false).
    assert not list(folder.glob("*.p[nd][gf]"))
    capsys.readouterr()
    assert main(["evaluate", str(run_dir), "--tta", "d4"]) == 0
    printed = capsys.readouterr().out
    assert "averaged over D4, N = 24" in printed
    assert all(str(folder / f"test-d4{end}") in printed for end in (".json", "-confusion.png", "-classes.png"))
    averaged = json.loads((folder / "test-d4.json").read_text())
    assert averaged["tta"] == "d4" and averaged["loss"] != json.loads(plain)["loss"] and averaged["count"] == 24
    # Existing evaluations are not made again, and neither is taken for the other.
    written = (folder / "test-d4.json").stat().st_mtime_ns
    assert main(["evaluate", str(run_dir), "--tta", "d4"]) == 0 == main(["evaluate", str(run_dir)])
    printed = capsys.readouterr().out
    assert str(folder / "test.json") in printed and printed.count("test-d4-confusion.png") == 1
    assert str(folder / "test-confusion.png") in printed and str(folder / "learning-curves.png") in printed
    assert (folder / "test-d4.json").stat().st_mtime_ns == written and (folder / "test.json").read_bytes() == plain
    (folder / "test-d4.json").write_bytes(plain)
    assert evaluate_run(run_dir, "test", {}, tta="d4")["loss"] == averaged["loss"]
    shutil.rmtree(folder)
    words = ["evaluate", str(run_dir), "--tta", "d4"]
    with forked(command, words, folder=tmp_path / "one") as one, forked(command, words, folder=tmp_path / "other") as other:
        assert one.wait() == other.wait() == [0], one.text("err") + other.text("err")
    assert not [*folder.glob(".*")]


@pytest.mark.slow
def test_recipe_with_eval_tta_validates_and_evaluates_with_views(blobs: Path, tmp_path: Path) -> None:
    """A rate of nothing: both runs have the same weights, apart from batch statistics that move alike."""
    losses = {}
    for tta in ("none", "d4"):
        run_dir = tmp_path / tta
        settings = quick_settings(blobs, run_dir, train__epochs=1, optim__lr=1e-12, eval__tta=tta)
        assert run_here(settings) == 0
        (losses[tta],) = [line["val/loss"] for line in read_metrics(run_dir) if "val/loss" in line]
        assert main(["evaluate", str(run_dir), "--split", "val", "--tta", "d4"]) == 0
    averaged = json.loads((tmp_path / "none" / "evaluation" / "val-d4.json").read_text())
    assert losses["d4"] == averaged["loss"] != losses["none"]
    assert (tmp_path / "d4" / "evaluation" / "test-d4.json").exists()
    assert not (tmp_path / "d4" / "evaluation" / "test.json").exists()
    assert main(["evaluate", str(tmp_path / "d4"), "--tta", "none"]) == 0
    counted = ("count", "confusion", "accuracy", "per_class", "step", "tta", "manifest_hash")
    one, other = read_evaluation(tmp_path / "d4"), read_evaluation(tmp_path / "none")
    assert {key: one[key] for key in counted} == {key: other[key] for key in counted}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("batch_size", "size"), [(4, 2), (10, 3)], ids=["uneven", "an-idle-rank"])
def test_tta_evaluation_is_bit_equal_on_any_number_of_processes(tmp_path: Path, batch_size: int, size: int) -> None:
    """19 galaxies in 5 batches (3 + 2) or in 2 (one of three ranks has none)."""
    manifest = write_shards(BlobSurvey(num_galaxies=115), tmp_path / "shards", encoding="png", workers=1)
    assert manifest.splits["test"].num_samples == 19
    run_dir = tmp_path / "run"
    settings = quick_settings(
        manifest.path, run_dir, train__epochs=1, train__threads=1, eval__batch_size=batch_size, eval__tta="d4"
    )
    assert run_here(settings) == 0
    path = run_dir / "evaluation" / "test-d4.json"
    found, predicted = [], []
    for world_size in (1, size):
        for file in (run_dir / "evaluation").iterdir():
            file.unlink()
        done = run_forked(train, settings, size=world_size)
        assert done.returncode == 0, done.stderr
        assert f"galaxydist: {world_size} process" in done.stderr and "is finished" in done.stderr
        assert "1 thread each" in done.stderr  # two threads add the numbers of an image in another order
        found.append(json.loads(path.read_text()))
        predicted.append([(path.parent / f"{split}-d4-predictions.parquet").read_bytes() for split in ("test", "val")])
        assert not [file.name for file in path.parent.iterdir() if file.name.startswith(".")]
    assert found[0] == found[1] and predicted[0] == predicted[1]
    logits_NK = read_predictions(path.parent / "test-d4-predictions.parquet").column("logits")
    assert logits_NK.shape == (19, 3) and np.isfinite(logits_NK).all()
    assert found[0]["count"] == 19 and found[0]["tta"] == "d4"
