"""Parquet files that hold the images themselves: as image files (``bytes`` and ``path``, Hugging Face's) or as arrays."""

import hashlib
import itertools
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import EncodedImage
from galaxydist.object_store import MissingError, TransientError
from galaxydist.surveys.image_arrays import ArrayLayout, ArrayOptions, array_layout
from galaxydist.surveys.image_files import parse_image
from galaxydist.surveys.tables.file_tree import FileTree

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "rgb_image", "img", "images", "picture", "cutout", "jpg", "png", "bytes", "image_bytes")
# Names of the arrays and of the bands in a struct of bands, as the Multimodal Universe's tables have them.
_ARRAYS, _BANDS = ("flux", "array", "image"), ("band", "bands")
# Bytes of a column that are read at a time, and images that are decoded from Arrow at a time.
_BUFFER_BYTES, _BATCH = 1 << 20, 32
_MIN_SLAB = 32
# Attempts to read from a store without progress.
_ATTEMPTS = 6


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
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        reader: Iterator[NDArray[np.uint8] | EncodedImage | DamagedImageError] | None = None

        def more() -> list[NDArray[np.uint8] | EncodedImage | DamagedImageError]:
            nonlocal reader
            try:
                reader = reader or self._images(start, stop)
                return list(itertools.islice(reader, _BATCH))
            except BaseException:
                reader = None  # it starts again where the last piece ended
                raise

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=wait_random_exponential(multiplier=0.2, max=30),
            stop=stop_after_attempt(_ATTEMPTS),
            reraise=True,
        )
        while start < stop:
            try:
                images = retrying(more)
            except TransientError as error:
                raise UserError(
                    f"{self.tree.location} could not be read in {_ATTEMPTS} attempts; the last one: {error}. See that the server "
                    "can be reached from this machine and give the command again"
                ) from error
            start += len(images)
            for image in images:
                if isinstance(image, DamagedImageError):
                    raise image
                yield image

    def digest(self) -> str:
        """Return ``FileTree.digest`` of the files, with how images are read."""
        return hashlib.sha256(f"{self.column} {self.tree.digest(self.sources)}".encode()).hexdigest()

    def _images(self, start: int, stop: int) -> Iterator[NDArray[np.uint8] | EncodedImage | DamagedImageError]:
        group = bisect_right(self.starts, start) - 1
        while start < stop:
            number = self.group_file[group]
            last = group
            while last + 1 < len(self.group_file) and self.group_file[last + 1] == number and self.starts[last + 1] < stop:
                last += 1
            yield from self._file_images(number, range(group, last + 1), start, stop)
            group, start = last + 1, self.starts[last + 1]

    def _file_images(
        self, number: int, groups: range, start: int, stop: int
    ) -> Iterator[NDArray[np.uint8] | EncodedImage | DamagedImageError]:
        """Yield the images of rows ``start`` ... ``stop - 1`` in a range of row groups of one file."""
        import pyarrow as pa

        file = self.sources[number]
        row = self.starts[groups.start]
        try:
            with self.tree.open(file) as stream, self.tree.explained(file):
                parquet = open_parquet(stream)
                batches = parquet.iter_batches(
                    _BATCH, [self.group_number[group] for group in groups], list(self.column.leaves), use_threads=False
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

    def _decode(self, column: "pa.Array", file: str, row: int) -> Iterator[NDArray[np.uint8] | EncodedImage | DamagedImageError]:
        if self.column.layout is not None:
            for number, image in enumerate(_arrays(column)):
                if image is None:
                    yield DamagedImageError(f"{self.tree.path(file)}, row {row + number + 1} of all: no image")
                else:
                    yield self.column.layout.to_rgb(image[None])[0]
            return
        for number, value in enumerate(column):
            data, path = image_file(value)
            name = f"{self.tree.path(file)}, {path or f'row {row + number + 1} of all'}"
            try:
                if data is None and path:
                    data = self._read_file(file, path)
                if data is None:
                    raise DamagedImageError(f"{name}: no image")
                yield parse_image(data, name)
            except DamagedImageError as error:
                yield error

    def _read_file(self, file: str, path: str) -> bytes | None:
        """Read an image file that the column only names, relative to its Parquet file."""
        try:
            with self.tree.open(str(PurePosixPath(file).parent / path)) as stream:
                return stream.read()
        except (OSError, MissingError) as error:
            raise DamagedImageError(f"{self.tree.path(file)} names the image {path!r}, which cannot be read: {error}") from error


@dataclass(frozen=True)
class ParquetColumns:
    """The columns of Parquet files without their images, and the class names by label column that the files give.

    ``images`` is None if no column holds images: the table may name image files. ``has_image`` is (N,) False for rows without an
    image, and ``num_rows`` has the number of rows of each file.
    """

    table: "pa.Table"
    images: ParquetImages | None
    has_image: NDArray[np.bool_]
    num_rows: tuple[int, ...]
    class_names: Mapping[str, tuple[str, ...]]


def read_parquet(tree: FileTree, files: Sequence[str], options: ArrayOptions, left_out: Sequence[str] = ()) -> ParquetColumns:
    """Read the columns of Parquet files of one schema but those of the images, which are found.

    Args:
        tree, files: the files, in the order of the rows.
        options: the user's choices for the images.
        left_out: columns that are not wanted in the table.

    Raises:
        UserError: a file is damaged or of another schema, or several columns may hold the images.
    """
    import pyarrow as pa

    tables, groups, present = [], [], []
    column: ImageColumn | None = None
    features: Mapping[str, Any] = {}
    for number, file in enumerate(files):
        try:
            with tree.open(file) as stream, tree.explained(file):
                parquet = open_parquet(stream)
                schema = parquet.schema_arrow
                if number == 0:
                    features = hugging_face_features(schema)
                    column = _find_column(tree.path(file), parquet, options, features)
                elif column is not None and column.name not in schema.names:
                    raise UserError(f"{tree.path(file)} has no column {column.name!r}, which {tree.path(files[0])} has")
                names = [name for name in schema.names if name not in left_out and (column is None or name != column.name)]
                tables.append(_scalar_columns(parquet, names, column))
                groups += [(number, group, parquet.metadata.row_group(group).num_rows) for group in range(parquet.num_row_groups)]
                present.append(_has_image(parquet, column))
        except pa.ArrowException as error:
            raise UserError(f"{tree.path(file)} is truncated or damaged, or no Parquet file ({error}); fetch it again") from error
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{tree.location}: its files have different columns ({error}); give files of one schema") from error
    classes = {name: labels for name, feature in features.items() if (labels := _class_names(feature))}
    images = _image_source(tree, files, groups, column) if column is not None else None
    num_rows = tuple(map(len, present))
    return ParquetColumns(_without_unlabelled(table, classes), images, np.concatenate(present), num_rows, classes)


def _has_image(parquet: "pq.ParquetFile", column: ImageColumn | None) -> NDArray[np.bool_]:
    """Return (N,) False for rows without bytes and without a path; only row groups that lack some bytes are read."""
    found = np.ones(parquet.metadata.num_rows, np.bool_)
    if column is None:
        return found
    names = [f"{parquet.schema.column(number).path}." for number in range(len(parquet.schema))]
    leaf = next(number for number, name in enumerate(names) if name.startswith(f"{column.leaves[0]}."))
    start = 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        statistics = group.column(leaf).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            batches = parquet.iter_batches(_BATCH, [number], list(column.leaves), use_threads=False)
            found[start : start + group.num_rows] = ~np.concatenate([_is_missing(batch, column) for batch in batches])
        start += group.num_rows
    return found


def _is_missing(batch: "pa.RecordBatch", column: ImageColumn) -> NDArray[np.bool_]:
    import pyarrow.compute as pc

    values = batch.column(column.name)
    leaves = [leaf.removeprefix(f"{column.name}.") for leaf in column.leaves if leaf != column.name]
    parts = [pc.struct_field(values, leaf) for leaf in leaves] or [values]
    return np.asarray(np.all([pc.is_null(part).to_numpy(zero_copy_only=False) for part in parts], axis=0))


def open_parquet(stream: Any) -> "pq.ParquetFile":
    """Open a Parquet file whose columns are read in small pieces, so that a large row group is never held in memory."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def hugging_face_features(schema: "pa.Schema") -> Mapping[str, Any]:
    """Return the features that the library `datasets` writes into a schema: column -> its description; empty without."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def image_file(value: "pa.Scalar") -> tuple[bytes | None, str | None]:
    """Return the bytes and the path of a value of an image column; either may be None."""
    found = value.as_py()
    if isinstance(found, bytes) or found is None:
        return found, None
    return found.get("bytes"), found.get("path")


def _image_source(
    tree: FileTree, files: Sequence[str], groups: Sequence[tuple[int, int, int]], column: ImageColumn
) -> ParquetImages:
    groups = [group for group in groups if group[2]]
    lengths = [length for _, _, length in groups]
    longest = max(lengths, default=1)
    return ParquetImages(
        tree,
        tuple(files),
        tuple(number for number, _, _ in groups),
        tuple(number for _, number, _ in groups),
        tuple(itertools.accumulate(lengths, initial=0)),
        column,
        longest * -(-_MIN_SLAB // longest),
    )


def _find_column(
    location: str, parquet: "pq.ParquetFile", options: ArrayOptions, features: Mapping[str, Any]
) -> ImageColumn | None:
    """Return the column with the images; None if there is none."""
    schema = parquet.schema_arrow
    if options.column is not None:
        if options.column not in schema.names:
            raise UserError(f"{location} has no column {options.column!r} (--image-column); {_listed(schema)}")
        found = _image_column(location, parquet, options.column, options)
        if found is None:
            kind = schema.field(options.column).type
            raise UserError(
                f"{location}: the column {options.column!r} holds {kind}, not images; if it names image files or URLs, give "
                f"--file {options.column} instead of --image-column; {_listed(schema)}"
            )
        return found
    declared = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]
    candidates = [name for name in schema.names if name in declared or _may_hold_images(schema.field(name).type, name)]
    for names in (candidates, [name for name in candidates if name.lower() in _IMAGE_NAMES]):
        if len(names) == 1:
            return _image_column(location, parquet, names[0], options)
    if candidates:
        raise UserError(f"{location}: several columns may hold images, {', '.join(candidates)}: choose one with --image-column")
    return None


def _may_hold_images(kind: Any, name: str) -> bool:
    import pyarrow as pa

    kind = _storage(kind)
    if pa.types.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return "bytes" in names or (bool(names & {*_ARRAYS}) and bool(names & {*_BANDS}))
    is_named = name.lower() in _IMAGE_NAMES
    return is_named and (_is_bytes(kind) or _depth(kind) in (2, 3))


def _image_column(location: str, parquet: "pq.ParquetFile", name: str, options: ArrayOptions) -> ImageColumn | None:
    """Return how the images of a column are read; None if it holds no images."""
    import pyarrow as pa

    kind = _storage(parquet.schema_arrow.field(name).type)
    names = [kind.field(number).name for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    if _is_bytes(kind) or ("bytes" in names and _is_bytes(_storage(kind.field("bytes").type))):
        if options.bands or options.scaling is not None:
            raise UserError(f"{location}: {name!r} holds image files of 8 bits; --bands and --scale are for arrays: remove them")
        return ImageColumn(name, tuple(f"{name}.{leaf}" for leaf in ("bytes", "path") if leaf in names) or (name,))
    if names:
        array = next((leaf for leaf in _ARRAYS if leaf in names), None)
        bands = next((leaf for leaf in _BANDS if leaf in names), None)
        if array is None or _depth(_storage(kind.field(array).type)) not in (2, 3):
            return None
        leaves = (f"{name}.{array}",)
        wanted = [*leaves, f"{name}.{bands}"] if bands else list(leaves)
        first = next(parquet.iter_batches(_BATCH, columns=wanted)).column(name)
        band_names = first.field(bands)[0].as_py() if bands and len(first) else None
    elif _depth(kind) in (2, 3):
        leaves, band_names = (name,), None
        first = next(parquet.iter_batches(_BATCH, columns=[name])).column(name)
    else:
        return None
    images = [image for image in _arrays(first) if image is not None]
    if not images:
        raise UserError(f"{location}: the column {name!r} has no image in its first rows")
    shape = (parquet.metadata.num_rows, *images[0].shape)
    return ImageColumn(name, leaves, array_layout(f"{location}, {name!r}", shape, np.stack(images), options, band_names))


def _arrays(column: "pa.Array") -> Iterator[NDArray[Any] | None]:
    """Yield the values of a column of nested lists of numbers, or of a struct with a single such field, as arrays."""
    import pyarrow as pa

    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    if pa.types.is_struct(column.type):
        fields = range(column.type.num_fields)
        column = column.field(next(number for number in fields if _depth(column.type.field(number).type) > 1))
    for value in column:
        yield None if not value.is_valid else _array(value.values)


def _array(values: "pa.Array") -> NDArray[Any]:
    """Return nested lists of numbers of equal lengths as one array."""
    import pyarrow as pa

    shape = [len(values)]
    while True:
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        if not _depth(values.type):
            break
        flat = values.flatten()
        shape.append(len(flat) // max(1, len(values)))
        values = flat
    numbers = np.asarray(values.to_numpy(zero_copy_only=False))
    if numbers.size != np.prod(shape):
        raise UserError("images are lists of rows of different lengths; store them as arrays of one shape")
    return numbers.reshape(shape)


def _storage(kind: Any) -> Any:
    import pyarrow as pa

    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _depth(kind: Any) -> int:
    """Return the number of nested lists of a type of numbers; 0 for any other type."""
    import pyarrow as pa

    depth, kind = 0, _storage(kind)
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth, kind = depth + 1, _storage(kind.value_type)
    return depth if pa.types.is_integer(kind) or pa.types.is_floating(kind) else 0


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _listed(schema: "pa.Schema") -> str:
    return f"its columns are {name_some([f'{field.name} ({field.type})' for field in schema], 40)}"


def _scalar_columns(parquet: "pq.ParquetFile", names: Sequence[str], column: ImageColumn | None) -> "pa.Table":
    """Return the columns of numbers and text, and the images' paths as the column ``file``."""
    import pyarrow as pa

    paths = [leaf for leaf in (column.leaves if column is not None else ()) if leaf.endswith(".path")]

    schema = parquet.schema_arrow
    nested = [
        name for name in names if pa.types.is_nested(_storage(schema.field(name).type)) or _is_bytes(schema.field(name).type)
    ]
    if nested:
        logger.info("columns without single numbers or text are not in the catalogue: %s", name_some(nested, 20))
    table = parquet.read([name for name in names if name not in nested] + list(paths))
    if paths and "file" not in table.column_names:
        image = table.column(paths[0].partition(".")[0]).combine_chunks()
        image = pa.concat_arrays(image.chunks) if isinstance(image, pa.ChunkedArray) else image
        table = table.append_column("file", image.field("path"))
    table = table.select([name for name in table.column_names if not pa.types.is_struct(table.schema.field(name).type)])
    return table.replace_schema_metadata(None)


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the names of a ClassLabel, in the order of its numbers; empty for another feature."""
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    names = feature.get("names")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _without_unlabelled(table: "pa.Table", classes: Mapping[str, tuple[str, ...]]) -> "pa.Table":
    """Return the table with null instead of -1, which stands for "no label" in a ClassLabel column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in classes:
        if name in table.column_names and pa.types.is_integer(table.schema.field(name).type):
            column = table.column(name)
            known = pc.if_else(pc.equal(column, -1), pa.scalar(None, column.type), column)
            table = table.set_column(table.column_names.index(name), name, known)
    return table
