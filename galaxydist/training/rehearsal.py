"""A trial of what only the end of a run needs, before its first step: an evaluation of a few galaxies, with numbers and figures.

A library that is missing, a number of classes that a figure cannot show, a name that cannot be written: all this would else be
found hours later, and again at every restart.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from galaxydist.counter_rng import hash64
from galaxydist.evaluation.counts import Predictions
from galaxydist.evaluation.parts import PartWriter, part_path
from galaxydist.evaluation.predictions import PredictionsInfo, predictions_path, read_predictions
from galaxydist.evaluation.report import render_evaluation, stem_of, write_evaluation
from galaxydist.evaluation.summary import summarise
from galaxydist.loading.loader import Batch
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.metrics_log import MetricsLog
from galaxydist.shards.manifest import Manifest
from galaxydist.training.predicting import Keeper, merge_predictions

# Enough for every number and figure: properties are shown from 25 galaxies on.
NUM_GALAXIES = 32


def rehearse_evaluation(manifest: Manifest, recipe: Recipe) -> None:
    """Evaluate some invented galaxies of the data set's classes in a temporary folder. For rank 0.

    Args:
        manifest: the shards.
        recipe: of the run.

    Raises:
        UserError: the disk of temporary files is full.
    """
    import pyarrow as pa

    numbers_N = torch.arange(NUM_GALAXIES)
    labels_N = numbers_N * manifest.num_classes // NUM_GALAXIES
    draws_NK = hash64(numbers_N.numpy()[:, None], np.arange(manifest.num_classes)) >> np.uint64(40)
    logits_NK = torch.from_numpy(draws_NK.astype(np.float32) / 2**22)
    predictions = Predictions(numbers_N, labels_N, logits_NK.argmax(1), logits_NK)
    shape = (NUM_GALAXIES, manifest.image_size, manifest.image_size, 3)
    images_NHWC = torch.from_numpy(np.resize(np.arange(251, dtype=np.uint8), shape))
    batch = Batch(images_NHWC, labels_N, torch.ones(NUM_GALAXIES), numbers_N, numbers_N, epoch=0, step=0)
    context = {
        "dataset": manifest.dataset,
        "variant": manifest.variant,
        "split": "test",
        "tta": recipe.eval.tta,
        "manifest_hash": manifest.hash,
        "recipe": recipe.name,
        "model": recipe.model.name,
    }
    with tempfile.TemporaryDirectory(prefix="galaxydist-") as name:
        folder = Path(name)
        path = predictions_path(folder, stem_of("test", recipe.eval.tta))
        with PartWriter(part_path(path, 0), manifest.num_classes) as part:
            with Keeper(part, image_size=manifest.image_size, threads=1) as keeper:
                keeper.add(batch, predictions)
                keeper.finish()
            catalogue = pa.table({"id": [f"galaxy-{number}" for number in range(NUM_GALAXIES)]})
            info = PredictionsInfo(class_names=manifest.class_names, context=context)
            merge_predictions(path, info, [part.path], catalogue, batch_size=NUM_GALAXIES)
        log = MetricsLog(folder / "metrics.jsonl")
        log.append(1, {"train/loss": 1.0, "val/loss": 1.0})
        judged = read_predictions(path)
        summary = summarise(judged, judged)  # also as its own validation split, for the temperature
        # Drawing takes seconds, and a few classes with plain names are drawn in any test.
        is_unusual = manifest.num_classes > 20 or not all(name.isascii() and name.isprintable() for name in manifest.class_names)
        curves, figures = summary.curves, recipe.eval.figures and is_unusual
        written = write_evaluation(folder, summary.metrics, context, metrics_log=log.path, curves=curves, figures=figures)
        render_evaluation(written, folder)
