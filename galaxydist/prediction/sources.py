"""Sources of galaxies to label: surveys of any kind and shards, read in chunks of batches."""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from galaxydist.cpus import bounded_map
from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage, Galaxy, Survey
from galaxydist.loading.decode import ImageError
from galaxydist.loading.loader import Batch, BufferPool, Chunks, DecodeOptions, EvalLoader, RankInfo
from galaxydist.prediction.image_form import SCALE_TOLERANCE, ImageForm, OtherImagesError
from galaxydist.recipe.schema import DataConfig
from galaxydist.shards.catalogue import iterate_catalogue, number_column, open_catalogue, read_catalogue
from galaxydist.shards.manifest import Manifest, catalogue_name
from galaxydist.shards.writer.damaged import read_rows, rows_left_out
from galaxydist.shards.writer.encode import PIXEL_HASH
from galaxydist.surveys.tables.json_columns import typed_column, unite_fields

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

SOURCE_ID = "source_id"
# Rows that a thread reads together where each has a file of its own.
SINGLE_FILES = 32
# Most bytes of pixels that are decoded ahead, if that is more than two slabs.
MOST_BYTES_AHEAD = 2**30


@dataclass(frozen=True)
class ReadSettings:
    """Settings with which a process reads its chunks.

    Args:
        chunks: batches per chunk, and the numbers of this process's chunks in the part.
        batch_size: E.
        form: form of the prepared images.
        data: the recipe's.
        ranks: this process among those that label the source.
        threads: decoding threads.
        pin: decode into pinned memory.
    """

    chunks: Chunks
    batch_size: int
    form: ImageForm
    data: DataConfig
    ranks: RankInfo
    threads: int
    pin: bool


class ChunkReader(Protocol):
    """Batches of chosen chunks in their order: ``Batch.step`` is the chunk, ``Batch.samples_B`` the rows (-1: padding).

    Rows that cannot be read are in ``Batch.errors``. A context manager.
    """

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...


class PredictionSource(Protocol):
    """Galaxies to label, in one or several parts.

    Attributes:
        location: path or URL, for messages and the record.
        parts: number of rows by name of the part (a split; for surveys ``""``).
        slab_length: number of consecutive rows that are cheapest to read together.
        left_out: reasons for the rows that are not labelled, because they have no image.
    """

    @property
    def location(self) -> str: ...
    @property
    def parts(self) -> Mapping[str, int]: ...
    @property
    def slab_length(self) -> int: ...
    @property
    def left_out(self) -> Sequence[str]: ...

    def describe(self) -> dict[str, Any]:
        """Return plain values that change when the source changes."""
        ...

    def open(self, part: str, reading: ReadSettings) -> ChunkReader:
        """Read chunks of a part."""
        ...

    def take_columns(self, chunk: int) -> "pa.Table | None":
        """Return the user's columns of the readable rows of a chunk that was read; None if ``columns`` has them."""
        ...

    def schema(self, chunk_schemas: "Sequence[pa.Schema]") -> "pa.Schema":
        """Return the user's columns, given those of all chunks; without positions if none is known."""
        ...

    def columns(self, part: str, lengths: Sequence[int]) -> "Iterator[pa.Table | None]":
        """Yield the user's columns of consecutive rows in tables of these lengths; None where ``take_columns`` has them."""
        ...


