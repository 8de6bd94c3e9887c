"""Scaling of float and 16-bit pixels to the 8-bit colours that are stored and read."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError

STRETCHES = ("linear", "asinh")

# Q of Lupton et al. (2004): the larger, the more the faint parts are raised.
_SOFTENING_Q = 8.0


@dataclass(frozen=True, slots=True)
class PixelScaling:
    """Rule that turns pixel values into 0 ... 255.

    Args:
        low: value that becomes 0, and all below it.
        high: value that becomes 255, and all above it.
        stretch: ``linear``, or ``asinh``: the intensity (mean of the three colours) is stretched by asinh and the ratios of the
            colours are kept (Lupton et al. 2004, PASP 116, 133, equations 1 to 3, with Q = 8 and an intensity of ``high``
            becoming full scale).

    Raises:
        UserError: ``low`` is not below ``high``, one of them is not finite, or the stretch is unknown.
    """

    low: float
    high: float
    stretch: str = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"a scale from {self.low:g} to {self.high:g} is not possible: give a lower and a higher finite value")
        if self.stretch not in STRETCHES:
            raise UserError(f"there is no stretch {self.stretch!r}; choose from {', '.join(STRETCHES)}")


def scale_pixels(pixels: NDArray[Any], scaling: PixelScaling) -> NDArray[np.uint8]:
    """Return pixels of any numeric type as 0 ... 255, rounded and clipped; values that are not a number become 0.

    Args:
        pixels: ... x 3 (red, green, blue), of any leading shape; the linear stretch takes any shape.
        scaling: the rule.
    """
    values: NDArray[np.floating[Any]] = pixels.astype(np.float64 if pixels.dtype.itemsize > 4 else np.float32)
    values -= scaling.low
    values /= scaling.high - scaling.low
    if scaling.stretch == "asinh":
        np.nan_to_num(values, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
        intensity = values.mean(axis=-1, keepdims=True)
        stretched = np.arcsinh(math.sinh(_SOFTENING_Q) * intensity) / _SOFTENING_Q
        values *= np.divide(stretched, intensity, out=np.zeros_like(intensity), where=intensity > 0)
        values /= np.maximum(values.max(axis=-1, keepdims=True), 1.0)  # too bright a colour: all three are lowered alike
    np.nan_to_num(values, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    return np.asarray(np.rint(np.clip(values, 0.0, 1.0) * 255.0), np.uint8)


def to_eight_bits(pixels: NDArray[Any], scaling: PixelScaling | None, name: str) -> NDArray[np.uint8]:
    """Return 8-bit pixels as they are, and others scaled.

    Args:
        pixels: ... x 3 of any numeric type.
        scaling: the rule; None if the user gave none.
        name: the images, for messages.

    Raises:
        UserError: other pixels than 8-bit ones without a scaling (with the range found), or 8-bit ones with one.
    """
    if pixels.dtype == np.uint8:
        if scaling is not None:
            raise UserError(f"{name}: its pixels have 8 bits already and are taken as they are; leave out --scale")
        return np.asarray(pixels)
    if scaling is None:
        raise unscaled(pixels, name)
    return scale_pixels(pixels, scaling)


def unscaled(pixels: NDArray[Any], name: str) -> UserError:
    """Return the error for pixels that need a scaling; it states their range, so that the user can choose one."""
    advice = "give --scale LOW HIGH: the values that become black and white"
    values = pixels[np.isfinite(pixels)].astype(np.float64) if pixels.dtype.kind in "iuf" else np.empty(0)
    if not values.size:
        return UserError(f"{name}: its pixels are {pixels.dtype}, without a finite number in the first images; {advice}")
    least, low, high, most = np.quantile(values, [0, 0.01, 0.995, 1]).tolist()
    shares = f"1 % are below {low:.5g}, 0.5 % above {high:.5g}"
    if least >= 0 and most <= 1:
        low, high = 0, 1
    elif least >= 0 and 200 < most <= 255:
        low, high = 0, 255
    return UserError(
        f"{name}: its pixels are {pixels.dtype}, in the first images from {least:.5g} to {most:.5g} ({shares}), not 8-bit; "
        f"{advice}, for example --scale {low:.4g} {high:.4g}"
    )
