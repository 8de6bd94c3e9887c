"""Images in numeric arrays: which axis holds the colours, which bands they are, and how their values become 8-bit RGB."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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


# Most bands of an image, to tell the axis of bands from those of pixels; a cube with more is a spectrum at each pixel.
_MOST_BANDS = 32


@dataclass(frozen=True, slots=True)
class ArrayOptions:
    """The user's choices for images in arrays.

    Args:
        column: data set or column that holds the images; None: by its name.
        bands: names (or numbers from 0) of the bands that become red, green and blue; empty if there are three colours anyway.
        scaling: rule for pixels that do not have 8 bits; None if the user gave none.
    """

    column: str | None = None
    bands: tuple[str, ...] = ()
    scaling: PixelScaling | None = None


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Layout of the images of an array of shape N x ...

    Args:
        name: the array, for messages.
        axis: axis of the bands in one image: 0, -1, or None for grey images without that axis.
        bands: numbers of the bands that become red, green and blue; a single one for grey.
        scaling: rule for pixels that do not have 8 bits.
    """

    name: str = field(repr=False)
    axis: int | None
    bands: tuple[int, ...]
    scaling: PixelScaling | None

    def to_rgb(self, images: NDArray[Any]) -> NDArray[np.uint8]:
        """Return images (N x ...) as N x H x W x 3 uint8; raises UserError as ``to_eight_bits`` does."""
        if self.axis is not None:
            images = np.moveaxis(images, 1, -1) if self.axis == 0 else images
            images = images[..., list(self.bands)] if self.bands != tuple(range(images.shape[-1])) else images
        else:
            images = images[..., None]
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        return np.ascontiguousarray(to_eight_bits(images, self.scaling, self.name))


def array_layout(
    name: str, shape: Sequence[int], first: NDArray[Any], options: ArrayOptions, names: Sequence[str] | None = None
) -> ArrayLayout:
    """Return the layout of an array of images.

    Args:
        name: the array, for messages.
        shape: of the array: N x H x W x C, N x C x H x W or N x H x W.
        first: its first images, for the range of their pixels.
        options: the user's choices.
        names: names of its bands, if the data gives them.

    Raises:
        UserError: no such shape of images, bands that are missing or have to be chosen, or pixels that need a scaling.
    """
    axis = _band_axis(name, shape, names)
    count = 1 if axis is None else shape[1:][axis]
    if options.bands:
        bands = _chosen(name, options.bands, names, count)
    elif names is not None and count > 1:
        raise UserError(
            f"{name} has the bands {', '.join(names)}: give --bands R,G,B with the names of those for red, green and blue"
        )
    elif count in (1, 3):
        bands = tuple(range(count))
    else:
        raise UserError(
            f"{name} has {count} bands without names (its shape is {show_shape(shape)}): give --bands with the numbers of those "
            f"for red, green and blue, in this order, from 0 to {count - 1}"
        )
    if first.dtype.kind not in "iuf":
        raise UserError(f"{name} holds {first.dtype}, not pixels; choose another data set with --image-column")
    layout = ArrayLayout(name, axis, bands, options.scaling)
    if first.dtype != np.uint8 and options.scaling is None:
        chosen = first if axis is None else np.moveaxis(first, axis if axis < 0 else 1, -1)[..., list(bands)]
        raise unscaled(chosen, name)
    layout.to_rgb(first[:1])
    return layout


def is_image_shape(shape: Sequence[int]) -> bool:
    """Return True for N x H x W, N x H x W x C and N x C x H x W with images of at least 8 pixels and few bands."""
    if len(shape) == 3:
        return min(shape[1:]) >= 8
    return len(shape) == 4 and (_is_cube(shape[1:3], shape[3]) or _is_cube(shape[2:4], shape[1]))


def _is_cube(pixels: Sequence[int], bands: int) -> bool:
    return min(pixels) >= 8 and 1 <= bands <= _MOST_BANDS


def _band_axis(name: str, shape: Sequence[int], names: Sequence[str] | None) -> int | None:
    """Return the axis of the bands in one image: 0, -1 or None."""
    if len(shape) == 3 and min(shape[1:]) >= 1:
        return None
    if len(shape) == 4 and min(shape[1:]) >= 1:
        first, last = shape[1], shape[3]
        if names is not None and len(names) in (first, last):
            return 0 if len(names) == first else -1
        if last in (1, 3) or first in (1, 3):
            return -1 if last in (1, 3) else 0
        if min(first, last) <= _MOST_BANDS:
            return 0 if first < last else -1
    raise UserError(
        f"{name} has the shape {show_shape(shape)}; images are N x height x width x 3, N x 3 x height x width, or other bands"
    )


def _chosen(name: str, wanted: Sequence[str], names: Sequence[str] | None, count: int) -> tuple[int, ...]:
    """Return the numbers of the wanted bands, which are given by name, by its last part (``g`` for ``des-g``), or by number."""
    if len(wanted) != 3:
        raise UserError(f"--bands {','.join(wanted)}: give three bands, for red, green and blue")
    known = [band.lower() for band in names or ()]
    short = [band.replace("_", "-").rpartition("-")[2] for band in known]
    found = []
    for band in wanted:
        matches = [number for number in range(len(known)) if band.lower() in (known[number], short[number])]
        if not matches and band.isdecimal() and int(band) < count:
            matches = [int(band)]
        if len(matches) != 1:
            there = f"the bands {', '.join(names)}" if names else f"{count} bands without names, numbered from 0"
            raise UserError(f"--bands {','.join(wanted)}: {name} has {'no' if not matches else 'several'} {band}; it has {there}")
        found += matches
    return tuple(found)


def show_shape(shape: Sequence[int]) -> str:
    """Return ``60 x 16 x 16``."""
    return " x ".join(map(str, shape))