@dataclass(frozen=True)
class SurveyToLabel:
    """The rows of a survey that are in a split, in the survey's order.

    Args:
        survey: any survey.
        location: its path or URL.
        options: the options with which it was opened, for the record.
    """

    survey: Survey
    location: str
    options: str = ""
    _columns: dict[int, "pa.Table"] = field(default_factory=dict)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the survey, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.survey.splits.values()]))

    @property
    def parts(self) -> Mapping[str, int]:
        return {"": len(self.rows)}

    @property
    def slab_length(self) -> int:
        images = getattr(self.survey, "images", self.survey)
        return SINGLE_FILES if hasattr(images, "files") else max(self.survey.slab_length, 1)

    @property
    def left_out(self) -> Sequence[str]:
        return [f"row {left_out.row + 1} ({left_out.id}): {left_out.reason}" for left_out in rows_left_out(self.survey)]

    def describe(self) -> dict[str, Any]:
        """Return the name, the number of rows, and a digest of the files."""
        counted = {"rows": len(self.rows), "options": self.options, "digest": self._digest}
        return {"location": self.location, "dataset": self.survey.name, **counted}

    @cached_property
    def _digest(self) -> str:
        """SHA-256 (hex) of sizes and times of the files: their bytes would have to be read twice."""
        images: Any = getattr(self.survey, "images", self.survey)
        tree = getattr(images, "tree", None)
        paths = [Path(self.location)]
        digest = hashlib.sha256(f"{self.survey.name} {len(self.survey.labels)}".encode())
        if hasattr(images, "files"):
            paths += [Path(images.root) / file for file in images.files if file]
        elif hasattr(images, "sources") and (tree is None or tree.is_local):
            paths += [Path(tree.root if tree is not None else "") / file for file in images.sources]
        elif hasattr(images, "digest"):  # remote files: sizes and versions
            digest.update(images.digest().encode())
        for path in paths:
            # The time of a folder changes with other files in it.
            if path.is_file():
                status = path.stat()
                digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def open(self, part: str, reading: ReadSettings) -> ChunkReader:
        del part
        return SurveyReader(self, reading, self._columns)

    def take_columns(self, chunk: int) -> "pa.Table | None":
        return self._columns.pop(chunk)

    def schema(self, chunk_schemas: "Sequence[pa.Schema]") -> "pa.Schema":
        import pyarrow as pa

        return pa.schema(unite_fields(chunk_schemas))

    def columns(self, part: str, lengths: Sequence[int]) -> "Iterator[pa.Table | None]":
        del part
        yield from [None] * len(lengths)


@dataclass(frozen=True)
class _Planned:
    """A batch before its rows are read: its chunk, the number of its first row, and the memory of its pixels."""

    chunk: int
    first: int
    pixels_BHWC: NDArray[np.uint8]


@dataclass(frozen=True)
class _Piece:
    """Rows of one chunk that were read together: their number, errors by row, and the user's columns of the readable rows."""

    chunk: int
    num_rows: int
    errors: Mapping[int, UserError]
    records: Sequence[Mapping[str, Any]]
    is_last: bool


