"""``galaxydist bench simulator`` and ``transfer``: difficulty and realism of the simulated survey.

A simulation whose classes could be recognised by colour and brightness alone would flatter every model trained on it.
"""

import dataclasses
import json
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.bench.common import show
from galaxydist.bench.loader_speed import simulated_shards
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import EvaluationData, evaluate_run
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.recipe.resolve import load_recipe
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.simulate.survey import draw_rows, plan_survey
from galaxydist.surveys.tables.listed_images import ListedImages
from galaxydist.training.trainer import train

# Balanced accuracy of ten classes above which the simulation is too easy.
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
    """Return each channel's mean, standard deviation and quantiles (5, 25, 50, 75, 95 %) of each image, B x 21."""
    features = []
    for image in images_BHWC:
        pixels = image.reshape(-1, 3).astype(np.float64)
        features.append([pixels.mean(axis=0), pixels.std(axis=0), *np.quantile(pixels, _QUANTILES, axis=0)])
    return np.array(features).reshape(len(images_BHWC), -1)


def thumbnails(images_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the images averaged down to 16 x 16 pixels with three channels, B x 768."""
    size = images_BHWC.shape[1] // _THUMBNAIL
    blocks = images_BHWC.reshape(len(images_BHWC), _THUMBNAIL, size, _THUMBNAIL, size, 3)
    return np.asarray(blocks.mean(axis=(2, 4)).reshape(len(images_BHWC), -1), np.float64)


def guard_accuracies(images_BHWC: NDArray[np.uint8], labels_B: NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """Return the stratified five-fold cross-validated balanced accuracies of the two classifiers.

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
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    quarter = images_BHWC.shape[1] // 4
    guards = {
        "colour": (regression, colour_features(images_BHWC)),
        "colour_centre": (regression, colour_features(images_BHWC[:, quarter:-quarter, quarter:-quarter])),
        "thumbnail": (RandomForestClassifier(500, random_state=seed, n_jobs=-1), thumbnails(images_BHWC)),
    }
    return {
        name: float(balanced_accuracy_score(labels_B, cross_val_predict(model, features, labels_B, cv=folds)))
        for name, (model, features) in guards.items()
    }


def measure_guards(
    num_galaxies: int = 1000, seed: int = 0, real_dir: Path | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Draw a class-balanced simulated set, measure the guards, print a table and, last, a line of JSON.

    Args:
        num_galaxies: size of the simulated set.
        seed: of the simulated set and the classifiers.
        real_dir: a folder of real galaxies (``<label>/<row>.jpg``, 256 x 256) to compare with.
        workers: number of processes that draw.

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
    show(f"{'balanced accuracy, five-fold':<48}{'simulated':>10}{'real':>8}{'limit':>8}")
    for name, text in _TITLES.items():
        of_real = f"{real[name]:8.1%}" if real else f"{'-':>8}"
        show(f"{text:<48}{simulated[name]:10.1%}{of_real}{GUARD_LIMIT:8.0%}")
    result: dict[str, Any] = {
        "num_galaxies": num_galaxies,
        "seed": seed,
        "limit": GUARD_LIMIT,
        "simulated": simulated,
        "real": real,
        "passed": max(simulated.values()) <= GUARD_LIMIT,
    }
    show(json.dumps(result))
    return result


def _read_real(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image

    paths = sorted(path for label in range(len(GALAXY10_CLASSES)) for path in (folder / str(label)).glob("*.jpg"))
    if not paths:
        raise UserError(f"no images in {folder}: expected <label>/<row>.jpg with labels 0 ... 9")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, np.array([int(path.parent.name) for path in paths])


# Likeness to the sky: training on simulated galaxies alone, test on real ones.

# Number of first rows of each class that are used to tune simulator and recipe; the reported accuracy is of the others.
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

    Nothing is chosen: the epochs are fixed, and the last (averaged) weights are evaluated. The real galaxies are in two halves:
    ``tuning``, the first 50 rows of each class, with which the simulator was tuned, and ``held_out``, the rest, whose accuracy is
    the result. A second call continues where the first one stopped.

    Args:
        real_dir: ``<label>/<row>.jpg``.
        work_dir: folder for shards and runs.
        environ: environment of the process.
        num_galaxies: number of simulated ones, seed 1.
        seeds: number of training runs, seeds 0, 1, ...
        overrides: further ``key=value`` of the recipe.

    Returns:
        Accuracy (balanced over the classes) by test set, mean and single seeds.

    Raises:
        UserError: no real galaxies, or a recipe that cannot be used.
    """
    simulated = simulated_shards(work_dir, num_galaxies)
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
        **{name: {"mean": fmean(values), "seeds": values} for name, values in found.items()},
    }
    show(f"\ntrained on {num_galaxies:,} simulated galaxies; balanced accuracy, mean of {seeds} seeds:")
    for name, values in found.items():
        show(f"  {name:<10} {fmean(values):.3f}   ({', '.join(f'{value:.3f}' for value in values)})")
    show(json.dumps(result))
    return result


def split_by_row(survey: TableSurvey) -> TableSurvey:
    """Split a survey into the first rows of each class as ``train`` (the tuning half) and the others as ``test`` (held out).

    Raises:
        UserError: files whose names are not row numbers.
    """
    rows: list[int] = []
    assert isinstance(survey.images, ListedImages)
    for file in survey.images.files:
        if (match := re.fullmatch(r"\d+", Path(file).stem)) is None:
            raise UserError(f"{survey.images.root / file} is not named after its row in the official file, as <label>/<row>.jpg")
        rows.append(int(match[0]))
    is_tuning = np.zeros(len(rows), bool)
    for label in np.unique(survey.labels):
        members = np.flatnonzero(survey.labels == label)
        is_tuning[members[np.argsort(np.asarray(rows)[members])][:TUNING_ROWS]] = True
    splits = {"train": np.flatnonzero(is_tuning), "test": np.flatnonzero(~is_tuning)}
    return dataclasses.replace(survey, splits=splits)
