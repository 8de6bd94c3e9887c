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

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 1000  # a multiple of 4: one random word weighs a galaxy in four resamples
SEED = 0x626F6F747374  # "bootst"
# Galaxies that are weighed together: 8 MB of weights.
_TOGETHER = 1024


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


def resample_confusion(confusion_KK: NDArray[np.int64]) -> NDArray[np.int64]:
    """R x K x K: as many confusion matrices of as many galaxies, each a draw with replacement."""
    count, num_classes = int(confusion_KK.sum()), len(confusion_KK)
    if count == 0:
        return np.zeros((0, num_classes, num_classes), np.int64)
    generator = np.random.Generator(np.random.Philox(key=SEED))
    drawn = generator.multinomial(count, confusion_KK.ravel() / count, size=RESAMPLES)
    return drawn.reshape(RESAMPLES, num_classes, num_classes)


def count_intervals(confusion_KK: NDArray[np.int64]) -> dict[str, list[float] | None]:
    """Intervals of accuracy, balanced accuracy, macro and weighted F1."""
    return {name: interval(values_R) for name, values_R in count_metrics(resample_confusion(confusion_KK)).items()}


def count_metrics(confusion_RKK: NDArray[np.int64]) -> Mapping[str, Floats]:
    """The same numbers as ``metrics_from_counts``, of many matrices at once; nan where that gives None."""
    support_RK, predicted_RK = confusion_RKK.sum(axis=2), confusion_RKK.sum(axis=1)
    correct_RK = np.diagonal(confusion_RKK, axis1=1, axis2=2)
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
