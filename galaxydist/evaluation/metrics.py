"""Metrics of an evaluation, from exact counts and stored predictions; every ratio is taken here, once, in float64."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation import bootstrap
from galaxydist.evaluation.bootstrap import LEVEL, ratio
from galaxydist.evaluation.calibration import DEFINITION, NUM_BINS, Reliability, Temperature, fit_temperature
from galaxydist.evaluation.predictions import PredictionsFile, PredictionsInfo, softmax

Floats = NDArray[np.float64]


def metrics_from_counts(confusion_KK: ArrayLike, loss_sum: float, class_names: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, mean loss, balanced accuracy, macro and weighted F1, and per-class precision, recall, F1 and support.

    Args:
        confusion_KK: counts; row: true class, column: predicted class.
        loss_sum: summed plain cross-entropy (nats).
        class_names: by label.

    Returns:
        Plain values for JSON. A ratio whose denominator is zero is None: recall of a class without galaxies, precision of a
        class that was never predicted, F1 of a class that is neither; so is a loss that is not finite. Balanced accuracy is the
        mean recall of the classes that have galaxies; macro F1 the mean F1 of the classes that have galaxies or were predicted
        (both as in scikit-learn).
    """
    matrix_KK = np.asarray(confusion_KK, dtype=np.int64)
    count = int(matrix_KK.sum())
    support_K, predicted_K, correct_K = matrix_KK.sum(axis=1), matrix_KK.sum(axis=0), matrix_KK.diagonal()
    recall_K = ratio(correct_K, support_K)
    f1_K = ratio(2 * correct_K, support_K + predicted_K)
    return {
        "count": count,
        "accuracy": _ratio_or_none(int(correct_K.sum()), count),
        "loss": _ratio_or_none(float(loss_sum), count),
        "balanced_accuracy": _mean(recall_K),
        "macro_f1": _mean(f1_K),
        "weighted_f1": _ratio_or_none(math.fsum(np.where(support_K > 0, np.nan_to_num(f1_K), 0.0) * support_K), count),
        "classes": list(class_names),
        "per_class": {
            "precision": _nan_to_none(ratio(correct_K, predicted_K)),
            "recall": _nan_to_none(recall_K),
            "f1": _nan_to_none(f1_K),
            "support": support_K.tolist(),
            "predicted": predicted_K.tolist(),
        },
        "confusion": matrix_KK.tolist(),
    }


def _ratio_or_none(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator and math.isfinite(numerator) else None


def _mean(values_K: ArrayLike) -> float | None:
    """Return the mean of the values that are not nan; None if there are none."""
    known = np.asarray(values_K, np.float64)
    known = known[~np.isnan(known)]
    return math.fsum(known) / len(known) if len(known) else None


def _nan_to_none(values_K: ArrayLike) -> list[float | None]:
    return [None if math.isnan(value) else value for value in np.asarray(values_K).tolist()]


def wilson_interval(correct: int, count: int) -> list[float]:
    """Return the 95 % interval of a binomial share (Wilson 1927, JASA 22, 209)."""
    from scipy import stats

    return [float(end) for end in stats.binomtest(correct, count).proportion_ci(LEVEL, method="wilson")]


# ROC and precision-recall curves of each class against all others, by scikit-learn.
#
# The area under the precision-recall curve is average precision, sum of (R_n - R_(n-1)) P_n: straight lines between the points
# would overestimate it (Davis & Goadrich 2006, ICML). Chance is 0.5 for ROC, the class's share of the galaxies for the other.

# Maximum number of probabilities in memory: of a large file, a few classes at a time.
_KEPT_VALUES = 2_000_000
# Number of points per drawn curve.
_DRAWN_POINTS = 200


@dataclass(frozen=True)
class ClassCurves:
    """ROC and precision-recall curve of one class, thinned for a figure: each a 2 x P array of x and y."""

    roc: Floats
    precision_recall: Floats


def roc_and_pr(predictions: PredictionsFile) -> tuple[dict[str, Any], tuple[ClassCurves | None, ...]]:
    """Compute the areas under both curves of every class, from probabilities in float64.

    Memory is two numbers per galaxy (a large file is read once for every few classes).

    Returns:
        ``roc_auc`` and ``average_precision`` for JSON, each ``per_class`` and as ``macro`` mean; and the curves by label. A class
        with no galaxies or all of them has None.

    Raises:
        UserError: the file is damaged.
    """
    found = [_class_curves(scores_N, is_class_N) for scores_N, is_class_N in _scores_by_class(predictions)]
    areas = {"roc_auc": [roc for roc, _, _ in found], "average_precision": [precision for _, precision, _ in found]}
    plain = {name: {"macro": _mean(values), "per_class": _nan_to_none(values)} for name, values in areas.items()}
    return plain, tuple(curves for _, _, curves in found)


def _scores_by_class(predictions: PredictionsFile) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
    num, num_classes = predictions.num_galaxies, predictions.info.num_classes
    at_once = max(1, min(num_classes, _KEPT_VALUES // max(num, 1)))
    labels_N = np.empty(num, np.int32)
    for first in range(0, num_classes, at_once):
        columns = slice(first, min(first + at_once, num_classes))
        scores_CN, start = np.empty((columns.stop - first, num)), 0
        for batch in predictions.batches(["label", "logits"]):
            stop = start + len(batch["label"])
            labels_N[start:stop] = batch["label"]
            scores_CN[:, start:stop] = softmax(batch["logits"])[:, columns].T
            start = stop
        for label, scores_N in enumerate(scores_CN, first):
            yield scores_N, labels_N == label


def _class_curves(scores_N: Floats, is_class_N: NDArray[np.bool_]) -> tuple[float, float, ClassCurves | None]:
    from sklearn import metrics

    if is_class_N.all() or not is_class_N.any():
        return math.nan, math.nan, None
    false_rate, true_rate, _ = metrics.roc_curve(is_class_N, scores_N)
    precision, recall, _ = metrics.precision_recall_curve(is_class_N, scores_N)
    average_precision = float(-np.sum(np.diff(recall) * precision[:-1]))  # as in sklearn.metrics.average_precision_score
    curves = ClassCurves(_thinned(false_rate, true_rate), _thinned(recall[::-1], precision[::-1]))
    return float(metrics.auc(false_rate, true_rate)), average_precision, curves


def _thinned(x_P: Floats, y_P: Floats) -> Floats:
    """Return at most ``_DRAWN_POINTS`` points of a curve, evenly spaced along it."""
    length_P = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x_P)) + np.abs(np.diff(y_P)))])
    kept = np.unique(np.searchsorted(length_P, np.linspace(0, length_P[-1], _DRAWN_POINTS)).clip(0, len(x_P) - 1))
    return np.stack([x_P[kept], y_P[kept]])


