"""Affine resampling of images, antialiased, on any device.

The filter aimed at is that of PIL and torchvision (``antialias=True``): a triangle two output pixels wide.
Here it is made of a mean over whole input pixels (a power of two, so that 1.5 to 3 of the means make an output pixel) and of
2 x 2 bilinear samples to an output pixel, whose spread comes close to the triangle's. A test holds the mean difference from a
float64 triangle below one grey level.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Input pixels to an output pixel: above the first, one sample is too few; above the second, pixels are averaged first.
FOUR_SAMPLES = 4 / 3
HALVE = 3.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def sampling(pitch: Floats, width: int) -> tuple[Ints, Ints]:
    """How images are sampled: how often they are halved first, and how many samples then make an output pixel along each axis.

    Args:
        pitch: input pixels between output pixels, for each image.
        width: of the input; it is halved only as long as that is exact.
    """
    halvings = np.ceil(np.log2(np.maximum(pitch, 1e-6) / HALVE)).astype(np.int64)
    halvings = np.clip(halvings, 0, (width & -width).bit_length() - 1)
    return halvings, np.where(pitch / 2.0**halvings > FOUR_SAMPLES, 2, 1).astype(np.int64)


def resample(images_BCHW: Tensor, maps: Floats, size: int, *, halvings: int, samples: int, inside: bool) -> Tensor:
    """Each image through its map; what lies outside is reflected at the edges.

    Args:
        images_BCHW: float32, of any memory format.
        maps: B x 2 x 3 from output to input coordinates (x to the right, y down; both -1 to 1 from edge to edge).
        size: output width.
        halvings, samples: as :func:`sampling` says.
        inside: no map leads outside, so that nothing needs to be reflected.

    Returns:
        float32 B x C x size x size.
    """
    for _ in range(halvings):
        images_BCHW = halve(images_BCHW)
    theta = torch.from_numpy(maps.astype(np.float32)).to(images_BCHW.device)[:, None, None]
    fine = size * samples
    line = (2 * torch.arange(fine, device=theta.device, dtype=torch.float32) + 1) / fine - 1
    grid = line.view(1, 1, fine, 1) * theta[..., 0] + (line.view(1, fine, 1, 1) * theta[..., 1] + theta[..., 2])
    padding = "border" if inside else "reflection"
    views = F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return views if samples == 1 else halve(views)


def halve(images_BCHW: Tensor) -> Tensor:
    """The mean of each 2 x 2 pixels. (Strided sums: five times as fast as avg_pool2d on a CPU.)"""
    rows = images_BCHW[:, :, 0::2] + images_BCHW[:, :, 1::2]
    return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)
