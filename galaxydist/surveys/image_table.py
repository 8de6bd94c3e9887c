"""Surveys from tables: one row per galaxy, whose columns give label, id, split and position, beside a source of its images.

Every reader of other people's data (CSV, Parquet, FITS, HDF5, tars) yields the table without image bytes and an ``ImageSource``;
``open_table`` decides on class names, ids, splits and left-out rows.
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError, name_some
from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.surveys.data_origin import DataOrigin
from galaxydist.surveys.folder_scan import check_name, file_ids, unique_ids
from galaxydist.surveys.given_split import RowsToSplit, SplitOptions, is_complete, split_code
from galaxydist.surveys.split import NONE, TEST, Codes, check_positions, rows_by_split
from galaxydist.surveys.table_columns import (
    ColumnNames,
    decoded,
    find_columns,
    has_rounded_integers,
    is_scalar,
    is_text,
    log_once,
    read_degrees,
    read_labels,
    text_values,
)

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# Names of the catalogue's own columns: a column of the table with such a name gets a `_` at its end.
_CATALOGUE_NAMES = frozenset({"id", "ra", "dec", "file", "source_id", "pixel_hash"})


class ImageSource(Protocol):
    """The images of a table's rows. It can be pickled, and opens its own files in each process.

    Attributes:
        slab_length: number of consecutive rows that are cheapest to read together.
    """

    @property
    def slab_length(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        """Yield the images of rows ``start`` ... ``stop - 1``: H x W x 3 uint8 RGB pixels, or the bytes of a JPEG or PNG file.

        Raises:
            DamagedImageError: the image of a row cannot be read.
        """
        ...

    def digest(self) -> str:
        """Return a SHA-256 (hex) that changes when an image changes."""
        ...


@runtime_checkable
class HashedImages(Protocol):
    """An ``ImageSource`` that also finds equal images, so that they stay in one split."""

    def group_equal(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) group numbers, equal for equal images; -1 for an image without a copy."""
        ...


@runtime_checkable
class DivisibleImages(Protocol):
    """An ``ImageSource`` with data of its own for each row, of which a process gets only those that it reads."""

    def part(self, start: int, stop: int) -> ImageSource:
        """Return a source that can only read rows ``start`` ... ``stop - 1``, under the same numbers."""
        ...


@dataclass(frozen=True)
class TableOptions(SplitOptions):
    """The user's options for a table, beside those for its split.

    Args:
        name: the data set's name.
        columns: the columns that the user names.
        classes: ``galaxy10``: the labels are Galaxy10's classes, by name or number; None: as they are.
        class_names: names of the classes 0, 1, ...; None: the label column holds the names.
        is_labelled: False for galaxies without labels: all rows are in the split ``test``, and there are no classes.
    """

    name: str
    columns: ColumnNames = field(default_factory=ColumnNames)
    classes: str | None = None
    class_names: tuple[str, ...] | None = None
    is_labelled: bool = True


