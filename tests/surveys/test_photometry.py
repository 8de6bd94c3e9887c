"""Sizes, brightnesses and skies of images whose truth is known."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from scipy.special import gammaincinv

from galaxydist.surveys.photometry import Measurements, measure_images

SKY = 20


def measure_image(image_HWC: NDArray[np.uint8]) -> Measurements:
    """The columns of one image, as numbers."""
    measured = measure_images(image_HWC[None])
    return Measurements(measured.size_px[0], measured.brightness[0], measured.sky[0])


def draw_sersic(
    radius: float, index: float, *, axis_ratio: float = 1.0, size: int = 256, shift: tuple[float, float] = (0.0, 0.0)
) -> NDArray[np.float64]:
    """A Sersic profile of that half-light radius (pixels; circularised), its brightest pixel 1; pixels are means of 25 points."""
    y_HW, x_HW = (np.mgrid[: 5 * size, : 5 * size] + 0.5) / 5 - size / 2
    y_HW, x_HW = y_HW - shift[0], x_HW - shift[1]
    along_HW, across_HW = 0.8 * x_HW + 0.6 * y_HW, 0.8 * y_HW - 0.6 * x_HW
    distance_HW = np.hypot(along_HW * axis_ratio**0.5, across_HW / axis_ratio**0.5)
    light_HW = np.exp(-gammaincinv(2 * index, 0.5) * (distance_HW / radius) ** (1 / index))
    pixels_HW = light_HW.reshape(size, 5, size, 5).mean(axis=(1, 3))
    return np.asarray(pixels_HW / pixels_HW.max())


def as_image(light_HW: NDArray[np.float64], *, sky: float = SKY, noise: float = 2.0, seed: int = 0) -> NDArray[np.uint8]:
    """Full light 200 over the sky, with normal noise, in the 8 bits of an image."""
    noise_HWC = np.random.default_rng(seed).normal(0, noise, (*light_HW.shape, 3))
    return np.clip(np.rint(200 * light_HW[..., None] + sky + noise_HWC), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("index", "expected", "radius"),
    [(0.5, 1.0, 5), (0.5, 1.0, 12), (0.5, 1.0, 25), (1, 0.993, 5), (1, 0.993, 12), (1, 0.993, 25), (4, 0.70, 5), (4, 0.70, 12)],
)
def test_measured_half_light_radius_matches_petrosian_theory_for_sersic_profiles(
    index: float, expected: float, radius: float
) -> None:
    # Graham et al. (2005): right for a disc; of a de Vaucouleurs profile the aperture loses the wings.
    light_HW = draw_sersic(radius, index)
    found = measure_image(as_image(light_HW))
    assert found.size_px == pytest.approx(expected * radius, rel=0.04)
    assert found.sky * 255 == pytest.approx(SKY, abs=0.3)
    if index <= 1:
        assert found.brightness == pytest.approx(200 / 255 * light_HW.sum(), rel=0.02)


def test_inclined_disc_keeps_its_brightness_and_size_within_10_percent() -> None:
    light_HW = draw_sersic(15, 1, axis_ratio=0.4)
    found = measure_image(as_image(light_HW))
    assert found.brightness == pytest.approx(200 / 255 * light_HW.sum(), rel=0.03)
    assert found.size_px == pytest.approx(15, rel=0.1)  # circular apertures


def test_neighbours_and_an_offset_change_size_and_brightness_by_under_3_percent() -> None:
    alone = measure_image(as_image(draw_sersic(12, 1, shift=(4.3, -6.7))))
    crowd_HW = draw_sersic(12, 1, shift=(4.3, -6.7)) + sum(
        0.9 * draw_sersic(2, 0.5, shift=place) for place in ((60, 20), (-50, -40), (-90, 95), (70, -75))
    )
    found = measure_image(as_image(crowd_HW))
    assert alone.size_px == pytest.approx(12, rel=0.02)
    assert found.size_px == pytest.approx(alone.size_px, rel=0.03)
    assert found.brightness == pytest.approx(alone.brightness, rel=0.03)
    assert found.sky == pytest.approx(alone.sky, abs=0.002)


def test_measured_radius_scales_with_the_image_and_the_sky_does_not() -> None:
    small, large = (measure_image(as_image(draw_sersic(size / 16, 1, size=size))) for size in (64, 256))
    assert large.size_px == pytest.approx(4 * small.size_px, rel=0.04)
    assert large.sky == pytest.approx(small.sky, abs=0.002)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_blank_image_has_a_sky_and_no_galaxy(level: int) -> None:
    found = measure_image(np.full((64, 48, 3), level, np.uint8))
    assert np.isnan(found.size_px) and found.brightness == 0
    assert found.sky == pytest.approx(level / 255, abs=0.002)


def test_an_empty_noisy_sky_has_no_galaxy() -> None:
    found = measure_image(as_image(np.zeros((128, 128)), noise=4))
    assert np.isnan(found.size_px) and found.brightness == 0


def test_measurements_of_a_batch_equal_those_of_single_images() -> None:
    images = [as_image(draw_sersic(r, n, size=64), seed=r) for r, n in itertools.product((3, 6, 9), (1, 4))] * 7
    batch = measure_images(np.stack(images))
    for number, image in enumerate(images):
        one = measure_image(image)
        assert (batch.size_px[number], batch.brightness[number], batch.sky[number]) == (one.size_px, one.brightness, one.sky)
    none = measure_images(np.empty((0, 64, 64, 3), np.uint8))
    assert none.size_px.shape == none.brightness.shape == none.sky.shape == (0,)


@given(hnp.arrays(np.uint8, st.tuples(st.just(2), st.integers(16, 40), st.integers(16, 40), st.just(3))))
def test_any_image_has_measurements_within_bounds(images_NHWC: NDArray[np.uint8]) -> None:
    found = measure_images(images_NHWC)
    radius = found.size_px[~np.isnan(found.size_px)]
    assert (radius >= 0).all() and (radius <= min(images_NHWC.shape[1:3]) / 2).all()
    assert (found.brightness >= 0).all() and (found.brightness[np.isnan(found.size_px)] == 0).all()
    assert ((found.sky >= 0) & (found.sky <= 1)).all()


def test_measure_images_refuses_other_shapes_and_dtypes() -> None:
    for images in (np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match=r"not .* of"):
            measure_image(images)
    assert math.isnan(measure_image(np.zeros((8, 32, 3), np.uint8)).size_px)  # too small to say anything


def test_real_barred_spirals_are_larger_than_in_between_smooth_galaxies(real_sample: Path) -> None:
    def sizes(label: int) -> NDArray[np.float64]:
        files = sorted((real_sample / str(label)).glob("*.jpg"))[:25]
        return measure_images(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])).size_px

    in_between, barred = sizes(3), sizes(5)
    assert np.isfinite(in_between).all() and np.isfinite(barred).all()
    assert np.median(barred) > 1.5 * np.median(in_between) > 10
