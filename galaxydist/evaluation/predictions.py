"""The predictions of an evaluation: a Parquet file with a row a galaxy, in the order of the stored samples.

Any reader of Parquet opens it. Columns: ``id``, ``sample`` (stored sample number), ``split``, ``label``, ``predicted``,
``probabilities`` and ``logits`` (K float32 each), ``in_validation`` (whether the model was chosen on this galaxy; null where
nobody has looked), and what is known of the galaxy, null where it is not: ``ra``, ``dec`` (degrees), ``redshift``, ``size``
(half-light radius), ``sky_brightness``, and of images from a folder ``source_id`` (the user's own id, of which ``id`` is made)
and ``file``, which files of earlier versions lack. What was judged on what stands as JSON in the file's metadata under
``galaxydist``.
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


# What each process predicts, on its way into one file: a part a process, merged in the order of the samples.
#
# A part holds rows of fixed length in the order of its batches, so that merging maps the parts and copies: no part is ever
# in
# memory whole, nor is the result.

# Rows that are handed on together, at least: more than a batch, less than a row group.
TOGETHER = 4096


def part_row(num_classes: int) -> np.dtype[Any]:
    """A galaxy in a part; ``size`` in pixels of the stored image and ``sky_brightness`` are nan where unknown."""
    scores = ("logits", "<f4", (num_classes,))
    return np.dtype(
        [("sample", "<i8"), ("label", "<i4"), ("predicted", "<i4"), scores, ("size", "<f8"), ("sky_brightness", "<f8")]
    )


def part_path(target: Path, rank: int) -> Path:
    """Where the part of a process lies, beside the file that it will be a part of."""
    return target.with_name(f".{target.name}.rank-{rank}")


class RankFile:
    """Writes one process's part. Use as a context manager: whatever happens, the part is gone after it.

    Args:
        path: of the part; what a killed process left there is overwritten.
        num_classes: K.
    """

    def __init__(self, path: Path, num_classes: int) -> None:
        self.path = path
        self._row = part_row(num_classes)
        self.num_rows = 0

    def __enter__(self) -> Self:
        with explain_full_disk(self.path):
            self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk also fails the flush at closing
            self._file.close()
        self.path.unlink(missing_ok=True)

    def append(self, columns: Mapping[str, ArrayLike]) -> None:
        """Write galaxies.

        Args:
            columns: one for each field of ``part_row``.

        Raises:
            UserError: the disk is full.
        """
        rows = np.empty(len(np.asarray(columns["sample"])), self._row)
        for name in rows.dtype.names or ():
            rows[name] = columns[name]
        with explain_full_disk(self.path):
            self._file.write(rows.tobytes())
        self.num_rows += len(rows)

    def finish(self) -> None:
        """All is written: other processes, on other machines too, may read the part from here on."""
        with explain_full_disk(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


def merge_rank_files(paths: Sequence[Path], num_classes: int, *, batch_size: int, num_samples: int) -> Iterator[NDArray[np.void]]:
    """The rows of all parts in the order of their samples, some thousand at a time.

    Batch j holds the samples j E ... (j + 1) E - 1 and was rank j mod W's (``shards.order.evaluation_batches``).

    Args:
        paths: of the parts, by rank.
        num_classes: K.
        batch_size: E.
        num_samples: of the split.

    Raises:
        ValueError: a galaxy is missing, or stands twice.
    """
    parts = [_map(path, part_row(num_classes)) for path in paths]
    places, blocks, num_waiting = [0] * len(parts), list[NDArray[np.void]](), 0
    for number, first in enumerate(range(0, num_samples, batch_size)):
        rank, count = number % len(parts), min(batch_size, num_samples - first)
        rows = parts[rank][places[rank] : places[rank] + count]
        places[rank] += count
        if not np.array_equal(rows["sample"], np.arange(first, first + count)):
            raise ValueError(f"{paths[rank].name}: the predictions of samples {first} to {first + count - 1} are not there")
        blocks.append(rows)
        num_waiting += count
        if num_waiting >= TOGETHER:
            yield np.concatenate(blocks)
            blocks, num_waiting = [], 0
    if blocks:
        yield np.concatenate(blocks)
    if places != [len(part) for part in parts]:
        raise ValueError("more galaxies were predicted than the split has")


def _map(path: Path, row: np.dtype[Any]) -> NDArray[np.void]:
    size = path.stat().st_size
    if size % row.itemsize:
        raise ValueError(f"{path} is cut off")
    return np.memmap(path, row, mode="r") if size else np.empty(0, row)


# Probabilities of logits, in float64.


def softmax(logits_NK: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities of logits, N x K float64."""
    return np.exp(log_softmax(logits_NK))


