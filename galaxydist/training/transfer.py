"""How much a simulated survey is like the sky: train on simulated galaxies alone, test on real ones."""

import dataclasses
import json
import re
import statistics
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import evaluate_run
from galaxydist.recipe.resolve import load_recipe
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import FolderSurvey, open_image_folder
from galaxydist.surveys.simulate import simulate_survey
from galaxydist.surveys.survey_sources import open_survey
from galaxydist.training.trainer import train

# Rows of each class (the first ones) on which simulator, recipe and checkpoint may be chosen; the figure is from the others.
TUNING_ROWS = 50


def measure_transfer(
    real_dir: Path,
    work_dir: Path,
    environ: MutableMapping[str, str],
    *,
    num_galaxies: int = 3000,
    seeds: int = 3,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train the demo's recipe on class-balanced simulated galaxies and test it on real ones; print a table and a JSON line.

    Nothing is chosen: fixed epochs, the last (averaged) weights. The real galaxies stand in two halves: ``tuning``, the first 50
    rows of each class, on which the simulator was made to look right, and ``held_out``, the rest, from which the figure is.
    A second call takes up what the first one finished.

    Args:
        real_dir: ``<label>/<row>.jpg``.
        work_dir: where shards and runs are kept.
        environ: the process's environment.
        num_galaxies: simulated ones, seed 1.
        seeds: number of training runs, seeds 0, 1, ...
        overrides: further ``key=value`` of the recipe.

    Returns:
        Accuracy (balanced over the classes) by test set, mean and single seeds.

    Raises:
        UserError: no real galaxies there, or a recipe that cannot be used.
    """
    simulated = _simulated_shards(work_dir, num_galaxies)
    real = write_shards(
        split_by_row(open_image_folder(real_dir, name="real_sample", fold=(0, 2), classes="galaxy10")), work_dir / "real"
    )
    found: dict[str, list[float]] = {"simulated": [], "tuning": [], "held_out": []}
    for seed in range(seeds):
        run_dir = work_dir / "runs" / f"seed-{seed}"
        settings = [f"data.manifest={simulated.path}", f"seed={seed}", f"run.dir={run_dir}", "eval.checkpoint=last", *overrides]
        if train(load_recipe(["recipe=demo", *settings]), environ):
            raise UserError(f"stopped; the same command continues with {run_dir}")
        evaluations = {
            "simulated": evaluate_run(run_dir, "test", environ),
            "tuning": evaluate_run(run_dir, "train", environ, manifest_path=real.path),
            "held_out": evaluate_run(run_dir, "test", environ, manifest_path=real.path),
        }
        for name, evaluation in evaluations.items():
            found[name].append(evaluation["balanced_accuracy"])
    result = {
        "task": "transfer",
        "train": "simulated",
        "num_galaxies": num_galaxies,
        **{name: {"mean": statistics.fmean(values), "seeds": values} for name, values in found.items()},
    }
    print(f"\ntrained on {num_galaxies:,} simulated galaxies; balanced accuracy, mean of {seeds} seeds:")
    for name, values in found.items():
        print(f"  {name:<10} {statistics.fmean(values):.3f}   ({', '.join(f'{value:.3f}' for value in values)})")
    print(json.dumps(result))
    return result


def split_by_row(survey: FolderSurvey) -> FolderSurvey:
    """The first rows of each class as ``train`` (the tuning half), the others as ``test`` (held out).

    Raises:
        UserError: files whose names are not row numbers.
    """
    rows: list[int] = []
    for file in survey.files:
        if (match := re.fullmatch(r"\d+", Path(file).stem)) is None:
            raise UserError(f"{survey.root / file} is not named by its row in the official file, as <label>/<row>.jpg")
        rows.append(int(match[0]))
    is_tuning = np.zeros(len(rows), bool)
    for label in np.unique(survey.labels):
        members = np.flatnonzero(survey.labels == label)
        is_tuning[members[np.argsort(np.asarray(rows)[members])][:TUNING_ROWS]] = True
    splits = {"train": np.flatnonzero(is_tuning), "test": np.flatnonzero(~is_tuning)}
    return dataclasses.replace(survey, splits=splits)


def _simulated_shards(work_dir: Path, num_galaxies: int) -> Manifest:
    path = work_dir / f"simulated-{num_galaxies}.h5"
    if not path.exists():
        work_dir.mkdir(parents=True, exist_ok=True)
        simulate_survey(path, num_galaxies, seed=1, balanced=True)
    return write_shards(open_survey(path), work_dir / f"simulated-{num_galaxies}")
