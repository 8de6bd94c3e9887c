"""``galaxydist bench folds --recipe``: one recipe and its starting weights, cross-validated on simulated galaxies."""

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from galaxydist.bench import real_galaxies
from galaxydist.bench.real_galaxies import measure_recipe
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.models.build import build_model
from galaxydist.models.weights import write_weights
from galaxydist.recipe.resolve import load_recipe
from galaxydist.surveys.simulate.survey import draw_rows, plan_survey

MODEL = ("model.width=8", "data.image_size=32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four simulated galaxies of each class, named after their rows as in the real sample."""
    folder, plan = tmp_path_factory.mktemp("images"), plan_survey(40, 3, balanced=True)
    for row, image in enumerate(draw_rows(plan, workers=1)):
        target = folder / str(plan.labels[row])
        target.mkdir(exist_ok=True)
        cv2.imwrite(str(target / f"{100 + row}.png"), np.ascontiguousarray(image[:, :, ::-1]))
    return folder


@pytest.mark.slow
def test_a_recipe_is_measured_on_every_fold_with_its_start_and_on_the_held_out_rows(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(load_recipe(["recipe=custom_cnn", *MODEL]).recipe.model, 10, 32)
    with torch.no_grad():
        model.get_parameter("head.bias")[3] += 1e6
    write_weights(tmp_path / "all-in-between.safetensors", model.state_dict())
    monkeypatch.setattr(real_galaxies, "TUNING_ROWS", 2)
    command = ["bench", "folds", "--real", str(images), "--data-dir", str(tmp_path), "--folds", "2", "--recipe", "custom_cnn"]
    command += [*MODEL, f"model.weights={tmp_path / 'all-in-between.safetensors'}", "train.epochs=1", "train.batch_size=12"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["start"]["folds"] == pytest.approx([0.1, 0.1]), "one class of ten"
    tables = [pq.read_table(path).to_pydict() for path in (tmp_path / "bench").rglob("test-predictions.parquet")]
    assert len(tables) == 2 and sum(len(table["id"]) for table in tables) == 40, "every galaxy is tested once"
    right = {row: a == b for table in tables for row, a, b in zip(*(table[k] for k in ("id", "label", "predicted")), strict=True)}
    assert found["accuracy"]["mean"] == pytest.approx(sum(right.values()) / 40)
    first_rows = {str(100 + 4 * label + k) for label in range(10) for k in (0, 1)}
    held_out = [
        np.mean([right[row] for row in table["id"] if row not in first_rows]) for table in tables if set(table["id"]) - first_rows
    ]
    assert sorted(found["held_out"]["folds"]) == pytest.approx(sorted(held_out))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found, "a second call trains nothing"


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("custom_cnn", ["eval.checkpoint=best"], "the comparison itself sets"),
        ("smal", [], "no such recipe"),
        ("custom_cnn", ["train.epoch=3"], "train.epochs"),
    ],
)
def test_fold_measurement_refuses_bad_recipes_before_writing(
    recipe: str, overrides: list[str], words: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        measure_recipe(recipe, images, tmp_path / "work", {}, overrides=overrides)
    assert not (tmp_path / "work").exists()
