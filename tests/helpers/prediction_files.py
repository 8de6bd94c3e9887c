"""Files of drawn predictions for tests."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.evaluation.predictions import PredictionsFile, PredictionsInfo, read_predictions, write_predictions

CONTEXT: Mapping[str, Any] = {
    "dataset": "blobs",
    "variant": "original",
    "split": "test",
    "tta": "none",
    "manifest_hash": "ab" * 32,
    "recipe": "vit",
    "model": "vit",
    "seed": 3,
    "checkpoint": "step-00000120-0003",
    "step": 120,
}


def write_logits(
    path: Path,
    logits_NK: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    *,
    properties: Mapping[str, ArrayLike] | None = None,
    units: Mapping[str, str] | None = None,
    loss: float | None = None,
    class_names: tuple[str, ...] | None = None,
    **context: Any,
) -> PredictionsFile:
    """A file of these logits; ``context`` replaces parts of ``CONTEXT``."""
    num, num_classes = logits_NK.shape
    names = class_names or tuple(f"class_{label}" for label in range(num_classes))
    info = PredictionsInfo(names, {**CONTEXT, **context}, units or {}, loss)

    def blocks() -> Iterator[dict[str, Any]]:
        for start in range(0, num, 5000):
            here = slice(start, min(start + 5000, num))
            yield {
                "id": [f"galaxy-{number}" for number in range(here.start, here.stop)],
                "sample": np.arange(here.start, here.stop),
                "label": labels_N[here],
                "predicted": logits_NK[here].argmax(axis=1),
                "logits": logits_NK[here],
                **{name: np.asarray(values)[here] for name, values in (properties or {}).items()},
            }

    write_predictions(path, info, blocks())
    return read_predictions(path)


def draw_logits(
    seed: int, num: int, num_classes: int, *, classes: int | None = None, sharpness: float = 2.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that are often right and too sure of it; labels of the first ``classes`` classes only."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, classes or num_classes, num)
    logits_NK = rng.normal(size=(num, num_classes)) + 1.2 * (np.arange(num_classes) == labels_N[:, None])
    return (sharpness * logits_NK).astype(np.float32), labels_N
