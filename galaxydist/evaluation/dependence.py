"""Accuracy against what is known of the galaxies: redshift, apparent size, brightness of the sky.

Bins hold equally many galaxies. Intervals are Wilson's (1927, JASA 22, 209), 95 %: a bin's accuracy is a binomial share.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.bootstrap import LEVEL
from galaxydist.evaluation.predictions import PredictionsFile

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