class SurveyReader:
    """Reads and decodes rows of a survey ahead in threads; the last batch of a chunk may be short.

    Args:
        source: the survey, and its rows to label.
        reading: chunks and preparation.
        columns: receives the user's columns of each chunk before its last batch is yielded.
    """

    def __init__(self, source: SurveyToLabel, reading: ReadSettings, columns: "dict[int, pa.Table]") -> None:
        self._survey, self._rows, self._slab_length = source.survey, source.rows, source.slab_length
        self._reading, self._columns = reading, columns
        self._pool = ThreadPoolExecutor(reading.threads, thread_name_prefix="galaxydist-decode")
        ahead = MOST_BYTES_AHEAD // (self._slab_length * reading.form.size**2 * 3)
        ahead = max(2, min(ahead, 2 * reading.threads + 1))
        self._buffers = BufferPool(math.ceil(ahead * self._slab_length / reading.batch_size) + 3, pin=reading.pin)
        self._planned = deque[_Planned]()
        self._batches = self._assemble(bounded_map(self._pool, self._read, self._tasks(), ahead))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def _tasks(self) -> Iterator[tuple[int, int, Sequence[NDArray[np.uint8]], bool]]:
        """Yield the arguments of ``_read`` for each piece: consecutive rows of one slab."""
        size = self._reading.batch_size * self._reading.chunks.length
        slab = self._slab_length
        for chunk in self._reading.chunks.numbers.tolist():
            start, stop = chunk * size, min((chunk + 1) * size, len(self._rows))
            rows = self._rows[start:stop]
            cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(rows // slab) != 0)) + 1
            images = self._plan(chunk, start, stop)
            for first, last in pairwise([start, *(start + cuts).tolist(), stop]):
                yield chunk, first, [*islice(images, last - first)], last == stop

    def _plan(self, chunk: int, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the memory of each image of a chunk; batches are planned as they are reached."""
        size, side = self._reading.batch_size, self._reading.form.size
        for first in range(start, stop, size):
            pixels_BHWC = self._buffers.take((min(size, stop - first), side, side, 3), np.uint8)
            self._planned.append(_Planned(chunk, first, pixels_BHWC))
            yield from pixels_BHWC

    def _read(self, chunk: int, first: int, images: Sequence[NDArray[np.uint8]], is_last: bool) -> _Piece:
        """Read rows and prepare their images; an image that cannot be read is black."""
        start = int(self._rows[first])
        errors: dict[int, UserError] = {}
        records = []
        rows = read_rows(self._survey, start, start + len(images))
        for row, (galaxy, pixels) in enumerate(zip(rows, images, strict=True), first):
            try:
                if isinstance(galaxy, DamagedImageError):
                    raise galaxy
                self._reading.form.prepare(galaxy.image, _name(galaxy), _number(galaxy.extras.get("pxscale")), out=pixels)
                records.append(self._record(galaxy))
            except DamagedImageError as error:
                pixels[...] = 0
                errors[row] = error
        return _Piece(chunk, len(images), errors, records, is_last)

    def _record(self, galaxy: Galaxy) -> Mapping[str, Any]:
        """Return the user's id and columns of a galaxy."""
        extras = {name: value.item() if isinstance(value, np.generic) else value for name, value in galaxy.extras.items()}
        if galaxy.label is not None and "label" not in extras:
            extras["label"] = self._survey.class_names[galaxy.label]
        own = extras.pop(SOURCE_ID, None)
        return {"id": own or galaxy.id, "ra": galaxy.ra, "dec": galaxy.dec, **extras}

    def _assemble(self, pieces: Iterator[_Piece]) -> Generator[Batch]:
        num_read, errors, records = 0, dict[int, UserError](), list[Mapping[str, Any]]()
        for piece in pieces:
            num_read += piece.num_rows
            errors |= piece.errors
            records += piece.records
            if piece.is_last:
                self._columns[piece.chunk], records = _table_of(records), []
            while self._planned and num_read >= len(self._planned[0].pixels_BHWC):
                planned = self._planned.popleft()
                num_read -= len(planned.pixels_BHWC)
                yield _batch(planned, errors)


def _table_of(records: "Sequence[Mapping[str, Any]]") -> "pa.Table":
    """Return a row per record and a column per name, in order of appearance."""
    import pyarrow as pa

    names = dict.fromkeys(name for record in records for name in record)
    columns = [typed_column(name, [record.get(name) for record in records]) for name in names]
    return pa.Table.from_arrays([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))


def _batch(planned: _Planned, errors: dict[int, UserError]) -> Batch:
    """Return a batch whose rows were read, with their errors, which are taken out of ``errors``."""
    rows = np.arange(planned.first, planned.first + len(planned.pixels_BHWC))
    return Batch(
        images_BHWC=torch.from_numpy(planned.pixels_BHWC),
        labels_B=torch.zeros(len(rows), dtype=torch.int64),
        weights_B=torch.ones(len(rows)),
        positions_B=torch.from_numpy(rows),
        samples_B=torch.from_numpy(rows),
        epoch=0,
        step=planned.chunk,
        errors={row: errors.pop(row) for row in [*errors] if row <= rows[-1]},
    )


def _name(galaxy: Galaxy) -> str:
    if isinstance(galaxy.image, EncodedImage) and galaxy.image.file:
        return galaxy.image.file
    return str(galaxy.extras.get("file") or f"galaxy {galaxy.extras.get(SOURCE_ID) or galaxy.id}")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class ShardsToLabel:
    """Splits of shards, in storage order. Images are used as they are stored.

    Args:
        manifest: of the shards.
        splits: names.
    """

    manifest: Manifest
    splits: tuple[str, ...]

    @property
    def location(self) -> str:
        return self.manifest.location

    @property
    def parts(self) -> Mapping[str, int]:
        return {split: self.manifest.split(split).num_samples for split in self.splits}

    @property
    def slab_length(self) -> int:
        return 1

    @property
    def left_out(self) -> Sequence[str]:
        return ()

    def describe(self) -> dict[str, Any]:
        manifest = self.manifest
        return {"location": self.location, "dataset": manifest.dataset, "splits": list(self.splits), "digest": manifest.hash}

    def check(self, form: ImageForm, trained_on: str) -> None:
        """Refuse images of another size or pixel scale than those of the training; its own shards are taken as they are.

        Args:
            form: the form of the model's images.
            trained_on: hash of the manifest that the model was trained on.

        Raises:
            OtherImagesError: without ``form.resize``.
            UserError: ``form.rescale``.
        """
        stored, size = form.stored, self.manifest.image_size
        if form.rescale:
            raise UserError("--rescale is for image files, tables and surveys; shards are labelled as they are stored")
        if form.resize or self.manifest.hash == trained_on:
            return
        if size != stored.image_size:
            raise OtherImagesError(
                f"the images of {self.location} have {size} x {size} pixels, and the training images were {stored.image_size} x "
                f"{stored.image_size} pixels. Give --resize to resample them; the galaxies should then fill as much of the image "
                "as those of the training"
            )
        if stored.stored_scales is None or not self.manifest.catalogues:
            return
        low, high = stored.stored_scales
        smallest, largest = (side / size for side in self.manifest.source_sides or (size, size))
        for split in self.splits:
            scales = number_column(read_catalogue(self.manifest, split, columns=["pxscale"]), "pxscale")
            scales = scales[np.isfinite(scales)]
            is_other = (scales * largest < low * (1 - SCALE_TOLERANCE)) | (scales * smallest > high * (1 + SCALE_TOLERANCE))
            if other := int(is_other.sum()):
                raise OtherImagesError(
                    f"{other} of {len(scales)} galaxies in the {split} split of {self.location} have another pixel scale "
                    f"({float(np.median(scales)) * smallest:.4g} arcsec/pixel in the median) than the training galaxies "
                    f"({low:.4g} to {high:.4g}), as they are stored. Give --resize to take them as they are"
                )

    def open(self, part: str, reading: ReadSettings) -> ChunkReader:
        return EvalLoader(
            self.manifest,
            part,
            batch_size=reading.batch_size,
            ranks=reading.ranks,
            decode=DecodeOptions.of(reading.data, threads=reading.threads, pin=reading.pin),
            chunks=reading.chunks,
            on_error="report",
        )

    def take_columns(self, chunk: int) -> "pa.Table | None":
        del chunk
        return None

    def schema(self, chunk_schemas: "Sequence[pa.Schema]") -> "pa.Schema":
        import pyarrow as pa

        del chunk_schemas
        schemas, known = [], set[str]()
        for split in self.splits:
            schemas += [table.schema for table in self.columns(split, [1]) if table is not None]
            positions = read_catalogue(self.manifest, split, columns=["ra", "dec"])
            known |= {name for name in positions.column_names if positions.column(name).null_count < len(positions)}
        united = pa.unify_schemas(schemas, promote_options="permissive")
        return pa.schema([field for field in united if field.name not in ("ra", "dec") or field.name in known])

    def columns(self, part: str, lengths: Sequence[int]) -> "Iterator[pa.Table | None]":
        start = 0
        for table in self._tables(part, lengths):
            stop = start + len(table)
            yield self._with_labels(table, part, start, stop)
            start = stop

    def _tables(self, part: str, lengths: Sequence[int]) -> "Iterator[pa.Table]":
        if catalogue_name(part) in self.manifest.catalogues:
            with open_catalogue(self.manifest, part) as file:
                yield from iterate_catalogue(file, lengths)
            return
        table, start = read_catalogue(self.manifest, part), 0
        for length in lengths:
            yield table.slice(start, length)
            start += length

    def _with_labels(self, table: "pa.Table", part: str, start: int, stop: int) -> "pa.Table":
        """Return the user's columns: the own ids, and split and class."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if SOURCE_ID in table.column_names:
            own = pc.coalesce(table.column(SOURCE_ID).cast("string"), table.column("id"))
            table = table.set_column(0, "id", own).drop_columns([SOURCE_ID])
        table = table.drop_columns([name for name in (PIXEL_HASH, "split") if name in table.column_names])
        table = table.append_column("split", pa.array([part] * len(table), pa.string()))
        labels = self.manifest.labels(part)[start:stop].tolist()
        names = [self.manifest.class_names[label] if label >= 0 else None for label in labels]
        return table if "label" in table.column_names else table.append_column("label", pa.array(names, pa.string()))


def damage_of(error: UserError) -> str:
    """Return the reason why an image cannot be read; raise an error that is not about a single image."""
    if isinstance(error, DamagedImageError):
        return error.reason
    if isinstance(error, ImageError):
        return error.problem
    raise error
