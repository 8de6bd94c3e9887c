"""HDF5 files of images in any schema: one file, or the folders ``healpix=*`` of the Multimodal Universe.

One data set holds the images, a value for each; all other data sets with one value per image are columns of the table.
"""

import hashlib
import itertools
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.surveys.folder_scan import natural_key
from galaxydist.surveys.hdf5_schema import COLUMNS, IMAGES, LABELS, check_hdf5, describe_damage, open_hdf5
from galaxydist.surveys.image_arrays import ArrayLayout, ArrayOptions, array_layout, is_image_shape, show_shape
from galaxydist.surveys.image_files import group_equal_rows
from galaxydist.surveys.table_columns import arrow_column, is_text
from galaxydist.surveys.tables.file_tree import hash_data, is_hashed_whole

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# Usual names of the data set with the images; `image_array` is the Multimodal Universe's, `X` scikit-learn's.
_IMAGE_NAMES = ("images", "image", "rgb_images", "rgb_image", "image_array", "imgs", "img", "x", "data", "pixels", "cutouts")
# The Multimodal Universe names the bands of `image_array` in `image_band`, N x C.
_BAND_NAMES = {"image_array": "image_band"}
_CLASS_ATTRIBUTES = ("class_names", "classes", "label_names", "names", "categories")
# The classes of Galaxy10 SDSS (https://astronn.readthedocs.io/en/latest/galaxy10sdss.html), in the order of its labels.
GALAXY10_SDSS_CLASSES = (
    *("disk_face_on_no_spiral", "smooth_completely_round", "smooth_in_between_round", "smooth_cigar_shaped"),
    *("disk_edge_on_rounded_bulge", "disk_edge_on_boxy_bulge", "disk_edge_on_no_bulge"),
    *("disk_face_on_tight_spiral", "disk_face_on_medium_spiral", "disk_face_on_loose_spiral"),
)
_SDSS_IMAGE = (69, 69, 3)
# Limits of rows per slab: chunks of a few images are read together, and never more than about 64 MB.
_MIN_SLAB, _SLAB_BYTES = 32, 1 << 26
# Images whose pixels are looked at when the file is opened.
_NUM_LOOKED_AT = 64


@dataclass(frozen=True)
class Hdf5Images:
    """Images of a data set in one or several HDF5 files, as an ``ImageSource``; rows run through the files in their order.

    Args:
        sources: the files.
        starts: first row of each file, and the number of all rows.
        column: the data set.
        layout: of its images.
        slab_length: rows that are read together.
    """

    sources: tuple[Path, ...]
    starts: tuple[int, ...]
    column: str
    layout: ArrayLayout
    slab_length: int

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of rows ``start`` ... ``stop - 1`` as H x W x 3 uint8.

        Raises:
            DamagedImageError: images cannot be read (truncated, damaged file).
        """
        while start < stop:
            number = bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[number + 1], start // self.slab_length * self.slab_length + self.slab_length)
            first, last = start - self.starts[number], end - self.starts[number]
            try:
                with open_hdf5(self.sources[number]) as h5:
                    images = h5[self.column][first:last]
            except (OSError, KeyError) as error:
                part = f"images of rows {first} ... {last - 1}"
                raise DamagedImageError(describe_damage(self.sources[number], OSError(error), part)) from error
            yield from self.layout.to_rgb(images)
            start = end

    def group_equal(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) group numbers, equal for equal images; -1 for the others, and for very large files."""
        if not is_hashed_whole(self.sources):
            return np.full(len(labels), -1, np.int64)
        return group_equal_rows(str(self.sources[0]), self.read, labels)

    def digest(self) -> str:
        """Return the hash of the files (see ``hash_data``), and of how images are read."""
        digest = hash_data(self.sources, self.column)
        return hashlib.sha256(f"{self.column} {self.layout} {digest}".encode()).hexdigest()


def find_hdf5(folder: Path) -> list[Path]:
    """Return the HDF5 files of a folder in the Multimodal Universe's layout (``**/healpix=*/*.hdf5``), in natural order."""
    found = [path for ending in ("hdf5", "h5") for path in folder.glob(f"**/healpix=*/*.{ending}") if path.is_file()]
    return sorted(found, key=lambda path: natural_key(path.as_posix()))


