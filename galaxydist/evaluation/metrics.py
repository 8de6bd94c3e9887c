"""Metrics from exact counts: every ratio is taken here, once, in float64."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def metrics_from_counts(confusion_KK: ArrayLike, loss_sum: float, count: int, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy, mean loss, balanced accuracy, macro and weighted F1, and per-class precision, recall, F1 and support.

    Args:
        confusion_KK: counts; row: true class, column: predicted class.
        loss_sum: summed plain cross-entropy (nats).
        count: number of galaxies.
        class_names: by label.

    Returns:
        Plain values for JSON. A ratio whose denominator is zero is None: recall of a class without galaxies, precision of a
        class that was never predicted, F1 of a class that is neither; so is a loss that is not finite. Balanced accuracy is the
        mean recall of the classes that have galaxies; macro F1 the mean F1 of the classes that have galaxies or were predicted
        (both as in scikit-learn).

    Raises:
        ValueError: the arguments do not fit together.
    """
    matrix_KK = np.asarray(confusion_KK, dtype=np.int64)
    num_classes = len(class_names)
    if matrix_KK.shape != (num_classes, num_classes):
        raise ValueError(f"a confusion matrix of shape {matrix_KK.shape} does not fit {num_classes} classes")
    if int(matrix_KK.sum()) != count:
        raise ValueError(f"the confusion matrix holds {int(matrix_KK.sum())} galaxies, not {count}")
    support_K, predicted_K, correct_K = matrix_KK.sum(axis=1), matrix_KK.sum(axis=0), matrix_KK.diagonal()
    recall_K = _ratio(correct_K, support_K)
    f1_K = _ratio(2 * correct_K, support_K + predicted_K)
    return {
        "count": count,
        "accuracy": _ratio_or_none(int(correct_K.sum()), count),
        "loss": _ratio_or_none(float(loss_sum), count),
        "balanced_accuracy": _mean(recall_K),
        "macro_f1": _mean(f1_K),
        "weighted_f1": _ratio_or_none(math.fsum(np.where(support_K > 0, np.nan_to_num(f1_K), 0.0) * support_K), count),
        "classes": list(class_names),
        "per_class": {
            "precision": _plain(_ratio(correct_K, predicted_K)),
            "recall": _plain(recall_K),
            "f1": _plain(f1_K),
            "support": support_K.tolist(),
            "predicted": predicted_K.tolist(),
        },
        "confusion": matrix_KK.tolist(),
    }


def _ratio(numerator_K: NDArray[np.int64], denominator_K: NDArray[np.int64]) -> Floats:
    """Element by element, nan where the denominator is 0."""
    ratio_K: Floats = np.full(len(denominator_K), np.nan)
    np.divide(numerator_K, denominator_K, out=ratio_K, where=denominator_K > 0)
    return ratio_K


def _ratio_or_none(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator and math.isfinite(numerator) else None


def _mean(values_K: Floats) -> float | None:
    known = values_K[~np.isnan(values_K)]
    return math.fsum(known) / len(known) if len(known) else None


def _plain(values_K: Floats) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values_K]
