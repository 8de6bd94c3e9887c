"""Image transforms: per-image parameters, and two backends that carry them out (torch on GPUs, OpenCV on CPUs).

The antialiasing filter approximates that of PIL and torchvision (``antialias=True``): a triangle two output pixels wide. A
bilinear sample alone is a triangle two input pixels wide. The missing variance (a triangle of half-width r has the variance
r^2 / 6) is added beforehand by a blur of a few taps; above three input pixels per output pixel, whole pixels are averaged first.
A test holds the mean difference from a float64 triangle below one grey level.
"""

import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.loading.loader import BufferPool

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]
# A numpy array or a tensor.
Array: TypeAlias = Any

# Input pixels per output pixel above which an image is blurred, or halved until it is below.
BLUR = 1.1
HALVE = 3.0
# Taps are multiples of 1/256, which are exact in 8-bit arithmetic (OpenCV's) and in float32.
TAP_UNIT = 256


@dataclass(frozen=True)
class AffineWarp:
    """Resampling through affine maps; images are continued by reflection at their edges.

    Args:
        maps: B x 2 x 3 from output to input coordinates (x to the right, y down; both -1 to 1 from edge to edge).
        halvings: B, number of times that 2 x 2 pixels are averaged first.
        taps: B x 3, outer, inner and middle one of the symmetric blur of five taps along each axis that follows.
        levels: the greatest blur radius (0, 1 or 2 pixels) for each number of halvings that the images may have.
    """

    maps: Array
    halvings: Array
    taps: Array
    levels: Mapping[int, int]

    def matrices(self, width: int, size: int) -> Floats:
        """Return the maps between pixel centres: B x 2 x 3 from (column, row) of the output to that of the halved input.

        Args:
            width: width of the images before they are halved.
            size: output width.
        """
        half = width / 2.0 ** (self.halvings + 1)
        linear = self.maps[:, :, :2] * (2 * half / size)[:, None, None]
        offset = (self.maps[:, :, 2] + 1) * half[:, None] - 0.5 - linear.sum(2) * (size - 1) / 2
        return np.concatenate([linear, offset[:, :, None]], axis=2)


@dataclass(frozen=True)
class QuarterTurn:
    """Quarter turns (B, counter-clockwise), then mirrors (B, 1: left to right), which only permute the pixels."""

    turns: Array
    mirrored: Array


@dataclass(frozen=True)
class ImageTransform:
    """Numbers of the transform of each image of a batch: numpy arrays for :class:`OpenCVBackend`, tensors for the other.

    Args:
        geometry: motion of the pixels; None: none. Without :class:`AffineWarp` the images already have the model's size.
        brightness_B: factor of the grey levels.
        noise_B2: standard deviation of the noise in grey levels, and the offset of the image's C x T x T deviates in the table.
    """

    geometry: AffineWarp | QuarterTurn | None = None
    brightness_B: Array | None = None
    noise_B2: Array | None = None


@dataclass(frozen=True)
class LevelScaling:
    """Constants of the map from grey levels to model input, ``level * gain * brightness + shift + noise * gain * brightness``.

    Args:
        gain_C: float64.
        shift_C: float32.
        noise_table: float32 standard normal deviates; an image's noise is a window of it.
    """

    gain_C: Floats
    shift_C: Float32s
    noise_table: Float32s | None = None


def antialias(pitch: Floats, width: int) -> tuple[Ints, Floats]:
    """Return ``halvings`` and ``taps`` of :class:`AffineWarp`, which prepare images for one bilinear sample per output pixel.

    Args:
        pitch: input pixels per output pixel, for each image.
        width: width of the input; it is halved only as long as it is even.
    """
    halvings = np.ceil(np.log2(np.maximum(pitch, 1e-6) / HALVE)).astype(np.int64)
    halvings = np.clip(halvings, 0, (width & -width).bit_length() - 1)
    left = pitch / 2.0**halvings
    # A mean over n pixels has the variance (n^2 - 1) / 12, here in units of the halved pixels.
    variance = (left**2 - 1) / 6 - (1 - 4.0**-halvings) / 12
    return halvings, _taps(np.where(left > BLUR, np.clip(variance, 0, 4 / 3), 0))


