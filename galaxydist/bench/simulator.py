"""How easy the simulated survey is: what a classifier reaches that sees no shapes, or hardly any.

A simulation whose classes could be told by colour and brightness alone would flatter every model trained on it.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import EvaluationData, evaluate_run
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.recipe.resolve import load_recipe
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import FolderSurvey, open_image_folder
from galaxydist.surveys.simulate.population import plan_survey
from galaxydist.surveys.simulate.survey import draw_rows, simulate_survey
from galaxydist.surveys.survey_sources import open_survey
from galaxydist.training.trainer import train

# Above this (balanced accuracy, ten classes) the simulation is too easy.
GUARD_LIMIT = 0.50
_QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
_THUMBNAIL = 16
_FOLDS = 5
_TITLES = {
    "colour": "colour and brightness, logistic regression",
    "colour_centre": "the same in the image's middle half",
    "thumbnail": "16 x 16 pixels, random forest",
}


def colour_features(images_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """B x 21: each channel's mean, standard deviation and quantiles (5, 25, 50, 75, 95 %)."""
    features = []
    for image in images_BHWC:
        pixels = image.reshape(-1, 3).astype(np.float64)
        features.append(
            np.concatenate([pixels.mean(axis=0), pixels.std(axis=0), np.quantile(pixels, _QUANTILES, axis=0).ravel()])
        )
    return np.array(features)


def thumbnails(images_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """B x 768: the images averaged down to 16 x 16 pixels, three channels."""
    size = images_BHWC.shape[1] // _THUMBNAIL
    blocks = images_BHWC.reshape(len(images_BHWC), _THUMBNAIL, size, _THUMBNAIL, size, 3)
    return np.asarray(blocks.mean(axis=(2, 4)).reshape(len(images_BHWC), -1), np.float64)


def _centre(images_BHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    quarter = images_BHWC.shape[1] // 4
    return images_BHWC[:, quarter:-quarter, quarter:-quarter]


def guard_accuracies(images_BHWC: NDArray[np.uint8], labels_B: NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """Stratified five-fold cross-validated balanced accuracies of the two classifiers.

    Args:
        images_BHWC: B x 256 x 256 x 3 uint8.
        labels_B: B class numbers, at least five of each class.
        seed: of the folds and the forest.

    Returns:
        ``colour``: logistic regression on :func:`colour_features`.
        ``colour_centre``: the same on the images' middle halves, where the galaxy is.
        ``thumbnail``: random forest on :func:`thumbnails`.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    trials: dict[str, tuple[Any, Callable[[NDArray[np.uint8]], NDArray[np.float64]]]] = {
        "colour": (make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)), colour_features),
        "colour_centre": (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
            lambda images: colour_features(_centre(images)),
        ),
        "thumbnail": (RandomForestClassifier(500, random_state=seed, n_jobs=-1), thumbnails),
    }
    accuracies = {}
    for name, (model, features) in trials.items():
        predicted = cross_val_predict(model, features(images_BHWC), labels_B, cv=folds)
        accuracies[name] = float(np.mean([np.mean(predicted[labels_B == label] == label) for label in np.unique(labels_B)]))
    return accuracies


def measure_guards(
    num_galaxies: int = 1000, seed: int = 0, real_dir: Path | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Draw a class-balanced simulated set, measure both guards, print a table and, as the last line, the result as JSON.

    Args:
        num_galaxies: size of the simulated set.
        seed: of the simulated set and the classifiers.
        real_dir: a folder of real galaxies (``<label>/<row>.jpg``, 256 x 256) to measure beside it.
        workers: processes to draw with.

    Returns:
        ``{"num_galaxies", "seed", "limit", "simulated": {guard: accuracy}, "real": ... or None, "passed"}``.

    Raises:
        UserError: too few galaxies for five folds, or no images in ``real_dir``.
    """
    if num_galaxies < len(GALAXY10_CLASSES) * _FOLDS:
        raise UserError(f"the guards need at least {len(GALAXY10_CLASSES) * _FOLDS} galaxies, not {num_galaxies}")
    plan = plan_survey(num_galaxies, seed, balanced=True)
    simulated = guard_accuracies(draw_rows(plan, workers, "simulate"), plan.labels, seed)
    real = guard_accuracies(*_read_real(real_dir), seed) if real_dir else None
    passed = max(simulated.values()) <= GUARD_LIMIT
    print(f"{'balanced accuracy, five-fold':<48}{'simulated':>10}{'real':>8}{'limit':>8}")
    for name, text in _TITLES.items():
        shown = f"{real[name]:8.1%}" if real else f"{'-':>8}"
        print(f"{text:<48}{simulated[name]:10.1%}{shown}{GUARD_LIMIT:8.0%}")
    result = {
        "num_galaxies": num_galaxies,
        "seed": seed,
        "limit": GUARD_LIMIT,
        "simulated": simulated,
        "real": real,
        "passed": passed,
    }
    print(json.dumps(result))
    return result


def _read_real(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image

    paths = sorted(path for label in range(len(GALAXY10_CLASSES)) for path in (folder / str(label)).glob("*.jpg"))
    if not paths:
        raise UserError(f"no images in {folder}: expected <label>/<row>.jpg with labels 0 ... 9")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, np.array([int(path.parent.name) for path in paths])


# How much a simulated survey is like the sky: train on simulated galaxies alone, test on real ones.

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
            "tuning": evaluate_run(run_dir, "train", environ, EvaluationData(real.path)),
            "held_out": evaluate_run(run_dir, "test", environ, EvaluationData(real.path)),
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
