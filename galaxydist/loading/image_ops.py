"""Image transforms: per-image parameters, and two backends that carry them out (torch on accelerators, OpenCV on CPUs).

The antialiasing filter approximates that of PIL and torchvision (``antialias=True``): a triangle two output pixels wide. A
bilinear sample alone is a triangle two input pixels wide. The missing variance (a triangle of half-width r has the variance
r^2 / 6) is added beforehand by a blur of a few taps; above three input pixels per output pixel, whole pixels are averaged first.
A test holds the mean difference from a float64 triangle below one grey level.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.loading.loader import BufferPool

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]

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
        taps: B x 5, the symmetric blur along each axis that follows; each row has the sum 1.
    """

    maps: Floats
    halvings: Ints
    taps: Float32s

    @property
    def radii(self) -> Ints:
        """B blur radii: 0 (none), 1 or 2 pixels."""
        return np.asarray(np.count_nonzero(self.taps, axis=1) // 2)

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
    """Quarter turns (B, counter-clockwise), then mirrors (B, left to right), which only permute the pixels."""

    turns: Ints
    mirrored: NDArray[np.bool_]


@dataclass(frozen=True)
class Noise:
    """A window of a fixed table of standard normal deviates for each image.

    Args:
        table: float32.
        offsets: B, offset in the table of an image's C x T x T deviates.
        gain_BC: float32, factor of the deviates.
    """

    table: Float32s
    offsets: Ints
    gain_BC: Float32s


@dataclass(frozen=True)
class ImageTransform:
    """Geometry of each image, then ``grey level * gain + shift + noise`` of the result in whole grey levels.

    Args:
        geometry: motion of the pixels. For :class:`QuarterTurn` the images already have the model's size.
        gain_BC: float32.
        shift_C: float32.
        noise: added noise, or None.
    """

    geometry: AffineWarp | QuarterTurn
    gain_BC: Float32s
    shift_C: Float32s
    noise: Noise | None = None


def antialias(pitch: Floats, width: int) -> tuple[Ints, Float32s]:
    """Return the ``halvings`` and ``taps`` of :class:`AffineWarp` that prepare images for one bilinear sample per output pixel.

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


def _taps(variance: Floats) -> Float32s:
    """Return taps of these variances: three up to 1/2; above, two blurs of three (from a binomial of 5 to a triangle to 3)."""
    single = variance <= 0.5
    side = np.where(single, variance / 2, variance / 4)
    near = np.where(single, side, 2 * side * (1 - 2 * side))
    far = np.where(single, 0, side**2)
    near, far = np.rint(TAP_UNIT * near), np.rint(TAP_UNIT * far)
    return (np.stack([far, near, TAP_UNIT - 2 * (near + far), near, far], axis=1) / TAP_UNIT).astype(np.float32)


class TorchBackend:
    """Carries out transforms with torch, on the images' device and a batch at a time (on a CPU slower than OpenCV).

    Args:
        size: T, width that the model sees.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._noise_table: Tensor | None = None

    def __call__(self, images_BHWC: Tensor, transform: ImageTransform) -> Tensor:
        """Convert uint8 B x H x W x 3, H == W, to float32 B x 3 x T x T on the same device."""
        batch = torch.empty((len(images_BHWC), 3, self._size, self._size), device=images_BHWC.device)
        for rows, group in _groups(transform.geometry):
            chosen = _index(rows, images_BHWC)
            images = images_BHWC[chosen].permute(0, 3, 1, 2).float()
            batch[chosen] = resample(images, group, self._size) if isinstance(group, AffineWarp) else _turn(images, group)
        batch.mul_(_column(transform.gain_BC, batch)).add_(_column(transform.shift_C[None], batch))
        if (noise := transform.noise) is not None:
            if self._noise_table is None or self._noise_table.device != batch.device:
                self._noise_table = torch.from_numpy(noise.table).to(batch.device)
            windows = self._noise_table.unfold(0, batch[0].numel(), 1)
            deviates = windows[torch.from_numpy(noise.offsets).to(batch.device)].view(batch.shape)
            batch.addcmul_(deviates, _column(noise.gain_BC, batch))
        return batch


def resample(images_BCHW: Tensor, warp: AffineWarp, size: int) -> Tensor:
    """Resample each image through its map, in whole grey levels.

    Args:
        images_BCHW: float32, 0 to 255, of any memory format.
        warp: equal numbers of halvings and equal blur radii for all images.
        size: output width.

    Returns:
        float32 B x C x size x size.
    """
    for _ in range(int(warp.halvings[0])):
        images_BCHW = halve(images_BCHW)
    radius = int(warp.radii[0])
    if radius:
        images_BCHW = whole(_blur(_blur(images_BCHW, warp.taps, radius, 2), warp.taps, radius, 3))
    theta = torch.from_numpy(warp.maps.astype(np.float32)).to(images_BCHW.device)[:, None, None]
    line = (2 * torch.arange(size, device=theta.device, dtype=torch.float32) + 1) / size - 1
    grid = line.view(1, 1, size, 1) * theta[..., 0] + (line.view(1, size, 1, 1) * theta[..., 1] + theta[..., 2])
    return F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False).round_()


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


def _blur(images_BCHW: Tensor, taps: Float32s, radius: int, axis: int) -> Tensor:
    """Blur along one axis, exactly: each product and sum is a multiple of 1/65536 below 2^24 of them."""
    middle, width = taps.shape[1] // 2, images_BCHW.shape[axis]
    index = torch.arange(-radius, width + radius, device=images_BCHW.device)
    mirrored = torch.where(index < 0, -1 - index, torch.where(index >= width, 2 * width - 1 - index, index))
    padded = images_BCHW.index_select(axis, mirrored)
    total = padded.narrow(axis, radius, width) * _column(taps[:, middle : middle + 1], images_BCHW)
    for reach in range(1, radius + 1):
        both = padded.narrow(axis, radius - reach, width) + padded.narrow(axis, radius + reach, width)
        total.addcmul_(both, _column(taps[:, middle + reach : middle + reach + 1], images_BCHW))
    return total


