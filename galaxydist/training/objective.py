"""The training loss as a sum and a weight: sums are added over micro-batches and ranks, and divided once."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional


class Objective:
    """Weighted cross-entropy with label smoothing, as numerator and weight.

    Sample i adds ``w_i * CE_i`` to the numerator and ``w_i`` to the weight, where ``w_i`` is its own weight (0 for a
    picture that could not be read) times its class's. Label smoothing e mixes the one-hot target with the uniform
    distribution: ``(1 - e) onehot + e / K`` (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    Args:
        class_weights_K: float32 weight of each class.
        label_smoothing: e, in [0, 1).
    """

    def __init__(self, class_weights_K: torch.Tensor, label_smoothing: float) -> None:
        self.class_weights_K = class_weights_K
        self.label_smoothing = label_smoothing

    def weights(self, labels_B: torch.Tensor, sample_weights_B: torch.Tensor) -> torch.Tensor:
        """The weight of every sample, float32 of shape B."""
        return self.class_weights_K[labels_B] * sample_weights_B

    def numerator(self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        """``sum_i w_i CE_i``, a float32 scalar (float64 for float64 logits) with a gradient."""
        logits_BK = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
        losses_B = functional.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=self.label_smoothing)
        return (losses_B * weights_B).sum()


def class_weights(kind: Literal["none", "balanced"], counts_K: Sequence[int]) -> torch.Tensor:
    """Weight of each class: 1, or ``N / (K N_k)`` from the training split's counts. float32 of shape K.

    A class without galaxies gets weight 1: nothing is ever multiplied by it.
    """
    if kind == "none":
        return torch.ones(len(counts_K))
    total = sum(counts_K)
    return torch.tensor([total / (len(counts_K) * count) if count else 1.0 for count in counts_K])