def log_softmax(logits_NK: NDArray[Any]) -> NDArray[np.float64]:
    """Logarithms of the probabilities, N x K float64; nan in a row with a logit that is not finite."""
    with np.errstate(invalid="ignore"):
        shifted_NK = logits_NK.astype(np.float64) - np.max(logits_NK, axis=1, keepdims=True, initial=-np.inf)
        log_NK: NDArray[np.float64] = shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))
    return log_NK


FORMAT_VERSION = 1
METADATA_KEY = b"galaxydist"
# Rows that are written, and so read, together: a few MB whatever the number of galaxies.
ROW_GROUP = 16_384
# What may be known of a galaxy; float64, null where it is not.
IN_VALIDATION = "in_validation"
PROPERTIES = ("ra", "dec", "redshift", "size", "sky_brightness")
# What the user calls a galaxy; text, null where nobody has said.
NAMES = ("source_id", "file")
LISTS = ("probabilities", "logits")
# What the name of every file of predictions ends in.
PREDICTIONS = "-predictions.parquet"


@dataclass(frozen=True)
class PredictionsInfo:
    """What a file of predictions says of itself.

    Args:
        class_names: by label.
        context: what was judged on what: ``dataset``, ``variant``, ``split``, ``tta``, ``manifest_hash``, ``recipe``, ``model``,
            ``seed``, ``checkpoint``, ``step``: plain values.
        units: of the properties that have one.
        loss: mean cross-entropy (nats), from the exact sum; None where it is not finite.
        versions: of galaxydist and the libraries that the numbers depend on.
        loss_without_validation: the mean cross-entropy of the galaxies that the model was not chosen on, where some were.
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
    """Where the predictions of an evaluation lie; ``stem`` as in ``report.stem_of``."""
    return evaluation_dir / f"{stem}{PREDICTIONS}"


def write_predictions(path: Path, info: PredictionsInfo, blocks: Iterator[Mapping[str, ArrayLike]]) -> int:
    """Write a file of predictions, whole or not at all; memory is that of a block and a row group.

    Args:
        path: its name; its folder exists.
        info: what it says of itself; ``context["split"]`` is written into each row.
        blocks: galaxies in the order of their sample numbers: columns ``id``, ``sample``, ``label``, ``predicted`` (B each),
            ``logits`` (B x K) and any of ``PROPERTIES`` (B float64, nan where unknown) and ``NAMES`` (B texts).

    Returns:
        Number of galaxies.

    Raises:
        UserError: the disk is full.
    """
    kept = "What it held before is unchanged." if path.exists() else ""
    with explain_full_disk(path, kept), _Writer(path, info) as writer:
        for block in blocks:
            writer.append(block)
    return writer.num_galaxies


class _Writer:
    """Collects blocks into row groups of one size, so that equal galaxies give equal files however they come."""

    def __init__(self, path: Path, info: PredictionsInfo) -> None:
        self._schema = _schema(info)
        self._info = info
        self._file = whole_file(path, path.with_name(f".{path.name}.tmp"))
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self.num_galaxies = 0

    def __enter__(self) -> Self:
        from pyarrow import parquet

        target = self._file.__enter__()
        self._writer = parquet.ParquetWriter(
            target, self._schema, compression="zstd", write_page_checksum=True, store_schema=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write(at_least=1)
            self._writer.close()
        except BaseException as failure:
            self._file.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._file.__exit__(kind, error, trace)

    def append(self, block: Mapping[str, ArrayLike]) -> None:
        import pyarrow as pa

        arrays = {name: np.asarray(values) for name, values in block.items() if name not in ("id", *NAMES)}
        count = len(arrays["sample"])
        arrays["probabilities"] = softmax(arrays["logits"])
        columns = [_column(field, block, arrays, self._info, count) for field in self._schema]
        self._waiting.append(pa.record_batch(columns, schema=self._schema))
        self._num_waiting += count
        self.num_galaxies += count
        self._write(at_least=ROW_GROUP)

    def _write(self, at_least: int) -> None:
        import pyarrow as pa

        if self._num_waiting < at_least:
            return
        table = pa.Table.from_batches(self._waiting, self._schema)
        full = table.num_rows if at_least < ROW_GROUP else table.num_rows // ROW_GROUP * ROW_GROUP
        self._writer.write_table(table.slice(0, full), row_group_size=ROW_GROUP)
        self._waiting = table.slice(full).combine_chunks().to_batches()
        self._num_waiting = table.num_rows - full


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


def _column(
    field: "pa.Field", block: Mapping[str, ArrayLike], arrays: Mapping[str, NDArray[Any]], info: PredictionsInfo, count: int
) -> "pa.Array":
    import pyarrow as pa

    if field.name in ("id", *NAMES) and field.name in block:
        return pa.array(block[field.name], pa.string())
    if field.name == "split":
        return pa.array([info.context["split"]] * count, pa.string())
    if field.nullable and field.name not in arrays:
        return pa.nulls(count, field.type)
    if field.name in PROPERTIES:
        return pa.array(arrays[field.name].astype(np.float64), pa.float64(), from_pandas=True)  # nan becomes null
    if field.name in LISTS:
        values = arrays[field.name]
        assert values.shape == (count, info.num_classes), (field.name, values.shape)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), type=field.type)
    return pa.array(arrays[field.name].astype(field.type.to_pandas_dtype()))


class PredictionsFile:
    """A file of predictions, opened by ``read_predictions``.

    Attributes:
        path: of the file.
        info: what it says of itself.
        num_galaxies: number of rows.
    """

    def __init__(self, path: Path, info: PredictionsInfo, num_galaxies: int) -> None:
        self.path = path
        self.info = info
        self.num_galaxies = num_galaxies

    def batches(self, columns: Sequence[str], batch_size: int = ROW_GROUP) -> Iterator[dict[str, NDArray[Any]]]:
        """Some columns, so many galaxies at a time in the order of the file; memory is that of one row group.

        Args:
            columns: names.
            batch_size: galaxies at a time; the last has fewer.

        Returns:
            By name: B values; ``probabilities`` and ``logits`` B x K float32; properties float64, nan where unknown;
            ``in_validation`` False where unknown; ``id`` and ``split`` as objects.

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
        """A whole column, as in ``batches``: memory is that of all galaxies."""
        parts = [batch[name] for batch in self.batches([name])]
        return np.concatenate(parts) if parts else np.empty((0, self.info.num_classes) if name in LISTS else 0)

    def rows(self, numbers: Sequence[int] | NDArray[np.int64], columns: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Some columns of the rows with these numbers (ascending, each once), read through once."""
        wanted = np.asarray(numbers, np.int64)
        parts, first = [], 0
        for batch in self.batches(columns):
            count = len(batch[columns[0]])
            low, high = np.searchsorted(wanted, (first, first + count))
            parts.append({name: values[wanted[low:high] - first] for name, values in batch.items()})
            first += count
        return {name: np.concatenate([part[name] for part in parts]) for name in columns} if parts else {}


def read_predictions(path: Path) -> PredictionsFile:
    """Open a file of predictions; only its footer is read.

    Raises:
        UserError: there is none, it is damaged, or it is not one of this version.
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
            f"{path} has format version {version}, this galaxydist reads version {FORMAT_VERSION}: make it anew with "
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
    later = {name: pa.string() for name in NAMES}
    if wrong := [field.name for field in expected if {**later, **kinds}.get(field.name) != field.type]:
        raise UserError(
            f"{path} has no column {', '.join(wrong)} of the expected type; make it anew with `galaxydist evaluate RUN`"
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
    return UserError(f"{path} is damaged ({error}); remove it and make it anew with `galaxydist evaluate RUN`")
