"""Keeping what an evaluation predicts: beside each galaxy's logits how large, and on how bright a sky, it appears."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.counts import Predictions
from galaxydist.evaluation.parts import PartWriter
from galaxydist.shards.batches import Batch
from galaxydist.surveys.measure import Measurements, measure_pictures

# Pictures are measured at most so wide: a quarter of the time at 256 pixels, and sizes that are the same to a part of a pixel.
MEASURED_WIDTH, LEAST_WIDTH = 128, 64


class Keeper:
    """Measures pictures beside the model, and writes one process's part. Use as a context manager.

    Args:
        part: to write to.
        image_size: width of the stored pictures in pixels: sizes are in these, however small a picture was decoded.
        threads: that measure.
    """

    def __init__(self, part: PartWriter, *, image_size: int, threads: int) -> None:
        self._part, self._image_size, self._most = part, image_size, threads + 1
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-measure")
        self._pending: deque[tuple[Predictions, Future[Measurements]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def add(self, batch: Batch, predictions: Predictions) -> None:
        """Keep the galaxies of a batch.

        Args:
            batch: as the model got it.
            predictions: of its galaxies, in its order.

        Raises:
            UserError: the disk is full.
        """
        images_BHWC = batch.images_BHWC.cpu().numpy()[batch.weights_B.cpu().numpy() != 0]
        self._pending.append((predictions, self._executor.submit(measure, images_BHWC, self._image_size)))
        while len(self._pending) > self._most:
            self._write()

    def finish(self) -> None:
        """Write what is still measured; other processes may read the part then.

        Raises:
            UserError: the disk is full.
        """
        while self._pending:
            self._write()
        self._part.finish()

    def _write(self) -> None:
        predictions, future = self._pending.popleft()
        measured = future.result()
        self._part.append(
            {
                "sample": predictions.samples_N.numpy(),
                "label": predictions.labels_N.numpy(),
                "predicted": predictions.predicted_N.numpy(),
                "logits": predictions.logits_NK.numpy(),
                "size": measured.size_px,
                "sky_brightness": measured.sky,
            }
        )


def measure(images_BHWC: NDArray[np.uint8], image_size: int) -> Measurements:
    """Half-light radii in pixels of the stored pictures, brightnesses and skies.

    Args:
        images_BHWC: uint8, square.
        image_size: width of the stored pictures.
    """
    num, width = images_BHWC.shape[:2]
    factor = next(factor for factor in range(-(-width // MEASURED_WIDTH), width + 1) if width % factor == 0)
    if factor > 1 and width // factor >= LEAST_WIDTH:
        blocks = images_BHWC.reshape(num, width // factor, factor, width // factor, factor, 3)
        images_BHWC = np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    measured = measure_pictures(images_BHWC)
    scale = image_size / images_BHWC.shape[1]
    return Measurements(measured.size_px * scale, measured.brightness * scale**2, measured.sky)

