"""Random images, and the reference of resampling: a float64 triangle filter, two output pixels wide along its axes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.loading.augment import Augment
from galaxydist.recipe.schema import AugmentConfig

Floats = NDArray[np.float64]


def resample_reference(image_HWC: Floats, map_23: Floats, size: int) -> Floats:
    """An image through an affine map, by adding up every input pixel that the filter of an output pixel covers.

    Args:
        image_HWC: square; it goes on beyond its edges as its mirror image.
        map_23: from output to input coordinates, both -1 to 1 from edge to edge.
        size: output width.
    """
    width = image_HWC.shape[0]
    steps = map_23[:, :2] * width / size
    pitch = np.linalg.norm(steps, axis=0)
    along = steps / pitch
    reach = np.maximum(pitch, 1.0)
    line = (2 * np.arange(size) + 1) / size - 1
    x_HW, y_HW = np.meshgrid(line, line)
    column_HW, row_HW = (
        ((map_23[axis, 0] * x_HW + map_23[axis, 1] * y_HW + map_23[axis, 2]) + 1) * width / 2 - 0.5 for axis in (0, 1)
    )
    first_column, first_row = np.floor(column_HW).astype(int), np.floor(row_HW).astype(int)
    total, weights = np.zeros((size, size, image_HWC.shape[2])), np.zeros((size, size))
    margin = int(np.ceil(1.5 * reach.max())) + 1
    for down in range(-margin, margin + 2):
        for right in range(-margin, margin + 2):
            column, row = first_column + right, first_row + down
            away_x, away_y = column - column_HW, row - row_HW
            weight = np.ones((size, size))
            for axis in (0, 1):
                distance = np.abs(away_x * along[0, axis] + away_y * along[1, axis])
                weight *= np.clip(1 - distance / reach[axis], 0, None)
            total += weight[..., None] * image_HWC[mirror(row, width), mirror(column, width)]
            weights += weight
    return np.asarray(total / weights[..., None])


def mirror(index: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Where an index outside 0 ... width - 1 falls when edges are mirrors."""
    index = np.mod(index, 2 * width)
    return np.where(index >= width, 2 * width - 1 - index, index)


# Normalisation that changes nothing, so that results are grey levels.
PLAIN = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


ALL = AugmentConfig(rotate="any", zoom=1.3, shift=0.06, brightness=0.1, noise=0.02)


def augmented(augment: Augment, images_BHWC: Tensor, epoch: int = 0, positions: Sequence[int] | None = None) -> Tensor:
    """Images as a training step sees those at these positions (0, 1, ...: None)."""
    chosen = np.asarray(range(len(images_BHWC)) if positions is None else positions, np.int64)
    draws_BN = torch.from_numpy(augment.draw(epoch, chosen, images_BHWC.shape[1]))
    return augment(images_BHWC, draws_BN.to(images_BHWC.device))


def random_images(count: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random images with some noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:width, :width] / width
    images = []
    for _ in range(count):
        cx, cy, s = generator.uniform(0.3, 0.7, 3)
        light = np.exp(-((x - cx) ** 2 + 2 * (y - cy) ** 2) / (0.1 * s)) + 0.3 * np.sin(9 * x + 5 * y) ** 2
        colours = generator.uniform(60, 180, 3)
        images.append(light[..., None] * colours + generator.normal(0, 4, (width, width, 3)))
    return torch.from_numpy(np.clip(np.stack(images), 0, 255).astype(np.uint8))
