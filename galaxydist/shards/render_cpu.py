"""``Changes`` carried out on a CPU by OpenCV, image by image, while an image is in the processor's cache."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.shards.changes import Changes, Float32s, Floats, Turn, Warp
from galaxydist.shards.memory import Buffers

Pixels = NDArray[np.uint8]

# Images that a thread takes in one go: few enough to share a batch among threads, enough to pay for the hand-over.
IMAGES_PER_TASK = 8


class CpuRenderer:
    """Images to model input in the memory of the processor.

    Args:
        size: T, width that the model sees.
        threads: that share a batch; the result does not depend on them.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        self._size, self._threads = size, threads
        self._buffers = Buffers(keep=4)
        self._executor: ThreadPoolExecutor | None = None

    def __call__(self, images_BHWC: Pixels, changes: Changes) -> Float32s:
        """uint8 B x H x W x 3, H == W, to float32 B x 3 x T x T; its memory is used again once nothing refers to it."""
        batch = self._buffers.take((len(images_BHWC), 3, self._size, self._size), np.float32)
        geometry = changes.geometry
        matrices = geometry.matrices(images_BHWC.shape[1], self._size) if isinstance(geometry, Warp) else None
        task = functools.partial(_render, images_BHWC, changes, matrices, batch)
        tasks = [range(first, min(first + IMAGES_PER_TASK, len(batch))) for first in range(0, len(batch), IMAGES_PER_TASK)]
        if self._threads == 1 or len(tasks) < 2:
            for rows in tasks:
                task(rows)
            return batch
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="galaxydist-augment")
        for _ in self._executor.map(task, tasks):
            pass
        return batch


@functools.cache
def _cv2() -> Any:
    """OpenCV without threads of its own: ours share the images."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def _render(images_BHWC: Pixels, changes: Changes, matrices: Floats | None, batch_BCHW: Float32s, rows: range) -> None:
    cv2 = _cv2()
    size = batch_BCHW.shape[2]
    # Four channels: OpenCV warps them in two thirds of the time that three take.
    warped, planes = np.empty((size, size, 4), np.uint8), list(np.empty((4, size, size), np.uint8))
    chosen = slice(rows.start, rows.stop)
    tables = changes.gain_BC[chosen, :, None] * np.arange(256, dtype=np.float32) + changes.shift_C[:, None]
    for row, table in zip(rows, tables, strict=True):
        if isinstance(changes.geometry, Warp):
            assert matrices is not None
            picture = _soften(cv2, images_BHWC[row], int(changes.geometry.halvings[row]), changes.geometry.taps[row])
            picture = cv2.cvtColor(picture, cv2.COLOR_RGB2RGBA)
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            cv2.warpAffine(picture, matrices[row], (size, size), dst=warped, flags=flags, borderMode=cv2.BORDER_REFLECT)
            channels = cv2.split(warped, planes)
        else:
            channels = cv2.split(_turn(cv2, images_BHWC[row], changes.geometry, row), planes[:3])
        for channel in range(3):
            cv2.LUT(channels[channel], table[channel], dst=batch_BCHW[row, channel])
        if changes.noise is not None:
            _add_noise(cv2, batch_BCHW[row], changes, row)


def _soften(cv2: Any, picture_HWC: Pixels, halvings: int, taps: Float32s) -> Pixels:
    for _ in range(halvings):
        half = picture_HWC.shape[0] // 2
        picture_HWC = cv2.resize(picture_HWC, (half, half), interpolation=cv2.INTER_AREA)
    if taps[2] == 1:
        return picture_HWC
    kernel = taps if taps[0] else taps[1:-1]
    return cv2.sepFilter2D(picture_HWC, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)  # type: ignore[no-any-return]


def _turn(cv2: Any, picture_HWC: Pixels, turn: Turn, row: int) -> Pixels:
    if turn.turns[row]:
        code = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)[turn.turns[row] - 1]
        picture_HWC = cv2.rotate(picture_HWC, code)
    return cv2.flip(picture_HWC, 1) if turn.mirrored[row] else picture_HWC


def _add_noise(cv2: Any, view_CHW: Float32s, changes: Changes, row: int) -> None:
    noise = changes.noise
    assert noise is not None
    place = int(noise.places[row])
    deviates_CHW = noise.table[place : place + view_CHW.size].reshape(view_CHW.shape)
    for view, deviates, gain in zip(view_CHW, deviates_CHW, noise.gain_BC[row].tolist(), strict=True):
        cv2.scaleAdd(deviates, gain, view, dst=view)