@dataclass(frozen=True, slots=True)
class LeftOutRow:
    """A row of a table that is in no split: its number, its id, and the reason."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class TableSurvey:
    """A table as a :class:`galaxydist.galaxy.Survey`; images are read on demand.

    Row i of the survey is row i of the table. Rows that are left out (without an image, a label or a split) are in no split.

    Attributes:
        location: the table, for messages.
        ids: N ids that are valid in a tar.
        ra, dec: (N,) degrees, nan where unknown.
        extras: the catalogue's other columns: ``source_id``, the table's own, and ``file``; scalars only.
        left_out: the rows that are left out, with their reasons.
        origin: licence, citation and revision that the source states; None if it states none.
        first_row: number of the first row that is held, 0 but for a ``part``.
    """

    location: str
    name: str
    variant: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64] = field(repr=False)
    splits: Mapping[str, NDArray[np.int64]] = field(repr=False)
    ids: Sequence[str] = field(repr=False)
    ra: NDArray[np.float64] = field(repr=False)
    dec: NDArray[np.float64] = field(repr=False)
    extras: "pa.Table" = field(repr=False)
    images: ImageSource = field(repr=False)
    left_out: tuple[LeftOutRow, ...] = field(repr=False, default=())
    origin: DataOrigin | None = None
    first_row: int = 0

    @property
    def slab_length(self) -> int:
        return self.images.slab_length

    @property
    def reads_single_files(self) -> bool:
        """True if reading a single row costs no more than its share of a slab."""
        return hasattr(self.images, "files")

    def image_name(self, row: int) -> str:
        """Return the file of a row's image if it has one, else the galaxy's id."""
        file = self.extras["file"][row].as_py() if "file" in self.extras.column_names else None
        return file or self.ids[row]

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        """Yield the galaxies of rows ``start`` ... ``stop - 1``; raises DamagedImageError at a row whose image cannot be read."""
        images = zip(range(start, stop), self.images.read(start, stop), strict=True)
        for first in range(start, stop, self.slab_length):
            last = min(first + self.slab_length, stop)
            slab = self.extras.slice(first - self.first_row, last - first)
            extras = slab.to_pylist() if self.extras.num_columns else [{}] * (last - first)
            for place, image in itertools.islice(images, last - first):
                row = place - self.first_row
                label = int(self.labels[row])
                ra, dec = (float(degrees) if np.isfinite(degrees) else None for degrees in (self.ra[row], self.dec[row]))
                yield Galaxy(self.ids[row], image, None if label < 0 else label, ra, dec, extras[place - first])

    def part(self, start: int, stop: int) -> "TableSurvey":
        """Return a survey that can only read rows ``start`` ... ``stop - 1``, to send to a process."""
        own = slice(start - self.first_row, stop - self.first_row)
        return replace(
            self,
            labels=self.labels[own],
            splits={},
            ids=self.ids[own],
            ra=self.ra[own],
            dec=self.dec[own],
            extras=self.extras.slice(own.start, stop - start),
            images=self.images.part(start, stop) if isinstance(self.images, DivisibleImages) else self.images,
            left_out=(),
            first_row=start,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copy a part of a table, of which Arrow would pickle the whole."""
        state = dict(vars(self))
        if self.extras.get_total_buffer_size() > 2 * self.extras.nbytes:
            state["extras"] = self.extras.take(np.arange(len(self.extras)))
        return state

    @cached_property
    def source_hash(self) -> str:
        """SHA-256 of names, labels, splits, positions, all columns and the images' digest."""
        digest = hashlib.sha256(f"table {self.name} {self.variant} {self.class_names}".encode())
        for array in (self.labels, *self.splits.values(), self.ra, self.dec):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("\n".join(self.ids).encode())
        for name, column in zip(self.extras.column_names, self.extras.columns, strict=True):
            digest.update(f"\n{name} {column.type}\n".encode())
            _hash_column(digest, decoded(column))
        digest.update(self.images.digest().encode())
        return digest.hexdigest()


def open_table(
    table: "pa.Table",
    images: ImageSource,
    location: str,
    options: TableOptions,
    has_image: NDArray[np.bool_] | None = None,
) -> TableSurvey:
    """Return the galaxies of a table: its class names, ids, splits and positions, and the rows left out.

    The split is the table's column. Without one it is 80/10/10: by cells of the sky if the positions are spread over many, in one
    field stratified by class with groups of neighbours together, and without positions by a hash of the id.

    Args:
        table: one row per galaxy in the survey's order, without image bytes.
        images: the images of these rows.
        location: the table's path or URL, for messages.
        options: the user's options.
        has_image: (N,) False for rows without an image; None: all have one.

    Raises:
        UserError: an empty table, wrong columns or values, ids that occur twice, or no row with an image and a label.
    """
    check_name(options.name)
    columns = read_columns(table, options.columns, location, is_labelled=options.is_labelled)
    given, without_split = _given_split(table, columns, location)
    reasons = {
        "without an image": ~has_image if has_image is not None else np.zeros(len(table), np.bool_),
        "without a split": without_split,
    }
    is_usable = ~np.any([*reasons.values()], axis=0)
    class_names, labels = _labels(table, columns, is_usable, location, options)
    reasons["without a label"] = is_usable & (labels < 0) & options.is_labelled
    is_kept = ~np.any([*reasons.values()], axis=0)
    kept = np.flatnonzero(is_kept)
    if not len(kept):
        raise UserError(
            f"{location}: no row can be used: {_describe(reasons)}; correct the table, or name other columns (--label, --split)"
        )
    if len(kept) < len(table):
        log_once(f"{location}: {len(table) - len(kept):,} of {len(table):,} rows are left out: {_describe(reasons)}")
    ids, source_ids = _ids(table, columns, kept, location, options.name)
    ra, dec = _positions(table, columns, location)
    codes = np.full(len(table), NONE, np.int8)
    if options.is_labelled:
        equal = np.full(len(table), -1, np.int64)
        is_cut = options.variant == "balanced" or not is_complete(location, given, has_val=options.has_val)
        if is_cut and isinstance(images, HashedImages):
            equal = images.group_equal(labels)
        rows = RowsToSplit(location, class_names, [ids[row] for row in kept.tolist()], labels[kept], ra[kept], dec[kept])
        marked = _marked_conflicting(table)[kept]
        codes[kept] = rows.split(None if given is None else given[kept], equal[kept], marked, options)
    else:
        codes[kept] = TEST
    return TableSurvey(
        location=location,
        name=options.name,
        variant=options.variant,
        class_names=class_names,
        labels=np.where(is_kept, labels, -1),
        splits=rows_by_split(codes),
        ids=ids,
        ra=ra,
        dec=dec,
        extras=_extras(table, columns, source_ids, location),
        images=images,
        left_out=_left_out(reasons, ids, source_ids),
    )


