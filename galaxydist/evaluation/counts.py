"""Exact counts of an evaluation: summed per rank, reduced over ranks once, divided once."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from galaxydist.errors import UserError
from galaxydist.evaluation.calibration import BIN_EDGES, NUM_BINS, Reliability

FRACTION_BITS = 36  # a sum of fractions overflows int64 only beyond 2^27 galaxies


class Predicted(NamedTuple):
    """Predictions of a batch, on the device of the counts.

    Args:
        classes_B: predicted classes, int64.
        confidence_B: their probabilities in units of 2^-36, int64; 0 if a logit is not finite.
    """

    classes_B: torch.Tensor
    confidence_B: torch.Tensor


class Counts:
    """Confusion matrix, summed loss, bins of confidence and number of galaxies of an evaluation; exact for any number of ranks.

    The loss is the plain cross-entropy (no label smoothing, no class weights). It is computed in float64, rounded once per galaxy
    and summed in fixed point (steps of 2^-36 = 1.5e-11 nats), so that the sum is bit-equal in any order and for any number of
    ranks. So are the confidences (the largest probabilities) in each bin.

    Args:
        num_classes: K.
        device: device of the sums.
        subset_N: bool mask by stored sample number, to count only some galaxies of a split; None to count all.
    """

    def __init__(
        self, num_classes: int, device: torch.device | str = "cpu", *, subset_N: NDArray[np.bool_] | None = None
    ) -> None:
        self.num_classes = num_classes
        self._device = torch.device(device)
        # K*K cells by rows; of each bin of confidence the galaxies, those predicted rightly and the sum of the confidences; whole
        # nats of loss, fractions of a nat, number of galaxies with a non-finite loss. Fractions are in units of 2^-36.
        self._sums = torch.zeros(num_classes**2 + 3 * NUM_BINS + 3, dtype=torch.int64, device=self._device)
        self._first_31 = num_classes**2 + NUM_BINS * torch.arange(3, device=self._device)[:, None]
        edges = torch.from_numpy(BIN_EDGES)
        # A copy from other memory would make the host wait.
        edges = edges.pin_memory() if self._device.type == "cuda" else edges
        self._edges = edges.to(self._device, non_blocking=True)
        self._subset_N = None if subset_N is None else torch.from_numpy(np.ascontiguousarray(subset_N))

    def add(
        self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, samples_B: torch.Tensor | None = None
    ) -> Predicted:
        """Count one batch and return its predictions; does not synchronise with the device.

        Args:
            logits_BK: any float type.
            labels_B: int64, 0 ... K-1.
            weights_B: 1 for a galaxy, 0 for padding and skipped images.
            samples_B: stored sample numbers on the CPU, below 0 for padding; required for a subset.
        """
        if self._subset_N is not None:
            assert samples_B is not None
            is_in_subset_B = self._subset_N[samples_B.clamp(min=0)]
            if weights_B.device.type == "cuda":  # a copy from other memory would make the host wait
                is_in_subset_B = is_in_subset_B.pin_memory()
            weights_B = weights_B * is_in_subset_B.to(weights_B.device, non_blocking=True)
        logits_BK = logits_BK.detach().to(self._device)
        labels_B, is_counted_B = labels_B.to(self._device), weights_B.to(self._device) != 0
        labels_B = torch.where(is_counted_B, labels_B, 0)  # padding may hold any label
        predicted_B = logits_BK.argmax(dim=1)
        self._sums.index_add_(0, labels_B * self.num_classes + predicted_B, is_counted_B.long())
        log_BK = functional.log_softmax(logits_BK.double(), dim=1)
        loss_B = functional.nll_loss(log_BK, labels_B, reduction="none")
        is_finite_B = loss_B.isfinite()
        confidence_B = self._add_confidences(log_BK, predicted_B == labels_B, is_counted_B & is_finite_B)
        loss_B = torch.where(is_counted_B & is_finite_B, loss_B, 0.0)
        whole_B = loss_B.floor()
        fraction_B = _fixed_point(loss_B - whole_B)
        self._sums[-3:] += torch.stack([whole_B.long().sum(), fraction_B.sum(), (is_counted_B & ~is_finite_B).sum()])
        return Predicted(predicted_B, confidence_B)

    def _add_confidences(self, log_BK: torch.Tensor, is_correct_B: torch.Tensor, is_counted_B: torch.Tensor) -> torch.Tensor:
        """Add to the bins of confidence, and return the confidences in units of 2^-36."""
        largest_B = log_BK.amax(dim=1).exp()
        largest_B = torch.where(largest_B.isfinite(), largest_B, 0.0)
        confidence_B, bin_B = _fixed_point(largest_B), torch.bucketize(largest_B, self._edges, right=True)
        counted_3B = torch.stack([torch.ones_like(confidence_B), is_correct_B.long(), confidence_B]) * is_counted_B
        self._sums.index_add_(0, (self._first_31 + bin_B).view(-1), counted_3B.view(-1))
        return confidence_B

    @property
    def confusion_KK(self) -> torch.Tensor:
        """int64 counts on the CPU; row: true class, column: predicted class."""
        return self._sums[: self.num_classes**2].cpu().reshape(self.num_classes, self.num_classes)

    @property
    def loss_sum(self) -> float:
        """Summed cross-entropy in nats; nan if the loss of a galaxy is not finite."""
        whole, fraction, num_nonfinite = self._sums[-3:].tolist()
        return math.nan if num_nonfinite else whole + fraction / 2**FRACTION_BITS

    @property
    def reliability(self) -> Reliability | None:
        """Bins of confidence; None if the loss of a galaxy is not finite."""
        if self._sums[-1]:
            return None
        found = Reliability()
        bins_3M = self._sums[self.num_classes**2 : -3].cpu().numpy().reshape(3, NUM_BINS)
        found.count, found.correct, found.confidence = bins_3M[0], bins_3M[1], bins_3M[2] / 2**FRACTION_BITS
        return found

    @property
    def count(self) -> int:
        """Number of galaxies counted."""
        return int(self._sums[: self.num_classes**2].sum())

    def vector(self) -> torch.Tensor:
        """Return all sums as one int64 tensor on the device, for one all-reduce (sum)."""
        return self._sums.clone()

    @classmethod
    def from_vector(cls, vector: torch.Tensor) -> "Counts":
        """Return the counts of a (reduced) ``vector``."""
        counts = cls(math.isqrt(vector.numel() - 3 * NUM_BINS - 3), vector.device)
        counts._sums = vector.detach().clone()
        return counts

    def check(self, expected: int, what: str = "the split") -> None:
        """Check that every galaxy was counted once.

        Args:
            expected: number of galaxies in the manifest.
            what: name of the evaluated galaxies, for the message.

        Raises:
            UserError: another number was counted.
        """
        if self.count != expected:
            raise UserError(
                f"{self.count} galaxies were counted in {what}, but its manifest has {expected}. The shards and the manifest do "
                "not belong together, or images could not be read: verify them with `galaxydist data check`."
            )


def _fixed_point(value_B: torch.Tensor) -> torch.Tensor:
    """Return values of 0 ... 1 in units of 2^-36, int64."""
    return torch.mul(value_B, 2**FRACTION_BITS).round().long()
