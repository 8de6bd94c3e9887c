"""Galaxy10's HDF5 schema: which columns a survey file has, and a writer that makes such a file piece by piece."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.surveys.storage import disk_error, remove_stale

IMAGES = "images"
LABELS = "ans"
IMAGE_SHAPE = (256, 256, 3)
# The columns beside the images, N values each; the dtypes are the official file's.
COLUMNS: Mapping[str, np.dtype[Any]] = {
    LABELS: np.dtype(np.uint8),
    "ra": np.dtype(np.float64),  # degrees, J2000
    "dec": np.dtype(np.float64),  # degrees, J2000
    "redshift": np.dtype(np.float64),  # nan where unknown
    "pxscale": np.dtype(np.float64),  # arcsec per pixel
}
NUM_CLASSES = 10

# Root attributes by which a file says where it comes from; the official file has none.
SURVEY_ATTRIBUTE = "survey"
SIMULATED = "simulated"


class SurveyFileWriter:
    """Writes a survey file in slabs, so that memory stays bounded; the file appears under its name only when it is whole.

    Use as a context manager: leaving it normally closes the file and gives it its name, an exception removes what was written.
    """

    def __init__(self, path: Path, num_galaxies: int, attributes: Mapping[str, str | int | float]) -> None:
        import h5py

        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._num_galaxies = num_galaxies
        self._num_written = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, f".{path.name}.*.partial")
        self._file = h5py.File(self._temporary, "w")
        # A chunk is one whole image: a reader takes any row without decoding others.
        self._images = self._file.create_dataset(
            IMAGES, (num_galaxies, *IMAGE_SHAPE), np.uint8, chunks=(1, *IMAGE_SHAPE) if num_galaxies else None
        )
        for name, dtype in COLUMNS.items():
            self._file.create_dataset(name, (num_galaxies,), dtype)
        for key, value in attributes.items():
            self._file.attrs[key] = value

    def append(
        self,
        images: NDArray[np.uint8],
        *,
        labels: ArrayLike,
        ra: ArrayLike,
        dec: ArrayLike,
        redshift: ArrayLike,
        pxscale: ArrayLike,
    ) -> None:
        """Write the next galaxies.

        Args:
            images: B x 256 x 256 x 3 uint8.
            labels: B class numbers, 0 ... 9.
            ra, dec: B positions in degrees (J2000).
            redshift: B values, nan where unknown.
            pxscale: B pixel scales in arcsec per pixel.

        Raises:
            UserError: the disk is full.
        """
        start, stop = self._num_written, self._num_written + len(images)
        assert images.dtype == np.uint8 and images.shape[1:] == IMAGE_SHAPE, (images.dtype, images.shape)
        assert stop <= self._num_galaxies, f"{stop} galaxies written into a file of {self._num_galaxies}"
        columns = {LABELS: labels, "ra": ra, "dec": dec, "redshift": redshift, "pxscale": pxscale}
        try:
            self._images[start:stop] = images
            for name, values in columns.items():
                column = np.asarray(values)
                assert column.shape == (len(images),), f"{name} has shape {column.shape}, expected ({len(images)},)"
                self._file[name][start:stop] = column.astype(COLUMNS[name])
        except OSError as error:
            raise disk_error(self._path, error) from error
        self._num_written = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                assert self._num_written == self._num_galaxies, f"{self._num_written} of {self._num_galaxies} galaxies written"
                self._file.close()
                with self._temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                self._temporary.replace(self._path)
        except OSError as failure:
            raise disk_error(self._path, failure) from failure
        finally:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # a full disk also fails the flush at closing
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def create_file(
    path: Path, num_galaxies: int, attributes: Mapping[str, str | int | float] | None = None, *, simulated: bool = True
) -> SurveyFileWriter:
    """Begin a survey file of ``num_galaxies`` galaxies.

    Args:
        path: the file's final name; it is written beside it under a temporary one.
        num_galaxies: rows that will be appended, no more and no fewer.
        attributes: provenance for the file's root (simulator version, seed, ...).
        simulated: mark the file as simulated, so that nothing ever takes it for the sky.
    """
    marks = {SURVEY_ATTRIBUTE: SIMULATED} if simulated else {}
    return SurveyFileWriter(Path(path), num_galaxies, {**marks, **(attributes or {})})
