"""Exact counts and the metrics that derive from them, against scikit-learn."""

import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torch.nn import functional

from galaxydist.errors import UserError
from galaxydist.evaluation.calibration import Reliability
from galaxydist.evaluation.counts import Counts
from galaxydist.evaluation.metrics import metrics_from_counts


def outputs(seed: int, num_galaxies: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(num_classes, (num_galaxies,), generator=generator)
    logits_NK = torch.randn(num_galaxies, num_classes, generator=generator) * 3
    return logits_NK + 2 * functional.one_hot(labels_N, num_classes), labels_N


def count_over_ranks(logits_NK: torch.Tensor, labels_N: torch.Tensor, batch_size: int, world_size: int) -> Counts:
    """As the evaluation deals them: batch j to rank j mod W, the last padded; then one sum over ranks."""
    num_classes = logits_NK.shape[1]
    ranks = [Counts(num_classes) for _ in range(world_size)]
    for j, start in enumerate(range(0, len(labels_N), batch_size)):
        logits_BK, labels_B = logits_NK[start : start + batch_size], labels_N[start : start + batch_size]
        padding = batch_size - len(labels_B)
        weights_B = torch.cat([torch.ones(len(labels_B)), torch.zeros(padding)])
        logits_BK = torch.cat([logits_BK, torch.full((padding, num_classes), math.nan)])
        labels_B = torch.cat([labels_B, torch.full((padding,), -1)])
        ranks[j % world_size].add(logits_BK, labels_B, weights_B)
    return Counts.from_vector(torch.stack([rank.vector() for rank in ranks]).sum(dim=0))


@given(st.integers(0, 99), st.integers(0, 40), st.integers(1, 7), st.integers(1, 8), st.integers(1, 5))
@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=25)
def test_counts_and_loss_are_bit_equal_on_any_number_of_ranks(
    seed: int, num_galaxies: int, num_classes: int, batch_size: int, world_size: int
) -> None:
    logits_NK, labels_N = outputs(seed, num_galaxies, num_classes)
    one = count_over_ranks(logits_NK, labels_N, batch_size, 1)
    many = count_over_ranks(logits_NK, labels_N, batch_size, world_size)
    assert torch.equal(one.vector(), many.vector())
    assert one.loss_sum == many.loss_sum
    assert many.count == num_galaxies
    many.check(num_galaxies)
    expected = functional.cross_entropy(logits_NK.double(), labels_N, reduction="sum").item()
    assert many.loss_sum == pytest.approx(expected, abs=1e-9)
    bins, counted = Reliability(), many.reliability
    probabilities_NK = logits_NK.double().softmax(dim=1).numpy()
    bins.add(probabilities_NK.max(axis=1, initial=0), probabilities_NK.argmax(axis=1) == labels_N.numpy())
    assert counted is not None and np.array_equal(counted.count, bins.count) and np.array_equal(counted.correct, bins.correct)
    assert counted.confidence == pytest.approx(bins.confidence, abs=1e-9)
    many_KK = many.confusion_KK.numpy()
    if num_galaxies:
        assert np.array_equal(
            many_KK, reference.confusion_matrix(labels_N, logits_NK.argmax(dim=1), labels=list(range(num_classes)))
        )


def test_the_loss_sum_does_not_depend_on_the_order() -> None:
    logits_NK, labels_N = outputs(0, 2000, 10)
    order = list(range(2000))
    sums = set()
    for seed in range(3):
        random.Random(seed).shuffle(order)
        sums.add(count_over_ranks(logits_NK[order], labels_N[order], 64, 3).loss_sum)
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(functional.cross_entropy(logits_NK, labels_N, reduction="sum").item(), rel=1e-5)


