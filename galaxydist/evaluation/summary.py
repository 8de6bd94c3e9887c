"""Everything that is said about an evaluation, from its stored predictions: no model, and no memory that grows with them.

Two to three passes over the file: this one, the areas', the properties'. What grows with the number of galaxies is one column at
a time (8 bytes a galaxy).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation import bootstrap
from galaxydist.evaluation.areas import Curve, measure_areas
from galaxydist.evaluation.calibration import DEFINITION, NUM_BINS, Reliability, Temperature, fit_temperature
from galaxydist.evaluation.dependence import measure_dependence
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.evaluation.predictions import PredictionsFile, PredictionsInfo
from galaxydist.evaluation.probabilities import log_softmax

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
    curves: tuple[Curve | None, ...]


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
        left_out.append(f"areas and calibration: {sums.num_nonfinite} galaxies have logits that are not finite")
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
