"""Augmentation: close to a float64 reference, the same in any batch, fixed by golden values."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from torch import Tensor

from galaxydist.loading.augment import Augment, Normalise
from galaxydist.loading.decode import reduction
from galaxydist.recipe.schema import AugmentConfig
from tests.helpers.antialias import ALL, PLAIN, augmented, random_images, resample_reference


def levels(augment: Augment | Normalise, images: Tensor, positions: list[int] | None = None, epoch: int = 0) -> Tensor:
    """Results as B x H x W x C."""
    if isinstance(augment, Normalise):
        return augment(images).permute(0, 2, 3, 1)
    return augmented(augment, images, epoch, positions).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("size", "zoom", "crop"),
    [
        (20, 1.0, 1.0),
        (32, 1.0, 1.0),
        (32, 2.0, 1.0),
        (40, 1.0, 1.0),
        (48, 1.2, 1.0),
        (64, 1.0, 1.0),
        (80, 1.2, 0.8),
        (96, 1.1, 1.0),
        (112, 1.2, 1.0),
        (128, 1.0, 1.0),
    ],
)
def test_augmentation_is_within_one_grey_level_of_a_float64_reference(
    size: int, zoom: float, crop: float, real_sample: Path
) -> None:
    """Mean over real galaxies, of 128 pixels to keep the reference quick; the augmented and the evaluation view."""
    paths = sorted(real_sample.glob("*/*.jpg"))[7::250]
    images = np.stack([simplejpeg.decode_jpeg(p.read_bytes(), min_factor=2, min_height=128, min_width=128) for p in paths])
    augment = Augment(AugmentConfig(zoom=zoom, shift=0.1), 3, *PLAIN, size, crop=crop)
    maps, _ = augment.affine_maps(0, np.arange(len(images)))
    expected = np.stack([resample_reference(i.astype(np.float64), m, size) for i, m in zip(images, maps, strict=True)])
    assert np.abs(levels(augment, torch.from_numpy(images)).numpy() - expected).mean() < 1.0
    upright = np.array([[crop, 0, 0], [0, crop, 0]])
    expected = np.stack([resample_reference(image.astype(np.float64), upright, size) for image in images])
    assert np.abs(levels(augment.normalise, torch.from_numpy(images)).numpy() - expected).mean() < 1.0


def test_augmented_image_depends_on_seed_epoch_and_position_not_on_the_batch() -> None:
    images = random_images(40, 64)
    augment = Augment(ALL, 1, *PLAIN, 40)
    positions = list(range(100, 140))
    whole = levels(augment, images, positions).clone()
    for rows in ([5], [7, 3, 30], list(range(39, -1, -1)), list(range(0, 40, 3))):
        part = levels(augment, images[rows], [positions[row] for row in rows])
        assert torch.equal(part, whole[rows])
    one = images[:1].expand(30, -1, -1, -1)
    many = levels(augment, one).reshape(30, -1)
    assert torch.cdist(many, many).fill_diagonal_(1e9).min() > 100
    assert not torch.equal(levels(augment, images, positions, epoch=1), whole)
    assert not torch.equal(levels(Augment(ALL, 2, *PLAIN, 40), images, positions), whole)


def test_augmentation_parameters_have_their_golden_values() -> None:
    """Fixed for order_version 1."""
    maps, zoom = Augment(ALL, 11, *PLAIN, 40).affine_maps(2, np.array([5, 6]))
    assert np.allclose(maps, GOLDEN_MAPS, atol=1e-6)
    assert np.allclose(zoom, GOLDEN_ZOOM, atol=1e-6)


GOLDEN_MAPS = [
    [[0.9085016, -0.5065936, 0.001878], [-0.5065936, -0.9085016, -0.0494188]],
    [[0.4390893, 0.6407438, -0.0724315], [-0.6407438, 0.4390893, -0.0479276]],
]
GOLDEN_ZOOM = [0.9613553, 1.2874032]


def test_quarter_turns_move_pixels_and_change_none() -> None:
    images = random_images(32, 24)
    augment = Augment(AugmentConfig(rotate="d4"), 0, *PLAIN, 24)
    views = levels(augment, images).numpy()
    kinds = set()
    for image, view in zip(images.numpy(), views, strict=True):
        turned = [np.rot90(image, turn) for turn in range(4)]
        equal = [np.array_equal(view, t[:, ::-1] if m else t) for m in (False, True) for t in turned]
        assert sum(equal) == 1
        kinds.add(equal.index(True))
    assert kinds == set(range(8))


@pytest.mark.parametrize("rotate", ["d4", "none"])
def test_exact_and_resampled_d4_augmentation_agree(rotate: str) -> None:
    """A shift too small to matter takes the other way through the code."""
    images = random_images(32, 32)
    exact = levels(Augment(AugmentConfig(rotate=rotate), 4, *PLAIN, 32), images)  # type: ignore[arg-type]
    sampled = levels(Augment(AugmentConfig(rotate=rotate, shift=1e-6), 4, *PLAIN, 32), images)  # type: ignore[arg-type]
    assert (exact - sampled).abs().max() < 0.05


def test_augmentation_without_any_change_equals_the_evaluation_view() -> None:
    images = random_images(5, 64)
    augment = Augment(AugmentConfig(rotate="none", flip=False), 0, *PLAIN, 40, crop=0.9)
    assert torch.equal(levels(augment, images), levels(augment.normalise, images))


def test_augmentation_of_a_constant_image_has_no_black_corners() -> None:
    images = torch.full((64, 32, 32, 3), 200, dtype=torch.uint8)
    for zoom in (1.0, 4.0):
        views = levels(Augment(AugmentConfig(zoom=zoom, shift=0.5), 0, *PLAIN, 32), images)
        assert (views - 200).abs().max() < 0.01


def test_angles_flips_zooms_and_shifts_have_their_distributions() -> None:
    augment = Augment(AugmentConfig(zoom=2.0, shift=0.25), 0, *PLAIN, 32)
    maps, zoom = augment.affine_maps(0, np.arange(20_000))
    angles = np.arctan2(-maps[:, 0, 1], maps[:, 1, 1])
    assert np.abs(np.histogram(angles, 8, (-np.pi, np.pi))[0] / 2500 - 1).max() < 0.1
    assert abs((np.linalg.det(maps[:, :, :2]) < 0).mean() - 0.5) < 0.02
    assert zoom.min() >= 0.5
    assert zoom.max() <= 2.0
    assert abs(np.log(zoom).mean()) < 0.01
    assert np.abs(maps[:, :, 2]).max() <= 0.5
    assert np.allclose(np.abs(np.linalg.det(maps[:, :, :2])), zoom**-2.0)


def test_brightness_is_one_factor_for_all_channels() -> None:
    images = random_images(50, 16)
    config = AugmentConfig(rotate="none", flip=False, brightness=0.2)
    factors = levels(Augment(config, 0, *PLAIN, 16), images) / images.clamp(min=1)
    factors = factors.masked_fill(images == 0, torch.nan).reshape(50, -1)
    middle = factors.nanmedian(1).values
    assert torch.nanmean((factors - middle[:, None]).abs()) < 1e-3
    assert 0.8 <= middle.min() < 0.83
    assert 1.17 < middle.max() <= 1.2


def test_noise_augmentation_is_gaussian_and_independent_between_images() -> None:
    images = torch.full((40, 32, 32, 3), 100, dtype=torch.uint8)
    config = AugmentConfig(rotate="none", flip=False, noise=0.1)
    noise = levels(Augment(config, 0, *PLAIN, 32), images).reshape(40, -1) - 100
    deviations = noise.std(1)
    assert deviations.max() < 25.5 * 1.05
    assert deviations.min() < 3
    standard = (noise / deviations[:, None])[deviations > 1]
    assert abs(standard.mean()) < 0.02
    assert abs((standard.abs() < 1).float().mean() - 0.6827) < 0.01
    correlation = torch.corrcoef(standard).fill_diagonal_(0)
    assert correlation.abs().max() < 0.1


def test_normalisation_gives_mean_0_and_deviation_1() -> None:
    images = random_images(60, 32)
    mean = (images / 255.0).mean((0, 1, 2)).tolist()
    std = (images / 255.0).std((0, 1, 2)).tolist()
    views = Normalise(mean, std, 32)(images)
    assert views.shape == (60, 3, 32, 32)
    assert views.dtype == torch.float32
    assert views.mean((0, 2, 3)).abs().max() < 1e-3
    assert (views.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_evaluation_view_crops_centrally_and_is_symmetric() -> None:
    image = torch.zeros((1, 64, 64, 3), dtype=torch.uint8)
    image[:, 16:48, 16:48] = 90
    assert (levels(Normalise(*PLAIN, 16, crop=0.5), image) == 90).all()
    edges = torch.zeros((1, 64, 64, 3), dtype=torch.uint8)
    edges[:, :, 32:] = 80
    view = levels(Normalise(*PLAIN, 20), edges)
    assert torch.allclose(view, 80 - view.flip(2), atol=1.0)


def test_augmentation_of_an_empty_batch_is_empty() -> None:
    images = torch.empty((0, 32, 32, 3), dtype=torch.uint8)
    assert augmented(Augment(ALL, 0, *PLAIN, 16), images).shape == (0, 3, 16, 16)


def test_reduced_decoding_changes_an_augmented_view_by_less_than_a_grey_level(real_sample: Path) -> None:
    factor = reduction(256, 80, 1.0, 1.2)
    assert factor == 2
    data = [path.read_bytes() for path in sorted(real_sample.glob("*/*.jpg"))[::200]]
    reduced = [simplejpeg.decode_jpeg(d, min_factor=2, min_height=128, min_width=128) for d in data]
    assert reduced[0].shape == (128, 128, 3)
    augment = Augment(AugmentConfig(zoom=1.2), 0, *PLAIN, 80)
    whole = levels(augment, torch.from_numpy(np.stack([simplejpeg.decode_jpeg(d) for d in data]))).clone()
    half = levels(augment, torch.from_numpy(np.stack(reduced)))
    assert (whole - half).abs().mean() < 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_augmentation_on_a_gpu_agrees_with_the_cpu_up_to_rounding() -> None:
    images = random_images(20, 96)
    for size in (24, 40, 90):
        for config in (ALL, AugmentConfig(rotate="d4", noise=0.02)):
            augment = Augment(config, 1, *PLAIN, size, crop=0.9)
            difference = (levels(augment, images) - levels(augment, images.cuda()).cpu()).abs()
            assert difference.mean() < 0.1
            assert difference.max() < 2.5
        view = augment.normalise
        assert (levels(view, images) - levels(view, images.cuda()).cpu()).abs().mean() < 0.1
