"""Mixup and cutmix: what is drawn, what becomes of images and labels, and that neither processes nor micro-batches matter."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional

from galaxydist.errors import EveryRankError
from galaxydist.loading.loader import Batch, DecodeOptions, RankInfo, TrainLoader
from galaxydist.recipe.rules import check_world, is_mixing
from galaxydist.recipe.schema import TrainConfig
from galaxydist.shards.manifest import read_manifest
from galaxydist.training.loss import LossTargets, WeightedCrossEntropy
from galaxydist.training.mixup import MixedBatch, Mixup, PairSlice, count_pair_parts, split_pairs, take

SIZE = 12
GOLDEN_SHARES = [0.140625, 0.19806410128671859, 0.171630859375, 0.657958984375, 0.23936647813648326]
GOLDEN_BOXES = [[34, 58, 35, 59], [0, 0, 0, 0], [13, 50, 45, 64], [15, 64, 0, 55], [0, 0, 0, 0]]
GOLDEN_MIXUP, GOLDEN_CUTMIX = 0.6990939041972104, 0.328125
BOTH = {"mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.75}


def mixing(seed: int = 3, size: int = SIZE, **settings: float) -> Mixup:
    return Mixup(TrainConfig(**(settings or BOTH)), seed, size)


def global_batch(size: int, number: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Batch, torch.Tensor]:
    """A whole global batch of made-up galaxies, and its normalised images."""
    generator = torch.Generator().manual_seed(size)
    batch = Batch(
        images_BHWC=torch.zeros(size, 1, 1, 3, dtype=torch.uint8),
        labels_B=torch.randint(5, (size,), generator=generator),
        weights_B=torch.ones(size),
        positions_B=number * size + torch.arange(size),
        samples_B=torch.arange(size),
        epoch=7,
        step=0,
    )
    return batch, torch.randn(size, 3, SIZE, SIZE, generator=generator, dtype=dtype)


def mixture(drawn: Mixup, batch: Batch) -> MixedBatch:
    """The values that a step takes from the draws of a batch."""
    return drawn.prepare(torch.from_numpy(drawn.draw_rows(batch.epoch, batch.positions_B.numpy())), batch.weights_B)


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """What a rank gets of it: the offsets o with o mod W == rank."""
    names = ("images_BHWC", "labels_B", "weights_B", "positions_B", "samples_B")
    return Batch(**{name: getattr(batch, name)[rank::world_size] for name in names}, epoch=batch.epoch, step=batch.step)


def mixed_by_hand(images_BCHW: torch.Tensor, batch: Batch, drawn: Mixup) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and soft targets of a whole global batch, one galaxy and one pixel row at a time."""
    half = len(images_BCHW) // 2
    draws = drawn.draw(batch.epoch, batch.positions_B[:half].numpy())
    mixed, targets = torch.empty_like(images_BCHW), torch.zeros(len(images_BCHW), 5, dtype=torch.float64)
    for row in range(2 * half):
        partner, pair = (row + half) % (2 * half), row % half
        whole = bool(batch.weights_B[row] > 0 and batch.weights_B[partner] > 0)
        blend = float(np.float32(draws.blends[pair])) if whole else 0.0
        top, bottom, left, right = draws.boxes[pair] if whole else (0, 0, 0, 0)
        kept = torch.tensor(1 - blend, dtype=images_BCHW.dtype)
        mixed[row] = images_BCHW[row] * kept + images_BCHW[partner] * (1 - kept)
        mixed[row, :, top:bottom, left:right] = images_BCHW[partner, :, top:bottom, left:right]
        share = float(np.float32(draws.partner_shares[pair])) if whole else 0.0
        targets[row, batch.labels_B[row]] += 1 - share
        targets[row, batch.labels_B[partner]] += share
    return mixed, targets


def test_mixup_and_cutmix_draws_have_their_golden_values() -> None:
    draws = mixing(seed=0, size=64, mixup=0.2, cutmix=1.0).draw(1, np.array([0, 1, 2, 1000, 10**12]))
    assert draws.partner_shares.tolist() == pytest.approx(GOLDEN_SHARES, abs=1e-12)
    assert draws.boxes.tolist() == GOLDEN_BOXES
    for alone, share in ({"mixup": 1.0}, GOLDEN_MIXUP), ({"cutmix": 1.0}, GOLDEN_CUTMIX):
        assert mixing(seed=0, size=64, **alone).draw(1, np.array([5])).partner_shares[0] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("a", [0.2, 0.8, 1.0, 5.0])
