"""Observation of a scene: seeing, noise, stars, background galaxies, artefacts, and the RGB stretch."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import ndtri

from galaxydist.surveys.simulate.components import CANVAS, MARGIN, SIZE, Array, Scene
from galaxydist.surveys.simulate.random_draws import PIXELS, Draws, pixel_normals

# The order of bands in this folder is g, r, z; the channels of an image (red, green, blue) are z, r, g.

# The viewer's constants: ``dr2_rgb`` and ``sdss_rgb`` in map/views.py of github.com/legacysurvey/imagine.
SCALES_G_R_Z = np.array([6.0, 3.4, 2.2], np.float32)
BLACK_LEVEL = 0.03
SOFTENING_Q = 20.0

# Galaxy10 consists of viewer cutouts: JPEG of quality 75 with halved colour resolution (read from the sample's JPEG tables).
JPEG_QUALITY = 75


def to_fluxes(magnitudes: NDArray[Any] | list[float]) -> Array:
    """Convert AB magnitudes to fluxes in nanomaggies (magnitude 22.5 is 1 nanomaggy)."""
    return np.asarray(10.0 ** (0.4 * (22.5 - np.asarray(magnitudes, np.float64))), np.float32)


def stretch(fluxes_CHW: Array) -> Array:
    """Apply the Legacy Surveys viewer's stretch: asinh of the mean of the scaled bands, which keeps hues and saturates to white.

    With x = scale * flux + m in each band and I the mean of the positive parts of x, a channel is x * asinh(Q I) / (sqrt(Q) I),
    clipped to 0 ... 1; Q = 20, m = 0.03 and scales 6.0, 3.4, 2.2 in g, r, z. After Lupton et al. (2004, PASP 116, 133), with the
    viewer's constants (``dr2_rgb`` calling ``sdss_rgb`` in github.com/legacysurvey/imagine, map/views.py).

    Args:
        fluxes_CHW: 3 x H x W surface brightnesses in g, r, z, nanomaggies per pixel of 0.262 arcsec.

    Returns:
        H x W x 3 float32 in 0 ... 1, channels z, r, g.
    """
    scaled = fluxes_CHW * SCALES_G_R_Z[:, None, None] + np.float32(BLACK_LEVEL)
    intensity = np.maximum(np.maximum(scaled, 0.0).mean(axis=0), np.float32(1e-6))
    gain = np.arcsinh(np.float32(SOFTENING_Q) * intensity) / (np.float32(np.sqrt(SOFTENING_Q)) * intensity)
    return np.asarray(np.clip(np.moveaxis(scaled[::-1] * gain, 0, -1), 0.0, 1.0))


def to_image(fluxes_CHW: Array) -> NDArray[np.uint8]:
    """Return the cutout as the viewer serves it: stretched, 8 bits, and JPEG-compressed once, which smooths the colour noise.

    Args:
        fluxes_CHW: as for :func:`stretch`.

    Returns:
        H x W x 3 uint8 RGB.
    """
    import simplejpeg

    pixels = np.ascontiguousarray((stretch(fluxes_CHW) * np.float32(255.0)).astype(np.uint8))
    data = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
    return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), np.uint8)


# Median seeing of the Legacy Surveys' DECam images, FWHM in arcsec in g, r, z (Dey et al. 2019, AJ 157, 168).
SEEING = (1.3, 1.2, 1.1)
# Wings of ground-based PSFs: Trujillo et al. (2001, MNRAS 328, 977) find Moffat exponents of 2.5 ... 4.8.
MOFFAT_BETA = 3.2
DECAM_PIXEL = 0.262

# Sky noise per pixel of 0.262 arcsec in g, r, z, nanomaggies. Order and size follow the DECaLS depths (Dey et al. 2019); the
# values are tuned to the sky noise of the real sample's tuning half.
NOISE = (0.0016, 0.0028, 0.0060)
# Weight of the neighbouring pixels in a pixel's noise: resampled co-adds have correlated noise.
_CORRELATION = 0.10


def draw_seeing(draws: Draws) -> tuple[float, float, float]:
    """Draw the seeing of an image in g, r, z (FWHM, arcsec), in steps of 0.02 so that the PSF's transform can be cached."""
    common = draws.normal(0.0, 0.10)
    g, r, z = (round(value * float(np.exp(common + draws.normal(0.0, 0.04))) / 0.02) * 0.02 for value in SEEING)
    return g, r, z


