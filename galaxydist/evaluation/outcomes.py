"""What a run predicted for each galaxy, matched by the galaxies' ids between runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError

COLUMNS = ("id", "label", "logits")


@dataclass(frozen=True)
class Outcomes:
    """One run's predictions on a test set, ordered by id.

    Args:
        ids_N: str, unique, ascending.
        labels_N: int64.
        log_probabilities_NK: float64.
        source: where they were read, for messages.
    """

    ids_N: NDArray[np.str_]
    labels_N: NDArray[np.int64]
    log_probabilities_NK: NDArray[np.float64]
    source: str = "predictions"

    @cached_property
    def predicted_N(self) -> NDArray[np.int64]:
        """The most probable class, the first of equals."""
        predicted_N: NDArray[np.int64] = self.log_probabilities_NK.argmax(axis=1)
        return predicted_N

    @cached_property
    def correct_N(self) -> NDArray[np.bool_]:
        """Whether the most probable class is the galaxy's."""
        correct_N: NDArray[np.bool_] = self.predicted_N == self.labels_N
        return correct_N

    @cached_property
    def losses_N(self) -> NDArray[np.float64]:
        """Plain cross-entropy in nats."""
        losses_N: NDArray[np.float64] = -self.log_probabilities_NK[np.arange(len(self.labels_N)), self.labels_N]
        return losses_N

    def take(self, ids_M: NDArray[np.str_]) -> "Outcomes":
        """Those of some of its galaxies (ids ascending)."""
        if len(ids_M) == len(self.ids_N):
            return self
        rows_M = np.searchsorted(self.ids_N, ids_M)
        return Outcomes(ids_M, self.labels_N[rows_M], self.log_probabilities_NK[rows_M], self.source)


def build_outcomes(ids: Sequence[str], labels: Sequence[int], logits: Any, *, source: str = "predictions") -> Outcomes:
    """Outcomes from columns in any order.

    Args:
        ids: N names.
        labels: N class numbers.
        logits: N x K, any float type; their softmax are the probabilities.
        source: where they come from, for messages.

    Raises:
        UserError: a galaxy stands there twice, a label has no column, or a number is not finite.
    """
    from scipy.special import log_softmax

    order_N = np.argsort(np.asarray(ids, np.str_), kind="stable")
    ids_N, labels_N = np.asarray(ids, np.str_)[order_N], np.asarray(labels, np.int64)[order_N]
    logits_NK = np.asarray(logits, np.float64)[order_N]
    again = ids_N[1:][ids_N[1:] == ids_N[:-1]]
    if len(again):
        raise UserError(f"{source} holds the galaxy {again[0]} twice. Evaluate the run again.")
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < logits_NK.shape[1]:
        raise UserError(f"{source} holds labels without a column of logits. Evaluate the run again.")
    if not np.isfinite(logits_NK).all():
        raise UserError(f"{source} holds logits that are not finite: the model's weights are broken.")
    return Outcomes(ids_N, labels_N, log_softmax(logits_NK, axis=1), source)


def read_outcomes(path: Path) -> Outcomes:
    """The outcomes in a file of predictions (Parquet with columns id, label and logits).

    Raises:
        UserError: it is missing, damaged or has other columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=list(COLUMNS))
        columns = {name: table.column(name).combine_chunks() for name in COLUMNS}
        scores = columns["logits"].flatten().to_numpy(zero_copy_only=False)
        logits_NK = scores.reshape(table.num_rows, -1) if table.num_rows else np.empty((0, 1))
        ids, labels = columns["id"].to_pylist(), columns["label"].to_numpy(zero_copy_only=False)
    except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as predictions ({reason}). Make it again with `galaxydist evaluate RUN`."
        ) from error
    return build_outcomes(ids, labels, logits_NK, source=str(path))


def match(outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """The outcomes of several runs on the galaxies that all of them judged, in the same order.

    Raises:
        UserError: they share no galaxy, know other numbers of classes, or a galaxy has two labels.
    """
    first = outcomes[0]
    shared = reduce(_intersect, (one.ids_N for one in outcomes))
    for other in outcomes[1:]:
        if len(shared) == 0:
            raise UserError(f"{first.source} and {other.source} have no galaxy in common: they are of different test sets.")
        if other.log_probabilities_NK.shape[1] != first.log_probabilities_NK.shape[1]:
            raise UserError(f"{first.source} and {other.source} are about different numbers of classes.")
    matched = [one.take(shared) for one in outcomes]
    for other in matched[1:]:
        if wrong := np.flatnonzero(other.labels_N != matched[0].labels_N).tolist():
            raise UserError(
                f"{len(wrong)} galaxies have other labels in {other.source} than in {first.source}, the first is "
                f"{shared[wrong[0]]}: they are of different data sets."
            )
    return matched


def _intersect(left: NDArray[np.str_], right: NDArray[np.str_]) -> NDArray[np.str_]:
    if np.array_equal(left, right):  # nearly always, and much quicker
        return left
    return np.intersect1d(left, right, assume_unique=True)