def has_galaxy10_schema(path: Path) -> bool:
    """Return True for a file that has all data sets of Galaxy10's schema, and none of which the images are another size."""
    try:
        with open_hdf5(path) as h5:
            if not all(name in h5 for name in (IMAGES, *COLUMNS)):
                return False
            shape = getattr(h5[IMAGES], "shape", None)
            return shape is None or len(shape) != 4 or shape[1:] == (256, 256, 3)
    except (OSError, KeyError):
        return True  # its reader says what is wrong


def read_hdf5(
    files: Sequence[Path], options: ArrayOptions, label: str | None = None
) -> tuple["pa.Table", Hdf5Images, Mapping[str, tuple[str, ...]]]:
    """Read the columns of HDF5 files of one schema, and find their images.

    Args:
        files: the files, in the order of the rows.
        options: the user's choices for the images.
        label: the label column that the user names; an N x K array of ones and zeros becomes class numbers.

    Returns:
        The table without the images, the images, and the class names by label column that the files give.

    Raises:
        UserError: not HDF5, no or several data sets of images, an unusable shape, or files of different schemas.
    """
    import pyarrow as pa

    column, layout, image_shape, chunk_rows = _find_images(files[0], options)
    tables: list[pa.Table] = []
    class_names: dict[str, tuple[str, ...]] = {}
    for path in files:
        try:
            with open_hdf5(path) as h5:
                sets = _data_sets(h5)
                found = sets.get(column)
                if found is None or tuple(found.shape[1:]) != image_shape:
                    kind = "no such data set" if found is None else f"the shape {show_shape(found.shape)}"
                    raise UserError(
                        f"{path}: {column!r} has {kind}, in the first file it has N x {show_shape(image_shape)}; give files of "
                        "one schema"
                    )
                tables.append(_columns(path, sets, len(found), label))
                class_names |= _class_names(h5, sets)
        except OSError as error:
            raise UserError(f"{describe_damage(path, error, 'its columns')}; fetch or make the file again") from error
    table = pa.concat_tables(tables, promote_options="permissive")
    if not len(table):
        raise UserError(f"{files[0]}: {column!r} has no images")
    names = table.column_names
    known = {"gz10_label": GALAXY10_CLASSES} if "gz10_label" in names else {}
    if {*COLUMNS} <= {*names} or (image_shape == _SDSS_IMAGE and LABELS in names):
        known[LABELS] = GALAXY10_CLASSES if {*COLUMNS} <= {*names} else GALAXY10_SDSS_CLASSES
    row_bytes = int(np.prod(image_shape)) * 4
    slab = max(1, min(chunk_rows * -(-_MIN_SLAB // chunk_rows), max(chunk_rows, _SLAB_BYTES // row_bytes)))
    starts = tuple(itertools.accumulate(map(len, tables), initial=0))
    return table, Hdf5Images(tuple(files), starts, column, layout, slab), known | class_names


def _find_images(path: Path, options: ArrayOptions) -> tuple[str, ArrayLayout, tuple[int, ...], int]:
    """Return the name, the layout, the shape of one image, and the chunk length of the data set with the images."""
    check_hdf5(path)
    try:
        with open_hdf5(path) as h5:
            sets = _data_sets(h5)
            column = _choose(path, sets, options.column)
            found = sets[column]
            bands = _band_names(path, sets, column)
            layout = array_layout(f"{path}, {column!r}", found.shape, found[:_NUM_LOOKED_AT], options, bands)
            return column, layout, tuple(found.shape[1:]), (found.chunks or (1,))[0]
    except OSError as error:
        raise UserError(f"{describe_damage(path, error, 'its images')}; fetch or make the file again") from error


def _data_sets(group: Any, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
    """Return the data sets of a file and of its groups, by their paths; broken links and links to groups above are left out."""
    import h5py

    found: dict[str, Any] = {}
    facts = h5py.h5o.get_info(group.id)
    own = (facts.fileno, facts.addr)
    if own in above:
        return found
    for name in group:
        try:
            item = group[name]
        except (KeyError, OSError):
            logger.warning("%s: %r is a broken link and is left out", group.file.filename, prefix + name)
            continue
        if isinstance(item, h5py.Group):
            found |= _data_sets(item, f"{prefix}{name}/", (*above, own))
        elif isinstance(item, h5py.Dataset) and item.shape:
            found[prefix + name] = item
    return found


def _choose(path: Path, sets: Mapping[str, Any], wanted: str | None) -> str:
    """Return the data set with the images: the user's choice, the one of a usual name, or the only one of such a shape."""
    if wanted is not None:
        if wanted not in sets:
            raise UserError(f"{path} has no data set {wanted!r} (--image-column); {_listed(sets)}")
        return wanted
    candidates = [name for name, found in sets.items() if found.dtype.kind in "iuf" and is_image_shape(found.shape)]
    usual = [name for name in candidates if name.rpartition("/")[2].lower() in _IMAGE_NAMES]
    for found in (usual, [] if usual else candidates):
        if len(found) == 1:
            return found[0]
    problem = "several data sets that may be the images" if candidates else "no data set with images"
    advice = "choose one with --image-column" if candidates else "images are N x height x width x 3, or N x 3 x height x width"
    raise UserError(f"{path} has {problem}; {_listed(sets)}; {advice}")


def _listed(sets: Mapping[str, Any]) -> str:
    shapes = [f"{name} ({show_shape(found.shape)} {found.dtype})" for name, found in sets.items()]
    return f"it has {name_some(shapes, 20) or 'no data sets'}"


def _band_names(path: Path, sets: Mapping[str, Any], column: str) -> list[str] | None:
    """Return the names of the bands of the images, None where the file does not give them."""
    name = _BAND_NAMES.get(column)
    if name is None or name not in sets or sets[name].ndim != 2 or not len(sets[name]):
        return None
    rows = sets[name].asstr(errors="replace")[:] if sets[name].dtype.kind in "OS" else sets[name][:].astype(str)
    if (rows != rows[:1]).any():
        raise UserError(f"{path}: {name!r} lists the bands in another order for some images; write files with one order")
    return [str(band) for band in rows[0]]


def _columns(path: Path, sets: Mapping[str, Any], count: int, label: str | None) -> "pa.Table":
    """Return all data sets with one value per image: 1-d ones, fields of records, and class numbers of a one-hot array."""
    import pyarrow as pa

    columns: dict[str, NDArray[Any]] = {}
    for name, found in sets.items():
        if found.ndim == 1 and len(found) != count:
            logger.warning("%s: %r has %d values for %d images and is left out", path, name, len(found), count)
        if found.shape[0] != count or found.ndim > 2:
            continue
        is_label = name == label or (label is None and name.lower() in ("y", "label", "labels", "ans"))
        if found.ndim == 2 and found.shape[1] > 1 and not is_label:
            continue
        values = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found[:]
        if values.ndim == 2:
            values = _class_numbers(path, name, values)
        columns |= {name: values} if values.dtype.names is None else {field: values[field] for field in values.dtype.names}
    arrays = {name: arrow_column(values) for name, values in columns.items()}
    if left_out := [name for name, array in arrays.items() if array is None]:
        logger.warning("%s: data sets with neither numbers nor text are left out: %s", path, name_some(left_out))
    # A table without columns has no rows.
    return pa.table({name: array for name, array in arrays.items() if array is not None} or {"row": pa.array(np.arange(count))})


def _class_numbers(path: Path, name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the class numbers of an N x K array with a single one in each row."""
    if values.dtype.kind not in "iufb" or not (np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()):
        raise UserError(
            f"{path}: {name!r} is {values.dtype} of shape {values.shape}, neither a class number for each image nor a single 1 "
            "in each row; name another data set with --label"
        )
    return np.asarray(values.argmax(axis=1), np.int64)


def _class_names(h5: Any, sets: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the class names that attributes of the file or of a data set list, by data set ("" for the file's).

    An attribute may be an array of text, a JSON list, or text with commas.
    """
    found = {}
    for name, item in (("", h5), *sets.items()):
        value = next((item.attrs[attribute] for attribute in _CLASS_ATTRIBUTES if attribute in item.attrs), None)
        if isinstance(value, bytes | str):
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            try:
                value = json.loads(text)
            except ValueError:
                value = text.split(",")
        names = arrow_column(np.asarray(value)) if isinstance(value, list | np.ndarray) else None
        if names is not None and len(names) and is_text(names.type):
            found[name] = tuple(names.to_pylist())
    return found
