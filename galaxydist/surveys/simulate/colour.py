"""From fluxes to a picture, as the Legacy Surveys' sky viewer does it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bands are kept in this order everywhere here; a picture's channels (red, green, blue) are z, r, g.
BANDS = ("g", "r", "z")

# The viewer's numbers: ``dr2_rgb`` and ``sdss_rgb`` in map/views.py of github.com/legacysurvey/imagine.
SCALES_G_R_Z = np.array([6.0, 3.4, 2.2], np.float32)
BLACK_LEVEL = 0.03
SOFTENING_Q = 20.0

# Viewer cut-outs, which Galaxy10 consists of, are JPEG of quality 75
# with halved colour resolution (read off the sample's own tables).
JPEG_QUALITY = 75

Array = NDArray[np.float32]


def to_fluxes(magnitudes: NDArray[Any] | list[float]) -> Array:
    """Fluxes in nanomaggies (22.5 magnitudes is 1 nanomaggy) of AB magnitudes."""
    return np.asarray(10.0 ** (0.4 * (22.5 - np.asarray(magnitudes, np.float64))), np.float32)


def stretch(fluxes_CHW: Array) -> Array:
    """The viewer's colours: asinh of the mean of the scaled bands, hues kept, saturating to white.

    With x = scale * flux + m in each band and I the mean of the positive parts of x, a channel is x * asinh(Q I) / (sqrt(Q) I),
    cut to 0 ... 1;
    Q = 20, m = 0.03 and scales 6.0, 3.4, 2.2 in g, r, z. After Lupton et al. (2004, PASP 116, 133), with the viewer's constants
    (``dr2_rgb`` calling ``sdss_rgb`` in github.com/legacysurvey/imagine, map/views.py).

    Args:
        fluxes_CHW: 3 x H x W surface brightnesses in g, r, z, nanomaggies per pixel of 0.262 arcsec.

    Returns:
        H x W x 3 float32 in 0 ... 1, channels z, r, g.
    """
    scaled = fluxes_CHW * SCALES_G_R_Z[:, None, None] + np.float32(BLACK_LEVEL)
    intensity = np.maximum(np.maximum(scaled, 0.0).mean(axis=0), np.float32(1e-6))
    gain = np.arcsinh(np.float32(SOFTENING_Q) * intensity) / (np.float32(np.sqrt(SOFTENING_Q)) * intensity)
    return np.asarray(np.clip(np.moveaxis(scaled[::-1] * gain, 0, -1), 0.0, 1.0))


def to_picture(fluxes_CHW: Array) -> NDArray[np.uint8]:
    """The cut-out that the viewer would serve: stretched, 8 bits, and once through its JPEG, which smooths the colour noise.

    Args:
        fluxes_CHW: as for :func:`stretch`.

    Returns:
        H x W x 3 uint8 RGB.
    """
    import simplejpeg

    pixels = np.ascontiguousarray((stretch(fluxes_CHW) * np.float32(255.0)).astype(np.uint8))
    data = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
    return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), np.uint8)
