"""Calibration: expected calibration error, and temperature scaling fitted on the validation split.

Expected calibration error (Naeini et al. 2015, AAAI; Guo et al. 2017, ICML, section 2): galaxies are sorted by their confidence
(the largest probability) into 15 equal bins of [0, 1], and ECE = sum over bins of n_b / N |accuracy_b - confidence_b|.
Temperature scaling (Guo et al. 2017, section 4.2): logits are divided by the one T > 0 that minimises the cross-entropy of the
validation split, never of the evaluated galaxies. It changes no prediction.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.predictions import PredictionsFile

Floats = NDArray[np.float64]

NUM_BINS = 15
# Between the bins.
BIN_EDGES = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
DEFINITION = "sum over 15 equal bins of confidence of n_b/N |accuracy_b - confidence_b|; confidence is the largest probability"
# Range of T: an optimum outside means that the validation split cannot determine it (all right, or no better than chance).
LOWEST, HIGHEST = 0.05, 20.0
# Maximum number of logits that are kept in memory during the fit; more are read from the file at every evaluation.
_KEPT_VALUES = 2_000_000


class Reliability:
    """Sums of galaxies, confidence and correct predictions by bin of confidence."""

    def __init__(self) -> None:
        self.count = np.zeros(NUM_BINS, np.int64)
        self.confidence = np.zeros(NUM_BINS)
        self.correct = np.zeros(NUM_BINS, np.int64)

    def add(self, confidence_B: Floats, is_correct_B: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Add galaxies and return the bin of each: bin b holds b/15 <= confidence < (b + 1)/15, the last also 1."""
        bin_B = np.searchsorted(BIN_EDGES, confidence_B, side="right")
        self.count += np.bincount(bin_B, minlength=NUM_BINS)
        self.confidence += np.bincount(bin_B, confidence_B, minlength=NUM_BINS)
        self.correct += np.bincount(bin_B, is_correct_B, minlength=NUM_BINS).astype(np.int64)
        return np.asarray(bin_B, np.int64)

    @property
    def ece(self) -> float | None:
        """Expected calibration error; None without galaxies."""
        total = int(self.count.sum())
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else None

    def to_json(self) -> dict[str, Any]:
        """Return the error and a row per bin, for JSON; the means of an empty bin are None."""
        edges = np.linspace(0, 1, NUM_BINS + 1)
        rows = [
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "count": int(count),
                "confidence": float(self.confidence[number] / count) if count else None,
                "accuracy": float(self.correct[number] / count) if count else None,
            }
            for number, count in enumerate(self.count)
        ]
        return {"ece": self.ece, "reliability": rows}


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Args:
        value: T.
        count: number of galaxies it was fitted on.
        loss_before, loss_after: their mean cross-entropy with T = 1 and with T.
        at_bound: True if T is at an end of the search range.
    """

    value: float
    count: int
    loss_before: float
    loss_after: float
    at_bound: bool


def fit_temperature(validation: PredictionsFile) -> Temperature | None:
    """Fit the temperature of least cross-entropy; return None if there are no galaxies or a loss is not finite.

    Raises:
        UserError: the file is damaged.
    """
    from scipy import optimize

    def loss_at(log_t: float) -> float:
        total = math.fsum(_losses(batch, math.exp(log_t)).sum() for batch in batches())
        return total / validation.num_galaxies

    batches = _batches(validation)
    if validation.num_galaxies == 0 or not math.isfinite(before := loss_at(0.0)):
        return None
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = optimize.minimize_scalar(loss_at, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    log_t = min((0.0, *bounds, float(found.x)), key=loss_at)
    return Temperature(math.exp(log_t), validation.num_galaxies, before, loss_at(log_t), log_t in bounds)


_Batch = dict[str, NDArray[Any]]


def _batches(file: PredictionsFile) -> Callable[[], Iterable[_Batch]]:
    columns = ["label", "logits"]
    if file.num_galaxies * file.info.num_classes > _KEPT_VALUES:
        return lambda: file.batches(columns)
    kept = list(file.batches(columns))
    return lambda: kept


def _losses(batch: _Batch, temperature: float) -> Floats:
    """Return the cross-entropy of each galaxy."""
    from scipy import special

    with np.errstate(invalid="ignore"):  # logits that are not finite
        log_BK = special.log_softmax(batch["logits"].astype(np.float64) / temperature, axis=1)
    return np.asarray(-log_BK[np.arange(len(log_BK)), batch["label"]])
