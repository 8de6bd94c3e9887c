"""Exact counts of some of a split's galaxies, beside those of all."""

import numpy as np
import torch
from numpy.typing import NDArray

from galaxydist.evaluation.counts import Counts


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
