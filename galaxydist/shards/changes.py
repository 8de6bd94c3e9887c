"""What is to become of each image of a batch, in numbers: the one plan that every device carries out.

The filter aimed at when an image shrinks is that of PIL and torchvision (``antialias=True``): a triangle two output pixels wide.
A bilinear sample alone is a triangle two input pixels wide. What is missing is blurred in beforehand by a few taps of the
missing variance (a triangle that reaches to r has the variance r^2 / 6); from three input pixels to an output pixel on, whole
pixels are averaged first. A test holds the mean difference from a float64 triangle below one grey level.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]

# Input pixels to an output pixel: above the first, the image is blurred; above the second, halved until it is below.
BLUR = 1.1
HALVE = 3.0
# Taps are multiples of 1/256, which 8-bit arithmetic (OpenCV's) and float32 both hold exactly.
TAP_UNIT = 256
NUM_TAPS = 5


@dataclass(frozen=True)
class Warp:
    """Resampling through a map; what lies outside an image is its reflection.

    Args:
        maps: B x 2 x 3 from output to input coordinates (x to the right, y down; both -1 to 1 from edge to edge).
        halvings: B, how often 2 x 2 pixels are averaged first.
        taps: B x 5, the symmetric blur along each axis that follows; sums are 1.
    """

    maps: Floats
    halvings: Ints
    taps: Float32s

    @property
    def radii(self) -> Ints:
        """B, how far each blur reaches: 0 (none), 1 or 2 pixels."""
        return np.asarray(np.count_nonzero(self.taps, axis=1) // 2)

    def matrices(self, width: int, size: int) -> Floats:
        """The maps between centres of pixels: B x 2 x 3 from (column, row) of the output to that of the halved input.

        Args:
            width: of the images before they are halved.
            size: output width.
        """
        half = width / 2.0 ** (self.halvings + 1)
        linear = self.maps[:, :, :2] * (2 * half / size)[:, None, None]
        offset = (self.maps[:, :, 2] + 1) * half[:, None] - 0.5 - linear.sum(2) * (size - 1) / 2
        return np.concatenate([linear, offset[:, :, None]], axis=2)


@dataclass(frozen=True)
class Turn:
    """Quarter turns (B, counter-clockwise) and then mirrors (B, left to right): the same pixels in other places."""

    turns: Ints
    mirrored: NDArray[np.bool_]


@dataclass(frozen=True)
class Noise:
    """A window of a fixed table of standard normal deviates for each image.

    Args:
        table: float32.
        places: B, where in the table an image's C x T x T deviates start.
        gain_BC: float32, what they are multiplied by.
    """

    table: Float32s
    places: Ints
    gain_BC: Float32s


@dataclass(frozen=True)
class Changes:
    """``grey level * gain + shift + noise`` of images that were warped or turned and are in whole grey levels again.

    Args:
        geometry: how pixels move. For a :class:`Turn` the images have the model's size already.
        gain_BC: float32.
        shift_C: float32.
        noise: if any.
    """

    geometry: Warp | Turn
    gain_BC: Float32s
    shift_C: Float32s
    noise: Noise | None = None


def antialias(pitch: Floats, width: int) -> tuple[Ints, Float32s]:
    """How images are made ready for one bilinear sample to an output pixel: ``halvings`` and ``taps`` of a :class:`Warp`.

    Args:
        pitch: input pixels between output pixels, for each image.
        width: of the input; it is halved only as long as that is exact.
    """
    halvings = np.ceil(np.log2(np.maximum(pitch, 1e-6) / HALVE)).astype(np.int64)
    halvings = np.clip(halvings, 0, (width & -width).bit_length() - 1)
    left = pitch / 2.0**halvings
    # A mean over n pixels has the variance (n^2 - 1) / 12: here in units of the halved pixels.
    variance = (left**2 - 1) / 6 - (1 - 4.0**-halvings) / 12
    return halvings, _taps(np.where(left > BLUR, np.clip(variance, 0, 4 / 3), 0))


def _taps(variance: Floats) -> Float32s:
    """Up to a variance of 1/2 three taps, above two times three: from the binomial of 5 to the triangle that reaches to 3."""
    single = variance <= 0.5
    side = np.where(single, variance / 2, variance / 4)
    near = np.where(single, side, 2 * side * (1 - 2 * side))
    far = np.where(single, 0, side**2)
    near, far = np.rint(TAP_UNIT * near), np.rint(TAP_UNIT * far)
    return (np.stack([far, near, TAP_UNIT - 2 * (near + far), near, far], axis=1) / TAP_UNIT).astype(np.float32)