def read_columns(table: "pa.Table", wanted: ColumnNames, location: str, *, is_labelled: bool) -> ColumnNames:
    """Return the columns of a table, as ``find_columns`` does.

    Raises:
        UserError: the table has no rows, or a column has lists, structures or bytes; or as ``find_columns``.
    """
    if not len(table):
        raise UserError(
            f"{location} has no rows{f', only the header {name_some(table.column_names)}' if table.num_columns else ''}"
        )
    columns = find_columns(table.column_names, wanted, location, is_labelled=is_labelled)
    for kind, name in asdict(columns).items():
        if name is not None and not is_scalar(table.schema.field(name).type):
            raise UserError(
                f"{location}, column {name!r} has values of type {table.schema.field(name).type}, not single numbers or text; "
                f"name another column with --{kind}"
            )
    return columns


def _labels(
    table: "pa.Table", columns: ColumnNames, is_usable: NDArray[np.bool_], location: str, options: TableOptions
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return class names and (N,) labels, -1 for rows that are not usable; a class of such rows alone is no class."""
    if not options.is_labelled:
        return (), np.full(len(table), -1, np.int64)
    if columns.label is None:
        raise UserError(
            f"{location} has no label column: name it with --label, or give --unlabelled if the galaxies have none (they can be "
            f"predicted, not trained on). Its columns are {name_some(table.column_names, 40)}"
        )
    if not is_usable.any():
        return (), np.full(len(table), -1, np.int64)
    as_galaxy10 = options.classes == "galaxy10"
    column = table.column(columns.label).filter(is_usable)
    names, found = read_labels(column, columns.label, location, class_names=options.class_names, as_galaxy10=as_galaxy10)
    labels = np.full(len(table), -1, np.int64)
    labels[is_usable] = found
    return names, labels


def _given_split(table: "pa.Table", columns: ColumnNames, location: str) -> tuple[Codes | None, NDArray[np.bool_]]:
    """Return the split codes of the split column (None without one), and the rows in which it is empty."""
    import pyarrow.compute as pc

    if columns.split is None:
        return None, np.zeros(len(table), np.bool_)
    values = text_values(table.column(columns.split))
    names = pc.drop_null(pc.unique(values)).to_pylist()
    codes = {name: split_code(name) for name in names}
    if wrong := [name for name, code in codes.items() if code is None]:
        raise UserError(
            f"{location}, column {columns.split!r}: the split {name_some([*map(repr, wrong)])} is not train, val or test (or "
            "valid, validation, margin); correct it, name another column with --split, or ignore it with --split none"
        )
    given = np.array([NONE if name is None else codes[name] for name in values.to_pylist()], np.int8)
    if not names:
        return None, np.zeros(len(table), np.bool_)
    return given, given == NONE


def _positions(table: "pa.Table", columns: ColumnNames, location: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return right ascensions and declinations in degrees, nan where unknown."""
    if columns.ra is None or columns.dec is None:
        return np.full(len(table), np.nan), np.full(len(table), np.nan)
    fields = [table.schema.field(name) for name in (columns.ra, columns.dec)]
    factors = [float((field.metadata or {}).get(b"degrees", 1)) for field in fields]
    ra, dec = (
        read_degrees(table.column(field.name), field.name, location) * factor
        for field, factor in zip(fields, factors, strict=True)
    )
    check_positions(ra, dec, name=lambda row: f"{location}, row {row + 1}")
    return ra, dec


def _ids(
    table: "pa.Table", columns: ColumnNames, kept: NDArray[np.int64], location: str, name: str
) -> tuple[list[str], list[str] | None]:
    """Return the N ids, and the N ids as the table has them: its id column, else the stems of its files (None without either)."""
    files = None if columns.file is None else text_values(table.column(columns.file)).to_pylist()
    numbered = [f"{name}-{row:07d}" for row in range(len(table))]
    if columns.id is not None:
        own = text_values(table.column(columns.id)).to_pylist()
        _check_ids(own, kept, columns.id, location, is_rounded=has_rounded_integers(table.column(columns.id)))
        candidates: list[tuple[str, ...]] = [(own[row], f"{own[row]}-{files[row] if files else row}") for row in kept.tolist()]
        source_ids = [text or "" for text in own]
    elif files is not None:
        paths = [text.replace("\\", "/").rstrip("/") if text else numbered[row] for row, text in enumerate(files)]
        candidates = [file_ids(paths[row]) for row in kept.tolist()]
        source_ids = [file_ids(path)[0] for path in paths]
    else:
        return numbered, None
    for row, unique in zip(kept.tolist(), unique_ids(candidates), strict=True):
        numbered[row] = unique
    return numbered, source_ids


def _check_ids(own: Sequence[str | None], kept: NDArray[np.int64], column: str, location: str, *, is_rounded: bool) -> None:
    advice = "correct the table, or name another column with --id (--id none takes the names of the image files)"
    if is_rounded:
        raise UserError(
            f"{location}, column {column!r}: its ids are floating-point numbers of so many digits that the last ones are lost; "
            f"store them as integers or text; {advice}"
        )
    rows = kept.tolist()
    if empty := [row for row in rows if own[row] is None]:
        raise UserError(f"{location}, column {column!r}: {len(empty)} rows have no id, the first is row {empty[0] + 1}; {advice}")
    if repeated := [text for text, count in Counter(own[row] for row in rows).items() if count > 1]:
        first = [row + 1 for row in rows if own[row] == repeated[0]]
        raise UserError(
            f"{location}, column {column!r}: {len(repeated)} ids occur more than once, the first is {repeated[0]!r} in rows "
            f"{name_some([*map(str, first)])}; {advice}"
        )


def _marked_conflicting(table: "pa.Table") -> NDArray[np.bool_]:
    """Return (N,) True for galaxies that the table marks in a column ``conflicting``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if "conflicting" not in table.column_names or not pa.types.is_boolean(table.schema.field("conflicting").type):
        return np.zeros(len(table), np.bool_)
    return np.asarray(pc.fill_null(decoded(table.column("conflicting")), False).to_numpy(zero_copy_only=False), np.bool_)


def _extras(table: "pa.Table", columns: ColumnNames, source_ids: Sequence[str] | None, location: str) -> "pa.Table":
    """Return the catalogue's other columns; nested ones are named in a warning and left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, pa.Array] = {}
    nested = []
    for name in table.column_names:
        if name in columns.used() or not name or name.startswith("__"):
            continue
        array = decoded(table.column(name))
        kind = array.type
        if pa.types.is_temporal(kind):
            array = pc.cast(array, pa.string())
        elif pa.types.is_decimal(kind) or pa.types.is_float16(kind):
            array = pc.cast(array, pa.float64())
        elif not is_scalar(kind):
            nested.append(name)
            continue
        found[f"{name}_" if name in _CATALOGUE_NAMES else name] = array
    if nested:
        logger.warning("%s: columns without single numbers or text are not in the catalogue: %s", location, name_some(nested, 20))
    if source_ids is not None:
        found = {"source_id": pa.array(source_ids, pa.string()), **found}
    if columns.file is not None:
        found["file"] = text_values(table.column(columns.file))
    return pa.table(found)


def _left_out(
    reasons: Mapping[str, NDArray[np.bool_]], ids: Sequence[str], source_ids: Sequence[str] | None
) -> tuple[LeftOutRow, ...]:
    rows = []
    for row in np.flatnonzero(np.any([*reasons.values()], axis=0)).tolist():
        why = " and ".join(reason for reason, mask in reasons.items() if mask[row])
        rows.append(LeftOutRow(row, (source_ids[row] if source_ids else "") or ids[row], why))
    return tuple(rows)


def _describe(reasons: Mapping[str, NDArray[np.bool_]]) -> str:
    """Return ``9 without an image, 3 without a label``."""
    return ", ".join(f"{int(mask.sum()):,} {reason}" for reason, mask in reasons.items() if mask.any())


def _hash_column(digest: Any, array: "pa.Array") -> None:
    """Add a column's values to a digest, and where it is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digest.update(np.packbits(pc.is_null(array).to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_null(array.type):
        return
    if not is_text(array.type):
        digest.update(
            np.ascontiguousarray(
                pc.fill_null(array, False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False)
            ).tobytes()
        )
        return
    filled = pc.fill_null(array, "")
    digest.update(pc.binary_length(filled).to_numpy(zero_copy_only=False).tobytes())
    for start in range(0, len(filled), 65_536):
        digest.update("".join(filled.slice(start, 65_536).to_pylist()).encode())
