"""Galaxy10's HDF5 schema: the columns of a survey file, and a writer that appends slabs of galaxies."""

import contextlib
import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.atomic_files import disk_error, remove_stale
from galaxydist.surveys.file_kinds import HDF5, file_kind, refuse_kind

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

# Root attributes that record a file's origin; the official file has none.
SURVEY_ATTRIBUTE = "survey"
SIMULATED = "simulated"


def open_hdf5(path: Path) -> Any:
    """Open a file for reading without HDF5's file lock, which many clusters lack, unless this process holds one already."""
    import h5py

    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking" not in str(error):
            raise
        return h5py.File(path, "r")


def check_hdf5(path: Path) -> None:
    """Raise a UserError that names the kind of a file that is not HDF5."""
    import h5py

    if (kind := file_kind(path)) != HDF5 and not h5py.is_hdf5(path):
        raise refuse_kind(path, kind, "an HDF5 file")


def describe_damage(path: Path, error: OSError, part: str) -> str:
    """Describe that a part of an HDF5 file cannot be read."""
    state = "truncated" if "truncated" in str(error) else "truncated or damaged"
    return f"{path} is {state}: cannot read {part} ({error})"


class SurveyFileWriter:
    """Writes a survey file in slabs with bounded memory; the file appears under its name only once it is complete.

    Use as a context manager: a normal exit renames the temporary file, an exception removes it.

    HDF5 creates the layout, uncompressed and contiguous (its codecs save 4 to 28 % of the size and take two to ten times as
    long). The values are then written without HDF5, because its library crashes the process when the disk fills up.

    Args:
        path: the file's final path; it is written under a temporary name in the same folder.
        num_galaxies: exact number of rows that will be appended.
        attributes: root attributes with the provenance (simulator version, seed, ...).
        simulated: mark the file as simulated, so that it is never mistaken for a real survey.
    """

    def __init__(
        self,
        path: Path,
        num_galaxies: int,
        attributes: Mapping[str, str | int | float] = MappingProxyType({}),
        *,
        simulated: bool = True,
    ) -> None:
        assert num_galaxies > 0, "a survey file holds at least one galaxy"
        attributes = {**({SURVEY_ATTRIBUTE: SIMULATED} if simulated else {}), **attributes}
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._num_galaxies = num_galaxies
        self._num_written = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, f".{path.name}.*.partial")
        layout = {IMAGES: (np.dtype(np.uint8), IMAGE_SHAPE), **{name: (dtype, ()) for name, dtype in COLUMNS.items()}}
        size = num_galaxies * sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        try:
            with self._temporary.open("wb") as file:
                _reserve(file.fileno(), size)
            self._offsets = _lay_out(self._temporary, num_galaxies, layout, attributes)
            self._file = self._temporary.open("rb+")
            _reserve(self._file.fileno(), self._temporary.stat().st_size)
        except BaseException as error:
            self._temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise disk_error(path, error) from error
            raise

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
            self._write(IMAGES, start, images)
            for name, values in columns.items():
                column = np.asarray(values)
                assert column.shape == (len(images),), f"{name} has shape {column.shape}, expected ({len(images)},)"
                self._write(name, start, column.astype(COLUMNS[name]))
        except OSError as error:
            raise disk_error(self._path, error) from error
        self._num_written = stop

    def _write(self, name: str, start: int, values: NDArray[Any]) -> None:
        row_bytes = values.dtype.itemsize * math.prod(values.shape[1:])
        self._file.seek(self._offsets[name] + start * row_bytes)
        self._file.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                assert self._num_written == self._num_galaxies, f"{self._num_written} of {self._num_galaxies} galaxies written"
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.replace(self._path)
        except OSError as failure:
            raise disk_error(self._path, failure) from failure
        finally:
            with contextlib.suppress(OSError):  # on a full disk, the flush in close() fails too
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _lay_out(
    path: Path,
    num_galaxies: int,
    layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    attributes: Mapping[str, str | int | float],
) -> dict[str, int]:
    """Create the file with all its data sets, contiguous and without values; return each one's byte offset in the file."""
    import h5py

    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # equal galaxies give equal bytes
    with h5py.File(path, "w") as h5:
        for key, value in attributes.items():
            h5.attrs[key] = value
        return {
            name: h5py.h5d.create(
                h5.id,
                name.encode(),
                h5py.h5t.py_create(dtype),
                h5py.h5s.create_simple((num_galaxies, *shape)),
                properties,
            ).get_offset()
            for name, (dtype, shape) in layout.items()
        }


def _reserve(descriptor: int, size: int) -> None:
    """Reserve disk space, so that a full disk is detected before any work; do nothing if the file system cannot reserve."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
