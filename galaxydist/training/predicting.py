"""Keeping what an evaluation predicts, and beside it how large, and on how bright a sky, each galaxy appears; then one file."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.evaluation.counts import Predictions
from galaxydist.evaluation.parts import PartWriter, merge_parts, part_row
from galaxydist.evaluation.predictions import NAMES, PredictionsInfo, write_predictions
from galaxydist.loading.loader import Batch
from galaxydist.surveys.photometry import Measurements, measure_pictures

if TYPE_CHECKING:
    import pyarrow as pa

# What of a catalogue is needed beside the predictions.
CATALOGUE_COLUMNS = ("id", "ra", "dec", "redshift", "pxscale", *NAMES)
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


def merge_predictions(
    path: Path,
    info: PredictionsInfo,
    parts: Sequence[Path],
    catalogue: "pa.Table",
    *,
    batch_size: int,
    seen_N: NDArray[np.bool_] | None = None,
) -> None:
    """One file of the parts of all processes and what the catalogue knows of the galaxies. Memory is the catalogue's.

    Sizes are in arcsec where the pixel scale of every galaxy is known, else in pixels of the stored pictures.

    Args:
        path: of the file, which appears whole or not at all.
        info: what it says of itself, but for units.
        parts: by rank.
        catalogue: ``CATALOGUE_COLUMNS``, a row a sample; columns that the data set does not have are left out.
        batch_size: of the evaluation.
        seen_N: which galaxies the model was chosen on; None where nobody has looked.

    Raises:
        UserError: the disk is full.
        ValueError: a galaxy is missing, or stands twice.
    """
    names = [name for name in ("id", *NAMES) if name in catalogue.column_names]
    known = {name: catalogue.column(name).to_numpy() for name in catalogue.column_names if name not in names}
    scale_N = np.asarray(known.pop("pxscale", np.full(len(catalogue), np.nan)), np.float64)
    has_scale = len(scale_N) > 0 and bool((np.isfinite(scale_N) & (scale_N > 0)).all())
    units = {"ra": "deg", "dec": "deg", "size": "arcsec" if has_scale else "pixel", "sky_brightness": "full scale = 1"}

    def blocks() -> Iterator[Mapping[str, ArrayLike]]:
        for rows in merge_parts(parts, info.num_classes, batch_size=batch_size, num_samples=len(catalogue)):
            here = slice(int(rows["sample"][0]), int(rows["sample"][-1]) + 1)
            block: dict[str, Any] = {name: rows[name] for name in part_row(info.num_classes).names or ()}
            block |= {name: np.asarray(values_N[here], np.float64) for name, values_N in known.items()}
            block |= {name: catalogue.column(name).slice(here.start, len(rows)).to_pylist() for name in names}
            if seen_N is not None:
                block["in_validation"] = seen_N[here]
            if has_scale:
                block["size"] = rows["size"] * scale_N[here]
            yield block

    write_predictions(path, dataclasses.replace(info, units=units), blocks())
