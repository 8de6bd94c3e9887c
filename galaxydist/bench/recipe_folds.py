"""``galaxydist bench folds --recipe NAME``: cross-validation of one recipe, and of its start, on real galaxies."""

import json
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.bench.common import show
from galaxydist.bench.real_galaxies import fit, mean_and_error, read_overrides, write_folds
from galaxydist.bench.simulator import TUNING_ROWS
from galaxydist.cpus import available_cores
from galaxydist.distributed import open_world
from galaxydist.evaluation.inference import evaluate_split
from galaxydist.evaluation.predictions import predictions_path, read_predictions
from galaxydist.evaluation.results_files import stem_of
from galaxydist.loading.training_data import TrainingData, build_augment
from galaxydist.models.build import build_model
from galaxydist.recipe.identity import run_name
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest

FIXED = ("recipe", "data.manifest", "eval.checkpoint", "run.dir", "run.root", "tracker.name")


def measure_recipe(
    recipe: str,
    real_dir: Path,
    work_dir: Path,
    environ: MutableMapping[str, str],
    *,
    num_folds: int = 3,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a recipe on every fold of a folder of real galaxies and test it on the rest; print a table and a JSON line.

    Nothing is chosen on a test fold: the recipe's epochs are fixed, and its last weights are evaluated. Images are in folders
    named 0 to 9 or after Galaxy10's classes. A second call continues where the first one stopped.

    Args:
        recipe: name or path.
        real_dir: ``<class>/<image>``, without split folders.
        work_dir: folder for shards and runs.
        environ: environment of the process.
        num_folds: number of stratified folds; each is the test set once.
        overrides: further ``key=value`` of the recipe.

    Returns:
        The content of the JSON line. ``held_out`` is the accuracy on the galaxies after the first rows of each class, with which
        the simulator was made; None if the files are not named after rows. ``start`` is the accuracy of the weights that the
        recipe starts from; None for random weights.

    Raises:
        UserError: no images, or a recipe or setting that cannot be used, before anything is trained; stopped by a signal.
    """
    extra = read_overrides(overrides, FIXED)
    own = {"recipe": recipe, "run.root": str(work_dir / "runs"), "eval.checkpoint": "last", "tracker.name": "none"}
    arguments = [f"{key}={value}" for key, value in {**own, "eval.figures": "false", **extra}.items()]
    load_recipe(arguments)
    manifests = write_folds(real_dir, work_dir, num_folds, classes="galaxy10")
    found: dict[str, list[Any]] = {"accuracy": [], "balanced_accuracy": [], "held_out": [], "start": [], "processor_minutes": []}
    for fold, manifest in enumerate(manifests, start=1):
        resolved = load_recipe([*arguments, f"data.manifest={manifest.path}"])
        found["start"].append(_start_accuracy(resolved.recipe, manifest, environ))
        size, epochs = manifest.splits["train"].num_samples, resolved.recipe.train.epochs
        show(f"\nfold {fold} of {num_folds}: {size} galaxies, {epochs} epochs")
        evaluation = fit(resolved, environ)
        for key in ("accuracy", "balanced_accuracy", "processor_minutes"):
            found[key].append(evaluation[key])
        found["held_out"].append(_held_out_accuracy(resolved.recipe, real_dir))
    known = {key: mean_and_error(values) if None not in values else None for key, values in found.items()}
    show(f"\n{recipe} {' '.join(overrides)}: mean over {num_folds} folds and standard error")
    titles = {
        "accuracy": "accuracy on the test fold",
        "held_out": f"the same without the first {TUNING_ROWS} rows of each class",
        "start": "accuracy of the starting weights",
    }
    for key, title in titles.items():
        if (row := known[key]) is not None:
            values = ", ".join(f"{100 * value:.1f}" for value in row["folds"])
            show(f"  {title:<48} {100 * row['mean']:.1f} +- {100 * row['standard_error']:.1f} % ({values})")
    show(f"  {'CPU minutes of a fold':<48} {fmean(found['processor_minutes']):.1f}")
    result = {"task": "folds", "recipe": recipe, "overrides": extra, "num_folds": num_folds, **known}
    show(json.dumps(result))
    return result


def _start_accuracy(recipe: Recipe, manifest: Manifest, environ: MutableMapping[str, str]) -> float | None:
    """Return the test accuracy before the first step; None if the head starts from random weights."""
    if recipe.model.weights is None and not recipe.model.pretrained:
        return None
    with open_world(recipe.train.precision, environ) as world:
        model = build_model(recipe.model, manifest.num_classes, recipe.data.image_size).to(world.device)
        augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=available_cores())
        return float(evaluate_split(world, model, manifest, "test", augment=augment, recipe=recipe)["accuracy"])


def _held_out_accuracy(recipe: Recipe, real_dir: Path) -> float | None:
    """Return the accuracy of a run's test predictions without the first ``TUNING_ROWS`` rows of each class folder."""
    rows = {folder.name: sorted(int(path.stem) for path in folder.iterdir()) for folder in _row_folders(real_dir)}
    tuning = {row for folder in rows.values() for row in folder[:TUNING_ROWS]}
    path = predictions_path(RunFolder(recipe.run.root / run_name(recipe)).evaluation_dir, stem_of("test", recipe.eval.tta))
    is_correct: list[NDArray[np.bool_]] = []
    for columns in read_predictions(path).batches(("id", "label", "predicted")):
        if not all(str(name).isdecimal() for name in columns["id"]):
            return None
        is_held_out = np.array([int(name) not in tuning for name in columns["id"]])
        is_correct.append((columns["label"] == columns["predicted"])[is_held_out])
    correct = np.concatenate(is_correct)
    return float(correct.mean()) if rows and len(correct) else None


def _row_folders(real_dir: Path) -> list[Path]:
    folders = [folder for folder in sorted(real_dir.iterdir()) if folder.is_dir()]
    return [folder for folder in folders if all(re.fullmatch(r"\d+", path.stem) for path in folder.iterdir())]
