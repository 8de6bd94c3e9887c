"""Random changes to a whole batch in one resampling on its device, and the deterministic view that evaluation uses.

Rotation, mirror, zoom, shift and crop are one affine map from the pixels that the model sees to the stored ones; each output pixel
is sampled once through it, antialiased. Every draw is a hash of (seed, epoch, position, purpose), so an image is changed in the
same way whatever batch, process or device it is in.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.chance import hash64, uniform
from galaxydist.recipe.schema import AugmentConfig
from galaxydist.shards.purposes import Purpose

# Images that are worked on together: their pixels stay in the processor's cache.
CHUNK = 16
NOISE_TABLE_SIZE = 1 << 20

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Normalise:
    """The view of evaluation: the central crop at the model's size, antialiased, then normalised.

    Args:
        channel_mean, channel_std: R G B, full scale being 1 (the manifest's).
        image_size: width that the model sees, in pixels.
        crop: central fraction of the stored width that is kept.
    """

    def __init__(self, channel_mean: Sequence[float], channel_std: Sequence[float], image_size: int, crop: float = 1.0) -> None:
        std = np.maximum(np.asarray(channel_std, np.float64), 1e-3)
        self._scale = torch.tensor(1 / (255 * std), dtype=torch.float32).view(1, 3, 1, 1)
        self._shift = torch.tensor(-np.asarray(channel_mean) / std, dtype=torch.float32).view(1, 3, 1, 1)
        self.image_size, self.crop = image_size, crop

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """uint8 B x H x W x 3 to normalised float32 B x 3 x T x T, on the same device."""
        return self.normalise_pixels(self.view(images_BHWC))

    def view(self, images_BHWC: Tensor) -> Tensor:
        """The central crop at the model's size: float32 B x 3 x T x T, 0 to 255."""
        width = images_BHWC.shape[2]
        kept = max(1, round(self.crop * width))
        if (width - kept) % 2:
            kept += 1
        margin = (width - kept) // 2
        images = to_float_BCHW(images_BHWC[:, margin : margin + kept, margin : margin + kept])
        if kept == self.image_size:
            return images
        size = (self.image_size, self.image_size)
        return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)

    def normalise_pixels(self, images_BCHW: Tensor) -> Tensor:
        """0 to 255 to the mean 0 and deviation 1 of the training split; in place."""
        return images_BCHW.mul_(self._scale.to(images_BCHW.device)).add_(self._shift.to(images_BCHW.device))


class Augment:
    """Random changes to training images.

    Args:
        config: which changes, and how large.
        seed: of the run.
        channel_mean, channel_std, image_size, crop: as in :class:`Normalise`.
    """

    def __init__(
        self,
        config: AugmentConfig,
        seed: int,
        channel_mean: Sequence[float],
        channel_std: Sequence[float],
        image_size: int,
        crop: float = 1.0,
    ) -> None:
        self.normalise = Normalise(channel_mean, channel_std, image_size, crop)
        self._config, self._seed, self._size, self._crop = config, seed, image_size, crop
        self._resamples = config.rotate == "any" or config.zoom > 1 or config.shift > 0
        self._noise_table = _noise_table(seed, 3 * image_size**2) if config.noise > 0 else None

    def __call__(self, images_BHWC: Tensor, epoch: int, positions_B: Tensor) -> Tensor:
        """Augmented, normalised images.

        Args:
            images_BHWC: uint8 B x H x W x 3, H == W.
            epoch: of training.
            positions_B: int64 positions in the epoch's order, on the CPU (elsewhere they are waited for).

        Returns:
            float32 B x 3 x T x T on the images' device.
        """
        positions = positions_B.cpu().numpy()
        if self._resamples:
            views = self._resample(images_BHWC, epoch, positions)
        else:
            views = self._turn(self.normalise.view(images_BHWC), epoch, positions)
        self._light(views, epoch, positions)
        return self.normalise.normalise_pixels(views)

    def parameters(self, epoch: int, positions: Ints) -> tuple[Floats, Floats]:
        """Each image's 2 x 3 map from the model's coordinates to the stored picture's (both -1 to 1 from edge to edge), and its
        zoom."""
        config = self._config

        def draw(purpose: Purpose) -> Floats:
            return uniform(self._seed, epoch, positions, purpose)

        if config.rotate == "any":
            angle = 2 * np.pi * draw(Purpose.ANGLE)
        elif config.rotate == "d4":
            angle = np.pi / 2 * np.floor(4 * draw(Purpose.ANGLE))
        else:
            angle = np.zeros(positions.shape)
        mirror = np.where(draw(Purpose.FLIP) < 0.5, -1.0, 1.0) if config.flip else np.ones(positions.shape)
        zoom = np.exp(math.log(config.zoom) * (2 * draw(Purpose.ZOOM) - 1))
        scale = self._crop / zoom
        maps = np.empty((positions.size, 2, 3))
        maps[:, 0, 0], maps[:, 0, 1] = scale * mirror * np.cos(angle), -scale * np.sin(angle)
        maps[:, 1, 0], maps[:, 1, 1] = scale * mirror * np.sin(angle), scale * np.cos(angle)
        for axis, purpose in enumerate((Purpose.SHIFT_X, Purpose.SHIFT_Y)):
            maps[:, axis, 2] = 2 * self._crop * config.shift * (2 * draw(purpose) - 1)
        return maps, zoom

    def _resample(self, images_BHWC: Tensor, epoch: int, positions: Ints) -> Tensor:
        maps, zoom = self.parameters(epoch, positions)
        views = torch.empty((positions.size, 3, self._size, self._size), device=images_BHWC.device)
        pitch = self._crop * images_BHWC.shape[1] / (self._size * zoom)
        step = CHUNK if images_BHWC.device.type == "cpu" else max(1, positions.size)
        for first in range(0, positions.size, step):
            part = slice(first, first + step)
            views[part] = resample(to_float_BCHW(images_BHWC[part]), maps[part], pitch[part], self._size)
        return views

    def _turn(self, views: Tensor, epoch: int, positions: Ints) -> Tensor:
        """Quarter turns and mirrors: the same pixels in other places."""
        turns = np.zeros(positions.size, np.int64)
        if self._config.rotate == "d4":
            turns = (4 * uniform(self._seed, epoch, positions, Purpose.ANGLE)).astype(np.int64)
        mirrored = np.zeros(positions.size, bool)
        if self._config.flip:
            mirrored = uniform(self._seed, epoch, positions, Purpose.FLIP) < 0.5
        turned = torch.empty_like(views)
        for number, (turn, mirror) in enumerate(zip(turns.tolist(), mirrored.tolist(), strict=True)):
            view = torch.rot90(views[number], turn, (1, 2))
            turned[number] = view.flip(2) if mirror else view
        return turned

    def _light(self, views: Tensor, epoch: int, positions: Ints) -> None:
        """Brightness and noise, in place, on 0 to 255."""
        config = self._config
        if config.brightness > 0:
            factor = 1 + config.brightness * (2 * uniform(self._seed, epoch, positions, Purpose.BRIGHTNESS) - 1)
            views *= _column(factor, views)
        if self._noise_table is not None:
            level = 255 * config.noise * uniform(self._seed, epoch, positions, Purpose.NOISE_LEVEL)
            places = hash64(self._seed, epoch, positions, Purpose.NOISE_PLACE)
            self._noise_table = self._noise_table.to(views.device)
            length = views[0].numel()
            for number, (place, sigma) in enumerate(zip(places.tolist(), level.tolist(), strict=True)):
                start = place % NOISE_TABLE_SIZE
                views[number].view(-1).add_(self._noise_table[start : start + length], alpha=sigma)


