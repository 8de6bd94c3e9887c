"""``Changes`` carried out by torch, a batch at a time: the way of an accelerator (it gives the same on a CPU, slowly)."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from galaxydist.shards.changes import Changes, Float32s, Floats, Ints, Noise, Turn, Warp


class DeviceRenderer:
    """Images to model input where they are.

    Args:
        size: T, width that the model sees.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._noise_table: Tensor | None = None

    def __call__(self, images_BHWC: Tensor, changes: Changes) -> Tensor:
        """uint8 B x H x W x 3, H == W, to float32 B x 3 x T x T on the same device."""
        batch = torch.empty((len(images_BHWC), 3, self._size, self._size), device=images_BHWC.device)
        for rows, group in _groups(changes.geometry):
            chosen = _index(rows, images_BHWC)
            images = images_BHWC[chosen].permute(0, 3, 1, 2).float()
            batch[chosen] = resample(images, group, self._size) if isinstance(group, Warp) else _turn(images, group)
        batch.mul_(_column(changes.gain_BC, batch)).add_(_column(changes.shift_C[None], batch))
        if changes.noise is not None:
            self._add_noise(batch, changes.noise)
        return batch

    def _add_noise(self, batch_BCHW: Tensor, noise: Noise) -> None:
        if self._noise_table is None or self._noise_table.device != batch_BCHW.device:
            self._noise_table = torch.from_numpy(noise.table).to(batch_BCHW.device)
        windows = self._noise_table.unfold(0, batch_BCHW[0].numel(), 1)
        deviates = windows[torch.from_numpy(noise.places).to(batch_BCHW.device)].view(batch_BCHW.shape)
        batch_BCHW.addcmul_(deviates, _column(noise.gain_BC, batch_BCHW))


def resample(images_BCHW: Tensor, warp: Warp, size: int) -> Tensor:
    """Each image through its map, in whole grey levels.

    Args:
        images_BCHW: float32, 0 to 255, of any memory format.
        warp: with as many halvings for every image, and blurs that reach equally far.
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
    """To another size, antialiased, in whole grey levels; no map involved.

    Args:
        images_BCHW: uint8, which torch resizes on a CPU alone, there ten times as fast as float32; or float32, 0 to 255. Both
            are rounded after either axis.
        size: output width.
    """
    if not images_BCHW.is_floating_point():
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return F.interpolate(images_BCHW, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    for shape in ((images_BCHW.shape[2], size), (size, size)):
        images_BCHW = whole(F.interpolate(images_BCHW, size=shape, mode="bilinear", antialias=True, align_corners=False))
    return images_BCHW


def halve(images_BCHW: Tensor) -> Tensor:
    """The mean of each 2 x 2 pixels, in whole grey levels."""
    rows = images_BCHW[:, :, 0::2] + images_BCHW[:, :, 1::2]
    return whole((rows[..., 0::2] + rows[..., 1::2]).mul_(0.25))


def whole(images: Tensor) -> Tensor:
    """Rounded to whole grey levels, halves up as OpenCV's arithmetic in whole numbers does; in place."""
    return images.add_(0.5).floor_()


def _blur(images_BCHW: Tensor, taps: Float32s, radius: int, axis: int) -> Tensor:
    """Along one axis, exactly: every product and sum is a whole number of 1/65536, below 2^24 of them."""
    middle, width = taps.shape[1] // 2, images_BCHW.shape[axis]
    index = torch.arange(-radius, width + radius, device=images_BCHW.device)
    mirrored = torch.where(index < 0, -1 - index, torch.where(index >= width, 2 * width - 1 - index, index))
    padded = images_BCHW.index_select(axis, mirrored)
    total = padded.narrow(axis, radius, width) * _column(taps[:, middle : middle + 1], images_BCHW)
    for reach in range(1, radius + 1):
        both = padded.narrow(axis, radius - reach, width) + padded.narrow(axis, radius + reach, width)
        total.addcmul_(both, _column(taps[:, middle + reach : middle + reach + 1], images_BCHW))
    return total


def _groups(geometry: Warp | Turn) -> Iterator[tuple[Ints, Warp | Turn]]:
    """The images that are treated alike: their rows, and what happens to them."""
    if isinstance(geometry, Warp):
        kinds = np.stack([geometry.halvings, geometry.radii], axis=1)
    else:
        kinds = np.stack([geometry.turns, geometry.mirrored], axis=1)
    for kind in np.unique(kinds, axis=0):
        rows = np.flatnonzero((kinds == kind).all(1))
        if isinstance(geometry, Warp):
            yield rows, Warp(geometry.maps[rows], geometry.halvings[rows], geometry.taps[rows])
        else:
            yield rows, Turn(geometry.turns[rows], geometry.mirrored[rows])


def _turn(images_BCHW: Tensor, turn: Turn) -> Tensor:
    turned = torch.rot90(images_BCHW, int(turn.turns[0]), (2, 3))
    return turned.flip(3) if turn.mirrored[0] else turned


def _index(rows: Ints, like: Tensor) -> Tensor | slice:
    """Rows as an index; neighbouring ones as a slice, which copies nothing."""
    if int(rows[-1]) - int(rows[0]) == rows.size - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(like.device)


def _column(values_BC: Float32s | Floats, like: Tensor) -> Tensor:
    """A number for each channel of each image, to multiply images by."""
    return torch.from_numpy(np.ascontiguousarray(values_BC)).to(like.device)[:, :, None, None]
