"""How easy the simulated survey is: what a classifier reaches that sees no shapes, or hardly any.

A simulation whose classes could be told by colour and brightness alone would flatter every model trained on it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.surveys.simulate.population import plan_survey
from galaxydist.surveys.simulate.survey import draw_rows

# Above this (balanced accuracy, ten classes) the simulation is too easy.
GUARD_LIMIT = 0.50
_QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
_THUMBNAIL = 16
_FOLDS = 5
_TITLES = {
    "colour": "colour and brightness, logistic regression",
    "colour_centre": "the same in the picture's middle half",
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
    """B x 768: the pictures averaged down to 16 x 16 pixels, three channels."""
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
        ``colour_centre``: the same on the pictures' middle halves, where the galaxy is.
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
        UserError: too few galaxies for five folds, or no pictures in ``real_dir``.
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
        raise UserError(f"no pictures in {folder}: expected <label>/<row>.jpg with labels 0 ... 9")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, np.array([int(path.parent.name) for path in paths])
