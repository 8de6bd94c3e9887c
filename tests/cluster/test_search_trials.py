"""Trials of a search as a job's ranks train them: one question for values, pruning, stops, and the search on this machine."""

import json
import os
import shlex
from functools import partial
from pathlib import Path

import pytest

from galaxydist.cli.main import main
from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.search.search_files import SearchRecord, read_trial, trial_dir
from galaxydist.cluster.search.search_space import Choices, Dimension, Interval, draw
from galaxydist.cluster.search.search_study import SearchStudy
from galaxydist.cluster.search.trial import train_trial
from galaxydist.cluster.status import read_overview, read_progress
from galaxydist.recipe.identity import result_fields
from galaxydist.recipe.resolve import load_recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.training.launch import launch
from tests.helpers.forked_runs import run_forked
from tests.helpers.runs import quick_settings

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
# Of the first three trials of this seed the second has the rate at which nothing is learnt.
RATES, SEED = Choices((0.01, 1e-6)), 11


def arguments_of(manifest: Path, run_dir: Path) -> list[str]:
    changes = {"optim__lr": None, "train__epochs": 4, "train__metric": "loss", "model__norm": "group"}
    return quick_settings(manifest, run_dir, **changes)


def write_record(root: Path, arguments: list[str], space: dict[str, Dimension]) -> SearchRecord:
    base = {key: value for key, value in result_fields(load_recipe(arguments).recipe).items() if key not in space}
    record = SearchRecord(space, "random", "asha", SEED, "loss", json.loads(json.dumps(base)))
    record.write(root)
    return record


def train(arguments: list[str], run_dir: Path) -> int:
    return launch(arguments, os.environ, work=partial(train_trial, run_dir=run_dir))


def test_ranks_of_a_trial_train_with_the_same_values_and_a_poor_one_is_pruned(blobs: Path, tmp_path: Path) -> None:
    space: dict[str, Dimension] = {"optim.lr": RATES, "optim.beta2": Interval(0.9, 0.999)}
    folders = [RunFolder(trial_dir(tmp_path, number)) for number in range(2)]
    record = write_record(tmp_path, arguments_of(blobs, folders[0].path), space)
    for number, folder in enumerate(folders):
        done = run_forked(train, arguments_of(blobs, folder.path), folder.path, size=2)
        assert done.returncode == 0, done.stderr
        values = read_trial(folder.path)
        assert values == draw(space, SEED, number)
        recipe = folder.read_recipe().recipe
        assert {key: recipe[key] for key in space} == values
    assert [(folder.is_finished, folder.is_pruned) for folder in folders] == [(True, False), (False, True)]
    study = SearchStudy(tmp_path, record)
    best = study.best()
    assert best is not None and best[0] == 0 and study.running() == []
    lines = [json.loads(line) for line in folders[0].metrics_path.read_text().splitlines()]
    assert best[1] == min(line["val/loss"] for line in lines if "val/loss" in line)
    pruned = json.loads(folders[1].pruned_path.read_text())
    assert pruned["value"] > best[1]

    done = run_forked(train, arguments_of(blobs, folders[1].path), folders[1].path)  # as after a kill at the very end
    assert done.returncode == 0 and folders[1].is_pruned, done.stderr


def test_local_search_shows_its_trials_and_continues_with_more(
    blobs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    path, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    settings = [argument.replace("=", ": ", 1) for argument in arguments_of(blobs, root) if not argument.startswith("run.dir")]
    common = "\n".join(["cluster: local", "parallel: 1", f"root: {root}", "set:", *(f"  {setting}" for setting in settings)])
    search = f"search: {{optim.lr: {list(RATES.values)}}}\nmethod: random\nseed: {SEED}\nprune: asha\n"

    def command(num_trials: int, *words: str) -> str:
        path.write_text(f"{common}\n{search}trials: {num_trials}\n")
        assert main(["sweep", str(path), *words]) == 0
        shown = capfd.readouterr()
        return shown.out + shown.err

    assert "2 runs: 2 to submit (2 new)" in command(2, "--dry-run") and not root.exists()
    shown = command(2, "--yes")
    assert "finished trial-000" in shown and "pruned   trial-001" in shown and "2 runs did not finish" not in shown
    best = read_progress(RunFolder(root / "trial-000")).best
    assert f"best trial  trial-000: loss {best:.4f} (val), optim.lr=0.01\n" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("train it")]
    words = shlex.split(line.removeprefix("train it"))
    assert words[:3] == ["galaxydist", "train", "recipe=custom_cnn"] and load_recipe(words[2:]).recipe.optim.lr == 0.01

    shown = command(3, "--yes")
    rows = {row.split()[0]: row.split()[1:] for row in shown.splitlines() if row.startswith("trial-")}
    assert rows["trial-000"] == ["optim.lr=0.01", "finished", f"{best:.4f}", "leave"]
    assert rows["trial-001"][:2] == ["optim.lr=1e-06", "pruned"] and rows["trial-002"] == ["new", "submit"]
    assert "3 runs: 1 finished, 1 pruned, 1 to submit (1 new)" in shown
    assert shown.count("started ") == 1 == shown.count("finished trial-002")
    assert [len(JobFiles(folder).jobs()) for folder in sorted(root.glob("trial-*"))] == [1, 1, 1]
    overview = read_overview([root])
    assert {status.name: (status.state, status.label) for status in overview.runs} == {
        "trial-000": ("FINISHED", "lr=0.01"),
        "trial-001": ("PRUNED", "lr=1e-06"),
        "trial-002": ("FINISHED", "lr=0.01"),
    }
    assert "3 runs: 2 finished, 1 pruned" in command(3, "--yes")
