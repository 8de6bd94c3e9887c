"""Calibration: whether a model that says 80 % is right in 80 % of the cases, and temperature scaling, which mends much of it.

Expected calibration error (Naeini et al. 2015, AAAI; Guo et al. 2017, ICML, section 2): galaxies are put by their confidence (the
largest probability) into 15 equal bins of [0, 1], and ECE = sum over bins of n_b / N |accuracy_b - confidence_b|.
Temperature scaling (Guo et al. 2017, section 4.2): logits are divided by the one T > 0 that minimises the cross-entropy of the
validation split, never of the galaxies that are judged. It changes no prediction.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.predictions import PredictionsFile, log_softmax

Floats = NDArray[np.float64]

NUM_BINS = 15
DEFINITION = "sum over 15 equal bins of confidence of n_b/N |accuracy_b - confidence_b|; confidence is the largest probability"
# Of T: beyond them a validation split says nothing sensible (all of it right, or nothing better than chance).
LOWEST, HIGHEST = 0.05, 20.0
# Logits that are kept in memory while T is looked for; more are read again at every try.
_KEPT_VALUES = 2_000_000


class Reliability:
    """Galaxies, confidence and correct answers by bin of confidence, added up."""

    def __init__(self) -> None:
        self.count = np.zeros(NUM_BINS, np.int64)
        self.confidence = np.zeros(NUM_BINS)
        self.correct = np.zeros(NUM_BINS, np.int64)

    def add(self, confidence_B: Floats, is_correct_B: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Take in galaxies; returns the bin of each: bin b holds b/15 <= confidence < (b + 1)/15, the last 1 too."""
        bin_B = np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], confidence_B, side="right")
        self.count += np.bincount(bin_B, minlength=NUM_BINS)
        self.confidence += np.bincount(bin_B, confidence_B, minlength=NUM_BINS)
        self.correct += np.bincount(bin_B, is_correct_B, minlength=NUM_BINS).astype(np.int64)
        return np.asarray(bin_B, np.int64)

    @property
    def ece(self) -> float | None:
        """Expected calibration error; None without galaxies."""
        total = int(self.count.sum())
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else None

    def plain(self) -> list[dict[str, Any]]:
        """A row a bin, for JSON; means are None in an empty one."""
        edges = np.linspace(0, 1, NUM_BINS + 1)
        return [
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "count": int(count),
                "confidence": float(self.confidence[number] / count) if count else None,
                "accuracy": float(self.correct[number] / count) if count else None,
            }
            for number, count in enumerate(self.count)
        ]


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Args:
        value: T.
        count: galaxies that it was fitted on.
        loss_before, loss_after: their mean cross-entropy with T = 1 and with T.
        at_bound: T lies at an end of the range that was searched.
    """

    value: float
    count: int
    loss_before: float
    loss_after: float
    at_bound: bool


def fit_temperature(validation: PredictionsFile) -> Temperature | None:
    """The temperature of least cross-entropy on a validation split; None where it has no galaxies or logits that are not finite.

    Raises:
        UserError: the file is damaged.
    """
    from scipy import optimize

    def loss_at(log_t: float) -> float:
        total = math.fsum(-_true_log(batch, math.exp(log_t)).sum() for batch in batches())
        return total / validation.num_galaxies

    batches = _batches(validation)
    if validation.num_galaxies == 0 or not math.isfinite(before := loss_at(0.0)):
        return None
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = optimize.minimize_scalar(loss_at, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    log_t = min((0.0, *bounds, float(found.x)), key=loss_at)
    return Temperature(math.exp(log_t), validation.num_galaxies, before, loss_at(log_t), log_t in bounds)


_Batch = dict[str, NDArray[Any]]


def _batches(file: PredictionsFile) -> Callable[[], Iterator[_Batch]]:
    columns = ["label", "logits"]
    if file.num_galaxies * file.info.num_classes > _KEPT_VALUES:
        return lambda: file.batches(columns)
    kept = list(file.batches(columns))
    return lambda: iter(kept)


def _true_log(batch: _Batch, temperature: float) -> Floats:
    """Logarithm of the probability of the true class."""
    log_BK = log_softmax(batch["logits"].astype(np.float64) / temperature)
    return np.asarray(log_BK[np.arange(len(log_BK)), batch["label"]])
