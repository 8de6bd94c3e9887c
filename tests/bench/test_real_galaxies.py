"""``galaxydist bench folds`` on drawn blobs: whole, stopped on the way, and a second time."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest

from galaxydist.bench import real_galaxies
from galaxydist.bench.real_galaxies import StepCost, mean_and_error, measure_folds
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from tests.helpers.blobs import CLASS_NAMES, BlobSurvey


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 blobs in class folders."""
    folder = tmp_path_factory.mktemp("images")
    for name in CLASS_NAMES:
        (folder / name).mkdir()
    for number, galaxy in enumerate(BlobSurvey().read(0, 120)):
        cv2.imwrite(str(folder / CLASS_NAMES[number % 3] / f"{number}.png"), galaxy.image)
    return folder


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.slow
def test_interrupted_fold_comparison_continues_and_a_finished_one_trains_no_model(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", "folds", "--real", str(images), "--data-dir", str(tmp_path), "--minutes", "0.005", "--folds", "2"]
    command += ["--models", "d4_cnn,custom_cnn", "data.image_size=32", "model.width=8", "train.batch_size=12"]
    real_train, trained = real_galaxies.train, []

    def stops_third(resolved: Any, environ: Any) -> int:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((resolved.recipe.model.name, resolved.recipe.train.epochs))
        return real_train(resolved, environ)

    monkeypatch.setattr(real_galaxies, "train", stops_third)
    assert main(command) == 130
    costs = (tmp_path / "bench" / "folds" / "costs.json").read_bytes()

    def goes_on(resolved: Any, environ: Any) -> int:
        trained.append((resolved.recipe.model.name, resolved.recipe.train.epochs))
        return real_train(resolved, environ)

    monkeypatch.setattr(real_galaxies, "train", goes_on)
    capsys.readouterr()
    assert main(command) == 0
    first = last_json(capsys)
    assert [name for name, _ in trained] == ["d4_cnn", "custom_cnn"] * 2
    assert trained[:2] == trained[2:], "the same epochs on every fold, also after a stop"
    assert (tmp_path / "bench" / "folds" / "costs.json").read_bytes() == costs

    assert main(command) == 0
    assert last_json(capsys) == first and len(trained) == 4
    assert (first["task"], first["num_folds"]) == ("folds", 2) and list(first["models"]) == ["d4_cnn", "custom_cnn"]
    for row in first["models"].values():
        assert row["epochs"] == max(1, round(0.3 / (row["seconds_per_step"] * 5)))  # 60 training blobs, 5 steps an epoch
        assert len(row["processor_minutes"]) == 2 and min(row["processor_minutes"]) >= 0
        assert row["accuracy"]["mean"] == pytest.approx(sum(row["accuracy"]["folds"]) / 2)
    assert first["models"]["d4_cnn"]["behind_the_first"] == {"mean": 0, "standard_error": 0, "folds": [0, 0]}
    own, other = (first["models"][name]["accuracy"]["mean"] for name in first["models"])
    assert first["models"]["custom_cnn"]["behind_the_first"]["mean"] == pytest.approx(own - other)
    tests = [json.loads(path.read_text()) for path in (tmp_path / "bench").rglob("evaluation/test.json")]
    assert len(tests) == 4 and sum(test["count"] for test in tests) == 240, "every galaxy is tested once a model"


def test_slower_model_gets_fewer_whole_epochs_for_equal_time(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    """A model whose step takes twice as long gets half the epochs; nothing is trained here."""
    monkeypatch.setattr(
        real_galaxies, "measure_costs", lambda recipes, _: dict(zip(recipes, (StepCost(0.5, 1), StepCost(1.0, 1)), strict=True))
    )
    epochs = []

    def look(resolved: Any, _: Any) -> int:
        epochs.append(resolved.recipe.train.epochs)
        assert (resolved.recipe.eval.checkpoint, resolved.recipe.train.patience) == ("last", 0)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        monkeypatch.setattr(real_galaxies, "read_evaluation", lambda *_: {"accuracy": 0.5})
        return 0

    monkeypatch.setattr(real_galaxies, "train", look)
    arguments = {"minutes": 1.0, "num_folds": 2, "models": ["d4_cnn", "custom_cnn"], "overrides": ["train.batch_size=12"]}
    with pytest.raises(KeyboardInterrupt):
        measure_folds(images, tmp_path, {}, **arguments)
    assert epochs == [24, 12]


def test_mean_and_error_divides_the_deviation_by_the_root_of_the_count() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == {"mean": 2.0, "standard_error": pytest.approx(1 / 3**0.5), "folds": [1, 2, 3]}


@pytest.mark.parametrize(
    ("models", "overrides", "words"),
    [
        (["d4_cnn", "lenet"], [], "'lenet'"),
        (["d4_cnn", "d4_cnn"], [], "'d4_cnn' is given twice"),
        (["d4_cnn"], ["train.epochs=3"], "train.epochs=3: the comparison itself sets"),
        (["d4_cnn"], ["seed"], "'seed' is no key=value"),
        (["d4_cnn"], ["optim.rate=3"], "optim.rate"),
        (["resnet18"], ["model.width=8"], "model.width"),
    ],
)
def test_fold_comparison_refuses_bad_models_and_overrides_before_writing(
    models: list[str], overrides: list[str], words: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        measure_folds(images, tmp_path / "work", {}, models=models, overrides=overrides)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_bench_folds_refuses_minutes_that_are_not_a_number_above_0(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "folds", "--real", ".", "--minutes", value])
    assert "is not a number above 0" in capsys.readouterr().err
