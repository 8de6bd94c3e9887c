"""Loss sums over parts, label smoothing, sample weights and class weights."""

import pytest
import torch
from torch.nn import functional

from galaxydist.training.loss import WeightedCrossEntropy, class_weights


def test_loss_summed_over_parts_is_torchs_weighted_mean() -> None:
    torch.manual_seed(0)
    logits_BK, labels_B = torch.randn(50, 4, dtype=torch.float64), torch.randint(0, 4, (50,))
    weights_K = torch.tensor([0.5, 1.0, 2.0, 4.0])
    objective = WeightedCrossEntropy(weights_K, label_smoothing=0.0)
    numerator, weight = torch.zeros(()), torch.zeros(())
    for part in (slice(0, 7), slice(7, 31), slice(31, 50)):
        weights_B = objective.weights(labels_B[part], torch.ones(len(labels_B[part])))
        numerator = numerator + objective.numerator(logits_BK[part], labels_B[part], weights_B)
        weight = weight + weights_B.sum()
    expected = functional.cross_entropy(logits_BK, labels_B, weight=weights_K.double())
    assert (numerator / weight).item() == pytest.approx(expected.item(), abs=1e-6)


def test_label_smoothing_mixes_with_the_uniform_distribution() -> None:
    logits_BK, labels_B = torch.randn(6, 5, dtype=torch.float64), torch.arange(5).repeat(2)[:6]
    target_BK = 0.9 * functional.one_hot(labels_B, 5).double() + 0.1 / 5
    expected = -(target_BK * logits_BK.log_softmax(1)).sum()
    found = WeightedCrossEntropy(torch.ones(5), 0.1).numerator(logits_BK, labels_B, torch.ones(6, dtype=torch.float64))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_sample_of_weight_zero_has_no_part_in_the_loss() -> None:
    logits_BK, labels_B = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    objective = WeightedCrossEntropy(torch.ones(3), 0.1)
    weights_B = objective.weights(labels_B, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    kept = torch.tensor([0, 2, 3])
    expected = objective.numerator(logits_BK[kept], labels_B[kept], torch.ones(3))
    assert objective.numerator(logits_BK, labels_B, weights_B).item() == pytest.approx(expected.item(), rel=1e-6)
    assert weights_B.sum().item() == 3


def test_balanced_class_weights_give_every_class_the_same_total() -> None:
    counts_K = [10, 30, 60]
    weights_K = class_weights("balanced", counts_K)
    totals_K = weights_K * torch.tensor(counts_K)
    assert totals_K.tolist() == pytest.approx([100 / 3] * 3)
    assert class_weights("balanced", [5, 0]).tolist() == [0.5, 1.0]