def blur(light_CHW: Array, seeing: tuple[float, float, float], pixel_scale: float) -> Array:
    """Convolve each band with the Moffat PSF of its seeing.

    Args:
        light_CHW: 3 x CANVAS x CANVAS.
        seeing: FWHM in g, r, z, arcsec.
        pixel_scale: arcsec per pixel.
    """
    blurred = np.empty_like(light_CHW)
    for band, fwhm in enumerate(seeing):
        spectrum = fft.rfft2(light_CHW[band])
        spectrum *= moffat_transform(round(fwhm / pixel_scale, 4))
        blurred[band] = fft.irfft2(spectrum, s=(CANVAS, CANVAS))
    return blurred


@lru_cache(maxsize=192)
def moffat_transform(fwhm: float) -> NDArray[np.complex64]:
    """Return the transfer function, CANVAS x (CANVAS/2 + 1), of a Moffat profile (1969, A&A 3, 455) of this FWHM in pixels."""
    offset = np.minimum(np.arange(CANVAS), CANVAS - np.arange(CANVAS))
    width = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / MOFFAT_BETA) - 1.0))
    profile = (1.0 + (offset[:, None] ** 2 + offset[None, :] ** 2) / width**2) ** -MOFFAT_BETA
    return np.asarray(fft.rfft2((profile / profile.sum()).astype(np.float32)))


def add_artefacts(light_CHW: Array, draws: Draws) -> None:
    """Add artefacts to a few images: a satellite trail in one band, or the glare of a bright star beyond the edge."""
    grid = np.arange(CANVAS, dtype=np.float32) - np.float32(CANVAS / 2)
    if draws.bernoulli(0.015):
        band, angle, offset = draws.integer(0, 2), draws.uniform(0.0, np.pi), draws.uniform(-100.0, 100.0)
        across = grid[None, :] * np.float32(np.cos(angle)) + grid[:, None] * np.float32(np.sin(angle)) - np.float32(offset)
        light_CHW[band] += np.float32(NOISE[band] * draws.uniform(1.5, 6.0)) * np.exp(-0.5 * (across / np.float32(2.0)) ** 2)
    if draws.bernoulli(0.03):
        angle, distance, reach = draws.uniform(0.0, 2.0 * np.pi), draws.uniform(150.0, 210.0), draws.uniform(15.0, 50.0)
        x, y = np.float32(distance * np.cos(angle)), np.float32(distance * np.sin(angle))
        gap = np.maximum(np.hypot(grid[None, :] - x, grid[:, None] - y) - np.float32(0.6 * distance), 0.0)
        colour = np.array([draws.uniform(0.5, 1.5), 1.0, draws.uniform(0.5, 1.5)], np.float32) * np.array(NOISE, np.float32)
        light_CHW += np.float32(draws.uniform(1.0, 6.0)) * np.exp(-gap / np.float32(reach)) * colour[:, None, None]


def add_noise(light_CHW: Array, draws: Draws, pixel_scale: float, seed: int, row: int) -> Array:
    """Cut the SIZE x SIZE image from the scene and add sky noise, correlated between neighbours as in resampled co-adds.

    Depth varies with position and band. Some images are shallower in all bands, or have an edge between two depths.
    """
    depth = draws.normal(0.0, 0.15)
    sigma = np.array([noise * np.exp(depth + draws.normal(0.0, 0.12)) for noise in NOISE])
    if draws.bernoulli(0.10):
        sigma *= draws.uniform(1.3, 2.2)
    # Pixels at a coarser scale are means over camera pixels: surface brightness stays the same, noise averages out.
    coarser = pixel_scale / DECAM_PIXEL
    sigma /= coarser
    white = pixel_normals((3, SIZE + 2, SIZE + 2), seed, PIXELS, row)
    noise = np.empty((3, SIZE, SIZE), np.float32)
    for band in range(3):  # one band at a time fits the CPU cache
        rows = white[band, :-2] + white[band, 2:]
        rows *= np.float32(_CORRELATION)
        rows += white[band, 1:-1]
        np.add(rows[:, :-2], rows[:, 2:], out=noise[band])
        noise[band] *= np.float32(_CORRELATION)
        noise[band] += rows[:, 1:-1]
        noise[band] *= np.float32(sigma[band] / (1.0 + 2.0 * _CORRELATION**2))
    if draws.bernoulli(0.06):
        edge = int(draws.uniform(0.1, 0.9) * SIZE)
        strip = noise[:, :edge] if draws.bernoulli(0.5) else noise[:, :, :edge]
        strip *= np.float32(draws.uniform(1.3, 1.8))
    level = np.array([draws.normal(0.0, 0.00008) for _ in range(3)], np.float32)
    inner = slice(MARGIN, MARGIN + SIZE)
    return light_CHW[:, inner, inner] / np.float32(coarser**2) + noise + level[:, None, None]


