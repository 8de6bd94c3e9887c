"""Selection for a gallery: most confident mistakes and least certain galaxies of each class.

The stored predictions are read once. Ties go to the smaller sample number, so that the selection depends on the predictions
alone.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.predictions import PredictionsFile

_COLUMNS = ("id", "sample", "label", "predicted", "probabilities")
_Rows = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class SelectedGalaxy:
    """A selected galaxy.

    Args:
        id: the survey's id.
        sample: stored sample number.
        label: true class.
        predicted: predicted class.
        probability: predicted probability of the predicted class.
        label_probability: predicted probability of the true class.
        entropy: entropy of the probabilities in nats: 0 for a certain prediction, log K if all K classes are equally likely.
    """

    id: str
    sample: int
    label: int
    predicted: int
    probability: float
    label_probability: float
    entropy: float

    @property
    def is_mistake(self) -> bool:
        return self.predicted != self.label


ByClass = tuple[tuple[SelectedGalaxy, ...], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected galaxies and the counts they were selected from.

    Args:
        confident: by true class: misclassified galaxies, the largest predicted probability first.
        uncertain: by true class: galaxies with the largest entropy, the largest first; right or wrong.
        num_galaxies: number of galaxies by true class.
        num_mistakes: number of misclassified galaxies by true class.
        num_undefined: number of galaxies whose probabilities are not finite; they are never selected.
    """

    confident: ByClass
    uncertain: ByClass
    num_galaxies: tuple[int, ...]
    num_mistakes: tuple[int, ...]
    num_undefined: int

    def predicted_classes(self) -> dict[int, int]:
        """Return sample number -> predicted class of all selected galaxies, by ascending sample number."""
        galaxies = (galaxy for of_class in (*self.confident, *self.uncertain) for galaxy in of_class)
        return dict(sorted((galaxy.sample, galaxy.predicted) for galaxy in galaxies))


def choose_mistakes(predictions: PredictionsFile, per_class: int) -> Selection:
    """Select galaxies of each true class; memory is bounded by a row group and the selection.

    Args:
        predictions: the predictions of an evaluation.
        per_class: maximum number per class and kind.

    Raises:
        UserError: the file is damaged.
    """
    num_classes = predictions.info.num_classes
    kept: dict[str, _Rows] = {"probability": {}, "entropy": {}}
    num_galaxies, num_mistakes = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    num_undefined = 0
    for batch in predictions.batches(_COLUMNS):
        rows = _with_scores(batch)
        is_wrong_N, is_defined_N = rows["predicted"] != rows["label"], np.isfinite(rows["entropy"])
        num_galaxies += np.bincount(rows["label"], minlength=num_classes)
        num_mistakes += np.bincount(rows["label"][is_wrong_N], minlength=num_classes)
        num_undefined += int((~is_defined_N).sum())
        for score, allowed_N in (("probability", is_defined_N & is_wrong_N), ("entropy", is_defined_N)):
            kept[score] = _best(kept[score], _take(rows, allowed_N), score, per_class)
    confident, uncertain = (_by_class(rows, num_classes) for rows in kept.values())
    return Selection(confident, uncertain, tuple(num_galaxies.tolist()), tuple(num_mistakes.tolist()), num_undefined)


def _with_scores(batch: _Rows) -> _Rows:
    from scipy import special

    p_NK, each = batch.pop("probabilities").astype(np.float64), np.arange(len(batch["label"]))
    probabilities = {"probability": p_NK[each, batch["predicted"]], "label_probability": p_NK[each, batch["label"]]}
    return {**batch, **probabilities, "entropy": special.entr(p_NK).sum(axis=1)}


def _best(kept: _Rows, rows: _Rows, score: str, per_class: int) -> _Rows:
    """Return the rows with the highest score of each class."""
    if kept:
        rows = {name: np.concatenate([kept[name], values]) for name, values in rows.items()}
    order = np.lexsort((rows["sample"], -rows[score], rows["label"]))
    label = rows["label"][order]
    rank = np.arange(label.size) - np.searchsorted(label, label)  # within its class
    return _take(rows, order[rank < per_class])


def _take(rows: _Rows, which: NDArray[Any]) -> _Rows:
    return {name: values[which] for name, values in rows.items()}


def _by_class(rows: _Rows, num_classes: int) -> ByClass:
    columns = [rows[field.name].tolist() for field in fields(SelectedGalaxy)] if rows else []
    galaxies = [SelectedGalaxy(*values) for values in zip(*columns, strict=True)]
    return tuple(tuple(galaxy for galaxy in galaxies if galaxy.label == label) for label in range(num_classes))