def _taps(variance: Floats) -> Floats:
    """Return taps of these variances: three up to 1/2; above, two blurs of three (from a binomial of 5 to a triangle to 3)."""
    single = variance <= 0.5
    side = np.where(single, variance / 2, variance / 4)
    near = np.where(single, side, 2 * side * (1 - 2 * side))
    far = np.where(single, 0, side**2)
    near, far = np.rint(TAP_UNIT * near), np.rint(TAP_UNIT * far)
    return np.stack([far, near, TAP_UNIT - 2 * (near + far)], axis=1) / TAP_UNIT


@functools.cache
def blur_levels(least: float, greatest: float, width: int) -> dict[int, int]:
    """Return the ``levels`` of :class:`AffineWarp` for pitches from ``least`` to ``greatest``."""
    # With the same number of halvings the blur grows with the pitch.
    edges = HALVE * 2.0 ** np.arange(width.bit_length())
    pitches = np.concatenate([[least], edges[(least < edges) & (edges < greatest)], [greatest]])
    halvings, taps = antialias(pitches, width)
    radii = np.count_nonzero(taps[:, :2], axis=1)
    return {level: int(radii[halvings == level].max()) for level in np.unique(halvings).tolist()}


class TorchBackend:
    """Carries out transforms with torch, on the images' device and a batch at a time (on a CPU slower than OpenCV).

    All images take the same operations, whatever their numbers are, and the host never waits for the device.

    Args:
        size: T, width that the model sees.
        scaling: from grey levels to model input.
    """

    def __init__(self, size: int, scaling: LevelScaling) -> None:
        self._size, self._scaling = size, scaling
        self._constants: dict[torch.device, list[Tensor]] = {}

    def __call__(
        self, images_BHWC: Tensor, transform: ImageTransform, *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Convert uint8 B x H x W x 3, H == W, to float32 B x 3 x T x T on the same device, in either memory format."""
        gain_C, shift_C, *noise_table = self._constants_on(images_BHWC.device)
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        if isinstance(transform.geometry, AffineWarp):
            images_BCHW = resample(images_BCHW, transform.geometry, self._size)
        elif transform.geometry is not None:
            images_BCHW = _turn(images_BCHW, transform.geometry)
        gain_BC = gain_C[None] if transform.brightness_B is None else transform.brightness_B.to(gain_C.dtype)[:, None] * gain_C
        batch = torch.empty(images_BCHW.shape, device=images_BCHW.device, memory_format=memory_format)
        torch.mul(images_BCHW, _column(gain_BC), out=batch).add_(shift_C)
        if transform.noise_B2 is not None:
            level_B, offset_B = transform.noise_B2.to(gain_C.dtype).unbind(1)
            deviates = noise_table[0].unfold(0, batch[0].numel(), 1)[offset_B.long()].view(batch.shape)
            batch.addcmul_(deviates, _column(level_B[:, None] * gain_BC))
        return batch

    def _constants_on(self, device: torch.device) -> list[Tensor]:
        """Return gain (float64), shift and noise table, which are copied to the device once."""
        if device not in self._constants:
            scaling = self._scaling
            arrays = [scaling.gain_C.astype(np.float64), scaling.shift_C[:, None, None], scaling.noise_table]
            self._constants[device] = [torch.from_numpy(array).to(device) for array in arrays if array is not None]
        return self._constants[device]


def resample(images_BCHW: Tensor, warp: AffineWarp, size: int) -> Tensor:
    """Resample each image through its map, in whole grey levels.

    Args:
        images_BCHW: float32, 0 to 255, of any memory format.
        warp: its numbers are tensors.
        size: output width.

    Returns:
        float32 B x C x size x size.
    """
    grid, taps = _grid(warp.maps, size), warp.taps.float()
    resampled: Tensor | None = None
    for level in range(max(warp.levels) + 1):
        if level:
            images_BCHW = halve(images_BCHW)
        if level not in warp.levels:
            continue
        sharp, radius = images_BCHW, warp.levels[level]
        if radius:
            sharp = whole(_blur(_blur(sharp, taps, radius, 2), taps, radius, 3))
        here = F.grid_sample(sharp, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        resampled = here if resampled is None else torch.where((warp.halvings == level)[:, None, None, None], here, resampled)
    assert resampled is not None
    return resampled.round_()


def _grid(maps_B23: Tensor, size: int) -> Tensor:
    """Return the input coordinates of the output pixels, float32 B x size x size x 2."""
    theta = maps_B23.float()[:, None, None]
    line = (2 * torch.arange(size, device=theta.device, dtype=torch.float32) + 1) / size - 1
    return line.view(1, 1, size, 1) * theta[..., 0] + (line.view(1, size, 1, 1) * theta[..., 1] + theta[..., 2])


def resize(images_BCHW: Tensor, size: int) -> Tensor:
    """Resize images with antialiasing, in whole grey levels.

    Args:
        images_BCHW: uint8, which torch resizes only on a CPU, ten times as fast as float32; or float32, 0 to 255. Both are
            rounded after each axis.
        size: output width.
    """
    if not images_BCHW.is_floating_point():
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return F.interpolate(images_BCHW, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    for shape in ((images_BCHW.shape[2], size), (size, size)):
        images_BCHW = whole(F.interpolate(images_BCHW, size=shape, mode="bilinear", antialias=True, align_corners=False))
    return images_BCHW


def halve(images_BCHW: Tensor) -> Tensor:
    """Return the means of 2 x 2 pixels, in whole grey levels."""
    rows = images_BCHW[:, :, 0::2] + images_BCHW[:, :, 1::2]
    return whole((rows[..., 0::2] + rows[..., 1::2]).mul_(0.25))


def whole(images: Tensor) -> Tensor:
    """Round to whole grey levels in place, halves up like OpenCV's integer arithmetic."""
    return images.add_(0.5).floor_()


def _blur(images_BCHW: Tensor, taps_B3: Tensor, radius: int, axis: int) -> Tensor:
    """Blur along one axis, exactly: each product and sum is a multiple of 1/65536 below 2^24 of them."""
    width = images_BCHW.shape[axis]
    index = torch.arange(-radius, width + radius, device=images_BCHW.device)
    mirrored = torch.where(index < 0, -1 - index, torch.where(index >= width, 2 * width - 1 - index, index))
    padded = images_BCHW.index_select(axis, mirrored)
    total = padded.narrow(axis, radius, width) * _column(taps_B3[:, 2:])
    for reach in range(1, radius + 1):
        both = padded.narrow(axis, radius - reach, width) + padded.narrow(axis, radius + reach, width)
        total.addcmul_(both, _column(taps_B3[:, 2 - reach : 3 - reach]))
    return total


def _turn(images_BCHW: Tensor, turn: QuarterTurn) -> Tensor:
    """Turn and mirror by sampling pixel centres: the nearest pixel is the exact one."""
    angle = turn.turns.float() * (math.pi / 2)
    cos, sin, mirror = angle.cos(), angle.sin(), 1 - 2 * turn.mirrored.float()
    zero = torch.zeros_like(cos)
    maps = torch.stack([torch.stack([cos * mirror, -sin, zero], 1), torch.stack([sin * mirror, cos, zero], 1)], 1)
    return F.grid_sample(images_BCHW, _grid(maps, images_BCHW.shape[2]), mode="nearest", align_corners=False)


def _column(values_BC: Tensor) -> Tensor:
    """Return one float32 per channel and image, broadcast over the pixels."""
    return values_BC.float()[:, :, None, None]


Pixels = NDArray[np.uint8]

# Images per task of a thread: few enough to share a batch among threads, and enough to pay for the submission.
IMAGES_PER_TASK = 8


class OpenCVBackend:
    """Carries out transforms with OpenCV on a CPU, image by image, while an image is in the CPU's cache.

    Args:
        size: T, width that the model sees.
        threads: threads that share a batch; the result does not depend on them.
    """

    def __init__(self, size: int, scaling: LevelScaling, threads: int = 1) -> None:
        self._size, self._scaling, self._threads = size, scaling, threads
        self._buffers = BufferPool(keep=4)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-augment")

    def __call__(self, images_BHWC: Pixels, transform: ImageTransform) -> Float32s:
        """Convert uint8 B x H x W x 3, H == W, to float32 B x 3 x T x T, whose memory is reused once nothing refers to it."""
        batch = self._buffers.take((len(images_BHWC), 3, self._size, self._size), np.float32)
        geometry = transform.geometry
        matrices = geometry.matrices(images_BHWC.shape[1], self._size) if isinstance(geometry, AffineWarp) else None
        task = functools.partial(self._apply, images_BHWC, transform, matrices, batch)
        tasks = [range(first, min(first + IMAGES_PER_TASK, len(batch))) for first in range(0, len(batch), IMAGES_PER_TASK)]
        run = map if self._threads == 1 or len(tasks) < 2 else self._executor.map
        list(run(task, tasks))
        return batch

    def _apply(
        self, images_BHWC: Pixels, transform: ImageTransform, matrices: Floats | None, batch_BCHW: Float32s, rows: range
    ) -> None:
        cv2, geometry, size = _cv2(), transform.geometry, self._size
        # OpenCV warps four channels in two thirds of the time that three take.
        warped, planes = np.empty((size, size, 4), np.uint8), np.empty((4, size, size), np.uint8)
        channels, rgb = list(planes), planes[:3]
        shift_C, flags = self._scaling.shift_C[:, None, None], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        brightness_B = np.ones(len(batch_BCHW)) if transform.brightness_B is None else transform.brightness_B
        gain_BC = brightness_B[rows.start : rows.stop, None] * self._scaling.gain_C
        for row, gain_C in zip(rows, gain_BC, strict=True):
            if isinstance(geometry, AffineWarp):
                assert matrices is not None
                image = _soften(cv2, images_BHWC[row], int(geometry.halvings[row]), geometry.taps[row])
                image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
                cv2.warpAffine(image, matrices[row], (size, size), dst=warped, flags=flags, borderMode=cv2.BORDER_REFLECT)
                cv2.split(warped, channels)
            else:
                cv2.split(_turn_one(cv2, images_BHWC[row], geometry, row), channels[:3])
            image_CHW = batch_BCHW[row]
            np.copyto(image_CHW, rgb)
            image_CHW *= gain_C.astype(np.float32)[:, None, None]
            image_CHW += shift_C
            if transform.noise_B2 is not None:
                self._add_noise(cv2, image_CHW, transform.noise_B2[row], gain_C)

    def _add_noise(self, cv2: Any, image_CHW: Float32s, noise_2: Floats, gain_C: Floats) -> None:
        assert self._scaling.noise_table is not None
        level, offset = noise_2
        deviates = self._scaling.noise_table[int(offset) :][: image_CHW.size].reshape(image_CHW.shape)
        for channel, gain in enumerate((level * gain_C).astype(np.float32).tolist()):
            cv2.scaleAdd(deviates[channel], gain, image_CHW[channel], dst=image_CHW[channel])


@functools.cache
def _cv2() -> Any:
    """Import OpenCV without its own threads, since ours share the images."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def _soften(cv2: Any, image_HWC: Pixels, halvings: int, taps: Floats) -> Pixels:
    for _ in range(halvings):
        half = image_HWC.shape[0] // 2
        image_HWC = cv2.resize(image_HWC, (half, half), interpolation=cv2.INTER_AREA)
    far, near, middle = taps.tolist()
    if middle == 1:
        return image_HWC
    kernel = np.array([far, near, middle, near, far] if far else [near, middle, near], np.float32)
    softened: Pixels = cv2.sepFilter2D(image_HWC, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)
    return softened


def _turn_one(cv2: Any, image_HWC: Pixels, turn: QuarterTurn | None, row: int) -> Pixels:
    if turn is None:
        return image_HWC
    if turns := int(turn.turns[row]):
        code = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)[turns - 1]
        image_HWC = cv2.rotate(image_HWC, code)
    return cv2.flip(image_HWC, 1) if turn.mirrored[row] else image_HWC