def test_mixup_factors_follow_their_distribution(a: float) -> None:
    draws = mixing(mixup=a).draw(0, np.arange(20_000))
    assert stats.kstest(1 - draws.partner_shares, stats.beta(a, a).cdf).pvalue > 0.01
    assert np.array_equal(draws.partner_shares, draws.blends) and not draws.boxes.any()


def test_cutmix_boxes_have_uniform_centres_and_the_drawn_area() -> None:
    size = 1000
    num_pairs = 200_000
    draws = mixing(size=size, cutmix=1.0).draw(0, np.arange(num_pairs))
    top, bottom, left, right = draws.boxes.T
    assert np.array_equal(draws.partner_shares, (bottom - top) * (right - left) / size**2)
    assert not draws.blends.any()
    assert draws.boxes.min() >= 0 and draws.boxes.max() <= size and (bottom >= top).all() and (right >= left).all()
    # What is not cut off at an edge is square, its area uniform given that it fits.
    free = (top > 0) & (left > 0) & (bottom < size) & (right < size)
    assert free.sum() > 1000 and np.abs((bottom - top) - (right - left))[free].max() <= 1
    # A square of side s around a uniform centre keeps s - s^2 / 4 of each axis: the mean area is the integral of
    # (s - s^2/4)^2 over uniform s^2.
    expected = 1 / 2 - 1 / 5 + 1 / 48
    assert draws.partner_shares.mean() == pytest.approx(expected, abs=4 * draws.partner_shares.std() / math.sqrt(num_pairs))
    for low, high in ((top, bottom), (left, right)):
        centres = (low + high)[(high > low) & (high - low < 100)] / (2 * size)
        centres = centres[(centres > 0.05) & (centres < 0.95)]  # what is so narrow is not cut off there
        assert centres.size > 1000 and stats.kstest(centres, stats.uniform(0.05, 0.9).cdf).pvalue > 0.01


def test_mix_prob_and_mix_switch_set_the_shares_of_mixup_and_cutmix() -> None:
    draws = mixing(mixup=1.0, cutmix=1.0, mix_prob=0.7, mix_switch=0.25, size=256).draw(4, np.arange(40_000))
    changed, cut = draws.partner_shares > 0, draws.boxes.any(axis=1)
    # A box may hold no pixel: 256^2 of them make that rare.
    assert changed.mean() == pytest.approx(0.7, abs=0.01)
    assert cut.mean() == pytest.approx(0.7 * 0.25, abs=0.01)
    assert not (cut & (draws.blends > 0)).any()
    for chosen, purpose in ((cut, "kind"), (changed, "whether")):
        assert abs(np.corrcoef(chosen[:-1], chosen[1:])[0, 1]) < 0.02, purpose


def test_mixup_draws_of_other_epochs_and_seeds_are_independent() -> None:
    pairs = np.arange(100)
    draws = [mixing(seed=seed, mixup=1.0).draw(epoch, pairs).blends for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(abs(np.corrcoef(draws[i], draws[j])[0, 1]) < 0.4 for i, j in ((0, 1), (0, 2), (1, 2)))


@given(st.floats(1e-3, 1e3), st.integers(0, 2**62), st.integers(0, 10**12))
def test_mixup_share_is_between_0_and_1_for_any_beta(a: float, seed: int, pair: int) -> None:
    for alone in ({"mixup": a}, {"cutmix": a}):
        share = mixing(seed, **alone).draw(0, np.array([pair])).partner_shares[0]
        assert 0 <= share <= 1


def test_mixup_is_off_and_draws_zero_if_its_probability_or_alpha_is_0() -> None:
    assert not is_mixing(TrainConfig(mixup=0.0)) and not is_mixing(TrainConfig(mixup=1.0, mix_prob=0.0))
    assert is_mixing(TrainConfig(mixup=0.1)) and is_mixing(TrainConfig(cutmix=0.1))
    draws = mixing(mixup=1.0, cutmix=1.0, mix_prob=0.0).draw(0, np.arange(50))
    assert not draws.partner_shares.any() and not draws.blends.any() and not draws.boxes.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [BOTH, {"mixup": 1.0}, {"cutmix": 1.0}])
