"""Images in arrays: which axis holds the bands, which bands become the colours, and what is refused."""

from collections.abc import Sequence

import numpy as np
import pytest

from galaxydist.errors import UserError
from galaxydist.surveys.image_arrays import ArrayOptions, PixelScaling, array_layout, is_image_shape

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
CUBES = np.random.default_rng(1).uniform(0, 2, (4, 5, 10, 12)).astype(">f4")
BANDS = ["hsc-g", "hsc-r", "hsc-i", "hsc-z", "hsc-y"]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (PIXELS, PIXELS),
        (np.moveaxis(PIXELS, -1, 1), PIXELS),
        (PIXELS[..., 0], PIXELS[..., [0, 0, 0]]),
        (PIXELS[..., :1], PIXELS[..., [0, 0, 0]]),
        (np.moveaxis(PIXELS[..., :1], -1, 1), PIXELS[..., [0, 0, 0]]),
    ],
    ids=["last", "first", "grey", "grey-last", "grey-first"],
)
def test_eight_bit_images_in_each_layout(images: np.ndarray, expected: np.ndarray) -> None:
    assert is_image_shape(images.shape)
    found = array_layout("x", images.shape, images, ArrayOptions()).to_rgb(images)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("wanted", [("i", "r", "g"), ("HSC-I", "hsc-r", "G"), ("2", "1", "0")])
def test_bands_are_chosen_by_name_part_of_a_name_or_number(wanted: tuple[str, ...]) -> None:
    options = ArrayOptions(bands=wanted, scaling=PixelScaling(0, 2))
    expected = np.rint(np.moveaxis(CUBES[:, [2, 1, 0]], 1, -1) / np.float32(2) * 255)
    np.testing.assert_array_equal(array_layout("x", CUBES.shape, CUBES, options, BANDS).to_rgb(CUBES), expected)
    last = np.moveaxis(CUBES, 1, -1)
    np.testing.assert_array_equal(array_layout("x", last.shape, last, options, BANDS).to_rgb(last), expected)


@pytest.mark.parametrize(
    ("images", "options", "names", "message"),
    [
        (CUBES, ArrayOptions(), BANDS, "has the bands hsc-g, hsc-r, hsc-i, hsc-z, hsc-y: give --bands"),
        (CUBES[:, :3], ArrayOptions(), BANDS[:3], "has the bands hsc-g, hsc-r, hsc-i: give --bands"),
        (CUBES, ArrayOptions(), None, "has 5 bands without names .*from 0 to 4"),
        (CUBES, ArrayOptions(bands=("i", "r", "u")), BANDS, "has no u; it has the bands hsc-g"),
        (CUBES, ArrayOptions(bands=("i", "r")), BANDS, "give three bands"),
        (CUBES, ArrayOptions(bands=("0", "1", "7")), None, "has no 7; it has 5 bands without names"),
        (CUBES, ArrayOptions(bands=("i", "r", "g")), BANDS, "its pixels are >f4, .*--scale LOW HIGH"),
        (PIXELS, ArrayOptions(scaling=PixelScaling(0, 1)), None, "leave out --scale"),
        (PIXELS > 3, ArrayOptions(), None, "holds bool, not pixels"),
        (PIXELS[0, 0], ArrayOptions(), None, "has the shape 12 x 3; images are"),
        (np.zeros((2, 40, 50, 60)), ArrayOptions(), None, "has the shape 2 x 40 x 50 x 60"),
    ],
)
def test_what_cannot_be_read_is_refused(
    images: np.ndarray, options: ArrayOptions, names: Sequence[str] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        array_layout("x", images.shape, images, options, names)


def test_tables_and_spectra_are_no_images() -> None:
    assert not any(map(is_image_shape, [(100,), (100, 3), (100, 4, 2), (100, 3, 3, 3), (50, 40, 50, 60)]))
