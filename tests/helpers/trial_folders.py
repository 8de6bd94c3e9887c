"""Folders of finished runs for tests: the files that a run leaves, written by the code that writes them, without any training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation import predictions
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.evaluation.predictions import PredictionsInfo
from galaxydist.evaluation.results_files import write_evaluation
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.recipe.identity import flatten
from galaxydist.recipe.resolve import load_recipe
from galaxydist.runs.folder import RunFolder, StoredRecipe

STEP = 700


def draw_logits(labels_N: NDArray[np.int64], accuracy: float, seed: int, num_classes: int = 10) -> NDArray[np.float32]:
    """Logits of which about a share ``accuracy`` is largest at the label."""
    random = np.random.default_rng(seed)
    logits_NK = random.normal(size=(len(labels_N), num_classes))
    right_N = random.random(len(labels_N)) < accuracy
    top_N = np.where(right_N, labels_N, (labels_N + random.integers(1, num_classes, len(labels_N))) % num_classes)
    logits_NK[np.arange(len(labels_N)), top_N] += 6.0
    return logits_NK.astype(np.float32)


def write_trial(
    folder: Path,
    arguments: Sequence[str] = ("recipe=resnet50",),
    *,
    accuracy: Mapping[str, float] | None = None,
    dataset: str = "galaxy10_decals",
    class_names: Sequence[str] = GALAXY10_CLASSES,
    num_galaxies: int = 400,
    validation: float | None = 0.5,
    keep_predictions: bool = True,
    finished: bool = True,
) -> RunFolder:
    """A run as it lies there when it has finished.

    Args:
        folder: its folder.
        arguments: of its command.
        accuracy: about what it reaches, by the variant on whose test set it is judged; its own has to be among them.
        dataset: name of the data set.
        class_names: by label.
        num_galaxies: in each test set.
        validation: its validation accuracy; None: the log has none.
        keep_predictions: of the single galaxies.
        finished: write result.json.
    """
    resolved = load_recipe(list(arguments))
    recipe, run = resolved.recipe, RunFolder(folder)
    run.create()
    run.write_recipe(StoredRecipe(flatten(recipe), resolved.origins))
    if validation is not None:
        run.metrics.append(STEP, {"val/accuracy": validation, "val/balanced_accuracy": validation, "val/loss": 1 - validation})
    for variant, reached in (accuracy or {"original": 0.6, "balanced": 0.5}).items():
        is_own = variant == recipe.data.variant
        place = run.evaluation_dir if is_own else run.evaluation_dir / f"{dataset}-{variant}"
        labels_N = np.arange(num_galaxies) % len(class_names)
        logits_NK = draw_logits(labels_N, reached, recipe.seed + 1000 * len(recipe.model.name), len(class_names))
        context = {
            "dataset": dataset,
            "variant": variant,
            "split": "test",
            "tta": recipe.eval.tta,
            "manifest_hash": f"{dataset}-{variant}",
            "recipe": recipe.name,
            "model": recipe.model.name,
            "seed": recipe.seed,
            "checkpoint": "step-00000700-0001",
            "step": STEP,
        }
        write_judgement(place, context, labels_N, logits_NK, class_names, keep_predictions=keep_predictions)
    if finished:
        run.write_result({"step": STEP, "test/accuracy": 0.5})
    return run


def write_judgement(
    place: Path,
    context: Mapping[str, Any],
    labels_N: NDArray[np.int64],
    logits_NK: NDArray[np.float32],
    class_names: Sequence[str],
    *,
    keep_predictions: bool = True,
) -> None:
    """An evaluation's JSON and the single galaxies' predictions."""
    confusion_KK = np.zeros((len(class_names), len(class_names)), np.int64)
    np.add.at(confusion_KK, (labels_N, logits_NK.argmax(axis=1)), 1)
    shifted_NK = logits_NK.astype(np.float64)
    losses_N = np.logaddexp.reduce(shifted_NK, axis=1) - shifted_NK[np.arange(len(labels_N)), labels_N]
    metrics = metrics_from_counts(confusion_KK, float(losses_N.sum()), class_names)
    write_evaluation(place, metrics, context, figures=False)
    if keep_predictions:
        stem = "test" if context["tta"] == "none" else f"test-{context['tta']}"
        write_predictions(place / f"{stem}-predictions.parquet", labels_N, logits_NK, prefix=str(context["variant"]))


def write_predictions(path: Path, labels_N: NDArray[np.int64], logits_NK: NDArray[np.float32], *, prefix: str = "g") -> None:
    """A file of predictions as an evaluation writes it."""
    count, num_classes = logits_NK.shape
    info = PredictionsInfo(tuple(f"class{number}" for number in range(num_classes)), {"split": "test"})
    block = {
        "id": [f"{prefix}-{number}" for number in range(count)],
        "sample": np.arange(count),
        "label": labels_N,
        "predicted": logits_NK.argmax(axis=1),
        "logits": logits_NK,
    }
    predictions.write_predictions(path, info, iter([block]))
