"""Catalogue of a split: ids, positions and other properties of its galaxies as a Parquet table.

The table has one row per sample in storage order, so that the tars need not be read. <dir>/columns/<split>.catalogue.parquet
holds ``id`` (string), ``ra`` and ``dec`` (float64, degrees, null if unknown), then the galaxies' extras as nullable columns
(``redshift``, ``pxscale``, ``row``, ``conflicting``, ``original_split``, an image folder's ``file`` and ``source_id``, any other
of the survey): booleans, integers, floats or strings, of one type throughout. Integers mixed with floats become float64. Lists,
objects, columns of several types, integers beyond 64 bits and all-null columns are only in each sample's .json.

manifest.json lists the files with their SHA-256 under ``catalogues``, not under ``columns``: every loader needs the columns on
disk, but a catalogue is fetched from a store only on demand. For shards of earlier versions, the table is read from the tars.
"""

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.atomic_files import file_sha256, whole_file
from galaxydist.cpus import bounded_map
from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest, catalogue_name, index_name
from galaxydist.shards.remote.cache import SharedFile
from galaxydist.shards.remote.open import file_reader
from galaxydist.shards.remote.prefetcher import LocalShards, fetch_shard
from galaxydist.shards.tar import BLOCK, Member, check_header, parse_index
from galaxydist.surveys.tables.json_columns import conform, is_unicode, parse_object, typed_column, unite_fields

ID, RA, DEC = OWN = ("id", "ra", "dec")
# Properties are larger than these.
LOWER_BOUNDS = {"redshift": -1.0, "pxscale": 0.0}
OWN_FIELDS = (pa.field(ID, pa.string()), pa.field(RA, pa.float64()), pa.field(DEC, pa.float64()))


