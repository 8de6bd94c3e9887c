"""Columns of Parquet files with images: the table without the images, and which column holds them."""

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.cpus import bounded_map
from galaxydist.errors import UserError, name_some
from galaxydist.surveys.file_kinds import HEAD_BYTES, PARQUET, kind_of, refuse_kind
from galaxydist.surveys.image_arrays import ArrayOptions, array_layout
from galaxydist.surveys.table_columns import is_scalar
from galaxydist.surveys.tables.file_tree import FileTree
from galaxydist.surveys.tables.parquet_images import (
    BATCH,
    ImageColumn,
    ParquetImages,
    list_arrays,
    list_depth,
    open_parquet,
    storage_type,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "rgb_image", "img", "images", "picture", "cutout", "jpg", "png", "bytes", "image_bytes")
# Names of the arrays and of the bands in a struct of bands, as the Multimodal Universe's tables have them.
_ARRAYS, _BANDS = ("flux", "array", "image"), ("band", "bands")
# Rows of a slab are at least this many.
_MIN_SLAB = 32
# Remote files whose columns are read at a time.
_NUM_CONNECTIONS = 16

T = TypeVar("T")


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

    first = _open_file(
        tree, files[0], lambda parquet: (_find_column(tree.path(files[0]), parquet, options), parquet.schema_arrow)
    )
    column, features = first[0], hugging_face_features(first[1])
    parts = _read_files(tree, files, column, left_out)
    try:
        table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{tree.location}: its files have different columns ({error}); give files of one schema") from error
    classes = {name: labels for name, feature in features.items() if (labels := _class_names(feature))}
    return ParquetColumns(
        table,
        _image_source(tree, files, [part.group_rows for part in parts], column) if column is not None else None,
        np.concatenate([part.has_image for part in parts]),
        tuple(len(part.has_image) for part in parts),
        classes,
    )


@dataclass(frozen=True)
class _FileColumns:
    """The columns of one file, the lengths of its row groups, and (N,) False for rows without an image."""

    table: "pa.Table"
    group_rows: list[int]
    has_image: NDArray[np.bool_]


def _read_files(tree: FileTree, files: Sequence[str], column: ImageColumn | None, left_out: Sequence[str]) -> list[_FileColumns]:
    """Read the columns of all files; remote ones in threads, since each takes some requests."""
    tasks = ((tree, file, partial(_read_columns, tree.path(file), column, left_out)) for file in files)
    if tree.is_local or len(files) == 1:
        return [_open_file(*task) for task in tasks]
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        found = bounded_map(pool, _open_file, tasks, 4 * _NUM_CONNECTIONS)
        return list(tqdm(found, total=len(files), desc="reading columns", unit="file", disable=None, delay=2.0))


def _open_file(tree: FileTree, file: str, read: Callable[["pq.ParquetFile"], T]) -> T:
    """Return what ``read`` returns for an open file.

    Raises:
        UserError: it is damaged, or no Parquet file.
    """
    import pyarrow as pa

    try:
        with tree.open(file) as stream:
            return read(open_parquet(stream))
    except (pa.ArrowException, OSError) as error:
        with tree.open(file) as stream:
            kind = kind_of(stream.read(HEAD_BYTES), tree.path(file))
        if kind != PARQUET:
            raise refuse_kind(tree.path(file), kind, "a Parquet file") from error
        raise UserError(f"{tree.path(file)} is truncated or damaged ({error}); fetch it again") from error


def _read_columns(location: str, column: ImageColumn | None, left_out: Sequence[str], parquet: "pq.ParquetFile") -> _FileColumns:
    names = parquet.schema_arrow.names
    if column is not None and column.name not in names:
        raise UserError(f"{location} has no column {column.name!r}, which the first file has; give files of one schema")
    wanted = [name for name in names if name not in left_out and (column is None or name != column.name)]
    lengths = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return _FileColumns(_scalar_columns(parquet, wanted, column), lengths, _has_image(parquet, column))


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
            batches = parquet.iter_batches(BATCH, [number], list(column.leaves), use_threads=False)
            found[start : start + group.num_rows] = ~np.concatenate([_is_missing(batch.column(0)) for batch in batches])
        start += group.num_rows
    return found