def to_float_BCHW(images_BHWC: Tensor) -> Tensor:
    """uint8 B x H x W x 3 to contiguous float32 B x 3 x H x W."""
    return images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def resample(images_BCHW: Tensor, maps: Floats, pitch: Floats, size: int) -> Tensor:
    """Each image through its map, antialiased; outside pixels are reflected at the edges.

    Args:
        images_BCHW: float32.
        maps: B x 2 x 3, from output to input coordinates, both -1 to 1 from edge to edge.
        pitch: input pixels between output pixels.
        size: output width.
    """
    views = images_BCHW.new_empty((len(maps), images_BCHW.shape[1], size, size))
    level = np.floor(np.log2(np.maximum(pitch, 1.0) + 1e-9)).astype(int)
    rows = np.arange(len(maps))
    reduced = images_BCHW
    for number in range(int(level.max(initial=0)) + 1):
        here = level[rows] == number
        if here.any():
            chosen = reduced if here.all() else reduced[torch.from_numpy(here).to(reduced.device)]
            views[torch.from_numpy(rows[here]).to(views.device)] = _sample(
                chosen, maps[rows[here]], pitch[rows[here]] / 2**number, size
            )
        rest = ~here
        if not rest.any():
            break
        reduced = F.avg_pool2d(reduced if rest.all() else reduced[torch.from_numpy(rest).to(reduced.device)], 2)
        rows = rows[rest]
    return views


def _sample(images_BCHW: Tensor, maps: Floats, pitch: Floats, size: int) -> Tensor:
    theta = torch.from_numpy(maps.astype(np.float32)).to(images_BCHW.device)
    grid_size = 2 * size if pitch.max() > 1.2 else size
    grid = F.affine_grid(theta, [len(maps), 3, grid_size, grid_size], align_corners=False)
    views = F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return views if grid_size == size else F.avg_pool2d(views, 2)


def _column(values: Floats, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device).view(-1, 1, 1, 1)


def _noise_table(seed: int, length: int) -> Tensor:
    """Standard normal deviates by Box and Muller (1958), with enough repeated at the end for one image from any place."""
    half = np.arange(NOISE_TABLE_SIZE // 2)
    radius = np.sqrt(-2 * np.log(1 - uniform(seed, Purpose.NOISE_TABLE, half, 0)))
    angle = 2 * np.pi * uniform(seed, Purpose.NOISE_TABLE, half, 1)
    table = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
    return torch.from_numpy(np.resize(table, NOISE_TABLE_SIZE + length))
