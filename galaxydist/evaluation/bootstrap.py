"""Bootstrap confidence intervals: how far a number would move with another draw of as many galaxies.

Percentile intervals (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3), always from the same random
bits, so that equal predictions give equal intervals.

What follows from the confusion matrix is resampled exactly: drawing N galaxies with replacement is one multinomial draw of the
matrix's cells. What needs each galaxy (loss, calibration, top-2 accuracy) weighs each with an independent Poisson number of mean
1 instead of the multinomial's counts, which is the same but for the resample's size (N, give or take the root of N) and is summed
up in one pass (Hanley & MacGibbon 2006, Comput Methods Programs Biomed 83, 57). A resample of no galaxy is left out.

An interval of the calibration error tends to lie high: noise adds to an absolute value, and a resample has more noise than the
galaxies themselves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 1000  # a multiple of 4: one random word weighs a galaxy in four resamples
SEED = 0x626F6F747374  # "bootst"
COUNTED = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1")
# Galaxies that are weighed together: 8 MB of weights.
_TOGETHER = 1024
# Values that are drawn together: 8 MB too.
_DRAWN_TOGETHER = 1_000_000


class GalaxyBootstrap:
    """Sums over galaxies in every resample, in one pass and in memory that does not grow.

    Galaxy i, counted in the order of ``add``, is weighed by the words 250 i ... 250 i + 249 of the Philox stream of ``SEED``: 16
    bits a resample, through a table.

    Args:
        num_columns: values that are summed of each galaxy.
    """

    def __init__(self, num_columns: int) -> None:
        self.sums_RM: Floats = np.zeros((RESAMPLES, num_columns))
        self._bits = np.random.Philox(key=SEED)

    def add(self, values_BM: Floats) -> None:
        """Take in galaxies: B rows of M finite values."""
        table = poisson_table()
        for start in range(0, len(values_BM), _TOGETHER):
            chunk_BM = values_BM[start : start + _TOGETHER]
            words = self._bits.random_raw(len(chunk_BM) * RESAMPLES // 4).astype("<u8", copy=False)
            weights_BR = table[words.view("<u2").reshape(len(chunk_BM), RESAMPLES)]
            self.sums_RM += weights_BR.T @ chunk_BM


@cache
def poisson_table() -> Floats:
    """A Poisson number of mean 1 for each value of 16 random bits, by inversion."""
    from scipy import stats

    table: Floats = stats.poisson.ppf((np.arange(2**16) + 0.5) / 2**16, 1.0).astype(np.float64)
    return table


def interval(values_R: Floats) -> list[float] | None:
    """The central 95 % of the resamples' values, without those that are nan; None where no value is left."""
    known = values_R[np.isfinite(values_R)]
    if not len(known):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(known, (tail, 1 - tail)).tolist()
    return [low, high]


@dataclass(frozen=True)
class Resamples:
    """The sums that are needed of some confusion matrices, each a draw with replacement of as many galaxies.

    Args:
        support_RK: galaxies of each class.
        predicted_RK: galaxies taken for it.
        correct_RK: both.
    """

    support_RK: NDArray[np.int64]
    predicted_RK: NDArray[np.int64]
    correct_RK: NDArray[np.int64]


def resample_confusion(confusion_KK: NDArray[np.int64]) -> Iterator[Resamples]:
    """R draws, some at a time; none of a matrix without galaxies.

    Only cells with galaxies are drawn: of a thousand classes most of the million are empty. The last cell counts as one of them,
    since numpy gives it what is left, without a draw: so the numbers are those of drawing all cells.
    """
    count, num_classes = int(confusion_KK.sum()), len(confusion_KK)
    if count == 0:
        return
    cells_M = np.union1d(np.flatnonzero(confusion_KK), [confusion_KK.size - 1])
    true_M, predicted_M = cells_M // num_classes, cells_M % num_classes
    right = true_M == predicted_M
    generator = np.random.Generator(np.random.Philox(key=SEED))
    together = max(1, _DRAWN_TOGETHER // max(len(cells_M), num_classes))
    for start in range(0, RESAMPLES, together):
        size = min(together, RESAMPLES - start)
        drawn_RM = generator.multinomial(count, confusion_KK.ravel()[cells_M] / count, size=size)
        yield Resamples(
            _sum_by(true_M, drawn_RM, num_classes),
            _sum_by(predicted_M, drawn_RM, num_classes),
            _sum_by(true_M[right], drawn_RM[:, right], num_classes),
        )


def _sum_by(class_M: NDArray[np.int64], drawn_RM: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """R x K: sums over the cells of each class."""
    sums_RK = np.zeros((len(drawn_RM), num_classes), np.int64)
    order = np.argsort(class_M, kind="stable")
    classes, starts = np.unique(class_M[order], return_index=True)
    if len(classes):
        sums_RK[:, classes] = np.add.reduceat(drawn_RM[:, order], starts, axis=1)
    return sums_RK


def count_intervals(confusion_KK: NDArray[np.int64]) -> dict[str, list[float] | None]:
    """Intervals of accuracy, balanced accuracy, macro and weighted F1."""
    values: dict[str, list[Floats]] = {name: [np.empty(0)] for name in COUNTED}
    for resamples in resample_confusion(confusion_KK):
        for name, values_R in count_metrics(resamples).items():
            values[name].append(values_R)
    return {name: interval(np.concatenate(values_R)) for name, values_R in values.items()}


def count_metrics(resamples: Resamples) -> Mapping[str, Floats]:
    """The same numbers as ``metrics_from_counts`` (``COUNTED``), of many matrices at once; nan where that gives None."""
    support_RK, predicted_RK, correct_RK = resamples.support_RK, resamples.predicted_RK, resamples.correct_RK
    count_R = support_RK.sum(axis=1)
    f1_RK = _ratio(2 * correct_RK, support_RK + predicted_RK)
    return {
        "accuracy": _ratio(correct_RK.sum(axis=1), count_R),
        "balanced_accuracy": _mean_known(_ratio(correct_RK, support_RK)),
        "macro_f1": _mean_known(f1_RK),
        "weighted_f1": _ratio((np.nan_to_num(f1_RK) * support_RK).sum(axis=1), count_R),
    }


def _ratio(numerator: NDArray[np.int64] | Floats, denominator: NDArray[np.int64]) -> Floats:
    ratio: Floats = np.full(denominator.shape, np.nan)
    return np.divide(numerator, denominator, out=ratio, where=denominator > 0)


def _mean_known(values_RK: Floats) -> Floats:
    known_RK = ~np.isnan(values_RK)
    return _ratio(np.where(known_RK, values_RK, 0.0).sum(axis=1), known_RK.sum(axis=1))