def _is_missing(values: "pa.Array") -> NDArray[np.bool_]:
    import pyarrow as pa

    parts = values.flatten() if pa.types.is_struct(values.type) else [values]
    return np.asarray(np.all([part.is_null().to_numpy(zero_copy_only=False) for part in parts], axis=0))


def hugging_face_features(schema: "pa.Schema") -> Mapping[str, Any]:
    """Return the features that the library `datasets` writes into a schema: column -> its description; empty without."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _image_source(
    tree: FileTree, files: Sequence[str], group_rows: Sequence[Sequence[int]], column: ImageColumn
) -> ParquetImages:
    groups = [(file, group, rows) for file, lengths in enumerate(group_rows) for group, rows in enumerate(lengths) if rows]
    lengths = [rows for _, _, rows in groups]
    longest = max(lengths, default=1)
    return ParquetImages(
        tree,
        tuple(files),
        tuple(file for file, _, _ in groups),
        tuple(group for _, group, _ in groups),
        tuple(itertools.accumulate(lengths, initial=0)),
        column,
        longest * -(-_MIN_SLAB // longest),
    )


def _find_column(location: str, parquet: "pq.ParquetFile", options: ArrayOptions) -> ImageColumn | None:
    """Return the column with the images; None if there is none."""
    schema = parquet.schema_arrow
    features = hugging_face_features(schema)
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

    kind = storage_type(kind)
    if pa.types.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return "bytes" in names or (bool(names & {*_ARRAYS}) and bool(names & {*_BANDS}))
    is_named = name.lower() in _IMAGE_NAMES
    return is_named and (_is_bytes(kind) or list_depth(kind) in (2, 3))


def _image_column(location: str, parquet: "pq.ParquetFile", name: str, options: ArrayOptions) -> ImageColumn | None:
    """Return how the images of a column are read; None if it holds no images."""
    import pyarrow as pa

    kind = storage_type(parquet.schema_arrow.field(name).type)
    names = [kind.field(number).name for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    if _is_bytes(kind) or ("bytes" in names and _is_bytes(storage_type(kind.field("bytes").type))):
        if options.bands or options.scaling is not None:
            raise UserError(f"{location}: {name!r} holds image files of 8 bits; --bands and --scale are for arrays: remove them")
        return ImageColumn(name, tuple(f"{name}.{leaf}" for leaf in ("bytes", "path") if leaf in names) or (name,))
    if names:
        array = next((leaf for leaf in _ARRAYS if leaf in names), None)
        bands = next((leaf for leaf in _BANDS if leaf in names), None)
        if array is None or list_depth(storage_type(kind.field(array).type)) not in (2, 3):
            return None
        leaves = (f"{name}.{array}",)
        wanted = [*leaves, f"{name}.{bands}"] if bands else list(leaves)
    elif list_depth(kind) in (2, 3):
        bands, leaves, wanted = None, (name,), [name]
    else:
        return None
    batch = next(parquet.iter_batches(BATCH, columns=wanted), None)
    first = batch.column(name) if batch is not None else pa.nulls(0, kind)
    band_names = first.field(bands)[0].as_py() if bands and len(first) else None
    images = [image for image in list_arrays(first) if image is not None]
    images = [image for image in images if image.shape == images[0].shape]
    if not images:
        raise UserError(f"{location}: the column {name!r} has no image in its first rows")
    shape = (parquet.metadata.num_rows, *images[0].shape)
    return ImageColumn(name, leaves, array_layout(f"{location}, {name!r}", shape, np.stack(images), options, band_names))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _listed(schema: "pa.Schema") -> str:
    return f"its columns are {name_some([f'{field.name} ({field.type})' for field in schema], 40)}"


def _scalar_columns(parquet: "pq.ParquetFile", names: Sequence[str], column: ImageColumn | None) -> "pa.Table":
    """Return the columns of numbers and text, and the images' paths as the column ``file``."""
    import pyarrow as pa

    paths = [leaf for leaf in (column.leaves if column is not None else ()) if leaf.endswith(".path")]
    nested = [name for name in names if not is_scalar(storage_type(parquet.schema_arrow.field(name).type))]
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