def test_mixed_images_and_targets_equal_a_loop_over_galaxies_and_rows(settings: dict[str, float], dtype: torch.dtype) -> None:
    batch, images_BCHW = global_batch(32, dtype=dtype)
    batch.weights_B[[3, 20]] = 0.0
    drawn = mixing(**settings)
    mix = mixture(drawn, batch)
    before = images_BCHW.clone()
    found_BCHW = mix(images_BCHW)
    expected_BCHW, targets_BK = mixed_by_hand(images_BCHW, batch, drawn)
    assert found_BCHW.dtype == dtype and torch.equal(images_BCHW, before)
    assert torch.allclose(found_BCHW, expected_BCHW, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-15)
    assert (found_BCHW != images_BCHW).flatten(1).any(1).sum() > 8
    share_B1 = mix.partner_shares_B[:, None]
    onehot_BK, partner_BK = (functional.one_hot(labels, 5) for labels in (batch.labels_B, mix.partners(batch.labels_B)))
    assert torch.allclose((onehot_BK * (1 - share_B1) + partner_BK * share_B1).double(), targets_BK, atol=1e-7)
    channels_last = mix(images_BCHW.to(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last) and torch.equal(channels_last, found_BCHW)


def test_pair_with_an_unreadable_image_is_not_mixed() -> None:
    batch, images_BCHW = global_batch(16)
    batch.weights_B[2], batch.labels_B[2], images_BCHW[2] = 0.0, 0, -9.0
    drawn = mixing(mixup=1.0)
    mix = mixture(drawn, batch)
    found_BCHW = mix(images_BCHW)
    assert torch.equal(found_BCHW[[2, 10]], images_BCHW[[2, 10]])
    assert not torch.equal(found_BCHW[[3, 11]], images_BCHW[[3, 11]])
    targets = WeightedCrossEntropy(torch.ones(5), 0.0).targets(batch.labels_B, batch.weights_B, mix)
    assert targets.total_weights_B[[2, 10]].tolist() == [0, 1]
    assert targets.partner_weights_B is not None and targets.partner_weights_B[[2, 10]].tolist() == [0, 0]
    assert targets.majority_B[10] == batch.labels_B[10]


@given(half=st.integers(1, 24), world=st.integers(1, 8), parts=st.integers(1, 8), cut=st.booleans())
def test_mixed_pairs_are_bit_equal_on_any_rank_and_in_any_micro_batch(half: int, world: int, parts: int, cut: bool) -> None:
    half *= world
    batch, images_BCHW = global_batch(2 * half)
    batch.weights_B[half // 3] = 0.0
    drawn = mixing(**(BOTH if cut else {"mixup": 0.5}))
    objective = WeightedCrossEntropy(torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0]), 0.1)
    expected_BCHW = mixture(drawn, batch)(images_BCHW)
    expected = objective.targets(batch.labels_B, batch.weights_B, mixture(drawn, batch))
    check_world(2 * half, world)
    parts = min(parts, half // world)
    seen = []
    for rank in range(world):
        share, images = share_of(batch, rank, world), images_BCHW[rank::world]
        mix = mixture(drawn, share)
        targets = objective.targets(share.labels_B, share.weights_B, mix)
        for part in split_pairs(len(images), parts):
            positions = take(share.positions_B, part)
            offsets = positions - 2 * 2 * half
            assert torch.equal((offsets + half) % (2 * half), offsets.roll(len(offsets) // 2))
            assert torch.equal(mix.take(part)(take(images, part)), expected_BCHW[offsets])
            assert same(targets.take(part), expected, offsets)
            seen += offsets.tolist()
    assert sorted(seen) == list(range(2 * half))


def same(found: LossTargets, expected: LossTargets, rows: torch.Tensor) -> bool:
    names = ("labels_B", "weights_B", "majority_B", "partner_labels_B", "partner_weights_B", "total_weights_B")
    return all(torch.equal(getattr(found, name), getattr(expected, name)[rows]) for name in names)


def test_train_loaders_of_any_world_size_give_bit_equal_mixed_images(blobs: Path) -> None:
    """The real readers: one step's mixed images of 24 galaxies by position, from 1, 2, 3, 4 and 6 processes."""
    manifest = read_manifest(blobs)
    drawn = mixing(size=32)
    found: list[dict[int, torch.Tensor]] = []
    for world in (1, 2, 3, 4, 6):
        images: dict[int, torch.Tensor] = {}
        for rank in range(world):
            common = {"seed": 1, "num_streams": 8, "decode": DecodeOptions(threads=1), "start_step": 4}
            with TrainLoader(manifest, batch_size=24, ranks=RankInfo(rank, world), **common) as reader:  # type: ignore[arg-type]
                batch = next(reader)
            images_BCHW = batch.images_BHWC.permute(0, 3, 1, 2).double()
            for part in split_pairs(len(images_BCHW), 2):
                mixed_BCHW = mixture(drawn, batch).take(part)(take(images_BCHW, part))
                images |= dict(zip(take(batch.positions_B, part).tolist(), mixed_BCHW, strict=True))
        found.append(images)
    assert sorted(found[0]) == list(range(24, 48))
    for images in found[1:]:
        assert images.keys() == found[0].keys()
        assert all(torch.equal(images[position], found[0][position]) for position in images)


@given(pairs=st.integers(1, 200), world=st.integers(1, 20), micro=st.integers(0, 300))
def test_split_pairs_keeps_pairs_whole_within_the_micro_batch_size(pairs: int, world: int, micro: int) -> None:
    num_parts = count_pair_parts(2 * pairs * world, world, micro)
    parts = split_pairs(2 * pairs, num_parts)
    rows = [take(torch.arange(2 * pairs), part).tolist() for part in parts]
    assert sorted(itertools.chain(*rows)) == list(range(2 * pairs))
    for part in rows:
        half = len(part) // 2
        assert half >= 1 and part[half:] == [row + pairs for row in part[:half]]
        assert micro == 0 or len(part) <= max(micro, 2)
    assert max(map(len, rows)) - min(map(len, rows)) <= 2
    assert micro != 0 or num_parts == 1


def test_taking_the_whole_batch_makes_no_copy() -> None:
    values = torch.arange(8)
    assert take(values, split_pairs(8, 1)[0]) is values
    assert take(values, slice(2, 5)).tolist() == [2, 3, 4]


def test_split_pairs_and_take_refuse_parts_that_separate_a_pair() -> None:
    for length, parts in ((7, 1), (8, 5), (8, 0), (0, 1)):
        with pytest.raises(ValueError, match="whole pairs"):
            split_pairs(length, parts)
    mix = mixture(mixing(), global_batch(8)[0])
    with pytest.raises(AssertionError, match="separate"):
        mix.take(slice(0, 4))
    assert len(mix.take(PairSlice(1, 3, 4)).partner_shares_B) == 4


@pytest.mark.parametrize(
    ("batch_size", "world_size", "way_out"),
    [
        (
            24,
            5,
            r"train\.batch_size=24 is no multiple of 2 x 5 processes\. Use train\.batch_size=20 or 30, or 4 or 6 processes, or",
        ),
        (6, 4, r"Use train\.batch_size=8, or 3 processes, or set train\.mixup=0 and train\.cutmix=0\.$"),
        (10, 2, r"Use train\.batch_size=8 or 12, or 1 or 5 processes"),
        (7, 2, r"Use train\.batch_size=4 or 8, or set train\.mixup=0"),
        (2, 3, r"Use train\.batch_size=6, or 1 process, or set"),
    ],
)
def test_world_size_that_separates_pairs_is_refused_with_alternatives(batch_size: int, world_size: int, way_out: str) -> None:
    with pytest.raises(EveryRankError, match=way_out):
        check_world(batch_size, world_size)


@given(st.integers(1, 400), st.integers(1, 60))
def test_check_world_refuses_exactly_the_world_sizes_that_separate_pairs(batch_size: int, world_size: int) -> None:
    offsets = np.arange(batch_size // 2)
    fits = batch_size % 2 == 0 and bool((offsets % world_size == (offsets + batch_size // 2) % world_size).all())
    try:
        check_world(batch_size, world_size)
    except EveryRankError as error:
        assert not fits
        for size in map(int, str(error).split("train.batch_size=")[2].split(", or")[0].split(" or ")):
            check_world(size, world_size)
    else:
        assert fits
