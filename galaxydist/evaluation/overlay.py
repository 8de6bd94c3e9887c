"""A map of saliency over a picture."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Perceptually uniform, read alike with any kind of colour vision, and green where no galaxy is (Smith & van der Walt 2015,
# bids.github.io/colormap).
COLOUR_MAP = "viridis"
OPACITY = 0.6


def overlay(picture_HWC: NDArray[np.uint8], map_TT: NDArray[np.float32], *, crop: float = 1.0) -> NDArray[np.uint8]:
    """Lay a map over the part of a picture that the model saw: clear where the map is 0, ``OPACITY`` where it is 1.

    Args:
        picture_HWC: H x W x 3 uint8, H == W, as it is stored.
        map_TT: 0 to 1, of the central crop, at any size.
        crop: central fraction of the width that the model saw; what lies outside stays as it is.

    Returns:
        H x W x 3 uint8.
    """
    from matplotlib import colormaps

    width = picture_HWC.shape[1]
    kept = crop_width(width, crop)
    margin = (width - kept) // 2
    resized = Image.fromarray(np.ascontiguousarray(map_TT, np.float32)).resize((kept, kept), Image.Resampling.BILINEAR)
    values_HW = np.zeros((width, width))
    values_HW[margin : margin + kept, margin : margin + kept] = np.asarray(resized).clip(0, 1)
    colours_HWC = 255 * colormaps[COLOUR_MAP](values_HW)[..., :3]
    alpha_HW1 = OPACITY * values_HW[..., None]
    mixed: NDArray[np.uint8] = np.rint((1 - alpha_HW1) * picture_HWC + alpha_HW1 * colours_HWC).astype(np.uint8)
    return mixed


def crop_width(width: int, crop: float) -> int:
    """Pixels of the central crop's width, as ``shards.augment.Normalise`` takes it."""
    kept = max(1, round(crop * width))
    return kept + (width - kept) % 2
