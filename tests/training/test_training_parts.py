"""The small parts of training: loss sums, schedule, micro-batches, early stopping, precision, SLURM's lists."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from galaxydist.distributed import resolve_precision
from galaxydist.errors import UserError
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import OptimConfig
from galaxydist.training.loss import WeightedCrossEntropy, class_weights
from galaxydist.training.mixup import split_evenly
from galaxydist.training.optimizer import LRSchedule
from galaxydist.training.resume import EarlyStopping
from galaxydist.training.step import count_micro_batches, example_images


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


def test_cosine_schedule_rises_to_its_peak_and_falls_to_its_final_value() -> None:
    config = OptimConfig(lr=1e-2, warmup=0.1, final=0.05)
    rate = LRSchedule(config, total_steps=200)
    rates = [rate(step) for step in range(200)]
    assert all(earlier < later for earlier, later in itertools.pairwise(rates[:21]))
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[20:]))
    assert rates[20] == max(rates) == pytest.approx(1e-2)
    assert rate(200) == pytest.approx(5e-4)
    # Half-way between the peak and the end of the cosine.
    assert rate(110) == pytest.approx(1e-2 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 2))))


def test_constant_schedule_keeps_the_peak() -> None:
    rate = LRSchedule(OptimConfig(lr=0.1, warmup=0.0, schedule="constant"), total_steps=10)
    assert {rate(step) for step in range(10)} == {0.1}


@given(batch=st.integers(1, 500), world=st.integers(1, 500), micro=st.integers(0, 500))
def test_micro_batches_cover_every_share_and_none_is_empty(batch: int, world: int, micro: int) -> None:
    world = min(world, batch)
    num_parts = count_micro_batches(batch, world, micro)
    for share in {batch // world, -(-batch // world)}:
        parts = split_evenly(share, num_parts)
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == share and parts[0].start == 0 and parts[-1].stop == share
        assert min(sizes) >= 1
        if micro:
            assert max(sizes) <= micro + (batch % world > 0)


def test_early_stopping_waits_and_survives_a_restart() -> None:
    stopping = EarlyStopping("loss", patience=2)
    assert [stopping.update(value, step) for step, value in enumerate([1.0, 0.5, 0.5, 0.7])] == [True, True, False, False]
    assert stopping.should_stop and stopping.best == 0.5 and stopping.best_step == 1
    again = EarlyStopping("loss", patience=2)
    again.load_state_dict(stopping.state_dict())
    assert again == stopping


def test_early_stopping_maximises_accuracy_and_never_stops_with_patience_0() -> None:
    stopping = EarlyStopping("accuracy", patience=0)
    assert [stopping.update(value, 0) for value in (0.5, 0.6, 0.1, 0.1)] == [True, True, False, False]
    assert not stopping.should_stop


@pytest.mark.parametrize(
    ("precision", "has_gpu", "capability", "expected"),
    [
        ("auto", False, None, "no"),
        ("auto", True, (9, 0), "bf16"),
        ("auto", True, (7, 5), "fp16"),
        ("bf16", False, None, "bf16"),
        ("no", True, (9, 0), "no"),
        ("fp16", True, (7, 0), "fp16"),
    ],
)
def test_precision_follows_the_device(precision: str, has_gpu: bool, capability: tuple[int, int] | None, expected: str) -> None:
    assert resolve_precision(precision, has_gpu, capability) == expected


def test_fp16_without_a_gpu_is_refused_suggesting_precision_auto() -> None:
    with pytest.raises(UserError, match=r"train\.precision=auto"):
        resolve_precision("fp16", has_gpu=False, capability=None)


@pytest.mark.parametrize(
    ("settings", "rank", "micro_batch", "count"),
    [
        (("train.batch_size=20",), 0, 0, 2),
        (("train.batch_size=20",), 2, 1, 1),
        (("train.batch_size=20", "train.compile=true"), 0, 0, 7),  # three ranks have 7, 7 and 6
        (("train.batch_size=20", "train.compile=true"), 2, 0, 6),
        (("train.batch_size=20", "train.compile=true"), 0, 4, 3),  # two parts, of 3 and 4
        (("train.batch_size=24", "train.compile=true", "train.mixup=0.4"), 0, 4, 4),
    ],
)
def test_example_batch_has_the_shape_of_a_steps_first_micro_batch(
    settings: tuple[str, ...], rank: int, micro_batch: int, count: int
) -> None:
    recipe = load_recipe(["recipe=custom_cnn", "data.image_size=16", *settings])
    world: Any = SimpleNamespace(rank=rank, size=3, device=torch.device("cpu"), dtype=torch.float64)
    augment: Any = lambda images_BHWC, *_: images_BHWC.permute(0, 3, 1, 2).float()  # noqa: E731
    images_BCHW = example_images(world, recipe.recipe, augment, micro_batch)
    assert (images_BCHW.shape, images_BCHW.dtype) == ((count, 3, 16, 16), torch.float64)
