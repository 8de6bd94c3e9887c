"""Exact counts of an evaluation: what is added up, reduced over ranks once, and divided once."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from galaxydist.errors import UserError

_FRACTION_BITS = 36  # 2^27 galaxies before a sum of fractions could overflow int64


@dataclass(frozen=True)
class BatchPredictions:
    """The outputs for single galaxies, in the order of their stored sample numbers.

    Args:
        samples_N: int64, stored sample number.
        labels_N: int64.
        predicted_N: int64, the class that was counted: rounding to float32 can make two logits equal.
        logits_NK: float32.
    """

    samples_N: torch.Tensor
    labels_N: torch.Tensor
    predicted_N: torch.Tensor
    logits_NK: torch.Tensor

    @property
    def probabilities_NK(self) -> torch.Tensor:
        """Softmax of the logits, N x K float64."""
        return functional.softmax(self.logits_NK.double(), dim=1)

    @staticmethod
    def merge(parts: "list[BatchPredictions]") -> "BatchPredictions":
        """The predictions of several ranks as one, ordered by sample number.

        Raises:
            ValueError: a galaxy stands in two of them.
        """
        joined = BatchPredictions.join(parts)
        order_N = torch.argsort(joined.samples_N)
        merged = BatchPredictions(*(tensor[order_N] for tensor in vars(joined).values()))
        if bool((merged.samples_N[1:] == merged.samples_N[:-1]).any()):
            raise ValueError("a galaxy was evaluated twice")
        return merged

    @staticmethod
    def join(parts: "list[BatchPredictions]") -> "BatchPredictions":
        """Predictions one after the other, as they come."""
        return BatchPredictions(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))


class Counts:
    """Confusion matrix, summed loss and number of galaxies of an evaluation, exact whatever the number of ranks.

    The loss is the plain cross-entropy (no smoothing, no class weights), computed in float64 and summed in fixed point (steps of
    2^-36 = 1.5e-11 nats, rounded once a galaxy), so that its sum, too, is bit-equal in any order and on any number of ranks.

    Args:
        num_classes: K.
        device: where the counts lie while they are added up.
        keep_predictions: also keep each galaxy's logits (``predictions``, ``take_predictions``).
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, keep_predictions: bool = False) -> None:
        self.num_classes = num_classes
        # float64 does not exist on Apple's GPUs; there everything is added up on the CPU.
        self._device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        # K*K cells by rows, whole nats of loss, fractions of a nat in units of 2^-36, galaxies whose loss is not finite.
        self._sums = torch.zeros(num_classes**2 + 3, dtype=torch.int64, device=self._device)
        self._kept: list[BatchPredictions] | None = [] if keep_predictions else None

    def add(
        self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, samples_B: torch.Tensor | None = None
    ) -> None:
        """Count one batch; does not wait for the device, but where predictions are kept.

        Args:
            logits_BK: any float type.
            labels_B: int64, 0 ... K-1.
            weights_B: 1 for a galaxy, 0 for padding or an image that was skipped.
            samples_B: stored sample numbers, needed where predictions are kept.
        """
        logits_BK = logits_BK.detach().to(self._device)
        labels_B, is_counted_B = labels_B.to(self._device), weights_B.to(self._device) != 0
        labels_B = torch.where(is_counted_B, labels_B, 0)  # padding may hold any label
        predicted_B = logits_BK.argmax(dim=1)
        cells_B = labels_B * self.num_classes + predicted_B
        self._sums.index_add_(0, cells_B, is_counted_B.long())
        loss_B = functional.cross_entropy(logits_BK.double(), labels_B, reduction="none")
        is_finite_B = loss_B.isfinite()
        loss_B = torch.where(is_counted_B & is_finite_B, loss_B, 0.0)
        whole_B = loss_B.floor()
        fraction_B = ((loss_B - whole_B) * 2**_FRACTION_BITS).round()
        sums = [whole_B.long().sum(), fraction_B.long().sum(), (is_counted_B & ~is_finite_B).sum()]
        self._sums[-3:] += torch.stack(sums)
        if self._kept is not None:
            if samples_B is None:
                raise ValueError("samples_B is needed to keep predictions")
            kept_B = is_counted_B.cpu()
            kept = (samples_B, labels_B, predicted_B, logits_BK.float())
            self._kept.append(BatchPredictions(*(tensor.cpu()[kept_B] for tensor in kept)))

    @property
    def confusion_KK(self) -> torch.Tensor:
        """int64 counts on the CPU; row: true class, column: predicted class."""
        return self._sums[:-3].cpu().reshape(self.num_classes, self.num_classes)

    @property
    def loss_sum(self) -> float:
        """Summed cross-entropy in nats; nan where a galaxy's loss was not finite."""
        whole, fraction, num_nonfinite = self._sums[-3:].tolist()
        return math.nan if num_nonfinite else whole + fraction / 2**_FRACTION_BITS

    @property
    def count(self) -> int:
        """Number of galaxies counted."""
        return int(self._sums[:-3].sum())

    @property
    def predictions(self) -> BatchPredictions:
        """This rank's kept predictions, ordered by sample number."""
        return BatchPredictions.merge([self._no_predictions(), *self._taken(clear=False)])

    def take_predictions(self) -> BatchPredictions:
        """What was kept since the last call, in the order of the batches; it is kept no longer."""
        return BatchPredictions.join([self._no_predictions(), *self._taken(clear=True)])

    def _taken(self, *, clear: bool) -> list[BatchPredictions]:
        if self._kept is None:
            raise ValueError("made without keep_predictions")
        taken = self._kept
        if clear:
            self._kept = []
        return taken

    def _no_predictions(self) -> BatchPredictions:
        none = torch.empty(0, dtype=torch.int64)
        return BatchPredictions(none, none, none, torch.empty(0, self.num_classes))

    def vector(self) -> torch.Tensor:
        """All sums as one int64 tensor of K*K + 3, on the device, for one all-reduce (sum)."""
        return self._sums.clone()

    @classmethod
    def from_vector(cls, vector: torch.Tensor) -> "Counts":
        """The counts of a (reduced) ``vector``."""
        num_classes = math.isqrt(max(vector.numel() - 3, 0))
        if vector.dtype != torch.int64 or vector.ndim != 1 or vector.numel() != num_classes**2 + 3:
            raise ValueError(f"a {vector.dtype} tensor of shape {tuple(vector.shape)} holds no counts")
        counts = cls(num_classes, vector.device)
        counts._sums = vector.detach().clone()
        return counts

    def check(self, expected: int, what: str = "the split") -> None:
        """Make sure that every galaxy was counted once.

        Args:
            expected: number of galaxies in the manifest.
            what: what was evaluated, for the message.

        Raises:
            UserError: another number was counted.
        """
        if self.count != expected:
            raise UserError(
                f"{self.count} galaxies were counted in {what}, but its manifest has {expected}. The shards and the manifest do "
                "not belong together, or images could not be read: verify them with `galaxydist data check`."
            )


# Exact counts of some of a split's galaxies, beside those of all.


class SubsetCounts:
    """Counts of the galaxies of a subset, from the batches of the whole split.

    Args:
        num_classes: K.
        is_counted_N: bool, by stored sample number.
        device: where the counts are added up.

    Attributes:
        counts: of this rank; reduced over ranks like any others.
        expected: how many galaxies all ranks together must have counted.
    """

    def __init__(self, num_classes: int, is_counted_N: NDArray[np.bool_], device: torch.device | str = "cpu") -> None:
        self.counts = Counts(num_classes, device)
        self.expected = int(is_counted_N.sum())
        self._is_counted_N = torch.from_numpy(np.ascontiguousarray(is_counted_N))

    def add(self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, samples_B: torch.Tensor) -> None:
        """Count one batch; see ``Counts.add``. Samples below 0 are padding, which has weight 0."""
        is_counted_B = self._is_counted_N[samples_B.cpu().clamp(min=0)]
        self.counts.add(logits_BK, labels_B, weights_B * is_counted_B.to(weights_B.device))
