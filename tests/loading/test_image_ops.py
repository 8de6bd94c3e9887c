"""Equal results of the two backends of image transforms: OpenCV on a CPU, torch elsewhere."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from galaxydist.loading.augment import Augment
from galaxydist.loading.image_ops import (
    AffineWarp,
    ImageTransform,
    LevelScaling,
    OpenCVBackend,
    TorchBackend,
    antialias,
    blur_levels,
    resize,
)
from galaxydist.recipe.schema import AugmentConfig
from tests.helpers.antialias import ALL, PLAIN, augmented, mirror, random_images

NO_SCALING = LevelScaling(np.ones(3), np.zeros(3, np.float32))


def moved_pixels(images_BHWC: np.ndarray, right: int, down: int) -> ImageTransform:
    """Whole pixels to the right and down."""
    count, width = images_BHWC.shape[:2]
    maps = np.tile(np.array([[1, 0, 2 * right / width], [0, 1, 2 * down / width]]), (count, 1, 1))
    return ImageTransform(AffineWarp(maps, np.zeros(count), np.tile([0.0, 0.0, 1.0], (count, 1)), {0: 0}))


def as_tensors(transform: ImageTransform) -> ImageTransform:
    """The same transform for the other backend."""
    warp = transform.geometry
    assert isinstance(warp, AffineWarp)
    tensors = (torch.from_numpy(values) for values in (warp.maps, warp.halvings, warp.taps))
    return ImageTransform(AffineWarp(*tensors, warp.levels))


@pytest.mark.parametrize(
    ("size", "crop", "config"),
    [
        (96, 1.0, {"zoom": 1.2, "shift": 0.05}),
        (80, 0.9, {"zoom": 1.1}),
        (64, 1.0, {"zoom": 1.6, "shift": 0.5, "brightness": 0.2, "noise": 0.05}),
        (48, 1.0, {"zoom": 1.0, "flip": False}),
        (30, 1.0, {"zoom": 1.3}),
        (20, 1.0, {"zoom": 2.0}),
        (48, 0.9, {"rotate": "d4", "noise": 0.02}),
        (96, 1.0, {"rotate": "none", "brightness": 0.3}),
    ],
)
def test_torch_and_opencv_agree(size: int, crop: float, config: dict[str, Any]) -> None:
    """They agree but for roundings that fall the other way; OpenCV 4 places samples on 1/32 pixels."""
    images = random_images(24, 96)
    augment = Augment(AugmentConfig(**config), 3, *PLAIN, size, crop=crop)
    ours, theirs = augmented(augment, images, epoch=1), by_torch(augment, images, epoch=1)
    difference = (theirs - ours).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 2.5
    channels_last = by_torch(augment, images, epoch=1, memory_format=torch.channels_last)
    assert channels_last.is_contiguous(memory_format=torch.channels_last) and torch.equal(channels_last, theirs)


@pytest.mark.parametrize("config", [ALL, AugmentConfig(rotate="d4", noise=0.02)])
def test_torch_backend_treats_each_image_alone(config: AugmentConfig) -> None:
    """At a pitch at which some images are halved and blurred, and others are not."""
    images, size = random_images(24, 96), 30
    augment = Augment(config, 3, *PLAIN, size)
    whole = by_torch(augment, images, epoch=1)
    for row in range(24):
        assert torch.equal(by_torch(augment, images[row : row + 1], epoch=1, first=row)[0], whole[row])


def by_torch(augment: Augment, images: Tensor, epoch: int, first: int = 0, **layout: torch.memory_format) -> Tensor:
    """The images that a GPU would get, computed on a CPU."""
    transform = augment.transform(torch.from_numpy(augment.draw(epoch, first + np.arange(len(images)), 96)), 96)
    views = images if isinstance(transform.geometry, AffineWarp) else augment.normalise.crop_and_resize(images)
    return augment.normalise.on_device(views, transform, **layout)


@given(least=st.floats(0.3, 20), ratio=st.floats(1, 8), width=st.sampled_from([64, 96, 100, 255]))
def test_blur_levels_cover_all_pitches_and_nothing_else(least: float, ratio: float, width: int) -> None:
    pitches = np.concatenate([np.geomspace(least, least * ratio, 400), [least * ratio]])
    halvings, taps = antialias(pitches, width)
    found: dict[int, int] = {}
    for level, radius in zip(halvings.tolist(), np.count_nonzero(taps[:, :2], axis=1).tolist(), strict=True):
        found[level] = max(radius, found.get(level, 0))
    levels = blur_levels(least, least * ratio, width)
    assert found.keys() <= levels.keys() and all(radius <= levels[level] for level, radius in found.items())
    assert min(levels) == halvings.min() and max(levels) == halvings.max()


@pytest.mark.parametrize("size", [20, 40, 64, 75, 130])
def test_resize_of_uint8_and_float_images_agrees_up_to_rounding(size: int) -> None:
    """A CPU takes the first, a GPU the second."""
    images = random_images(10, 96).permute(0, 3, 1, 2)
    difference = (resize(images, size).float() - resize(images.float(), size)).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 2.5


@pytest.mark.parametrize(("right", "down"), [(0, 0), (-5, 3), (31, -33), (64, 65), (-200, 1000), (12_345, -9_999)])
def test_pixels_outside_the_image_are_mirrored_at_any_distance(right: int, down: int) -> None:
    images = random_images(3, 32)
    transform = moved_pixels(images.numpy(), right, down)
    rows, columns = mirror(np.arange(32) + down, 32), mirror(np.arange(32) + right, 32)
    expected = images.numpy()[:, rows][:, :, columns].transpose(0, 3, 1, 2)
    assert np.abs(OpenCVBackend(32, NO_SCALING)(images.numpy(), transform) - expected).max() <= 1
    assert np.abs(TorchBackend(32, NO_SCALING)(images, as_tensors(transform)).numpy() - expected).max() <= 1


@pytest.mark.parametrize("config", [ALL, AugmentConfig(rotate="d4", noise=0.02)])
@pytest.mark.parametrize("count", [1, 8, 21])
def test_augmentation_is_bit_equal_for_any_number_of_threads(config: AugmentConfig, count: int) -> None:
    images = random_images(count, 48)
    one, four = (Augment(config, 1, *PLAIN, 40, threads=threads) for threads in (1, 4))
    for epoch in range(3):
        assert torch.equal(augmented(one, images, epoch), augmented(four, images, epoch))
        assert torch.equal(one.normalise(images), four.normalise(images))


def scattered(images: Tensor) -> list[Tensor]:
    """The same images, differently laid out in memory."""
    count, width = images.shape[:2]
    wide = torch.zeros((2 * count, width + 7, width + 3, 3), dtype=torch.uint8)
    wide[::2, 5 : width + 5, 2 : width + 2] = images
    return [
        wide[::2, 5 : width + 5, 2 : width + 2],
        images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        images.transpose(1, 2).contiguous().transpose(1, 2),
    ]


@pytest.mark.parametrize("config", [ALL, AugmentConfig(rotate="d4"), AugmentConfig(rotate="none", flip=False, zoom=3.0)])
@pytest.mark.parametrize("size", [40, 64])
def test_augmentation_is_bit_equal_for_any_memory_layout(config: AugmentConfig, size: int) -> None:
    images = random_images(10, 64)
    augment = Augment(config, 1, *PLAIN, size)
    expected, view = augmented(augment, images), augment.normalise(images)
    for strange in scattered(images):
        assert not strange.is_contiguous()
        assert torch.equal(augmented(augment, strange), expected)
        assert torch.equal(augment.normalise(strange), view)


def test_augmented_batches_are_not_overwritten_by_later_ones() -> None:
    images = random_images(6, 32)
    augment = Augment(ALL, 1, *PLAIN, 24)
    kept = [augmented(augment, images, epoch) for epoch in range(12)]
    for epoch, batch in enumerate(kept):
        assert torch.equal(batch, augmented(Augment(ALL, 1, *PLAIN, 24), images, epoch))


@given(pitch=st.floats(0.05, 60), width=st.integers(16, 2048))
def test_antialias_blur_has_the_spread_of_the_triangle_filter(pitch: float, width: int) -> None:
    """Taps add up to 1 exactly, are never negative and fall off to the sides.

    With halvings and the bilinear sample they spread as far as the triangle filter, wherever the width allows it.
    """
    halvings, taps = antialias(np.array([pitch]), width)
    factor, weights = 2 ** int(halvings[0]), np.concatenate([taps[0], taps[0, 1::-1]])
    assert width % factor == 0
    assert weights.sum() == 1
    assert weights[2] >= weights[1] >= weights[0] >= 0
    assert np.array_equal(weights * 256, np.rint(weights * 256))
    if pitch <= 1.1:
        assert factor == 1
        assert weights[2] == 1
    elif pitch / factor <= 3:
        blur = (weights * np.arange(-2, 3) ** 2).sum()
        spread = factor**2 * (blur + 1 / 6) + (factor**2 - 1) / 12
        assert spread == pytest.approx(pitch**2 / 6, abs=0.02 * factor**2)


def test_opencv_is_not_imported_with_the_augmentation_module() -> None:
    code = "import sys, galaxydist.loading.augment; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
