"""Exact counts of an evaluation: summed per rank, reduced over ranks once, divided once."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from galaxydist.errors import UserError

_FRACTION_BITS = 36  # a sum of fractions overflows int64 only beyond 2^27 galaxies


class Counts:
    """Confusion matrix, summed loss and number of galaxies of an evaluation; exact for any number of ranks.

    The loss is the plain cross-entropy (no label smoothing, no class weights). It is computed in float64, rounded once per galaxy
    and summed in fixed point (steps of 2^-36 = 1.5e-11 nats), so that the sum is bit-equal in any order and for any number of
    ranks.

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
        # K*K cells by rows, whole nats of loss, fractions of a nat in units of 2^-36, number of galaxies with a non-finite loss.
        self._sums = torch.zeros(num_classes**2 + 3, dtype=torch.int64, device=self._device)
        self._subset_N = None if subset_N is None else torch.from_numpy(np.ascontiguousarray(subset_N))

    def add(
        self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor, samples_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Count one batch and return the predicted classes, (B,) int64; does not synchronise with the device.

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
        loss_B = functional.cross_entropy(logits_BK.double(), labels_B, reduction="none")
        is_finite_B = loss_B.isfinite()
        loss_B = torch.where(is_counted_B & is_finite_B, loss_B, 0.0)
        whole_B = loss_B.floor()
        fraction_B = ((loss_B - whole_B) * 2**_FRACTION_BITS).round()
        self._sums[-3:] += torch.stack([whole_B.long().sum(), fraction_B.long().sum(), (is_counted_B & ~is_finite_B).sum()])
        return predicted_B

    @property
    def confusion_KK(self) -> torch.Tensor:
        """int64 counts on the CPU; row: true class, column: predicted class."""
        return self._sums[:-3].cpu().reshape(self.num_classes, self.num_classes)

    @property
    def loss_sum(self) -> float:
        """Summed cross-entropy in nats; nan if the loss of a galaxy is not finite."""
        whole, fraction, num_nonfinite = self._sums[-3:].tolist()
        return math.nan if num_nonfinite else whole + fraction / 2**_FRACTION_BITS

    @property
    def count(self) -> int:
        """Number of galaxies counted."""
        return int(self._sums[:-3].sum())

    def vector(self) -> torch.Tensor:
        """Return all sums as one int64 tensor of K*K + 3 elements, on the device, for one all-reduce (sum)."""
        return self._sums.clone()

    @classmethod
    def from_vector(cls, vector: torch.Tensor) -> "Counts":
        """Return the counts of a (reduced) ``vector``."""
        counts = cls(math.isqrt(vector.numel() - 3), vector.device)
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
