"""The public Python API: its names, cheap to import, each works on a tiny simulated survey, and all are documented."""

import subprocess
import sys
from pathlib import Path

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

ROOT = Path(__file__).parents[2]
NAMES = [
    "EvalLoader",
    "TrainLoader",
    "build_model",
    "evaluate",
    "load_recipe",
    "open_shards",
    "simulate_survey",
    "train",
    "write_shards",
]


def test_the_names_are_these_and_documented() -> None:
    assert [name for name in galaxydist.__all__ if name != "__version__"] == NAMES
    assert set(dir(galaxydist)) == set(galaxydist.__all__)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"### `{name}(" in page, name
        assert getattr(galaxydist, name).__doc__, name


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        galaxydist.tain  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, galaxydist; print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_from_a_simulated_survey_to_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path))
    simulate_survey(tmp_path / "survey.h5", num_galaxies=100, seed=0)
    manifest = write_shards(tmp_path / "survey.h5", tmp_path / "shards", image_size=64)
    assert open_shards(manifest.location).hash == open_shards(tmp_path / "shards").hash == manifest.hash
    with TrainLoader(manifest, seed=0, batch_size=8) as loader:
        assert next(loader).images_BHWC.shape == (8, 64, 64, 3)
    with EvalLoader(manifest, "test", batch_size=8) as test_loader:
        assert sum(int(batch.weights_B.sum()) for batch in test_loader) == manifest.splits["test"].num_samples
    keys = [
        "data.image_size=32",
        "data.num_streams=8",
        "model.width=4",
        "train.epochs=1",
        "train.batch_size=12",
        "eval.figures=false",
    ]
    recipe = load_recipe(["demo", f"data.manifest={manifest.location}", f"run.dir={tmp_path / 'run'}", *keys])
    model = build_model(recipe.recipe.model, manifest.num_classes, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, manifest.num_classes)
    run_dir = train(recipe)
    assert run_dir == tmp_path / "run" and (run_dir / "result.json").is_file()
    metrics = evaluate(run_dir, "val")
    assert metrics["count"] == manifest.splits["val"].num_samples == sum(map(sum, metrics["confusion"]))
    assert train(recipe) == run_dir, "a finished run is not trained again"
    with pytest.raises(UserError):
        evaluate(tmp_path / "nothing")
