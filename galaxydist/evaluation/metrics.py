"""Metrics from exact counts: every ratio is taken here, once, in float64."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation import bootstrap
from galaxydist.evaluation.bootstrap import LEVEL
from galaxydist.evaluation.calibration import DEFINITION, NUM_BINS, Reliability, Temperature, fit_temperature
from galaxydist.evaluation.predictions import PredictionsFile, PredictionsInfo, log_softmax, softmax

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


# Areas under the ROC and the precision-recall curve, each class against all others, by scikit-learn.
#
# The area under the precision-recall curve is average precision, sum of (R_n - R_(n-1)) P_n: no straight lines between the
# points,
# which would be too good (Davis & Goadrich 2006, ICML). Chance is 0.5 for ROC, the class's share of the galaxies for the
# other.

# Probabilities that are in memory together: all classes of a small file, of a large one a few classes at a time.
_KEPT_VALUES = 2_000_000
# Points of a curve that are drawn.
_DRAWN = 200


@dataclass(frozen=True)
class ClassCurves:
    """One class's curves, thinned out for a figure: each a 2 x P array of x and y."""

    roc: Floats
    precision_recall: Floats


@dataclass(frozen=True)
class Areas:
    """By label; None for a class that has no galaxies or all of them."""

    roc: Sequence[float | None]
    precision_recall: Sequence[float | None]
    curves: Sequence[ClassCurves | None]

    def plain(self) -> dict[str, Any]:
        """For JSON; ``macro`` is the mean over the classes that have an area."""
        named: Mapping[str, Sequence[float | None]] = {"roc_auc": self.roc, "average_precision": self.precision_recall}
        return {name: {"macro": _mean_of_known(values), "per_class": list(values)} for name, values in named.items()}


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


def _measure(scores_N: Floats, is_class_N: NDArray[np.bool_]) -> tuple[float | None, float | None, ClassCurves | None]:
    from sklearn import metrics

    if is_class_N.all() or not is_class_N.any():
        return None, None, None
    false_rate, true_rate, _ = metrics.roc_curve(is_class_N, scores_N)
    precision, recall, _ = metrics.precision_recall_curve(is_class_N, scores_N)
    average_precision = float(-np.sum(np.diff(recall) * precision[:-1]))  # as in sklearn.metrics.average_precision_score
    curve = ClassCurves(_thinned(false_rate, true_rate), _thinned(recall[::-1], precision[::-1]))
    return float(metrics.auc(false_rate, true_rate)), average_precision, curve


def _thinned(x_P: Floats, y_P: Floats) -> Floats:
    """At most some hundred points of a curve, evenly along it."""
    way_P = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x_P)) + np.abs(np.diff(y_P)))])
    chosen = np.unique(np.searchsorted(way_P, np.linspace(0, way_P[-1], _DRAWN)).clip(0, len(x_P) - 1))
    return np.stack([x_P[chosen], y_P[chosen]])


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# Accuracy against what is known of the galaxies: redshift, apparent size, brightness of the sky.
#
# Bins hold equally many galaxies. Intervals are Wilson's (1927, JASA 22, 209), 95 %: a bin's accuracy is a binomial share.

MEASURED = ("redshift", "size", "sky_brightness")
MOST_BINS = 8
# Galaxies of a bin: fewer would say little, its interval being 0.4 wide.
LEAST_GALAXIES = 25


def measure_dependence(predictions: PredictionsFile) -> tuple[dict[str, Any], list[str]]:
    """Accuracy in bins of each property.

    Returns:
        By property, for JSON: ``unit``, ``count`` (galaxies that have it) and ``bins``; and a sentence for each that is left out.

    Raises:
        UserError: the file is damaged.
    """
    is_correct_N = predictions.column("label") == predictions.column("predicted")
    found, absent = {}, []
    for name in MEASURED:
        values_N = predictions.column(name)
        is_known_N = np.isfinite(values_N)
        count = int(is_known_N.sum())
        if count < LEAST_GALAXIES:
            has = "no galaxy has" if count == 0 else f"only {count} {'galaxy has' if count == 1 else 'galaxies have'}"
            absent.append(f"{name.replace('_', ' ')}: {has} it")
            continue
        bins = _bins(values_N[is_known_N], is_correct_N[is_known_N])
        found[name] = {"unit": predictions.info.units.get(name, ""), "count": count, "bins": bins}
    return found, absent