def _groups(geometry: AffineWarp | QuarterTurn) -> Iterator[tuple[Ints, AffineWarp | QuarterTurn]]:
    """Yield the rows of images that take the same operations, and their part of the geometry."""
    columns = [geometry.halvings, geometry.radii] if isinstance(geometry, AffineWarp) else [geometry.turns, geometry.mirrored]
    kinds = np.stack(columns, axis=1)
    for kind in np.unique(kinds, axis=0):
        rows = np.flatnonzero((kinds == kind).all(1))
        yield rows, type(geometry)(*(column[rows] for column in vars(geometry).values()))


def _turn(images_BCHW: Tensor, turn: QuarterTurn) -> Tensor:
    turned = torch.rot90(images_BCHW, int(turn.turns[0]), (2, 3))
    return turned.flip(3) if turn.mirrored[0] else turned


def _index(rows: Ints, like: Tensor) -> Tensor | slice:
    """Return rows as an index; adjacent rows as a slice, which makes no copy."""
    if int(rows[-1]) - int(rows[0]) == rows.size - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(like.device)


def _column(values_BC: Float32s | Floats, like: Tensor) -> Tensor:
    """Return one number per channel and image, broadcast over the pixels."""
    return torch.from_numpy(np.ascontiguousarray(values_BC)).to(like.device)[:, :, None, None]


Pixels = NDArray[np.uint8]

# Images per task of a thread: few enough to share a batch among threads, and enough to pay for the submission.
IMAGES_PER_TASK = 8


class OpenCVBackend:
    """Carries out transforms with OpenCV on a CPU, image by image, while an image is in the CPU's cache.

    Args:
        size: T, width that the model sees.
        threads: threads that share a batch; the result does not depend on them.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        self._size, self._threads = size, threads
        self._buffers = BufferPool(keep=4)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-augment")

    def __call__(self, images_BHWC: Pixels, transform: ImageTransform) -> Float32s:
        """Convert uint8 B x H x W x 3, H == W, to float32 B x 3 x T x T, whose memory is reused once nothing refers to it."""
        batch = self._buffers.take((len(images_BHWC), 3, self._size, self._size), np.float32)
        geometry = transform.geometry
        matrices = geometry.matrices(images_BHWC.shape[1], self._size) if isinstance(geometry, AffineWarp) else None
        task = functools.partial(_apply, images_BHWC, transform, matrices, batch)
        tasks = [range(first, min(first + IMAGES_PER_TASK, len(batch))) for first in range(0, len(batch), IMAGES_PER_TASK)]
        run = map if self._threads == 1 or len(tasks) < 2 else self._executor.map
        list(run(task, tasks))
        return batch


@functools.cache
def _cv2() -> Any:
    """Import OpenCV without its own threads, since ours share the images."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def _apply(images_BHWC: Pixels, transform: ImageTransform, matrices: Floats | None, batch_BCHW: Float32s, rows: range) -> None:
    cv2, geometry, noise = _cv2(), transform.geometry, transform.noise
    size = batch_BCHW.shape[2]
    # OpenCV warps four channels in two thirds of the time that three take.
    warped, planes = np.empty((size, size, 4), np.uint8), list(np.empty((4, size, size), np.uint8))
    tables = transform.gain_BC[rows.start : rows.stop, :, None] * np.arange(256, dtype=np.float32) + transform.shift_C[:, None]
    for row, table in zip(rows, tables, strict=True):
        if isinstance(geometry, AffineWarp):
            assert matrices is not None
            image = _soften(cv2, images_BHWC[row], int(geometry.halvings[row]), geometry.taps[row])
            image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            cv2.warpAffine(image, matrices[row], (size, size), dst=warped, flags=flags, borderMode=cv2.BORDER_REFLECT)
            channels = cv2.split(warped, planes)
        else:
            channels = cv2.split(_turn_one(cv2, images_BHWC[row], geometry, row), planes[:3])
        for channel in range(3):
            cv2.LUT(channels[channel], table[channel], dst=batch_BCHW[row, channel])
        if noise is not None:
            deviates = noise.table[noise.offsets[row] :][: batch_BCHW[row].size].reshape(batch_BCHW[row].shape)
            for channel, gain in enumerate(noise.gain_BC[row].tolist()):
                cv2.scaleAdd(deviates[channel], gain, batch_BCHW[row, channel], dst=batch_BCHW[row, channel])


def _soften(cv2: Any, image_HWC: Pixels, halvings: int, taps: Float32s) -> Pixels:
    for _ in range(halvings):
        half = image_HWC.shape[0] // 2
        image_HWC = cv2.resize(image_HWC, (half, half), interpolation=cv2.INTER_AREA)
    if taps[2] == 1:
        return image_HWC
    kernel = taps if taps[0] else taps[1:-1]
    return cv2.sepFilter2D(image_HWC, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)  # type: ignore[no-any-return]


def _turn_one(cv2: Any, image_HWC: Pixels, turn: QuarterTurn, row: int) -> Pixels:
    if turn.turns[row]:
        code = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)[turn.turns[row] - 1]
        image_HWC = cv2.rotate(image_HWC, code)
    return cv2.flip(image_HWC, 1) if turn.mirrored[row] else image_HWC
