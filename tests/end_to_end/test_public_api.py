"""The public Python API: its names, cheap to import, each works on a tiny simulated survey, and all are documented."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import galaxydist
from galaxydist import (
    EvalLoader,
    TrainLoader,
    build_model,
    evaluate,
    load_recipe,
    open_shards,
    simulate_survey,
    train,
    write_shards,
)
from galaxydist.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
TINY = [
    "data.image_size=32",
    "data.num_streams=8",
    "model.width=4",
    "train.epochs=1",
    "train.batch_size=12",
    "eval.figures=false",
]
NAMES = [
    "EvalLoader",
    "RankInfo",
    "TrainLoader",
    "build_model",
    "evaluate",
    "load_predictor",
    "load_recipe",
    "open_shards",
    "simulate_survey",
    "train",
    "write_shards",
]


def test_public_api_has_exactly_the_documented_names() -> None:
    assert [name for name in galaxydist.__all__ if name != "__version__"] == NAMES
    assert set(dir(galaxydist)) == set(galaxydist.__all__)
    page = PAGE.read_text(encoding="utf-8")
    for name in NAMES:
        assert f"### `{name}(" in page, name
        assert getattr(galaxydist, name).__doc__, name


def test_unknown_name_of_the_package_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        galaxydist.tain  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, galaxydist; print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    example = example.replace("num_galaxies=1500", "num_galaxies=100").replace('"train.epochs=3"', ", ".join(map(repr, TINY)))
    found: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), found)
    manifest, run_dir, metrics = found["manifest"], found["run_dir"], found["metrics"]
    assert metrics["count"] == manifest.splits["test"].num_samples == sum(map(sum, metrics["confusion"]))
    assert (run_dir / "result.json").is_file() and run_dir.is_relative_to("runs")
    assert train(found["recipe"]) == run_dir, "a finished run is not trained again"
    with pytest.raises(UserError):
        evaluate(tmp_path / "nothing")


def test_public_loaders_and_models_work_on_shards_of_a_simulated_survey(tmp_path: Path) -> None:
    simulate_survey(tmp_path / "survey.h5", num_galaxies=60, seed=0, workers=1)
    manifest = write_shards(tmp_path / "survey.h5", tmp_path / "shards", image_size=64, workers=1)
    assert open_shards(manifest.location).hash == open_shards(tmp_path / "shards").hash == manifest.hash
    with TrainLoader(manifest, seed=0, batch_size=8) as loader:
        batch = next(loader)
    assert batch.images_BHWC.shape == (8, 64, 64, 3) and batch.images_BHWC.dtype == torch.uint8
    with EvalLoader(manifest, "test", batch_size=8) as test_loader:
        assert sum(int(batch.weights_B.sum()) for batch in test_loader) == manifest.splits["test"].num_samples
    recipe = load_recipe(["demo", "model.width=4"])
    model = build_model(recipe.recipe.model, manifest.num_classes, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, manifest.num_classes)
