"""Files of predictions: one per finished chunk in a work folder, and the table that they are merged into.

<out>.partial/settings.json           model, source and options; another call continues only with the same
<out>.partial/chunk-000000.parquet    logits of a chunk's rows, the user's columns of a survey, and the damaged rows
"""

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import explain_full_disk, read_json, replace_bytes, to_json, whole_file, write_json
from galaxydist.errors import UserError, name_some
from galaxydist.prediction.predictor import Predictions
from galaxydist.prediction.sources import PredictionSource
from galaxydist.shards.catalogue import rechunk
from galaxydist.surveys.tables.json_columns import conform

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS_FILE = "settings.json"
WORK_VERSION = 1
METADATA_KEY = b"galaxydist"
_OWN_NAMES = re.compile(r"settings\.json|\.settings\.json\.\w+\.tmp|failed|chunk-\d+\.(parquet|tmp)")
# Columns of a chunk's file that are not the user's.
ROW, LOGITS = "__row", "__logits"
# Chunks of a source, if their size allows it, and most rows of one: a chunk is what a kill may lose on each process.
NUM_CHUNKS, MOST_ROWS = 16, 8192
CSV, PARQUET = ".csv", ".parquet"
# Rows of a row group of the merged Parquet file.
ROW_GROUP = 65_536


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a part of the source: ``start`` ... ``stop - 1``; ``number_in_part`` counts within the part."""

    number: int
    part: str
    number_in_part: int
    start: int
    stop: int


@dataclass(frozen=True)
class ChunkPlan:
    """Division of a source into chunks, which depends on the source and the batch size alone.

    Args:
        batch_size: E.
        length: batches per chunk.
        chunks: in the order of the source.
    """

    batch_size: int
    length: int
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, source: PredictionSource, batch_size: int) -> "ChunkPlan":
        """Divide a source."""
        num_rows = sum(source.parts.values())
        rows = max(min(num_rows // NUM_CHUNKS, MOST_ROWS), min(source.slab_length, MOST_ROWS), 1)
        length = math.ceil(rows / batch_size)
        chunks: list[Chunk] = []
        for part, count in source.parts.items():
            for number, start in enumerate(range(0, count, length * batch_size)):
                chunks.append(Chunk(len(chunks), part, number, start, min(start + length * batch_size, count)))
        return cls(batch_size, length, tuple(chunks))


class WorkFolder:
    """The finished chunks of unfinished predictions, beside the file to write.

    Args:
        out: the file to write.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        # Made by a process that fails, so that the others stop.
        self.failure_path = self.path / "failed"

    def prepare(self, settings: Mapping[str, Any], *, threads: int, overwrite: bool) -> int:
        """Create the folder, or continue with the same settings.

        Args:
            settings: model, source and options.
            threads: torch's threads of a process.
            overwrite: start anew if the folder belongs to other predictions.

        Returns:
            The number of torch's threads of the first call: on a CPU, the last bits of small networks' numbers depend on it.

        Raises:
            UserError: it belongs to other predictions and ``overwrite`` is not set, or it cannot be created.
        """
        wanted = json.loads(to_json({"version": WORK_VERSION, **settings}))
        path = self.path / SETTINGS_FILE
        if self.path.exists():
            if foreign := [entry.name for entry in self.path.iterdir() if not _OWN_NAMES.fullmatch(entry.name)]:
                raise UserError(f"{self.path} is in the way: it holds {name_some(foreign)}. Move it, or give another -o")
            found = read_json(path) if path.exists() else {}
            first_threads = found.pop("threads", threads)
            if found == wanted:
                self.failure_path.unlink(missing_ok=True)
                return int(first_threads)
            if found and not overwrite:
                raise UserError(
                    f"{self.path} holds the beginning of other predictions ({', '.join(_differences(found, wanted))}). Give the "
                    "command that began them, --overwrite to start anew, or another -o"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_json(path, {**wanted, "threads": threads})
        return threads

    def path_of(self, chunk: Chunk) -> Path:
        return self.path / f"chunk-{chunk.number:06d}.parquet"

    def unfinished(self, plan: ChunkPlan) -> list[Chunk]:
        """Return the chunks that have no file yet."""
        names = {path.name for path in self.path.iterdir()}
        return [chunk for chunk in plan.chunks if self.path_of(chunk).name not in names]

    def write(
        self,
        chunk: Chunk,
        rows: NDArray[np.int64],
        logits_NK: NDArray[np.float32],
        columns: "pa.Table | None",
        damaged: Sequence[str],
    ) -> None:
        """Write a finished chunk atomically.

        Args:
            chunk: the chunk.
            rows: readable rows in the part of the source, ascending.
            logits_NK: their logits.
            columns: the user's columns, if they are kept in the chunk.
            damaged: reasons of the rows that cannot be read.

        Raises:
            UserError: the disk is full.
        """
        import pyarrow as pa
        from pyarrow import parquet

        kind = pa.list_(pa.float32(), logits_NK.shape[1])
        table = columns if columns is not None else pa.table({})
        fields = [*table.schema, pa.field(ROW, pa.int64()), pa.field(LOGITS, kind)]
        arrays = [*table.columns, pa.array(rows), pa.FixedSizeListArray.from_arrays(pa.array(logits_NK.ravel()), type=kind)]
        metadata = {METADATA_KEY: json.dumps([*damaged])}
        whole = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=metadata))
        path = self.path_of(chunk)
        with explain_full_disk(path), whole_file(path, path.with_suffix(".tmp")) as file:
            parquet.write_table(whole, file, compression="zstd")

    def read(self, chunk: Chunk) -> "pa.Table":
        """Read a finished chunk.

        Raises:
            UserError: its file is damaged; it is removed.
        """
        import pyarrow as pa
        from pyarrow import parquet

        path = self.path_of(chunk)
        try:
            return parquet.read_table(path)
        except (pa.ArrowException, OSError) as error:
            path.unlink(missing_ok=True)
            raise UserError(f"{path} was damaged ({error}) and is removed: give the same command again") from error

    def read_damaged(self, chunk: Chunk) -> tuple["pa.Schema", list[str]]:
        """Return the schema of the user's columns in a finished chunk, and the reasons of its damaged rows."""
        import pyarrow as pa
        from pyarrow import parquet

        schema = parquet.read_schema(self.path_of(chunk))
        own = pa.schema([field for field in schema if field.name not in (ROW, LOGITS)])
        return own, json.loads(schema.metadata[METADATA_KEY])

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return ``key: old, now new`` for the values that differ, by dotted key."""
    lines = []
    for key in [*dict.fromkeys([*found, *wanted])]:
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}.{line}" for line in _differences(old, new)]
        else:
            lines.append(f"{key}: {json.dumps(old)} there, {json.dumps(new)} now")
    return lines


@dataclass(frozen=True)
class Output:
    """The file to write, and its columns.

    Args:
        path: ``.csv`` or ``.parquet``.
        class_names, temperature: of the model.
        logits: with the logits.
        top: number of most probable classes that get columns of their own.
    """

    path: Path
    class_names: tuple[str, ...]
    temperature: float | None
    logits: bool = False
    top: int = 0

    @property
    def damaged_path(self) -> Path:
        """List of the damaged images."""
        return self.path.with_suffix(".damaged.csv")

    @property
    def record_path(self) -> Path:
        """Record of model and source beside a CSV file; in a Parquet file it is in the metadata."""
        return self.path.with_name(f"{self.path.name}.json")

    def merge(self, work: WorkFolder, plan: ChunkPlan, source: PredictionSource, record: Mapping[str, Any]) -> dict[str, int]:
        """Write the file from the finished chunks, a chunk at a time; the work folder is removed last.

        Args:
            work: with all chunks.
            plan, source: of the predictions.
            record: of model and source.

        Returns:
            ``galaxies`` and ``damaged``: numbers of rows.

        Raises:
            UserError: no image could be read, or the disk is full.
        """
        found = [work.read_damaged(chunk) for chunk in plan.chunks]
        damaged = [(chunk.part, reason) for chunk, (_, reasons) in zip(plan.chunks, found, strict=True) for reason in reasons]
        num_rows = sum(source.parts.values())
        if num_rows and len(damaged) == num_rows:
            work.remove()
            raise UserError(f"none of the {num_rows} images of {source.location} can be read; the first: {damaged[0][1]}")
        counts = {"galaxies": num_rows - len(damaged), "damaged": len(damaged) + len(source.left_out)}
        self._write_damaged(damaged, source.left_out)
        schema = source.schema([schema for schema, _ in found])
        text = to_json({**record, **counts})
        tables = self._tables(work, plan, source, schema)
        if self.path.suffix == PARQUET:
            self.record_path.unlink(missing_ok=True)
        else:
            replace_bytes(self.record_path, text.encode())
        self._write(tables, text)
        work.remove()
        return counts

    def _tables(self, work: WorkFolder, plan: ChunkPlan, source: PredictionSource, schema: "pa.Schema") -> "Iterator[pa.Table]":
        """Yield the rows of the result, a chunk at a time: the user's columns, then the predictions."""
        parts: dict[str, list[Chunk]] = {}
        for chunk in plan.chunks:
            parts.setdefault(chunk.part, []).append(chunk)
        for part, chunks in parts.items():
            columns = source.columns(part, [chunk.stop - chunk.start for chunk in chunks])
            for chunk, own in zip(chunks, columns, strict=True):
                stored = work.read(chunk)
                rows = stored.column(ROW).to_numpy()
                logits_NK = stored.column(LOGITS).combine_chunks().flatten().to_numpy().reshape(-1, len(self.class_names))
                users = stored.drop_columns([ROW, LOGITS]) if own is None else own.take(rows - chunk.start)
                found = Predictions(logits_NK, self.class_names, self.temperature).to_table(logits=self.logits, top=self.top)
                yield _beside(conform(users, schema), found)

    def _write(self, tables: "Iterator[pa.Table]", record: str) -> None:
        """Write the file; in Parquet files with the record, in row groups of one size."""
        from itertools import chain, repeat, takewhile

        from pyarrow import csv as arrow_csv
        from pyarrow import parquet

        first = next(tables)
        schema = first.schema.remove_metadata().with_metadata({METADATA_KEY: record})
        groups = takewhile(len, rechunk(chain([first], tables), first.schema, repeat(ROW_GROUP)))
        writer_of = partial(parquet.ParquetWriter, compression="zstd") if self.path.suffix == PARQUET else arrow_csv.CSVWriter
        with (
            explain_full_disk(self.path),
            whole_file(self.path, self.path.with_name(f".{self.path.name}.tmp")) as file,
            writer_of(file, schema) as writer,
        ):
            for group in groups:
                writer.write_table(group.replace_schema_metadata(schema.metadata))

    def _write_damaged(self, damaged: Sequence[tuple[str, str]], left_out: Sequence[str]) -> None:
        """Write the list of the damaged images and of the rows without an image, or remove an older list."""
        if not damaged and not left_out:
            self.damaged_path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("split", "reason"))
        table.writerows((part, reason) for part, reason in damaged)
        table.writerows(("", reason) for reason in left_out)
        replace_bytes(self.damaged_path, text.getvalue().encode("utf-8", "backslashreplace"))


def _beside(users: "pa.Table", predictions: "pa.Table") -> "pa.Table":
    """Return both tables side by side: the user's id and file first; a user's column of a prediction's name gets a ``_``."""
    import pyarrow as pa

    names = users.column_names
    order = [name for name in ("id", "file") if name in names]
    order += [name for name in names if name not in order]
    columns = {}
    for name in order:
        free = name
        while free in predictions.column_names or (free != name and free in names):
            free += "_"
        columns[free] = users.column(name)
    columns |= {name: predictions.column(name) for name in predictions.column_names}
    return pa.table(columns)