# Accuracy in bins of a galaxy's property. Bins hold equal numbers of galaxies.

BINNED_PROPERTIES = ("redshift", "size", "sky_brightness")
MOST_BINS = 8
# Minimum number of galaxies per bin: with fewer, the interval would be wider than 0.4.
LEAST_GALAXIES = 25


def accuracy_by_property(predictions: PredictionsFile) -> tuple[dict[str, Any], list[str]]:
    """Compute the accuracy in bins of each property.

    Returns:
        By property, for JSON: ``unit``, ``count`` (galaxies with a known value) and ``bins``; and a sentence about each property
        that is left out.

    Raises:
        UserError: the file is damaged.
    """
    is_correct_N = predictions.column("label") == predictions.column("predicted")
    found, left_out = {}, []
    for name in BINNED_PROPERTIES:
        values_N = predictions.column(name)
        is_known_N = np.isfinite(values_N)
        count = int(is_known_N.sum())
        if count < LEAST_GALAXIES:
            has = "no galaxy has" if count == 0 else f"only {count} {'galaxy has' if count == 1 else 'galaxies have'}"
            left_out.append(f"{name.replace('_', ' ')}: {has} it")
            continue
        bins = _accuracy_bins(values_N[is_known_N], is_correct_N[is_known_N])
        found[name] = {"unit": predictions.info.units.get(name, ""), "count": count, "bins": bins}
    return found, left_out