def table_of(metas: Iterable[tuple[str, bytes]]) -> pa.Table:
    """Return a row per galaxy: ``id`` string, ``ra`` and ``dec`` float64 (degrees), then the extras in order of appearance.

    Numbers that are not finite, and positions that are not numbers, become null. Each extra's metadata holds the kind of its
    values, for :func:`unite`. A column of several types is all null.

    Args:
        metas: key of each galaxy and the contents of its .json, empty if it has none.

    Raises:
        ValueError: a .json is not JSON, or not an object.
    """
    rows = [(key, parse_object(meta)) for key, meta in metas]
    names = dict.fromkeys(name for _, row in rows for name in row if name not in OWN and is_unicode(name))
    fields = [*OWN_FIELDS]
    columns = [
        pa.array([row[ID] if isinstance(row.get(ID), str) else key for key, row in rows], pa.string()),
        *(pa.array([_number(row.get(name)) for _, row in rows], pa.float64()) for name in (RA, DEC)),
    ]
    for name in names:
        field, column = typed_column(name, [row.get(name) for _, row in rows])
        fields.append(field)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def unite(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Unite the schemas of several tables of :func:`table_of`, as :func:`unite_fields` does."""
    return pa.schema([*OWN_FIELDS, *unite_fields([field for field in schema if field.name not in OWN] for schema in schemas)])


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


# Rows written and held in memory at a time.
ROW_GROUP = 65_536
# Threads that read the tars of a local folder.
THREADS = 4
# Attempts at a remote shard and its index.
ATTEMPTS = 4


def write_catalogue(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Write a split's catalogue atomically; the same rows and version of pyarrow give the same bytes.

    Args:
        path: the file.
        schema: the tables' schemas united by ``unite``.
        tables: tables of ``table_of``, of any lengths, in storage order.

    Returns:
        SHA-256 (hex) of the file.
    """
    with (
        whole_file(path, path.with_suffix(".tmp")) as file,
        # These types do not need a copy of the schema in Arrow's own form.
        pq.ParquetWriter(file, schema, version="2.6", compression="zstd", store_schema=False) as writer,
    ):
        # Groups of a fixed size, so that the file does not depend on the size of the shards.
        groups = rechunk((conform(table, schema) for table in tables), schema, itertools.repeat(ROW_GROUP))
        for group in itertools.takewhile(len, groups):
            writer.write_table(group, row_group_size=ROW_GROUP)
    return file_sha256(path)


def read_catalogue(manifest: Manifest, split: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the ids, positions and extras of a split's galaxies, one row per sample in storage order.

    Shards of earlier versions, without a catalogue, are read from the tars, with a progress bar; remote shards through the cache.

    Args:
        manifest, split: the data set and its split.
        columns: names in the order wanted, without those that the data set lacks. None: all, beginning with ``id``, ``ra``,
            ``dec``.

    Raises:
        UserError: no such split, or a file that is missing, damaged or has another checksum than the manifest says.
    """
    manifest.split(split)
    if catalogue_name(split) not in manifest.catalogues:
        table = _read_tars(manifest, split)
        return table if columns is None else table.select([name for name in columns if name in table.column_names])
    with open_catalogue(manifest, split) as file, _explain(manifest, split):
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in columns if name in names]
        return file.read(wanted).select(wanted)


def number_column(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column of a catalogue as (N,) float64: nan where it is null, and throughout if there are no numbers of this name.

    A user's table may have any values in a column such as ``redshift``. Impossible ones are placeholders for unknown (-99).
    """
    kind = table.schema.field(name).type if name in table.column_names else None
    if kind is None or not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        return np.full(len(table), np.nan)
    values_N = np.array(table.column(name).to_numpy(), np.float64)
    values_N[values_N <= LOWER_BOUNDS.get(name, -np.inf)] = np.nan
    return values_N


@contextlib.contextmanager
def open_catalogue(manifest: Manifest, split: str) -> Iterator[Any]:
    """Open a split's catalogue as a ``pyarrow.parquet.ParquetFile``, fetched first for remote shards, and verify its checksum.

    Raises:
        UserError: it is missing, damaged or has another checksum than the manifest says.
    """
    path = _catalogue_path(manifest, catalogue_name(split))
    with _explain(manifest, split):
        file = pq.ParquetFile(path)
    with file:
        expected = manifest.split(split).num_samples
        if file.metadata.num_rows != expected:
            raise UserError(f"{path} has {file.metadata.num_rows} rows, the manifest says {expected}; {manifest.remedy}")
        yield file


def iterate_catalogue(file: Any, lengths: Iterable[int]) -> Iterator[pa.Table]:
    """Return an iterator over an opened catalogue's rows in tables of the given lengths, reading one row group at a time."""
    tables = (pa.Table.from_batches([batch]) for batch in file.iter_batches(ROW_GROUP))
    return rechunk(tables, file.schema_arrow, lengths)


def rechunk(tables: Iterator[pa.Table], schema: pa.Schema, lengths: Iterable[int]) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of the given lengths, shorter ones once the rows run out."""
    held = schema.empty_table()
    for length in lengths:
        while len(held) < length and (table := next(tables, None)) is not None:
            held = pa.concat_tables([held, table])
        yield held.slice(0, length).combine_chunks()
        held = held.slice(length)


def _catalogue_path(manifest: Manifest, name: str) -> Path:
    """Return the path of a local catalogue with the checksum in the manifest, fetching it for remote shards."""
    path, expected = manifest.dir / name, manifest.catalogues[name]
    if manifest.remote is None:
        if not path.is_file():
            raise UserError(f"{path} is missing, though the manifest names it; {manifest.remedy}")
        if file_sha256(path) != expected:
            raise UserError(f"{path}: its checksum is not the manifest's; {manifest.remedy}")
        return path
    if path.is_file() and file_sha256(path) != expected:
        path.unlink(missing_ok=True)  # damaged in the cache: fetch it again
    manifest.remote_folder(threading.Event()).get(name, sha256=bytes.fromhex(expected))
    return path


@contextlib.contextmanager
def _explain(manifest: Manifest, split: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{manifest.dir / catalogue_name(split)} is damaged ({error}); {manifest.remedy}") from error


def _read_tars(manifest: Manifest, split: str) -> pa.Table:
    """Read the table from the samples' .json in the tars, found by the index of each tar."""
    read, local, stop = file_reader(manifest), LocalShards(manifest, split), threading.Event()
    folder = manifest.remote_shards(stop) if manifest.has_remote_shards else None
    rows = manifest.shards(split)

    def table(number: int, attempt: int = 1) -> pa.Table:
        name = manifest.shard_name(split, number)
        # A remote shard is fetched into the cache, where a loader will find it.
        file = fetch_shard(manifest, folder, split, number, allow_over_limit=True) if folder else local.open(number)
        assert file is not None
        try:
            return table_of(_metas(file, parse_index(read(index_name(name), None).decode("ascii"))))
        except (ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            # An index has no checksum; if the network damaged it, which only the tar can show, reading it again helps.
            if manifest.remote is not None and attempt < ATTEMPTS:
                return table(number, attempt + 1)
            shard = manifest.shard_location(split, number)
            raise UserError(
                f"shard {shard} or its index is damaged ({error}): list all damage with `galaxydist data check "
                f"{manifest.location}`, then {manifest.remedy}"
            ) from error

    tables: list[pa.Table] = []
    total, threads = manifest.split(split).num_samples, THREADS if manifest.remote is None else manifest.remote.cache.threads
    with (
        ThreadPoolExecutor(threads) as executor,
        tqdm(total=total, desc=f"catalogue of {split}", unit="img", disable=None) as bar,
    ):
        try:
            for found in bounded_map(executor, table, ((number,) for number in range(len(rows))), 2 * threads):
                tables.append(found)
                bar.update(len(found))
        finally:
            stop.set()
    schema = unite(found.schema for found in tables)
    if not tables:
        return schema.empty_table()
    united = pa.concat_tables([conform(found, schema) for found in tables]).combine_chunks()
    if len(united) != total:
        raise UserError(f"{manifest.location}: the indexes of {split} list {len(united)} galaxies, the manifest {total}")
    return united


def _metas(file: SharedFile, samples: list[list[Member]]) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the .json of each sample of a tar.

    Raises:
        ValueError: the index does not match the tar.
    """
    for members in samples:
        key = members[0].name.partition(".")[0]
        member = next((member for member in members if member.extension == "json"), members[0])
        data = os.pread(file.descriptor, BLOCK + (member.size if member.extension == "json" else 0), member.offset - BLOCK)
        check_header(data[:BLOCK], member)
        yield key, data[BLOCK:]