def test_nonfinite_losses_give_no_loss_and_huge_ones_are_summed() -> None:
    counts = Counts(2)
    counts.add(torch.tensor([[0.0, 1e9], [3e9, 0.0]]), torch.tensor([0, 1]), torch.ones(2))
    assert counts.loss_sum == pytest.approx(4e9)
    counts.add(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]), torch.ones(1))
    total = Counts.from_vector(counts.vector())
    assert math.isnan(total.loss_sum) and total.reliability is None
    assert total.count == 3
    assert metrics_from_counts(total.confusion_KK.numpy(), total.loss_sum, "ab")["loss"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_counted(dtype: torch.dtype) -> None:
    logits_NK, labels_N = outputs(1, 20, 4)
    counts = Counts(4)
    counts.add(logits_NK.to(dtype).requires_grad_(), labels_N, torch.ones(20))
    assert counts.count == 20
    assert counts.loss_sum == pytest.approx(functional.cross_entropy(logits_NK.to(dtype).double(), labels_N).item() * 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counts_of_a_gpu_are_those_of_the_cpu() -> None:
    logits_NK, labels_N = outputs(2, 100, 10)
    here, there = Counts(10), Counts(10, "cuda")
    here.add(logits_NK, labels_N, torch.ones(100))
    there.add(logits_NK.cuda(), labels_N.cuda(), torch.ones(100, device="cuda"))
    assert torch.equal(here.confusion_KK, there.confusion_KK)
    assert there.vector().is_cuda
    assert Counts.from_vector(there.vector()).loss_sum == pytest.approx(here.loss_sum, rel=1e-12)


def test_counting_reads_no_value_from_the_device() -> None:
    """On the meta device, which has none: a GPU would make the host wait for each."""
    counts = Counts(3, "meta", subset_N=np.array([True, False]))
    logits_BK, labels_B, weights_B = (torch.zeros(shape, device="meta") for shape in ((4, 3), (4,), (4,)))
    predicted = counts.add(logits_BK, labels_B.long(), weights_B, torch.tensor([0, 1, -1, -1]))
    assert [(values_B.shape, values_B.device.type) for values_B in predicted] == [((4,), "meta")] * 2
    assert counts.vector().device.type == "meta"


def test_a_missing_or_doubled_galaxy_is_an_error() -> None:
    counts = count_over_ranks(*outputs(0, 30, 3), 8, 2)
    counts.check(30)
    for expected in (29, 31):
        with pytest.raises(UserError, match=rf"30 galaxies .* test split, but its manifest has {expected}.*data check"):
            counts.check(expected, "the test split")


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=40).map(lambda p: (k, p))
    )
)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_metrics_are_those_of_scikit_learn(case: tuple[int, list[tuple[int, int]]]) -> None:
    num_classes, pairs = case
    true, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    labels = list(range(num_classes))
    confusion_KK = reference.confusion_matrix(true, predicted, labels=labels)
    names = [f"class_{label}" for label in labels]
    found = metrics_from_counts(confusion_KK, 2.5 * len(pairs), names)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["count"] == len(pairs)
    assert found["loss"] == 2.5
    assert found["classes"] == names
    assert found["confusion"] == confusion_KK.tolist()
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are predicted but never true
        assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(true, predicted))
        assert found["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro"))
        assert found["weighted_f1"] == pytest.approx(reference.f1_score(true, predicted, average="weighted"))
        precision, recall, f1, support = reference.precision_recall_fscore_support(
            true, predicted, labels=labels, zero_division=np.nan
        )
    for key, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        values = [math.nan if value is None else value for value in found["per_class"][key]]
        assert values == pytest.approx(list(expected), nan_ok=True), key
    assert found["per_class"]["support"] == list(support)


def test_metrics_of_no_galaxies_are_none() -> None:
    found = metrics_from_counts(np.zeros((2, 2)), 0.0, "ab")
    assert [found[key] for key in ("accuracy", "loss", "balanced_accuracy", "macro_f1", "weighted_f1")] == [None] * 5
    assert found["per_class"]["recall"] == [None, None]
