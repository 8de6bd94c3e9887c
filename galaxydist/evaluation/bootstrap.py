"""Bootstrap confidence intervals over galaxies.

Percentile intervals (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3), always from the same random
bits, so that equal predictions give equal intervals.

Metrics of the confusion matrix are resampled exactly: drawing N galaxies with replacement is one multinomial draw of the matrix's
cells. Metrics that need each galaxy (loss, calibration, top-2 accuracy) weight each with an independent Poisson number of mean 1
instead of the multinomial counts. This differs only in the size of a resample (N, within about the root of N), and is summed in
one pass (Hanley & MacGibbon 2006, Comput Methods Programs Biomed 83, 57). A resample without galaxies is left out.

An interval of the calibration error tends to lie high: noise increases an absolute value, and a resample has more noise than the
galaxies themselves.
"""

from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 1000  # a multiple of 4: one random word weighs a galaxy in four resamples
SEED = 0x626F6F747374  # "bootst"
# Metrics of the confusion matrix.
COUNTED = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1")
# Number of galaxies weighted at once (8 MB of weights), and of values drawn at once (8 MB too).
_WEIGHTED_AT_ONCE, _DRAWN_AT_ONCE = 1024, 1_000_000


class GalaxyBootstrap:
    """Sums over galaxies in every resample, in one pass and constant memory.

    Galaxy i, in the order of ``add``, gets its weights from the words 250 i ... 250 i + 249 of the Philox stream of ``SEED``: 16
    bits per resample, through a table.

    Args:
        num_columns: number of values per galaxy.
    """

    def __init__(self, num_columns: int) -> None:
        self.sums_RM: Floats = np.zeros((RESAMPLES, num_columns))
        self._bits = np.random.Philox(key=SEED)

    def add(self, values_BM: Floats) -> None:
        """Add galaxies: B rows of M finite values."""
        table = poisson_table()
        for start in range(0, len(values_BM), _WEIGHTED_AT_ONCE):
            chunk_BM = values_BM[start : start + _WEIGHTED_AT_ONCE]
            words = self._bits.random_raw(len(chunk_BM) * RESAMPLES // 4).astype("<u8", copy=False)
            weights_BR = table[words.view("<u2").reshape(len(chunk_BM), RESAMPLES)]
            self.sums_RM += weights_BR.T @ chunk_BM


@cache
def poisson_table() -> Floats:
    """Return a Poisson number of mean 1 for each value of 16 random bits, by inversion."""
    from scipy import stats

    table: Floats = stats.poisson.ppf((np.arange(2**16) + 0.5) / 2**16, 1.0).astype(np.float64)
    return table


def interval(values_R: Floats) -> list[float] | None:
    """Return the central 95 % of the resampled values, without nan; None if no value is left."""
    known = values_R[np.isfinite(values_R)]
    if not len(known):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(known, (tail, 1 - tail)).tolist()
    return [low, high]


# R resampled confusion matrices: number of galaxies of each class, predicted as it, and both (R x K each).
Resamples = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def resample_confusion(confusion_KK: NDArray[np.int64]) -> Iterator[Resamples]:
    """Yield R draws in blocks; nothing for a matrix without galaxies.

    Only cells with galaxies are drawn: with a thousand classes, most of the million are empty. The last cell is always included,
    because numpy assigns it the remainder without a draw: so the numbers equal those of drawing all cells.
    """
    count, num_classes = int(confusion_KK.sum()), len(confusion_KK)
    if count == 0:
        return
    cells_M = np.union1d(np.flatnonzero(confusion_KK), [confusion_KK.size - 1])
    true_M, predicted_M = cells_M // num_classes, cells_M % num_classes
    is_right_M = true_M == predicted_M
    generator = np.random.Generator(np.random.Philox(key=SEED))
    at_once = max(1, _DRAWN_AT_ONCE // max(len(cells_M), num_classes))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn_RM = generator.multinomial(count, confusion_KK.ravel()[cells_M] / count, size=size)
        true_RK, predicted_RK = _sum_by(true_M, drawn_RM, num_classes), _sum_by(predicted_M, drawn_RM, num_classes)
        yield true_RK, predicted_RK, _sum_by(true_M[is_right_M], drawn_RM[:, is_right_M], num_classes)


def _sum_by(class_M: NDArray[np.int64], drawn_RM: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Return the sums over the cells of each class, R x K."""
    from scipy import sparse

    cells = class_M, np.arange(len(class_M))
    return np.asarray((sparse.csr_array((np.ones_like(class_M), cells), (num_classes, len(class_M))) @ drawn_RM.T).T)


def count_intervals(confusion_KK: NDArray[np.int64]) -> dict[str, list[float] | None]:
    """Return the intervals of accuracy, balanced accuracy, macro and weighted F1."""
    values: dict[str, list[Floats]] = {name: [np.empty(0)] for name in COUNTED}
    for resamples in resample_confusion(confusion_KK):
        for name, values_R in count_metrics(*resamples).items():
            values[name].append(values_R)
    return {name: interval(np.concatenate(values_R)) for name, values_R in values.items()}


def count_metrics(
    support_RK: NDArray[np.int64], predicted_RK: NDArray[np.int64], correct_RK: NDArray[np.int64]
) -> Mapping[str, Floats]:
    """Return the metrics ``COUNTED`` of many matrices at once, as ``metrics_from_counts`` does; nan where that gives None."""
    count_R = support_RK.sum(axis=1)
    f1_RK = ratio(2 * correct_RK, support_RK + predicted_RK)
    return {
        "accuracy": ratio(correct_RK.sum(axis=1), count_R),
        "balanced_accuracy": _mean_known(ratio(correct_RK, support_RK)),
        "macro_f1": _mean_known(f1_RK),
        "weighted_f1": ratio((np.nan_to_num(f1_RK) * support_RK).sum(axis=1), count_R),
    }


def ratio(numerator: NDArray[np.int64] | Floats, denominator: NDArray[np.int64]) -> Floats:
    """Return the elementwise ratio; nan where the denominator is 0."""
    ratios: Floats = np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)
    return ratios


def _mean_known(values_RK: Floats) -> Floats:
    known_RK = ~np.isnan(values_RK)
    return ratio(np.where(known_RK, values_RK, 0.0).sum(axis=1), known_RK.sum(axis=1))
