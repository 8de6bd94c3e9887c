"""Shards, run folders and checkpoints that were written before the modules were moved: read, continued, evaluated, reported."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galaxydist.cli.main import main
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.gallery.choose import choose_mistakes
from galaxydist.runs.folder import RunFolder
from tests.helpers.runs import PYTHON, launch, quick_settings, read_losses, run_here, without_figures

ARCHIVE = Path(__file__).parents[1] / "data" / "before_redesign" / "runs.tar.xz"
# The command of `stopped` and `continued`.
SETTINGS: dict[str, object] = {
    "data__dataset": "blobs",
    "data__image_size": 16,
    "data__num_streams": 4,
    "model__weights": "weights.safetensors",
    "model__freeze_backbone": "true",
    "optim__lr": 0.02,
    "train__batch_size": 16,
    "train__epochs": 20,
    "train__log_every": 1,
    "train__ema": 0.9,
    "train__patience": 30,
    "eval__batch_size": 8,
    "train__threads": 1,
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def older_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the data root ``data`` and the runs ``stopped``, ``continued`` and ``adagrad``."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALAXYDIST_DATA", "data")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


def settings(run: str, **changes: object) -> list[str]:
    return [word for word in quick_settings("", Path(run), **SETTINGS | changes) if word != "data.manifest="]


def read(run: str, name: str) -> Any:
    return json.loads((Path(run) / name).read_text())


def test_data_check_accepts_shards_of_an_older_version() -> None:
    assert main(["data", "check", "data/shards/blobs/original"]) == 0


def test_run_of_an_older_version_continues_with_the_same_losses() -> None:
    run_id = read("stopped", "tracker.json")["run_id"]
    # In a process of its own: wandb's part of this one may have been ended by another test.
    done = launch(PYTHON, settings("stopped", tracker__name="wandb", tracker__mode="offline"))
    assert done.returncode == 0, done.stderr
    losses, known = read_losses(Path("stopped")), read_losses(Path("continued"))
    assert losses.keys() == known.keys()
    np.testing.assert_allclose([*losses.values()], [*known.values()], rtol=1e-4)
    assert read("stopped", "result.json") == pytest.approx(read("continued", "result.json"), rel=1e-4)
    assert read("stopped", "tracker.json") == {"run_id": run_id, "stored_step": 60, "is_complete": True}


@pytest.mark.parametrize("run", ["continued", "adagrad"])
def test_evaluation_of_an_older_run_equals_its_stored_result(run: str) -> None:
    known = read(run, "evaluation/test.json")
    (Path(run) / "evaluation/test.json").unlink()
    with without_figures():
        assert main(["evaluate", run]) == 0
    found = read(run, "evaluation/test.json")
    for name in ("step", "checkpoint", "manifest_hash", "count", "classes", "confusion"):
        assert found[name] == known[name]
    for name in ("loss", "accuracy", "balanced_accuracy", "macro_f1", "top2_accuracy"):
        assert found[name] == pytest.approx(known[name], rel=1e-4)
    assert found["roc_auc"]["macro"] == pytest.approx(known["roc_auc"]["macro"], abs=0.02)


def test_gallery_of_an_older_run_chooses_the_same_galaxies() -> None:
    content = read("continued", "evaluation/test-gallery.json")
    chosen = choose_mistakes(read_predictions(Path("continued/evaluation/test-predictions.parquet")), 4)
    for kind, found in (("mistakes", chosen.confident), ("uncertain", chosen.uncertain)):
        known = content[kind]["chosen"]
        assert [[galaxy["id"] for galaxy in of_class] for of_class in known] == [[g.id for g in of_class] for of_class in found]


def test_report_includes_finished_runs_of_an_older_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", ".", "-o", "report.html"]) == 0
    assert "stopped: left out: the run has not finished" in capsys.readouterr().out
    lines = Path("report.md").read_text().splitlines()
    for run in ("continued", "adagrad"):
        accuracy = f"{read(run, 'result.json')['test/accuracy']:.3f}"
        assert any(line.startswith(f"| {run} |") and accuracy in line for line in lines)


def test_a_run_whose_optimizer_is_no_longer_offered_is_not_continued(capsys: pytest.CaptureFixture[str]) -> None:
    longer = settings("adagrad", optim__name="adagrad", train__epochs=4, train__ema=0.0, resume__force="[train.epochs]")
    assert run_here(longer) == 2
    assert "optim.name=adagrad: there is no such optimizer" in capsys.readouterr().err
    assert RunFolder(Path("adagrad")).is_finished and read("adagrad", "recipe.json")["recipe"]["train.epochs"] == 2