def add_stars(scene: Scene, draws: Draws) -> None:
    """Add foreground stars: counts rise by 0.17 dex per magnitude, colours follow the stellar locus, faint ones are redder."""
    area = (scene.pixel_scale / DECAM_PIXEL) ** 2
    num = draws.poisson(4.2 * area * np.exp(draws.normal(0.0, 0.6)))
    if not num:
        return
    slope = 0.17
    bright, faint = 10 ** (slope * 15.0), 10 ** (slope * 23.5)
    red_mag = np.log10(bright + (faint - bright) * draws.uniforms(num)) / slope
    # Covey et al. (2007, AJ 134, 2398): g-r runs from 0.2 (F stars) to 1.4 (M dwarfs), where it saturates and r-z increases.
    temperature = np.clip(draws.uniforms(num) * 1.3 + 0.10 * (red_mag - 20.0), 0.0, 1.6)
    green_red = np.clip(0.25 + 1.15 * temperature, 0.0, 1.45)
    red_z = 0.68 * green_red - 0.10 + np.maximum(temperature - 0.75, 0.0) * 2.0 * draws.uniforms(num)
    position = (draws.uniforms(2 * num).reshape(2, num) - 0.5) * CANVAS
    fluxes = to_fluxes(np.stack([red_mag + green_red, red_mag, red_mag - red_z], axis=1))
    scene.add_points(position[0], position[1], fluxes)


def add_background(scene: Scene, draws: Draws) -> None:
    """Add small, faint, mostly red background discs with the counts of Metcalfe et al. (2001, MNRAS 323, 795)."""
    area = (scene.pixel_scale / DECAM_PIXEL) ** 2
    num = min(draws.poisson(40.0 * min(area, 2.0) * np.exp(draws.normal(0.0, 0.35))), 140)
    slope = 0.34
    bright, faint = 10 ** (slope * 18.5), 10 ** (slope * 24.5)
    red_mag = np.log10(bright + (faint - bright) * draws.uniforms(num)) / slope
    reds = draws.uniforms(num) < 0.55
    green_red = np.where(reds, 1.15, 0.55) + 0.22 * ndtri(0.01 + 0.98 * draws.uniforms(num))
    red_z = np.where(reds, 0.20, 0.05) + 0.75 * green_red + 0.12 * ndtri(0.01 + 0.98 * draws.uniforms(num))
    size = np.exp(np.log(0.45) - 0.14 * (red_mag - 22.0) + 0.3 * ndtri(0.01 + 0.98 * draws.uniforms(num))) / scene.pixel_scale
    axis_ratio, angle = 0.25 + 0.75 * draws.uniforms(num), np.pi * draws.uniforms(num)
    position = (draws.uniforms(2 * num).reshape(2, num) - 0.5) * CANVAS
    fluxes = to_fluxes(np.stack([red_mag + green_red, red_mag, red_mag - red_z], axis=1))
    for i in range(num):
        window = scene.window(position[0, i], position[1, i], min(4.0 * size[i] + 2.0, 24.0))
        u, v = window.turned(angle[i])
        profile = np.exp(-1.68 / size[i] * np.sqrt(u * u + (v / axis_ratio[i]) ** 2 + 0.3)).astype(np.float32)
        scene.add(
            window, profile / (profile.sum() if window.whole else 2 * np.pi * axis_ratio[i] * (size[i] / 1.68) ** 2), fluxes[i]
        )
