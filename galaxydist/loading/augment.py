"""Random augmentation of training images in one resampling, and the deterministic preprocessing of evaluation.

Rotation, mirror, zoom, shift and crop are one affine map from the model's pixels to the stored ones; each output pixel is sampled
once through it, antialiased. Every random number is a hash of (seed, epoch, position, stream), so that an image is changed in the
same way in any batch, process and device: the numbers are drawn here, and carried out by OpenCV on a CPU and by torch elsewhere
(``image_ops``). Both round to whole grey levels before brightness, noise and normalisation.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.counter_rng import Stream, hash64, uniform
from galaxydist.loading.image_ops import (
    AffineWarp,
    Float32s,
    Floats,
    ImageTransform,
    Ints,
    LevelScaling,
    OpenCVBackend,
    QuarterTurn,
    TorchBackend,
    antialias,
    blur_levels,
    resize,
)
from galaxydist.recipe.schema import AugmentConfig

NOISE_TABLE_SIZE = 1 << 20


class Normalise:
    """Preprocessing of evaluation: the central crop, resized to the model's size with antialiasing, then normalised.

    Args:
        channel_mean, channel_std: statistics of the training pixels, R G B, full scale 1.
        image_size: T, width that the model sees, in pixels.
        crop: central fraction of the stored width that is kept.
        threads: threads that share a batch on a CPU.
        noise_table: of the augmentation, if it adds noise.
    """

    def __init__(
        self,
        channel_mean: Sequence[float],
        channel_std: Sequence[float],
        image_size: int,
        crop: float = 1.0,
        *,
        threads: int = 1,
        noise_table: Float32s | None = None,
    ) -> None:
        std = np.maximum(np.asarray(channel_std, np.float64), 1e-3)
        scaling = LevelScaling(1 / (255 * std), (-np.asarray(channel_mean) / std).astype(np.float32), noise_table)
        self._image_size, self._crop = image_size, crop
        self.on_cpu, self.on_device = OpenCVBackend(image_size, scaling, threads), TorchBackend(image_size, scaling)

    def __call__(self, images_BHWC: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Convert uint8 B x H x W x 3 to normalised float32 B x 3 x T x T, on the same device."""
        return self.apply(images_BHWC, ImageTransform(), memory_format=memory_format)

    def apply(
        self, images_BHWC: Tensor, transform: ImageTransform, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Carry out a transform; images that are not warped are cropped and resized first."""
        if not isinstance(transform.geometry, AffineWarp):
            images_BHWC = self.crop_and_resize(images_BHWC)
        if images_BHWC.device.type != "cpu":
            return self.on_device(images_BHWC, transform, memory_format=memory_format)
        images_BCHW = torch.from_numpy(self.on_cpu(images_BHWC.numpy(), transform))
        return images_BCHW.contiguous(memory_format=memory_format)

    def crop_and_resize(self, images_BHWC: Tensor) -> Tensor:
        """Return the central crop at the model's size: uint8 B x T x T x 3."""
        width = images_BHWC.shape[2]
        kept = max(1, round(self._crop * width))
        kept += (width - kept) % 2
        margin = (width - kept) // 2
        images_BHWC = images_BHWC[:, margin : margin + kept, margin : margin + kept]
        if kept == self._image_size:
            return images_BHWC
        images = images_BHWC.permute(0, 3, 1, 2)
        images = resize(images if images.device.type == "cpu" else images.float(), self._image_size).to(torch.uint8)
        return images.permute(0, 2, 3, 1)


class Augment:
    """Random augmentation of training images.

    Args:
        config: kinds and sizes of the changes.
        seed: seed of the run.
        channel_mean, channel_std, image_size, crop, threads: as in :class:`Normalise`.

    Attributes:
        normalise: preprocessing of evaluation with the same settings.
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
        threads: int = 1,
    ) -> None:
        noise_table = _noise_table(seed, 3 * image_size**2) if config.noise > 0 else None
        self.normalise = Normalise(channel_mean, channel_std, image_size, crop, threads=threads, noise_table=noise_table)
        self._config, self._seed, self._size, self._crop = config, seed, image_size, crop
        self._resamples = config.rotate == "any" or config.zoom > 1 or config.shift > 0

    def __call__(
        self, images_BHWC: Tensor, draws_BN: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Return augmented, normalised images; on a GPU the host does not wait.

        Args:
            images_BHWC: uint8 B x H x W x 3, H == W.
            draws_BN: from :meth:`draw` for this width, on the images' device; further columns are ignored.
            memory_format: of the result.

        Returns:
            float32 B x 3 x T x T on the images' device.
        """
        draws = draws_BN.numpy() if images_BHWC.device.type == "cpu" else draws_BN
        return self.normalise.apply(images_BHWC, self.transform(draws, images_BHWC.shape[1]), memory_format=memory_format)

    def draw(self, epoch: int, positions: Ints, width: int) -> Floats:
        """Draw the random numbers of images.

        Args:
            epoch: training epoch.
            positions: B positions in the epoch's order.
            width: width of the images before the transform, in pixels.

        Returns:
            B x N: brightness, map, halvings and taps (or turns and mirror), level and offset of the noise.
        """
        columns: list[NDArray[Any]] = [1 + self._config.brightness * self._symmetric(epoch, positions, Stream.BRIGHTNESS)]
        if self._resamples:
            maps, zoom = self.affine_maps(epoch, positions)
            halvings, taps = antialias(self._crop * width / (self._size * zoom), width)
            columns += [*maps.reshape(-1, 6).T, halvings, *taps.T]
        else:
            columns += [np.rint(self._angle(epoch, positions) / (np.pi / 2)), self._mirrored(epoch, positions)]
        if self._config.noise > 0:
            # A window of a fixed table of deviates at a hashed offset.
            columns.append(255 * self._config.noise * uniform(self._seed, epoch, positions, Stream.NOISE_LEVEL))
            columns.append(hash64(self._seed, epoch, positions, Stream.NOISE_PLACE) % np.uint64(NOISE_TABLE_SIZE))
        return np.stack(columns, axis=1).astype(np.float64)

    def transform(self, draws_BN: Any, width: int) -> ImageTransform:
        """Return the transform of these draws, a numpy array or a tensor, for images of this width."""
        geometry: AffineWarp | QuarterTurn
        if self._resamples:
            # Rounding may take a zoom beyond the limits.
            pitch, zoom = self._crop * width / self._size, self._config.zoom * (1 + 1e-9 * (self._config.zoom > 1))
            levels = blur_levels(pitch / zoom, pitch * zoom, width)
            geometry = AffineWarp(draws_BN[:, 1:7].reshape(-1, 2, 3), draws_BN[:, 7], draws_BN[:, 8:11], levels)
        else:
            geometry = QuarterTurn(draws_BN[:, 1], draws_BN[:, 2])
        first = 11 if self._resamples else 3
        noise_B2 = draws_BN[:, first : first + 2] if self._config.noise > 0 else None
        return ImageTransform(geometry, draws_BN[:, 0], noise_B2)

    def affine_maps(self, epoch: int, positions: Ints) -> tuple[Floats, Floats]:
        """Return the images' maps, B x 2 x 3, and their zooms, B.

        A map goes from the model's coordinates to the stored image's (x to the right, y down, both -1 to 1 from edge to edge).
        """
        config = self._config
        angle, mirror = self._angle(epoch, positions), np.where(self._mirrored(epoch, positions), -1.0, 1.0)
        zoom = np.exp(math.log(config.zoom) * self._symmetric(epoch, positions, Stream.ZOOM))
        scale = self._crop / zoom
        maps = np.empty((positions.size, 2, 3))
        maps[:, 0, 0], maps[:, 0, 1] = scale * mirror * np.cos(angle), -scale * np.sin(angle)
        maps[:, 1, 0], maps[:, 1, 1] = scale * mirror * np.sin(angle), scale * np.cos(angle)
        for axis, stream in enumerate((Stream.SHIFT_X, Stream.SHIFT_Y)):
            maps[:, axis, 2] = 2 * self._crop * config.shift * self._symmetric(epoch, positions, stream)
        return maps, zoom

    def _symmetric(self, epoch: int, positions: Ints, stream: Stream) -> Floats:
        """Draw uniform numbers in [-1, 1)."""
        return 2 * uniform(self._seed, epoch, positions, stream) - 1

    def _angle(self, epoch: int, positions: Ints) -> Floats:
        if self._config.rotate == "none":
            return np.zeros(positions.shape)
        turns = 4 * uniform(self._seed, epoch, positions, Stream.ANGLE)
        return np.pi / 2 * (np.floor(turns) if self._config.rotate == "d4" else turns)

    def _mirrored(self, epoch: int, positions: Ints) -> NDArray[np.bool_]:
        return self._config.flip & (uniform(self._seed, epoch, positions, Stream.FLIP) < 0.5)


def _noise_table(seed: int, length: int) -> Float32s:
    """Return standard normal deviates (Box & Muller 1958), with the first ``length`` repeated at the end for wrap-around."""
    half = np.arange(NOISE_TABLE_SIZE // 2)
    radius = np.sqrt(-2 * np.log(1 - uniform(seed, 0, half, Stream.NOISE_TABLE)))
    angle = 2 * np.pi * uniform(seed, 1, half, Stream.NOISE_TABLE)
    table = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
    return np.resize(table, NOISE_TABLE_SIZE + length)
