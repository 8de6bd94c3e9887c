"""Sky patch in three bands of surface brightness, to which galaxies, stars and other light are added."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SIZE = 256
# Pixels drawn beyond each image edge, so that the PSF blurs light into the image as well as out of it, and so that the
# wrap-around of the Fourier transform stays outside.
MARGIN = 16
CANVAS = SIZE + 2 * MARGIN
CENTRE = CANVAS / 2 - 0.5


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of the scene.

    Attributes:
        rows, columns: slices of the scene.
        x: 1 x W, y: H x 1: pixel coordinates relative to the object's centre.
        whole: True if the square around the object lies completely inside the canvas.
    """

    rows: slice
    columns: slice
    x: Array
    y: Array
    whole: bool

    @property
    def is_empty(self) -> bool:
        """True if the object lies outside the canvas."""
        return self.x.size == 0 or self.y.size == 0

    def turned(self, angle: float) -> tuple[Array, Array]:
        """Return coordinates along and across an axis at this position angle (radians), H x W each."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return self.x * cos + self.y * sin, self.y * cos - self.x * sin


class Scene:
    """Surface brightness in g, r, z, nanomaggies per pixel, before the PSF.

    Attributes:
        light_CHW: 3 x CANVAS x CANVAS float32.
        pixel_scale: arcsec per pixel.
    """

    def __init__(self, pixel_scale: float) -> None:
        self.light_CHW = np.zeros((3, CANVAS, CANVAS), np.float32)
        self.pixel_scale = pixel_scale

    def window(self, x: float, y: float, radius: float) -> Window:
        """Return the square of half-width ``radius`` around x, y (pixels from the centre), clipped to the canvas."""
        column, row = CENTRE + x, CENTRE + y
        left, low = max(int(np.floor(column - radius)), 0), max(int(np.floor(row - radius)), 0)
        right = max(min(int(np.ceil(column + radius)) + 1, CANVAS), left)
        high = max(min(int(np.ceil(row + radius)) + 1, CANVAS), low)
        whole = column - radius >= 0 and row - radius >= 0 and column + radius < CANVAS and row + radius < CANVAS
        return Window(
            slice(low, high),
            slice(left, right),
            (np.arange(left, right) - column).astype(np.float32)[None, :],
            (np.arange(low, high) - row).astype(np.float32)[:, None],
            whole,
        )

    def add(self, window: Window, profile_HW: Array, fluxes: Array) -> None:
        """Add a profile whose sum over the whole plane is 1, times the fluxes in g, r, z (nanomaggies)."""
        target = self.light_CHW[:, window.rows, window.columns]
        target += profile_HW * fluxes.astype(np.float32)[:, None, None]

    def dim(self, window: Window, depth_HW: Array, reddening: Array) -> None:
        """Dim the light behind dust by exp(-depth * reddening) in each band."""
        target = self.light_CHW[:, window.rows, window.columns]
        target *= np.exp(-depth_HW * reddening.astype(np.float32)[:, None, None])

    def add_points(self, x: NDArray[np.float64], y: NDArray[np.float64], fluxes_NC: Array) -> None:
        """Add point sources (stars, knots) at x, y pixels from the image centre, distributed over the four nearest pixels."""
        column, row = CENTRE + x, CENTRE + y
        left, low = np.floor(column).astype(int), np.floor(row).astype(int)
        for right in (0, 1):
            for high in (0, 1):
                weight = np.abs(1 - right - (column - left)) * np.abs(1 - high - (row - low))
                ok = (left + right >= 0) & (left + right < CANVAS) & (low + high >= 0) & (low + high < CANVAS)
                for band in range(3):
                    np.add.at(
                        self.light_CHW[band],
                        (low[ok] + high, left[ok] + right),
                        (weight[ok] * fluxes_NC[ok, band]).astype(np.float32),
                    )
