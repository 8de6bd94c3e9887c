"""Areas under the ROC and the precision-recall curve, each class against all others, by scikit-learn.

The area under the precision-recall curve is average precision, sum of (R_n - R_(n-1)) P_n: no straight lines between the points,
which would be too good (Davis & Goadrich 2006, ICML). Chance is 0.5 for ROC, the class's share of the galaxies for the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.predictions import PredictionsFile
from galaxydist.evaluation.probabilities import softmax

Floats = NDArray[np.float64]

# Probabilities that are in memory together: all classes of a small file, of a large one a few classes at a time.
_KEPT_VALUES = 2_000_000
# Points of a curve that are drawn.
_DRAWN = 200


@dataclass(frozen=True)
class Curve:
    """One class's curves, thinned out for a figure: each a 2 x P array of x and y."""

    roc: Floats
    precision_recall: Floats


@dataclass(frozen=True)
class Areas:
    """By label; None for a class that has no galaxies or all of them."""

    roc: Sequence[float | None]
    precision_recall: Sequence[float | None]
    curves: Sequence[Curve | None]

    def plain(self) -> dict[str, Any]:
        """For JSON; ``macro`` is the mean over the classes that have an area."""
        named: Mapping[str, Sequence[float | None]] = {"roc_auc": self.roc, "average_precision": self.precision_recall}
        return {name: {"macro": _mean(values), "per_class": list(values)} for name, values in named.items()}


def measure_areas(predictions: PredictionsFile) -> Areas:
    """Areas and curves of every class, from probabilities in float64.

    Memory is two numbers a galaxy (a large file is read once for each few classes).

    Raises:
        UserError: the file is damaged.
    """
    found = [_measure(scores_N, is_class_N) for scores_N, is_class_N in _by_class(predictions)]
    return Areas([area[0] for area in found], [area[1] for area in found], [area[2] for area in found])


def _by_class(predictions: PredictionsFile) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
    num, num_classes = predictions.num_galaxies, predictions.info.num_classes
    together = max(1, min(num_classes, _KEPT_VALUES // max(num, 1)))
    labels_N = np.empty(num, np.int32)
    for first in range(0, num_classes, together):
        chosen = slice(first, min(first + together, num_classes))
        scores_CN, place = np.empty((chosen.stop - first, num)), 0
        for batch in predictions.batches(["label", "logits"]):
            stop = place + len(batch["label"])
            labels_N[place:stop] = batch["label"]
            scores_CN[:, place:stop] = softmax(batch["logits"])[:, chosen].T
            place = stop
        for label, scores_N in enumerate(scores_CN, first):
            yield scores_N, labels_N == label


def _measure(scores_N: Floats, is_class_N: NDArray[np.bool_]) -> tuple[float | None, float | None, Curve | None]:
    from sklearn import metrics

    if is_class_N.all() or not is_class_N.any():
        return None, None, None
    false_rate, true_rate, _ = metrics.roc_curve(is_class_N, scores_N)
    precision, recall, _ = metrics.precision_recall_curve(is_class_N, scores_N)
    average_precision = float(-np.sum(np.diff(recall) * precision[:-1]))  # as in sklearn.metrics.average_precision_score
    curve = Curve(_thinned(false_rate, true_rate), _thinned(recall[::-1], precision[::-1]))
    return float(metrics.auc(false_rate, true_rate)), average_precision, curve


def _thinned(x_P: Floats, y_P: Floats) -> Floats:
    """At most some hundred points of a curve, evenly along it."""
    way_P = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x_P)) + np.abs(np.diff(y_P)))])
    chosen = np.unique(np.searchsorted(way_P, np.linspace(0, way_P[-1], _DRAWN)).clip(0, len(x_P) - 1))
    return np.stack([x_P[chosen], y_P[chosen]])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