def _bins(values_N: NDArray[np.float64], is_correct_N: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Quantile bins; equal values stay together, so that there may be fewer bins than asked for."""
    from scipy import stats

    num_bins = max(1, min(MOST_BINS, len(values_N) // LEAST_GALAXIES))
    edges = np.unique(np.quantile(values_N, np.linspace(0, 1, num_bins + 1)))
    bin_N = np.searchsorted(edges[1:-1], values_N, side="right")
    bins = []
    for number in range(max(len(edges) - 1, 1)):
        inside = values_N[bin_N == number]
        correct = int(is_correct_N[bin_N == number].sum())
        if not len(inside):
            continue
        low, high = stats.binomtest(correct, len(inside)).proportion_ci(LEVEL, method="wilson")
        bins.append(
            {
                "low": float(inside.min()),
                "high": float(inside.max()),
                "median": float(np.median(inside)),
                "count": len(inside),
                "correct": correct,
                "accuracy": correct / len(inside),
                "interval": [float(low), float(high)],
            }
        )
    return bins


# Everything that is said about an evaluation, from its stored predictions: no model, and no memory that grows with them.
#
# Two to three passes over the file: this one, the areas', the properties'. What grows with the number of galaxies is one
# column at
# a time (8 bytes a galaxy).

# The logits are stored as float32: how far the mean loss from them may lie from the counted one.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Summary:
    """What there is to say.

    Args:
        metrics: for JSON.
        curves: ROC and precision-recall curves by label, for the figure; empty where there are none.
    """

    metrics: dict[str, Any]
    curves: tuple[ClassCurves | None, ...]


def summarise(predictions: PredictionsFile, validation: PredictionsFile | None = None) -> Summary:
    """All metrics of stored predictions.

    Args:
        predictions: of the galaxies that are judged.
        validation: of the same model on its validation split, to fit the temperature on; None: without.

    Returns:
        The metrics are those of ``metrics_from_counts`` and ``confusion_normalised``, ``top2_accuracy``, ``roc_auc``,
        ``average_precision``, ``calibration``, ``intervals``, ``against`` and ``left_out``: sentences about what cannot be said.

    Raises:
        UserError: a file is damaged, or the two are of different classes.
    """
    if validation is not None and validation.info.class_names != predictions.info.class_names:
        raise UserError(
            f"{validation.path} has the classes {', '.join(validation.info.class_names)}, {predictions.path} has "
            f"{', '.join(predictions.info.class_names)}: a temperature is fitted on predictions of the same model"
        )
    temperature = fit_temperature(validation) if validation is not None else None
    sums = _Sums(predictions.info.num_classes, temperature.value if temperature is not None else None)
    for batch in predictions.batches(["label", "predicted", "logits", "in_validation"]):
        sums.add(batch["label"], batch["predicted"], batch["logits"], batch["in_validation"])
    confusion_KK, count = sums.confusion_KK, predictions.num_galaxies
    metrics = metrics_from_counts(confusion_KK, sums.loss_sum, count, predictions.info.class_names)
    if sums.num_nonfinite == 0 and predictions.info.loss is not None:
        _check_loss(predictions, metrics["loss"])
        metrics["loss"] = predictions.info.loss
    if int(sums.without_KK.sum()) < count:
        metrics["without_validation"] = sums.without_validation(predictions.info)
    against, left_out = measure_dependence(predictions)
    metrics["confusion_normalised"] = _shares(confusion_KK)
    metrics |= {"against": against, "left_out": left_out, "intervals": _intervals(confusion_KK, sums)}
    if sums.num_nonfinite:
        left_out.append(f"areas and calibration: of {count:,} galaxies {sums.num_nonfinite:,} have logits that are not finite")
        return Summary(metrics, ())
    areas = measure_areas(predictions)
    metrics |= {"top2_accuracy": sums.num_top2 / count if count else None, **areas.plain()}
    metrics["calibration"] = _calibration(sums, temperature, validation)
    if temperature is None:
        left_out.append("temperature scaling: no predictions of this model's validation split")
    return Summary(metrics, tuple(areas.curves))


class _Sums:
    """What is added up in the pass: counts, losses, bins of confidence with and without the temperature, and their resamples."""

    def __init__(self, num_classes: int, temperature: float | None) -> None:
        self.confusion_KK = np.zeros((num_classes, num_classes), np.int64)
        # Of the galaxies that the model was not chosen on.
        self.without_KK, self._losses_without = np.zeros((num_classes, num_classes), np.int64), list[float]()
        self.num_top2 = self.num_nonfinite = 0
        self.temperature = temperature
        # Without and with the temperature.
        self.reliabilities = [Reliability() for _ in ((1.0,) if temperature is None else (1.0, temperature))]
        self._losses: list[list[float]] = [[] for _ in self.reliabilities]
        # Number of galaxies, of right answers in two; and of each of the above: loss, and by bin correct answers - confidence.
        self.resamples = bootstrap.GalaxyBootstrap(2 + len(self.reliabilities) * (1 + NUM_BINS))

    @property
    def loss_sum(self) -> float:
        return math.nan if self.num_nonfinite else self.loss_sums[0]

    @property
    def loss_sums(self) -> list[float]:
        return [math.fsum(parts) for parts in self._losses]

    def add(
        self, label_B: NDArray[Any], predicted_B: NDArray[Any], logits_BK: NDArray[np.float32], seen_B: NDArray[np.bool_]
    ) -> None:
        self.confusion_KK += self._cells(label_B, predicted_B)
        self.without_KK += self._cells(label_B[~seen_B], predicted_B[~seen_B])
        is_finite_B = np.isfinite(logits_BK).all(axis=1)
        self.num_nonfinite += int((~is_finite_B).sum())
        label_B, predicted_B, logits_BK = label_B[is_finite_B], predicted_B[is_finite_B], logits_BK[is_finite_B]
        seen_B = seen_B[is_finite_B]
        is_correct_B, rows = label_B == predicted_B, np.arange(len(label_B))
        is_top2_B = in_top_two(logits_BK, label_B) | is_correct_B
        self.num_top2 += int(is_top2_B.sum())
        columns = [np.ones((len(rows), 1)), is_top2_B[:, None].astype(np.float64)]
        for number, reliability in enumerate(self.reliabilities):
            scale = 1.0 if number == 0 or self.temperature is None else self.temperature
            log_BK = log_softmax(logits_BK.astype(np.float64) / scale)
            loss_B, confidence_B = -log_BK[rows, label_B], np.exp(log_BK.max(axis=1, initial=-np.inf))
            self._losses[number].append(float(loss_B.sum()))
            if number == 0:
                self._losses_without.append(float(loss_B[~seen_B].sum()))
            gaps_BM = np.zeros((len(rows), NUM_BINS))
            gaps_BM[rows, reliability.add(confidence_B, is_correct_B)] = is_correct_B - confidence_B
            columns += [loss_B[:, None], gaps_BM]
        self.resamples.add(np.hstack(columns))

    def without_validation(self, info: PredictionsInfo) -> dict[str, Any]:
        """The counted metrics of the galaxies that the model was not chosen on."""
        loss_sum = math.nan if self.num_nonfinite else math.fsum(self._losses_without)
        metrics = metrics_from_counts(self.without_KK, loss_sum, int(self.without_KK.sum()), info.class_names)
        return {**metrics, "loss": metrics["loss"] if info.loss_without_validation is None else info.loss_without_validation}

    def _cells(self, label_B: NDArray[Any], predicted_B: NDArray[Any]) -> NDArray[np.int64]:
        num_classes = len(self.confusion_KK)
        cells_B = label_B.astype(np.int64) * num_classes + predicted_B
        return np.bincount(cells_B, minlength=num_classes**2).reshape(num_classes, num_classes)


def in_top_two(logits_BK: NDArray[Any], label_B: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the true class is one of the two of the largest logits; of equal ones the first counts as larger, as in argmax."""
    true_B1 = logits_BK[np.arange(len(label_B)), label_B][:, None]
    is_before_BK = np.arange(logits_BK.shape[1]) < label_B[:, None]
    above_B = ((logits_BK > true_B1) | ((logits_BK == true_B1) & is_before_BK)).sum(axis=1)
    return np.asarray(above_B < 2)


def _intervals(confusion_KK: NDArray[np.int64], sums: _Sums) -> dict[str, Any]:
    found: dict[str, Any] = {
        "level": bootstrap.LEVEL,
        "resamples": bootstrap.RESAMPLES,
        "seed": bootstrap.SEED,
        "method": "percentile bootstrap over galaxies",
        **bootstrap.count_intervals(confusion_KK),
    }
    if sums.num_nonfinite:
        return found
    sums_RM = sums.resamples.sums_RM
    sums_RM = sums_RM[sums_RM[:, 0] > 0]
    means_RM = sums_RM[:, 1:] / sums_RM[:, :1]
    found["top2_accuracy"] = bootstrap.interval(means_RM[:, 0])
    for number, prefix in enumerate(("", "scaled_")[: len(sums.reliabilities)]):
        first = 1 + number * (1 + NUM_BINS)
        found[f"{prefix}loss"] = bootstrap.interval(means_RM[:, first])
        found[f"{prefix}ece"] = bootstrap.interval(np.abs(means_RM[:, first + 1 : first + 1 + NUM_BINS]).sum(axis=1))
    return found


def _calibration(sums: _Sums, temperature: Temperature | None, validation: PredictionsFile | None) -> dict[str, Any]:
    count = int(sums.confusion_KK.sum())
    plain: dict[str, Any] = {
        "definition": DEFINITION,
        "num_bins": NUM_BINS,
        "ece": sums.reliabilities[0].ece,
        "reliability": sums.reliabilities[0].plain(),
        "temperature": None,
    }
    if temperature is not None and validation is not None:
        plain["temperature"] = {
            **vars(temperature),
            "fitted_on": {name: validation.info.context[name] for name in ("dataset", "variant", "split", "manifest_hash")},
        }
        plain["scaled"] = {
            "loss": sums.loss_sums[1] / count if count else None,
            "ece": sums.reliabilities[1].ece,
            "reliability": sums.reliabilities[1].plain(),
        }
    return plain


def _shares(confusion_KK: NDArray[np.int64]) -> list[list[float] | None]:
    """Of each true class; None for a class without galaxies."""
    return [(row_K / row_K.sum()).tolist() if row_K.sum() else None for row_K in confusion_KK]


def _check_loss(predictions: PredictionsFile, loss: float) -> None:
    counted = predictions.info.loss
    assert counted is not None
    if not math.isclose(loss, counted, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE):
        raise UserError(
            f"{predictions.path}: the logits give a loss of {loss:.6f}, but {counted:.6f} was counted when they were written. "
            "The file was changed; make it anew with `galaxydist evaluate RUN`"
        )
