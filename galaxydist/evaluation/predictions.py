"""Predictions of an evaluation: a Parquet file with one row per galaxy, in the order of the stored samples.

Columns: ``id``, ``sample`` (stored sample number), ``split``, ``label``, ``predicted``, ``probabilities`` and ``logits`` (K
float32 each), ``in_validation`` (true if the galaxy is in the run's validation split; null if unknown), and the galaxy's
properties, null if unknown: ``ra``, ``dec`` (degrees), ``redshift``, ``size`` (half-light radius), ``sky_brightness``, and for
images from a folder ``source_id`` (the user's own id, from which ``id`` is made) and ``file``, which files of earlier versions
lack. JSON in the file's metadata, under the key ``galaxydist``, describes the evaluated run and data.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.atomic_files import explain_full_disk, whole_file
from galaxydist.errors import UserError
from galaxydist.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa


FORMAT_VERSION = 1
METADATA_KEY = b"galaxydist"
# Rows per row group of the file: a few MB, for any number of galaxies.
ROW_GROUP = 16_384
# Minimum number of rows per block of a merge: more than a batch, less than a row group.
_MERGED_ROWS = 4096
IN_VALIDATION = "in_validation"
# Properties of a galaxy; float64, null if unknown.
PROPERTIES = ("ra", "dec", "redshift", "size", "sky_brightness")
# The user's names of a galaxy; strings, null if unknown.
NAMES = ("source_id", "file")
LISTS = ("probabilities", "logits")
# Suffix of the file names.
PREDICTIONS = "-predictions.parquet"


# Files of single ranks: rows of fixed length in the order of the rank's batches. They are merged through memory maps, so that
# neither a rank's file nor the result is ever in memory as a whole.


def row_dtype(num_classes: int) -> np.dtype[Any]:
    """Return the record type of a galaxy; ``size`` (in pixels of the stored image) and ``sky_brightness`` are nan if unknown."""
    scores = ("logits", "<f4", (num_classes,))
    return np.dtype(
        [("sample", "<i8"), ("label", "<i4"), ("predicted", "<i4"), scores, ("size", "<f8"), ("sky_brightness", "<f8")]
    )


def rank_file_path(target: Path, rank: int) -> Path:
    """Return the path of a rank's file, in the folder of the merged file."""
    return target.with_name(f".{target.name}.rank-{rank}")


