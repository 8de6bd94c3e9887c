"""Parquet files that hold the images themselves: as image files (``bytes`` and ``path``, Hugging Face's) or as arrays."""

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.store_errors import MissingError
from galaxydist.surveys.image_arrays import ArrayLayout
from galaxydist.surveys.image_files import group_equal_rows, parse_image
from galaxydist.surveys.tables.file_tree import FileTree, is_hashed_whole

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Bytes of a column that are read at a time, and images that are decoded from Arrow at a time.
_BUFFER_BYTES, BATCH = 1 << 20, 32


@dataclass(frozen=True)
class ImageColumn:
    """The column with the images of Parquet files.

    Args:
        name: the column.
        leaves: the leaf columns that are read: those of the bytes and the path, or of the array.
        layout: of arrays; None for image files.
    """

    name: str
    leaves: tuple[str, ...]
    layout: ArrayLayout | None = None


@dataclass(frozen=True)
class ParquetImages:
    """Images of a column of Parquet files, as an ``ImageSource``; rows run through the files and their row groups in order.

    Args:
        tree: where the files are.
        sources: the files.
        group_file: (G,) number of the file of each row group.
        group_number: (G,) number of the row group in its file.
        starts: (G + 1,) first row of each row group, and the number of all rows.
        column: the column with the images.
        slab_length: rows that are read together: whole row groups, if all are of one length.
    """

    tree: FileTree
    sources: tuple[str, ...]
    group_file: tuple[int, ...]
    group_number: tuple[int, ...]
    starts: tuple[int, ...]
    column: ImageColumn
    slab_length: int

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        """Yield the images of rows ``start`` ... ``stop - 1``; each row group is read once, a few images at a time.

        Raises:
            DamagedImageError: an image is missing, or is not an image.
            UserError: a file cannot be read.
        """
        groups = range(bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop))
        for number, of_file in itertools.groupby(groups, key=self.group_file.__getitem__):
            yield from self._file_images(number, [*of_file], start, stop)

    def digest(self) -> str:
        """Return ``FileTree.digest`` of the files, with how images are read."""
        return hashlib.sha256(f"{self.column} {self.tree.digest(self.sources)}".encode()).hexdigest()

    def group_equal(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) group numbers, equal for equal images; -1 for the others, and for remote or very large files."""
        if not self.tree.is_local or not is_hashed_whole([Path(self.tree.root, file) for file in self.sources]):
            return np.full(len(labels), -1, np.int64)
        return group_equal_rows(self.tree.location, self.read, labels)

    def _file_images(
        self, number: int, groups: Sequence[int], start: int, stop: int
    ) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        """Yield the images of rows ``start`` ... ``stop - 1`` in some row groups of one file."""
        import pyarrow as pa

        file = self.sources[number]
        row = self.starts[groups[0]]
        try:
            with self.tree.open(file) as stream:
                parquet = open_parquet(stream)
                batches = parquet.iter_batches(
                    BATCH, [self.group_number[group] for group in groups], list(self.column.leaves), use_threads=False
                )
                for batch in batches:
                    if row + len(batch) > start:
                        first = max(0, start - row)
                        column = batch.column(self.column.name).slice(first, min(stop, row + len(batch)) - row - first)
                        yield from self._decode(column, file, row + first)
                    row += len(batch)
                    if row >= stop:
                        return
        except (pa.ArrowException, OSError) as error:
            raise DamagedImageError(f"{self.tree.path(file)} is damaged: cannot read its images ({error})") from error

    def _decode(self, column: "pa.Array", file: str, row: int) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        layout = self.column.layout
        for number, stored in enumerate(column if layout is None else list_arrays(column), start=row + 1):
            value, path = stored, None
            if layout is None:
                found = stored.as_py()
                value, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
            name = f"{self.tree.path(file)}, {path or f'row {number} of all'}"
            if value is None and path:
                value = self._read_file(file, path)
            if value is None:
                raise DamagedImageError(f"{name}: no image")
            yield parse_image(value, name) if layout is None else layout.to_rgb(value[None])[0]

    def _read_file(self, file: str, path: str) -> bytes | None:
        """Read an image file that the column only names, relative to its Parquet file."""
        try:
            with self.tree.open(str(PurePosixPath(file).parent / path)) as stream:
                return stream.read()
        except (OSError, MissingError) as error:
            raise DamagedImageError(f"{self.tree.path(file)} names the image {path!r}, which cannot be read: {error}") from error


def open_parquet(stream: Any) -> "pq.ParquetFile":
    """Open a Parquet file whose columns are read in small pieces, so that a large row group is never held in memory."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def list_arrays(column: "pa.Array") -> Iterator[NDArray[Any] | None]:
    """Yield the values of a column of nested lists of numbers, or of a struct with a single such field, as arrays."""
    import pyarrow as pa

    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    if pa.types.is_struct(column.type):
        fields = range(column.type.num_fields)
        column = column.field(next(number for number in fields if list_depth(column.type.field(number).type) > 1))
    for value in column:
        yield None if not value.is_valid else _array(value.values)


def _array(values: "pa.Array") -> NDArray[Any]:
    """Return nested lists of numbers of equal lengths as one array."""
    import pyarrow as pa

    shape = [len(values)]
    while True:
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        if not list_depth(values.type):
            break
        flat = values.flatten()
        shape.append(len(flat) // max(1, len(values)))
        values = flat
    numbers = np.asarray(values.to_numpy(zero_copy_only=False))
    if numbers.size != np.prod(shape):
        raise UserError("images are lists of rows of different lengths; store them as arrays of one shape")
    return numbers.reshape(shape)


def storage_type(kind: Any) -> Any:
    """Return the type that an extension type is stored as, and any other type as it is."""
    import pyarrow as pa

    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def list_depth(kind: Any) -> int:
    """Return the number of nested lists of a type of numbers; 0 for any other type."""
    import pyarrow as pa

    depth, kind = 0, storage_type(kind)
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth, kind = depth + 1, storage_type(kind.value_type)
    return depth if pa.types.is_integer(kind) or pa.types.is_floating(kind) else 0
