"""Random changes to a whole batch in one resampling on its device, and the deterministic view that evaluation uses.

Rotation, mirror, zoom, shift and crop are one affine map from the pixels that the model sees to the stored ones; each output
pixel is sampled once through it, antialiased. Every draw is a hash of (seed, epoch, position, purpose), so an image is changed
in the same way whatever batch, process or device it is in.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.chance import hash64, uniform
from galaxydist.recipe.schema import AugmentConfig
from galaxydist.shards.memory import Buffers
from galaxydist.shards.purposes import Purpose
from galaxydist.shards.resample import resample, sampling

NOISE_TABLE_SIZE = 1 << 20
# Bytes of samples that are worked on together on a CPU, for each thread: they stay in its cache.
CHUNK_BYTES = 4 << 20

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
        self._image_size, self._crop = image_size, crop
        self._buffers = Buffers(keep=4)

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """uint8 B x H x W x 3 to normalised float32 B x 3 x T x T, on the same device."""
        batch = self.empty(images_BHWC)
        for rows in chunks(np.arange(len(images_BHWC)), images_BHWC, self._image_size):
            chosen = index(rows, images_BHWC)
            batch[chosen] = self.finish(self.view(images_BHWC[chosen]))
        return batch

    def empty(self, images_BHWC: Tensor) -> Tensor:
        """Room for a batch's views."""
        shape = (len(images_BHWC), 3, self._image_size, self._image_size)
        if images_BHWC.device.type == "cpu":
            return torch.from_numpy(self._buffers.take(shape, np.float32))
        return torch.empty(shape, device=images_BHWC.device)

    def view(self, images_BHWC: Tensor) -> Tensor:
        """The central crop at the model's size: float32 B x 3 x T x T, 0 to 255."""
        width = images_BHWC.shape[2]
        kept = max(1, round(self._crop * width))
        kept += (width - kept) % 2
        margin = (width - kept) // 2
        images = images_BHWC[:, margin : margin + kept, margin : margin + kept].permute(0, 3, 1, 2)
        if kept != self._image_size:
            # On a CPU torch resizes uint8 ten times as fast as float32, rounding to whole grey levels.
            images = images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images.float()
            size = (self._image_size, self._image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return images.to(torch.float32, memory_format=torch.contiguous_format)

    def finish(self, views_BCHW: Tensor, brightness: Floats | None = None) -> Tensor:
        """0 to 255 to mean 0 and deviation 1 of the training split's pixels, after a factor for each image; in place."""
        scale = self._scale.to(views_BCHW.device)
        if brightness is not None:
            scale = scale * column(brightness, views_BCHW)
        return views_BCHW.mul_(scale).add_(self._shift.to(views_BCHW.device))


class Augment:
    """Random changes to training images.

    Args:
        config: which changes, and how large.
        seed: of the run.
        channel_mean, channel_std, image_size, crop: as in :class:`Normalise`.

    ``normalise`` is the view of evaluation with the same settings.
    """

    def __init__(
        self,
        config: AugmentConfig,
        seed: int,
        channel_mean: Sequence[float],
        channel_std: Sequence[float],
        image_size: int,
        *,
        crop: float = 1.0,
    ) -> None:
        self.normalise = Normalise(channel_mean, channel_std, image_size, crop)
        self._config, self._seed, self._size, self._crop = config, seed, image_size, crop
        self._resamples = config.rotate == "any" or config.zoom > 1 or config.shift > 0
        reach = crop * config.zoom * (math.sqrt(2) if config.rotate == "any" else 1) + 2 * crop * config.shift
        self._inside = reach <= 1
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
        batch = self.normalise.empty(images_BHWC)
        views = self._resampled if self._resamples else self._turned
        for rows, view in views(images_BHWC, epoch, positions):
            self._add_noise(view, epoch, positions[rows])
            batch[index(rows, batch)] = self.normalise.finish(view, self._brightness(epoch, positions[rows]))
        return batch

    def parameters(self, epoch: int, positions: Ints) -> tuple[Floats, Floats]:
        """Each image's 2 x 3 map from the model's coordinates to the stored picture's (x to the right, y down, -1 to 1 from edge
        to edge), and its zoom."""
        config = self._config
        angle, mirror = self._angle(epoch, positions), np.where(self._mirrored(epoch, positions), -1.0, 1.0)
        zoom = np.exp(math.log(config.zoom) * (2 * self._draw(epoch, positions, Purpose.ZOOM) - 1))
        scale = self._crop / zoom
        maps = np.empty((positions.size, 2, 3))
        maps[:, 0, 0], maps[:, 0, 1] = scale * mirror * np.cos(angle), -scale * np.sin(angle)
        maps[:, 1, 0], maps[:, 1, 1] = scale * mirror * np.sin(angle), scale * np.cos(angle)
        for axis, purpose in enumerate((Purpose.SHIFT_X, Purpose.SHIFT_Y)):
            maps[:, axis, 2] = 2 * self._crop * config.shift * (2 * self._draw(epoch, positions, purpose) - 1)
        return maps, zoom

    def _draw(self, epoch: int, positions: Ints, purpose: Purpose) -> Floats:
        return uniform(self._seed, epoch, positions, purpose)

    def _angle(self, epoch: int, positions: Ints) -> Floats:
        if self._config.rotate == "none":
            return np.zeros(positions.shape)
        turns = 4 * self._draw(epoch, positions, Purpose.ANGLE)
        return np.pi / 2 * (np.floor(turns) if self._config.rotate == "d4" else turns)

    def _mirrored(self, epoch: int, positions: Ints) -> NDArray[np.bool_]:
        return self._config.flip & (self._draw(epoch, positions, Purpose.FLIP) < 0.5)

    def _brightness(self, epoch: int, positions: Ints) -> Floats | None:
        if self._config.brightness == 0:
            return None
        return 1 + self._config.brightness * (2 * self._draw(epoch, positions, Purpose.BRIGHTNESS) - 1)

    def _resampled(self, images_BHWC: Tensor, epoch: int, positions: Ints) -> Iterator[tuple[Ints, Tensor]]:
        """Views through their maps, in groups that are sampled alike."""
        maps, zoom = self.parameters(epoch, positions)
        width = images_BHWC.shape[1]
        halvings, samples = sampling(self._crop * width / (self._size * zoom), width)
        for halving, sample in sorted({*zip(halvings.tolist(), samples.tolist(), strict=True)}):
            alike = np.flatnonzero((halvings == halving) & (samples == sample))
            for rows in chunks(alike, images_BHWC, max(width, self._size * sample)):
                images = images_BHWC[index(rows, images_BHWC)].permute(0, 3, 1, 2).float()
                yield (
                    rows,
                    resample(images, maps[rows], self._size, halvings=halving, samples=sample, inside=self._inside),
                )

    def _turned(self, images_BHWC: Tensor, epoch: int, positions: Ints) -> Iterator[tuple[Ints, Tensor]]:
        """Views after quarter turns and mirrors: the same pixels in other places."""
        turns = np.rint(self._angle(epoch, positions) / (np.pi / 2)).astype(np.int64)
        mirrored = self._mirrored(epoch, positions)
        for turn, mirror in sorted({*zip(turns.tolist(), mirrored.tolist(), strict=True)}):
            alike = np.flatnonzero((turns == turn) & (mirrored == mirror))
            for rows in chunks(alike, images_BHWC, images_BHWC.shape[1]):
                view = torch.rot90(self.normalise.view(images_BHWC[index(rows, images_BHWC)]), turn, (2, 3))
                yield rows, view.flip(3) if mirror else view

    def _add_noise(self, views: Tensor, epoch: int, positions: Ints) -> None:
        """Gaussian noise, in place: a window of a fixed table of deviates, at a hashed place."""
        if self._noise_table is None:
            return
        self._noise_table = self._noise_table.to(views.device)
        level = 255 * self._config.noise * self._draw(epoch, positions, Purpose.NOISE_LEVEL)
        places = hash64(self._seed, epoch, positions, Purpose.NOISE_PLACE) % np.uint64(NOISE_TABLE_SIZE)
        length = views[0].numel()
        if views.device.type == "cpu":
            for view, place, deviation in zip(views, places.tolist(), level.tolist(), strict=True):
                view.view(-1).add_(self._noise_table[place : place + length], alpha=deviation)
        else:
            windows = self._noise_table.unfold(0, length, 1)
            noise = windows[torch.from_numpy(places.astype(np.int64)).to(views.device)].view(views.shape)
            views.addcmul_(noise, column(level, views))


def chunks(rows: Ints, images_BHWC: Tensor, width: int) -> Iterator[Ints]:
    """Rows in groups to work on together: all on an accelerator, on a CPU what fits its cache."""
    step = max(1, len(rows))
    if images_BHWC.device.type == "cpu":
        step = torch.get_num_threads() * max(1, CHUNK_BYTES // (12 * width**2))
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def index(rows: Ints, like: Tensor) -> Tensor | slice:
    """Rows as an index; neighbouring ones as a slice, which copies nothing."""
    if rows.size and int(rows[-1]) - int(rows[0]) == rows.size - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(like.device)


def column(values: Floats, like: Tensor) -> Tensor:
    """A number for each image, to multiply images by."""
    return torch.from_numpy(values.astype(np.float32)).to(like.device).view(-1, 1, 1, 1)


def _noise_table(seed: int, length: int) -> Tensor:
    """Standard normal deviates by Box and Muller (1958), with enough repeated at the end for one image from any place."""
    half = np.arange(NOISE_TABLE_SIZE // 2)
    radius = np.sqrt(-2 * np.log(1 - uniform(seed, 0, half, Purpose.NOISE_TABLE)))
    angle = 2 * np.pi * uniform(seed, 1, half, Purpose.NOISE_TABLE)
    table = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
    return torch.from_numpy(np.resize(table, NOISE_TABLE_SIZE + length))