def _accuracy_bins(values_N: Floats, is_correct_N: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Return quantile bins; equal values share a bin, so that there may be fewer bins than ``MOST_BINS``."""
    num_bins = max(1, min(MOST_BINS, len(values_N) // LEAST_GALAXIES))
    edges = np.unique(np.quantile(values_N, np.linspace(0, 1, num_bins + 1)))
    bin_N = np.searchsorted(edges[1:-1], values_N, side="right")
    bins = []
    for number in np.unique(bin_N):
        inside, correct = values_N[bin_N == number], int(is_correct_N[bin_N == number].sum())
        bins.append(
            {
                "low": float(inside.min()),
                "high": float(inside.max()),
                "median": float(np.median(inside)),
                "count": len(inside),
                "correct": correct,
                "accuracy": correct / len(inside),
                "interval": wilson_interval(correct, len(inside)),
            }
        )
    return bins


# All metrics of stored predictions, without the model. They take two to three passes over the file (sums, curves, properties).
# Memory grows with the number of galaxies only by one column at a time (8 bytes per galaxy).

# Tolerance between the counted mean loss and that of the logits, which are stored as float32.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Summary:
    """All metrics, for JSON, and the ROC and precision-recall curves by label, for the figure (empty if there are none)."""

    metrics: dict[str, Any]
    curves: tuple[ClassCurves | None, ...]


def summarise(predictions: PredictionsFile, validation: PredictionsFile | None = None) -> Summary:
    """Compute all metrics of stored predictions.

    Args:
        predictions: of the evaluated galaxies.
        validation: of the same model on its validation split, to fit the temperature on; None for no temperature scaling.

    Returns:
        The metrics are those of ``metrics_from_counts`` and ``confusion_normalised``, ``top2_accuracy``, ``roc_auc``,
        ``average_precision``, ``calibration``, ``intervals``, ``against`` (accuracy by property) and ``left_out`` (sentences
        about missing metrics).

    Raises:
        UserError: a file is damaged, or the two have different classes.
    """
    if validation is not None and validation.info.class_names != predictions.info.class_names:
        raise UserError(
            f"{validation.path} has the classes {', '.join(validation.info.class_names)}, {predictions.path} has "
            f"{', '.join(predictions.info.class_names)}: a temperature is fitted on predictions of the same model"
        )
    temperature = fit_temperature(validation) if validation is not None else None
    sums = _Sums(predictions.info.num_classes, (1.0,) if temperature is None else (1.0, temperature.value))
    for batch in predictions.batches(["label", "predicted", "logits", "in_validation"]):
        sums.add(batch["label"], batch["predicted"], batch["logits"], batch["in_validation"])
    confusion_KK, count = sums.confusion_KK, predictions.num_galaxies
    metrics = metrics_from_counts(confusion_KK, sums.loss_sum, predictions.info.class_names)
    if sums.num_nonfinite == 0 and predictions.info.loss is not None:
        _check_loss(predictions, metrics["loss"])
        metrics["loss"] = predictions.info.loss
    if int(sums.without_KK.sum()) < count:
        metrics["without_validation"] = sums.without_validation(predictions.info)
    against, left_out = accuracy_by_property(predictions)
    metrics["confusion_normalised"] = [(row_K / row_K.sum()).tolist() if row_K.sum() else None for row_K in confusion_KK]
    metrics |= {"against": against, "left_out": left_out, "intervals": sums.intervals()}
    if sums.num_nonfinite:
        left_out.append(f"areas and calibration: of {count:,} galaxies {sums.num_nonfinite:,} have logits that are not finite")
        return Summary(metrics, ())
    areas, curves = roc_and_pr(predictions)
    metrics |= {"top2_accuracy": sums.num_top2 / count if count else None, **areas}
    metrics["calibration"] = _calibration(sums, temperature, validation)
    if temperature is None:
        left_out.append("temperature scaling: no predictions of this model's validation split")
    return Summary(metrics, curves)


class _Sums:
    """Sums of one pass: counts, and for each scale of the logits (1, T) losses, bins of confidence and their resamples."""

    def __init__(self, num_classes: int, scales: Sequence[float]) -> None:
        self.confusion_KK = np.zeros((num_classes, num_classes), np.int64)
        # Of the galaxies outside the run's validation split.
        self.without_KK, self._losses_without = np.zeros((num_classes, num_classes), np.int64), list[float]()
        self.num_top2 = self.num_nonfinite = 0
        self._scales = scales
        self.reliabilities = [Reliability() for _ in scales]
        self._losses: list[list[float]] = [[] for _ in scales]
        # Number of galaxies, number of correct top-2 predictions; and per scale: loss, and by bin correct - confidence.
        self._resamples = bootstrap.GalaxyBootstrap(2 + len(scales) * (1 + NUM_BINS))

    @property
    def loss_sum(self) -> float:
        return math.nan if self.num_nonfinite else self.loss_sums[0]

    @property
    def loss_sums(self) -> list[float]:
        return [math.fsum(parts) for parts in self._losses]

    def add(
        self,
        label_B: NDArray[Any],
        predicted_B: NDArray[Any],
        logits_BK: NDArray[np.float32],
        in_validation_B: NDArray[np.bool_],
    ) -> None:
        from scipy import special

        self.confusion_KK += self._confusion(label_B, predicted_B)
        self.without_KK += self._confusion(label_B[~in_validation_B], predicted_B[~in_validation_B])
        is_finite_B = np.isfinite(logits_BK).all(axis=1)
        self.num_nonfinite += int((~is_finite_B).sum())
        label_B, predicted_B, logits_BK = label_B[is_finite_B], predicted_B[is_finite_B], logits_BK[is_finite_B]
        in_validation_B = in_validation_B[is_finite_B]
        is_correct_B, rows = label_B == predicted_B, np.arange(len(label_B))
        is_top2_B = in_top_two(logits_BK, label_B) | is_correct_B
        self.num_top2 += int(is_top2_B.sum())
        columns = [np.ones((len(rows), 1)), is_top2_B[:, None].astype(np.float64)]
        for scale, reliability, losses in zip(self._scales, self.reliabilities, self._losses, strict=True):
            log_BK = special.log_softmax(logits_BK.astype(np.float64) / scale, axis=1)
            loss_B, confidence_B = -log_BK[rows, label_B], np.exp(log_BK.max(axis=1, initial=-np.inf))
            if not columns[2:]:  # the first scale: the logits as they are
                self._losses_without.append(float(loss_B[~in_validation_B].sum()))
            losses.append(float(loss_B.sum()))
            gaps_BM = np.zeros((len(rows), NUM_BINS))
            gaps_BM[rows, reliability.add(confidence_B, is_correct_B)] = is_correct_B - confidence_B
            columns += [loss_B[:, None], gaps_BM]
        self._resamples.add(np.hstack(columns))

    def without_validation(self, info: PredictionsInfo) -> dict[str, Any]:
        """Return the counted metrics of the galaxies outside the run's validation split."""
        loss_sum = math.nan if self.num_nonfinite else math.fsum(self._losses_without)
        metrics = metrics_from_counts(self.without_KK, loss_sum, info.class_names)
        return {**metrics, "loss": metrics["loss"] if info.loss_without_validation is None else info.loss_without_validation}

    def intervals(self) -> dict[str, Any]:
        """Return the bootstrap intervals and their parameters, for JSON."""
        found: dict[str, Any] = {
            "level": bootstrap.LEVEL,
            "resamples": bootstrap.RESAMPLES,
            "seed": bootstrap.SEED,
            "method": "percentile bootstrap over galaxies",
            **bootstrap.count_intervals(self.confusion_KK),
        }
        if self.num_nonfinite:
            return found
        sums_RM = self._resamples.sums_RM
        sums_RM = sums_RM[sums_RM[:, 0] > 0]
        means_RM = sums_RM[:, 1:] / sums_RM[:, :1]
        found["top2_accuracy"] = bootstrap.interval(means_RM[:, 0])
        for number, prefix in enumerate(("", "scaled_")[: len(self._scales)]):
            first = 1 + number * (1 + NUM_BINS)
            found[f"{prefix}loss"] = bootstrap.interval(means_RM[:, first])
            found[f"{prefix}ece"] = bootstrap.interval(np.abs(means_RM[:, first + 1 : first + 1 + NUM_BINS]).sum(axis=1))
        return found

    def _confusion(self, label_B: NDArray[Any], predicted_B: NDArray[Any]) -> NDArray[np.int64]:
        num_classes = len(self.confusion_KK)
        cells_B = label_B.astype(np.int64) * num_classes + predicted_B
        return np.bincount(cells_B, minlength=num_classes**2).reshape(num_classes, num_classes)


def in_top_two(logits_BK: NDArray[Any], label_B: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask of the galaxies whose true class has one of the two largest logits; the first of equal ones is larger."""
    true_B1 = logits_BK[np.arange(len(label_B)), label_B][:, None]
    is_before_BK = np.arange(logits_BK.shape[1]) < label_B[:, None]
    above_B = ((logits_BK > true_B1) | ((logits_BK == true_B1) & is_before_BK)).sum(axis=1)
    return np.asarray(above_B < 2)


def _calibration(sums: _Sums, temperature: Temperature | None, validation: PredictionsFile | None) -> dict[str, Any]:
    count = int(sums.confusion_KK.sum())
    found = {"definition": DEFINITION, "num_bins": NUM_BINS, **sums.reliabilities[0].to_json(), "temperature": None}
    if temperature is not None and validation is not None:
        fitted_on = {name: validation.info.context[name] for name in ("dataset", "variant", "split", "manifest_hash")}
        found["temperature"] = {**vars(temperature), "fitted_on": fitted_on}
        found["scaled"] = {"loss": sums.loss_sums[1] / count if count else None, **sums.reliabilities[1].to_json()}
    return found


def _check_loss(predictions: PredictionsFile, loss: float) -> None:
    counted = predictions.info.loss
    assert counted is not None
    if not math.isclose(loss, counted, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE):
        raise UserError(
            f"{predictions.path}: the logits give a loss of {loss:.6f}, but {counted:.6f} was counted when they were written. "
            "The file was changed; make it again with `galaxydist evaluate RUN`"
        )
