"""Scaling of pixels to 8 bits: the linear rule, Lupton's asinh, and the message that helps to choose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.errors import UserError
from galaxydist.surveys.image_arrays import PixelScaling, scale_pixels, to_eight_bits


@given(st.sampled_from(["<f4", ">f8", "<u2", ">i4", "<i8"]), st.integers(0, 100))
def test_linear_scale_is_the_rounded_ratio_clipped(dtype: str, low: int) -> None:
    values = np.arange(0, 1000, 7).astype(dtype)
    expected = [round(min(max((value - low) / (555 - low), 0), 1) * 255) for value in range(0, 1000, 7)]
    assert np.abs(scale_pixels(values, PixelScaling(low, 555)).astype(int) - expected).max() <= (1 if dtype == "<f4" else 0)
    numbers = np.arange(256).astype(dtype)
    assert scale_pixels(numbers, PixelScaling(0, 255)).tolist() == list(range(256))


def test_values_that_are_no_numbers_are_black_and_infinite_ones_clipped() -> None:
    pixels = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    assert scale_pixels(pixels, PixelScaling(-1, 1)).tolist() == [[0, 255, 0]]
    assert scale_pixels(pixels, PixelScaling(-1, 1, "asinh"))[0, 2] == 0


def test_asinh_is_luptons_up_to_his_factor_and_keeps_colours() -> None:
    from astropy.visualization import LuptonAsinhStretch

    rng = np.random.default_rng(0)
    fluxes = rng.uniform(0.0, 0.05, (50, 40, 3)) + 2.0
    mine = scale_pixels(fluxes, PixelScaling(2.0, 12.0, "asinh")).astype(float)
    softening = np.sinh(8) / 10
    # astropy's f(I) = asinh(I Q / stretch) 0.1 / asinh(0.1 Q), ours asinh(I sinh(Q) / (high - low)) / Q
    intensity = (fluxes - 2).mean(axis=-1, keepdims=True)
    lupton = LuptonAsinhStretch(stretch=8 / softening, Q=8)(intensity)
    theirs = (fluxes - 2) / intensity * lupton * (np.arcsinh(0.8) / 0.1 / 8) * 255
    bright = theirs.max(axis=-1) < 255
    assert bright.sum() > 1000
    assert np.abs(mine - theirs)[bright].max() <= 0.51
    assert scale_pixels(np.full((1, 3), 12.0), PixelScaling(2, 12, "asinh")).tolist() == [[255, 255, 255]]
    saturated = scale_pixels(np.array([[100.0, 50.0, 25.0]]), PixelScaling(0, 10, "asinh"))
    assert saturated.tolist() == [[255, 128, 64]]


@pytest.mark.parametrize(
    ("pixels", "example"),
    [
        (np.linspace(0, 1, 300, dtype=np.float32), "--scale 0 1"),
        (np.arange(256, dtype=np.float64), "--scale 0 255"),
        (np.linspace(-10, 1000, 1001), "--scale 0.1 995"),
        (np.array([0, 65535] * 300, np.uint16), "from 0 to 65535"),
    ],
)
def test_unscaled_pixels_are_refused_with_their_range(pixels: np.ndarray, example: str) -> None:
    with pytest.raises(UserError, match=r"give --scale LOW HIGH") as caught:
        to_eight_bits(pixels, None, "images of a.h5")
    assert example in str(caught.value)


def test_eight_bit_pixels_stay_and_impossible_scales_are_refused() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert to_eight_bits(pixels, None, "x") is pixels
    with pytest.raises(UserError, match="lower and a higher"):
        PixelScaling(1, 1)
    with pytest.raises(UserError, match="choose from linear, asinh"):
        PixelScaling(0, 1, "log")
    with pytest.raises(UserError, match="without a finite number"):
        to_eight_bits(np.full(3, np.nan), None, "x")
