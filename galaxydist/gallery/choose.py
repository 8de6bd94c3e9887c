"""Selection for a gallery: most confident mistakes and least certain galaxies of each class.

The stored predictions are read once. Ties go to the smaller sample number, so that the selection depends on the predictions
alone.
"""

from dataclasses import dataclass
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

    confident: tuple[tuple[SelectedGalaxy, ...], ...]
    uncertain: tuple[tuple[SelectedGalaxy, ...], ...]
    num_galaxies: tuple[int, ...]
    num_mistakes: tuple[int, ...]
    num_undefined: int

    def samples(self) -> NDArray[np.int64]:
        """Return the unique sample numbers of all selected galaxies, ascending."""
        return np.unique(np.array([pick.sample for picks in (*self.confident, *self.uncertain) for pick in picks], np.int64))


def choose_mistakes(predictions: PredictionsFile, per_class: int) -> Selection:
    """Select galaxies of each true class; memory is bounded by a row group and the selection.

    Args:
        predictions: the predictions of an evaluation.
        per_class: maximum number per class and kind.

    Raises:
        UserError: the file is damaged.
    """
    num_classes = predictions.info.num_classes
    confident, uncertain = _Best("probability", per_class, num_classes), _Best("entropy", per_class, num_classes)
    num_galaxies, num_mistakes = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    num_undefined = 0
    for batch in predictions.batches(_COLUMNS):
        rows = _scored(batch)
        mistaken_N = rows["predicted"] != rows["label"]
        num_galaxies += np.bincount(rows["label"], minlength=num_classes)
        num_mistakes += np.bincount(rows["label"][mistaken_N], minlength=num_classes)
        defined_N = np.isfinite(rows["entropy"])
        num_undefined += int((~defined_N).sum())
        confident.add(_take(rows, defined_N & mistaken_N))
        uncertain.add(_take(rows, defined_N))
    return Selection(
        confident.picks(), uncertain.picks(), tuple(num_galaxies.tolist()), tuple(num_mistakes.tolist()), num_undefined
    )


def entropies(probabilities_NK: NDArray[Any]) -> NDArray[np.float64]:
    """Return the entropy in nats of each row of probabilities; nan if a probability is not finite."""
    p_NK = probabilities_NK.astype(np.float64)
    terms_NK = np.where(p_NK == 0, 0.0, p_NK * np.log(np.where(p_NK > 0, p_NK, 1.0)))
    entropy_N: NDArray[np.float64] = np.where(np.isfinite(p_NK).all(axis=1), -terms_NK.sum(axis=1), np.nan)
    return entropy_N


class _Best:
    """Keeps the rows with the highest score of each class while batches are added."""

    def __init__(self, score: str, per_class: int, num_classes: int) -> None:
        self._score, self._per_class, self._num_classes = score, per_class, num_classes
        self._kept: _Rows | None = None

    def add(self, rows: _Rows) -> None:
        if self._kept is not None:
            rows = {name: np.concatenate([self._kept[name], values]) for name, values in rows.items()}
        order = np.lexsort((rows["sample"], -rows[self._score], rows["label"]))
        label = rows["label"][order]
        place = np.arange(label.size) - np.searchsorted(label, label)  # rank within its class
        self._kept = _take(rows, order[place < self._per_class])

    def picks(self) -> tuple[tuple[SelectedGalaxy, ...], ...]:
        found: list[list[SelectedGalaxy]] = [[] for _ in range(self._num_classes)]
        if self._kept is not None:
            names = list(SelectedGalaxy.__dataclass_fields__)
            for values in zip(*(self._kept[name].tolist() for name in names), strict=True):
                pick = SelectedGalaxy(**dict(zip(names, values, strict=True)))
                found[pick.label].append(pick)
        return tuple(map(tuple, found))


def _scored(batch: _Rows) -> _Rows:
    p_NK, each = batch["probabilities"], np.arange(len(batch["label"]))
    return {
        **{name: values for name, values in batch.items() if name != "probabilities"},
        "probability": p_NK[each, batch["predicted"]].astype(np.float64),
        "label_probability": p_NK[each, batch["label"]].astype(np.float64),
        "entropy": entropies(p_NK),
    }


def _take(rows: _Rows, which: NDArray[Any]) -> _Rows:
    return {name: values[which] for name, values in rows.items()}
