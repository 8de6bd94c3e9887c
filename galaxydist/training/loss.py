"""The training loss as a sum and a weight, which are added over micro-batches and ranks and divided once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from galaxydist.training.mixup import MixedBatch, Part, take


@dataclass(frozen=True)
class LossTargets:
    """Target labels of a batch and their weights in the loss.

    Args:
        labels_B: int64, own label of each galaxy.
        weights_B: float32, weight of the own label: the galaxy's weight, times its share lam of the label, times its class's.
        majority_B: int64, label with the larger share (the own one of equal shares), which counts as correct.
        partner_labels_B, partner_weights_B: the same of the galaxies that they are mixed with; None without mixing.
    """

    labels_B: torch.Tensor
    weights_B: torch.Tensor
    majority_B: torch.Tensor
    partner_labels_B: torch.Tensor | None = None
    partner_weights_B: torch.Tensor | None = None

    @property
    def total_weights_B(self) -> torch.Tensor:
        """Weight of each galaxy, float32; the loss is divided by their sum over all ranks."""
        return self.weights_B if self.partner_weights_B is None else self.weights_B + self.partner_weights_B

    def take(self, part: Part) -> "LossTargets":
        """Return the targets of a part of the batch."""
        values = (self.labels_B, self.weights_B, self.majority_B, self.partner_labels_B, self.partner_weights_B)
        return LossTargets(*(take(value, part) for value in values if value is not None))


class WeightedCrossEntropy:
    """Weighted cross-entropy with label smoothing, as numerator and weight.

    Sample i adds ``w_i * CE_i`` to the numerator and ``w_i`` to the weight, where ``w_i`` is its own weight (0 for an image that
    could not be read) times its class's. Label smoothing e mixes the one-hot target with the uniform
    distribution: ``(1 - e) onehot + e / K`` (Szegedy et al. 2016, arXiv:1512.00567, section 7). A sample mixed with another, of
    which lam is its own, adds ``lam w_i CE_i + (1 - lam) w'_i CE'_i`` and ``lam w_i + (1 - lam) w'_i``, where ``w'_i`` and
    ``CE'_i`` are those of the other sample's class.

    Args:
        class_weights_K: float32 weight of each class.
        label_smoothing: e, in [0, 1).
    """

    def __init__(self, class_weights_K: torch.Tensor, label_smoothing: float) -> None:
        self.class_weights_K = class_weights_K
        self.label_smoothing = label_smoothing

    def targets(self, labels_B: torch.Tensor, sample_weights_B: torch.Tensor, mix: MixedBatch | None = None) -> LossTargets:
        """Return the targets of a rank's whole batch.

        Args:
            labels_B: int64.
            sample_weights_B: float32.
            mix: the batch's mixtures; None without mixing.
        """
        weights_B = self.weights(labels_B, sample_weights_B)
        if mix is None:
            return LossTargets(labels_B, weights_B, labels_B)
        partner_labels_B, shares_B = mix.partners(labels_B), mix.partner_shares_B
        partner_weights_B = self.weights(partner_labels_B, sample_weights_B) * shares_B
        majority_B = torch.where(shares_B > 0.5, partner_labels_B, labels_B)
        return LossTargets(labels_B, weights_B * (1 - shares_B), majority_B, partner_labels_B, partner_weights_B)

    def weights(self, labels_B: torch.Tensor, sample_weights_B: torch.Tensor) -> torch.Tensor:
        """Return the weights of samples that are not mixed, float32 of shape B."""
        return self.class_weights_K[labels_B] * sample_weights_B

    def summed_loss(self, logits_BK: torch.Tensor, targets: LossTargets) -> torch.Tensor:
        """Return the numerator of mixed or unmixed samples, as ``numerator`` does."""
        own = self.numerator(logits_BK, targets.labels_B, targets.weights_B)
        if targets.partner_labels_B is None or targets.partner_weights_B is None:
            return own
        return own + self.numerator(logits_BK, targets.partner_labels_B, targets.partner_weights_B)

    def numerator(self, logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        """Return ``sum_i w_i CE_i``, a float32 scalar (float64 for float64 logits) with a gradient."""
        logits_BK = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
        losses_B = functional.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=self.label_smoothing)
        return (losses_B * weights_B).sum()


def class_weights(kind: Literal["none", "balanced"], counts_K: Sequence[int]) -> torch.Tensor:
    """Return the weight of each class, float32 of shape K: 1, or ``N / (K N_k)`` from the training split's counts.

    A class without galaxies gets weight 1, which is never used.
    """
    if kind == "none":
        return torch.ones(len(counts_K))
    total = sum(counts_K)
    return torch.tensor([total / (len(counts_K) * count) if count else 1.0 for count in counts_K])