class RankFile:
    """Temporary file of one rank's predictions. Use as a context manager: the file is deleted on exit.

    Args:
        path: of the file; one that a killed process left there is overwritten.
        num_classes: K.
    """

    def __init__(self, path: Path, num_classes: int) -> None:
        self.path = path
        self._row = row_dtype(num_classes)

    def __enter__(self) -> Self:
        with explain_full_disk(self.path):
            self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk also fails the flush on closing
            self._file.close()
        self.path.unlink(missing_ok=True)

    def append(self, columns: Mapping[str, ArrayLike]) -> None:
        """Write galaxies.

        Args:
            columns: one for each field of ``row_dtype``.

        Raises:
            UserError: the disk is full.
        """
        rows = np.empty(len(np.asarray(columns["sample"])), self._row)
        for name in rows.dtype.names or ():
            rows[name] = columns[name]
        with explain_full_disk(self.path):
            self._file.write(rows.tobytes())

    def finish(self) -> None:
        """Flush and fsync the file, after which other processes, also on other machines, may read it."""
        with explain_full_disk(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


def merge_rank_files(paths: Sequence[Path], num_classes: int, *, batch_size: int, num_samples: int) -> Iterator[NDArray[np.void]]:
    """Yield the rows of all ranks in the order of their samples, a few thousand at a time.

    Batch j holds the samples j E ... (j + 1) E - 1 and belongs to rank j mod W (``shards.order.evaluation_batches``).

    Args:
        paths: of the files, by rank.
        num_classes: K.
        batch_size: E.
        num_samples: of the split.

    Raises:
        ValueError: a galaxy is missing or duplicated.
    """
    tables = [_map(path, row_dtype(num_classes)) for path in paths]
    num_read, blocks, num_waiting = [0] * len(tables), list[NDArray[np.void]](), 0
    for number, first in enumerate(range(0, num_samples, batch_size)):
        rank, count = number % len(tables), min(batch_size, num_samples - first)
        rows = tables[rank][num_read[rank] : num_read[rank] + count]
        num_read[rank] += count
        if not np.array_equal(rows["sample"], np.arange(first, first + count)):
            raise ValueError(f"{paths[rank].name}: the predictions of samples {first} to {first + count - 1} are not there")
        blocks.append(rows)
        num_waiting += count
        if num_waiting >= _MERGED_ROWS:
            yield np.concatenate(blocks)
            blocks, num_waiting = [], 0
    if blocks:
        yield np.concatenate(blocks)
    if num_read != [len(table) for table in tables]:
        raise ValueError("more galaxies were predicted than the split has")


def _map(path: Path, row: np.dtype[Any]) -> NDArray[np.void]:
    return np.memmap(path, row, mode="r") if path.stat().st_size else np.empty(0, row)  # an empty file cannot be mapped


def softmax(logits_NK: NDArray[Any]) -> NDArray[np.float64]:
    """Return the probabilities of logits in float64; nan in a row with a logit of nan or +inf."""
    from scipy import special

    with np.errstate(invalid="ignore"):
        return np.asarray(special.softmax(logits_NK.astype(np.float64), axis=1))


@dataclass(frozen=True)
class PredictionsInfo:
    """Metadata of a file of predictions.

    Args:
        class_names: by label.
        context: plain values that describe the evaluated run and data: ``dataset``, ``variant``, ``split``, ``tta``,
            ``manifest_hash``, ``recipe``, ``model``, ``seed``, ``checkpoint``, ``step``.
        units: by property.
        loss: mean cross-entropy (nats), from the exact sum; None if it is not finite.
        versions: of galaxydist and the libraries that the numbers depend on.
        loss_without_validation: mean cross-entropy without the galaxies of the run's validation split, if there are any.
    """

    class_names: tuple[str, ...]
    context: Mapping[str, Any]
    units: Mapping[str, str] = field(default_factory=dict)
    loss: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    loss_without_validation: float | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def predictions_path(evaluation_dir: Path, stem: str) -> Path:
    """Return the path of an evaluation's predictions; ``stem`` as from ``results_files.stem_of``."""
    return evaluation_dir / f"{stem}{PREDICTIONS}"


def write_predictions(path: Path, info: PredictionsInfo, blocks: Iterator[Mapping[str, ArrayLike]]) -> None:
    """Write a file of predictions atomically; memory is that of a block and a row group.

    Equal galaxies give an equal file, however they are divided into blocks.

    Args:
        path: of the file; its folder exists.
        info: its metadata; ``context["split"]`` is written into each row.
        blocks: galaxies in the order of their sample numbers: columns ``id``, ``sample``, ``label``, ``predicted`` (B each),
            ``logits`` (B x K) and any of ``PROPERTIES`` (B float64, nan if unknown) and ``NAMES`` (B strings).

    Raises:
        UserError: the disk is full.
    """
    from pyarrow import parquet

    schema = _schema(info)
    kept = "What it held before is unchanged." if path.exists() else ""
    with (
        explain_full_disk(path, kept),
        whole_file(path, path.with_name(f".{path.name}.tmp")) as target,
        parquet.ParquetWriter(target, schema, compression="zstd", write_page_checksum=True, store_schema=True) as writer,
    ):
        for table in _row_groups((_record_batch(block, schema, info) for block in blocks), schema):
            writer.write_table(table, row_group_size=ROW_GROUP)


def _row_groups(batches: "Iterator[pa.RecordBatch]", schema: "pa.Schema") -> "Iterator[pa.Table]":
    """Regroup batches into tables of whole row groups, the last of the remaining rows."""
    import pyarrow as pa

    waiting, num_waiting = list["pa.RecordBatch"](), 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        if num_waiting >= ROW_GROUP:
            table, full = pa.Table.from_batches(waiting, schema), num_waiting // ROW_GROUP * ROW_GROUP
            yield table.slice(0, full)
            waiting, num_waiting = table.slice(full).combine_chunks().to_batches(), num_waiting - full
    if num_waiting:
        yield pa.Table.from_batches(waiting, schema)


def _schema(info: PredictionsInfo) -> "pa.Schema":
    import pyarrow as pa

    scores = pa.list_(pa.field("element", pa.float32(), nullable=False), info.num_classes)
    fields = [("id", pa.string()), ("sample", pa.int64()), ("split", pa.string()), ("label", pa.int32())]
    fields += [("predicted", pa.int32()), *((name, scores) for name in LISTS)]
    required = [pa.field(name, kind, nullable=False) for name, kind in fields]
    content = {
        "format": FORMAT_VERSION,
        "galaxydist": __version__,
        **info.context,
        "classes": list(info.class_names),
        "units": dict(info.units),
        "loss": info.loss,
        "loss_without_validation": info.loss_without_validation,
        "versions": dict(info.versions),
    }
    known = [pa.field(name, pa.float64()) for name in PROPERTIES] + [pa.field(name, pa.string()) for name in NAMES]
    return pa.schema(
        [*required, pa.field(IN_VALIDATION, pa.bool_()), *known], metadata={METADATA_KEY: json.dumps(content, allow_nan=False)}
    )


def _record_batch(block: Mapping[str, ArrayLike], schema: "pa.Schema", info: PredictionsInfo) -> "pa.RecordBatch":
    import pyarrow as pa

    arrays = {name: np.asarray(values) for name, values in block.items() if name not in ("id", *NAMES)}
    count = len(arrays["sample"])
    arrays["probabilities"] = softmax(arrays["logits"])

    def column(name: str, kind: "pa.DataType", nullable: bool) -> "pa.Array":
        if name in ("id", *NAMES) and name in block:
            return pa.array(block[name], pa.string())
        if name == "split":
            return pa.array([info.context["split"]] * count, pa.string())
        if nullable and name not in arrays:
            return pa.nulls(count, kind)
        if name in PROPERTIES:
            return pa.array(arrays[name].astype(np.float64), pa.float64(), from_pandas=True)  # nan becomes null
        if name in LISTS:
            assert arrays[name].shape == (count, info.num_classes), (name, arrays[name].shape)
            return pa.FixedSizeListArray.from_arrays(pa.array(arrays[name].astype(np.float32).ravel()), type=kind)
        return pa.array(arrays[name].astype(kind.to_pandas_dtype()))

    return pa.record_batch([column(field.name, field.type, field.nullable) for field in schema], schema=schema)


@dataclass(frozen=True)
class PredictionsFile:
    """An open file of predictions, from ``read_predictions``: its path, metadata and number of rows."""

    path: Path
    info: PredictionsInfo
    num_galaxies: int

    def batches(self, columns: Sequence[str], batch_size: int = ROW_GROUP) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield some columns in batches, in the order of the file; memory is that of one row group.

        Args:
            columns: names.
            batch_size: number of galaxies per batch; the last has fewer.

        Returns:
            By name: B values; ``probabilities`` and ``logits`` B x K float32; properties float64, nan if unknown;
            ``in_validation`` False if unknown; ``id`` and ``split`` as objects.

        Raises:
            UserError: the file is damaged.
        """
        import pyarrow as pa

        try:
            with _open(self.path) as file:
                for batch in file.iter_batches(batch_size, columns=list(columns), use_threads=False):
                    yield {name: _values(batch.column(name), name, self.info.num_classes) for name in columns}
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error

    def column(self, name: str) -> NDArray[Any]:
        """Return a whole column, as in ``batches``; memory is that of all galaxies."""
        parts = [batch[name] for batch in self.batches([name])]
        return np.concatenate(parts) if parts else np.empty((0, self.info.num_classes) if name in LISTS else 0)


def read_predictions(path: Path) -> PredictionsFile:
    """Open a file of predictions; only its footer is read.

    Raises:
        UserError: the file is missing, damaged, foreign or of another version.
    """
    import pyarrow as pa

    if not path.is_file():
        raise UserError(f"there are no predictions at {path}: make them with `galaxydist evaluate RUN`")
    try:
        with _open(path) as file:
            schema, num_galaxies = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    foreign = f"{path} is not a file of predictions that galaxydist wrote; make one with `galaxydist evaluate RUN`"
    try:
        content = json.loads((schema.metadata or {})[METADATA_KEY])
        version = content.pop("format")
    except (KeyError, ValueError, AttributeError, TypeError):
        raise UserError(foreign) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, but this galaxydist reads version {FORMAT_VERSION}: make it again with "
            "`galaxydist evaluate RUN`, or use the version that wrote it"
        )
    try:
        info = PredictionsInfo(
            class_names=tuple(content.pop("classes")),
            units=content.pop("units"),
            loss=content.pop("loss"),
            loss_without_validation=content.pop("loss_without_validation"),
            versions={"galaxydist": content.pop("galaxydist"), **content.pop("versions")},
            context=content,
        )
        expected = _schema(info)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(foreign) from None
    kinds = {field.name: field.type for field in schema}
    optional = {name: pa.string() for name in NAMES}
    if wrong := [field.name for field in expected if {**optional, **kinds}.get(field.name) != field.type]:
        raise UserError(
            f"{path} has no column {', '.join(wrong)} of the expected type; make it again with `galaxydist evaluate RUN`"
        )
    return PredictionsFile(path, info, num_galaxies)


def _open(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)


def _values(array: "pa.Array", name: str, num_classes: int) -> NDArray[Any]:
    if name in LISTS:
        scores: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
        return scores.reshape(-1, num_classes)
    if name == IN_VALIDATION:
        array = array.fill_null(False)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values.astype(np.float64) if name in PROPERTIES else values


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); remove it and make it again with `galaxydist evaluate RUN`")
