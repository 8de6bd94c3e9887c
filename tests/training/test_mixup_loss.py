"""The loss of mixed galaxies: numerator and weight, against torch's soft targets and against formulas by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from galaxydist.loading.loader import Batch
from galaxydist.recipe.schema import TrainConfig
from galaxydist.training.loss import WeightedCrossEntropy
from galaxydist.training.mixup import MixedBatch, Mixup, split_pairs, take

NUM_CLASSES = 5
WEIGHTS_K = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25])


def mix_of(*partner_shares: float) -> MixedBatch:
    """Mixup of pairs in these proportions."""
    numbers_P6 = torch.zeros(len(partner_shares), 6)
    numbers_P6[:, :2] = torch.tensor(partner_shares)[:, None]
    return MixedBatch(numbers_P6, has_boxes=False)


def sample(size: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 logits, labels, weights of which one is 0."""
    generator = torch.Generator().manual_seed(seed)
    weights_B = torch.ones(size)
    weights_B[3] = 0.0
    labels_B = torch.randint(NUM_CLASSES, (size,), generator=generator)
    return torch.randn(size, NUM_CLASSES, generator=generator, dtype=torch.float64) * 3, labels_B, weights_B


def shares(size: int, seed: int = 1) -> list[float]:
    return torch.rand(size // 2, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_loss_without_class_weights_is_cross_entropy_with_soft_targets(smoothing: float) -> None:
    logits_BK, labels_B, _ = sample()
    objective, mix = WeightedCrossEntropy(torch.ones(NUM_CLASSES), smoothing), mix_of(*shares(24))
    targets = objective.targets(labels_B, torch.ones(24), mix)
    share_B1 = mix.partner_shares_B[:, None].double()
    onehot_BK = functional.one_hot(labels_B, NUM_CLASSES).double()
    soft_BK = onehot_BK * (1 - share_B1) + onehot_BK.roll(12, 0) * share_B1
    expected = functional.cross_entropy(logits_BK, soft_BK, label_smoothing=smoothing)
    # Shares are float32.
    assert (objective.summed_loss(logits_BK, targets) / targets.total_weights_B.sum()).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    assert targets.total_weights_B.tolist() == pytest.approx([1.0] * 24, abs=1e-6)


def test_mixup_loss_weights_each_label_by_its_class_weight() -> None:
    logits_BK, labels_B, weights_B = sample(8)
    partner_shares = shares(8)
    objective = WeightedCrossEntropy(WEIGHTS_K, 0.2)
    targets = objective.targets(labels_B, weights_B, mix_of(*partner_shares))
    log_BK = logits_BK.log_softmax(1)
    smooth_BK = -(0.8 * log_BK + 0.2 * log_BK.mean(1, keepdim=True))
    numerator = 0.0
    for row in range(8):
        share, own, other = partner_shares[row % 4], int(labels_B[row]), int(labels_B[(row + 4) % 8])
        first, second = (1 - share) * float(WEIGHTS_K[own]), share * float(WEIGHTS_K[other])
        weight = float(weights_B[row])
        assert targets.total_weights_B[row].item() == pytest.approx(weight * (first + second), rel=1e-6)
        numerator += weight * (first * float(smooth_BK[row, own]) + second * float(smooth_BK[row, other]))
    assert objective.summed_loss(logits_BK, targets).item() == pytest.approx(numerator, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixup_loss_with_zero_shares_is_bit_equal_to_the_plain_loss(dtype: torch.dtype) -> None:
    logits_BK, labels_B, weights_B = sample()
    logits_BK = logits_BK.to(dtype).requires_grad_()
    objective = WeightedCrossEntropy(WEIGHTS_K, 0.1)
    plain_weights_B = objective.weights(labels_B, weights_B)
    expected = objective.numerator(logits_BK, labels_B, plain_weights_B)
    (gradient_BK,) = torch.autograd.grad(expected, logits_BK)
    for mix in (None, mix_of(*[0.0] * 12)):
        targets = objective.targets(labels_B, weights_B, mix)
        found = objective.summed_loss(logits_BK, targets)
        assert torch.equal(found, expected) and found.dtype == dtype
        assert torch.equal(targets.total_weights_B, plain_weights_B)
        assert torch.equal(targets.majority_B, labels_B)
        assert torch.equal(torch.autograd.grad(found, logits_BK)[0], gradient_BK)


def test_majority_label_of_a_mixed_pair_has_the_larger_share() -> None:
    labels_B = torch.tensor([0, 1, 2, 3, 4, 0])
    targets = WeightedCrossEntropy(WEIGHTS_K, 0.0).targets(labels_B, torch.ones(6), mix_of(0.3, 0.5, 0.8))
    assert targets.majority_B.tolist() == [0, 1, 0, 3, 4, 2]


@given(world=st.integers(1, 4), parts=st.integers(1, 3), seed=st.integers(0, 50))
@settings(max_examples=25)
def test_mixed_step_has_equal_loss_and_gradients_on_any_ranks_and_micro_batches(world: int, parts: int, seed: int) -> None:
    """Mixed images through a small model in float64: loss and gradients, summed over ranks and parts and divided once."""
    generator = torch.Generator().manual_seed(seed)
    batch = Batch(
        images_BHWC=torch.zeros(24, 1, 1, 3, dtype=torch.uint8),
        labels_B=torch.randint(NUM_CLASSES, (24,), generator=generator),
        weights_B=(torch.rand(24, generator=generator) > 0.1).float(),
        positions_B=24 * seed + torch.arange(24),
        samples_B=torch.arange(24),
        epoch=3,
        step=0,
    )
    images_BCHW = torch.randn(24, 3, 8, 8, generator=generator, dtype=torch.float64)
    whole, divided = step(batch, images_BCHW, 1, 1), step(batch, images_BCHW, world, parts)
    assert torch.allclose(divided, whole, rtol=0, atol=1e-12)


def step(batch: Batch, images_BCHW: torch.Tensor, world_size: int, num_parts: int) -> torch.Tensor:
    """Loss and gradients of the global batch, by ``world_size`` ranks in ``num_parts`` parts each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(144, NUM_CLASSES))
    model = model.double()
    objective = WeightedCrossEntropy(WEIGHTS_K, 0.1)
    mixing = Mixup(TrainConfig(mixup=0.4, cutmix=1.0, mix_prob=0.8), seed=5, image_size=8)
    numerator, weight = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rank in range(world_size):
        mine = {name: getattr(batch, name)[rank::world_size] for name in ("labels_B", "weights_B", "positions_B", "samples_B")}
        share = Batch(batch.images_BHWC[rank::world_size], **mine, epoch=batch.epoch, step=0)
        draws_B6 = torch.from_numpy(mixing.draw_rows(share.epoch, share.positions_B.numpy()))
        mix = mixing.prepare(draws_B6, share.weights_B)
        targets = objective.targets(share.labels_B, share.weights_B, mix)
        weight = weight + targets.total_weights_B.sum(dtype=torch.float64)
        for part in split_pairs(len(share.labels_B), num_parts):
            mixed_BCHW = mix.take(part)(take(images_BCHW[rank::world_size], part))
            numerator = numerator + objective.summed_loss(model(mixed_BCHW), targets.take(part))
    gradients = torch.autograd.grad(numerator / weight, list(model.parameters()))
    return torch.cat([(numerator / weight).detach().reshape(1), *(gradient.flatten() for gradient in gradients)])
