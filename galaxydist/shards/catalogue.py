"""A split's galaxies as a table, a row a sample in storage order, so that ids and positions need not be read from the tars.

<dir>/columns/<split>.catalogue.parquet: ``id`` string, ``ra`` and ``dec`` float64 (degrees, null where unknown), then those
extras of the galaxies (``redshift``, ``pxscale``, ``row``, ``conflicting``, ``original_split``, a folder's ``file`` and
``source_id``, whatever the survey has) that are booleans, whole numbers, numbers or strings, of one type throughout, as nullable
columns. Whole and other numbers together are float64. Left out, but still in each sample's .json: lists and objects, columns of
several types, whole numbers past 64 bits, columns that are null throughout.

manifest.json names the files with their SHA-256 under ``catalogues``, not under ``columns``: what stands there every reader of
this format wants on the disk, while a catalogue is fetched from a store only when somebody asks for it. Shards without it, made
before, are read from the tars.
"""

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from galaxydist.atomic_files import whole_file
from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest, catalogue_name, shard_name
from galaxydist.shards.remote.cache import Cache, CacheEntry, SharedFile
from galaxydist.shards.remote.object_store import Store, download
from galaxydist.shards.remote.open import file_reader
from galaxydist.shards.remote.prefetcher import LocalShards
from galaxydist.shards.tar import BLOCK, Member, check_header, parse_index

if TYPE_CHECKING:
    import pyarrow as pa


# The .json of many galaxies as one table, column by column: what has a type, what has none, and how the tables of several
# shards
# become those of one data set.

ID, RA, DEC = OWN = ("id", "ra", "dec")

# What the values of an extra are. Whole numbers are EXACT up to 2^53, where float64 begins to leave some out.
NOTHING, BOOLEAN, EXACT, WHOLE, FLOAT, TEXT, MIXED = "nothing", "boolean", "exact", "whole", "float", "text", "mixed"
_KIND = b"kind"
_EXACT_LIMIT, _WHOLE_LIMIT = 2**53, 2**63


def table_of(metas: Iterable[tuple[str, bytes]]) -> "pa.Table":
    """A row for each galaxy: ``id`` string, ``ra`` and ``dec`` float64 (degrees), then the extras in the order of their coming.

    A number that is not finite is null, and so is a position that is not a number. Each field's metadata has the kind of its
    values, for :func:`unite`; a column without a type is all null.

    Args:
        metas: of each galaxy the key and the contents of its .json; empty where it has none.

    Raises:
        ValueError: a .json is not JSON, or not an object.
    """
    import pyarrow as pa

    rows = [(key, _parse(meta)) for key, meta in metas]
    names = dict.fromkeys(name for _, row in rows for name in row if name not in OWN and _is_unicode(name))
    fields = [pa.field(ID, pa.string()), pa.field(RA, pa.float64()), pa.field(DEC, pa.float64())]
    columns = [
        pa.array([_name(row, key) for key, row in rows], pa.string()),
        *(pa.array([_number(row.get(name)) for _, row in rows], pa.float64()) for name in (RA, DEC)),
    ]
    for name in names:
        values = [_finite(row.get(name)) for _, row in rows]
        kind = _merge_all(map(_kind, values))
        fields.append(pa.field(name, _type(kind), metadata={_KIND: kind}))
        columns.append(_array(values, kind))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def unite(schemas: Iterable["pa.Schema"]) -> "pa.Schema":
    """The columns of all: those of :func:`table_of` whose values are of one type throughout and not null throughout. Whole
    numbers and others together are float64, if none of the whole ones is past 2^53."""
    import pyarrow as pa

    kinds: dict[str, str] = {}
    for schema in schemas:
        for field in schema:
            if field.name not in OWN:
                kinds[field.name] = _merge(kinds.get(field.name, NOTHING), field.metadata[_KIND].decode())
    fields = [pa.field(ID, pa.string()), pa.field(RA, pa.float64()), pa.field(DEC, pa.float64())]
    fields += [pa.field(name, _type(kind)) for name, kind in kinds.items() if kind not in (NOTHING, MIXED)]
    return pa.schema(fields)


def conform(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    """A table of :func:`table_of` with the columns of a united schema."""
    import pyarrow as pa

    columns = [
        table.column(field.name).cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _parse(meta: bytes) -> Mapping[str, Any]:
    content = json.loads(meta) if meta else {}
    if not isinstance(content, dict):
        raise ValueError(f"its .json is not an object but {type(content).__name__}")
    return content


def _name(row: Mapping[str, Any], key: str) -> str:
    name = row.get(ID)
    return name if isinstance(name, str) else key


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _kind(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int):
        if abs(value) <= _EXACT_LIMIT:
            return EXACT
        return WHOLE if -_WHOLE_LIMIT <= value < _WHOLE_LIMIT else MIXED
    if isinstance(value, float):
        return FLOAT
    return TEXT if isinstance(value, str) and _is_unicode(value) else MIXED


def _is_unicode(text: str) -> bool:
    """JSON lets half a surrogate pair through, which no column can hold."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _merge_all(kinds: Iterable[str]) -> str:
    merged = NOTHING
    for kind in {*kinds}:
        merged = _merge(merged, kind)
    return merged


def _merge(one: str, other: str) -> str:
    """The kind of a column that has values of both; the order in which kinds are merged makes no difference."""
    kinds = {one, other} - {NOTHING}
    if len(kinds) < 2:
        return kinds.pop() if kinds else NOTHING
    if kinds == {EXACT, WHOLE}:
        return WHOLE
    return FLOAT if kinds == {EXACT, FLOAT} else MIXED


def _type(kind: str) -> "pa.DataType":
    import pyarrow as pa

    types: Mapping[str, Callable[[], pa.DataType]] = {
        BOOLEAN: pa.bool_,
        EXACT: pa.int64,
        WHOLE: pa.int64,
        FLOAT: pa.float64,
        TEXT: pa.string,
    }
    return types.get(kind, pa.null)()


def _array(values: Sequence[Any], kind: str) -> "pa.Array":
    import pyarrow as pa

    if kind == FLOAT:
        values = [None if value is None else float(value) for value in values]
    return pa.nulls(len(values)) if kind in (NOTHING, MIXED) else pa.array(values, _type(kind))


# Rows that are written, and held, at a time.
ROW_GROUP = 65_536
# That read the tars of a folder on this machine.
THREADS = 4
# At an index from a store.
ATTEMPTS = 4


def write_catalogue(path: Path, schema: "pa.Schema", tables: Iterable["pa.Table"]) -> str:
    """Write a split's catalogue, whole or not at all; the same bytes for the same rows and the same version of pyarrow.

    Args:
        path: of the file.
        schema: from ``unite`` over the tables' schemas.
        tables: of ``table_of``, of any lengths, in storage order.

    Returns:
        SHA-256 (hex) of the file.
    """
    import pyarrow.parquet as pq

    with (
        whole_file(path, path.with_suffix(".tmp")) as file,
        # Arrow's own form of the schema would add nothing that these types need.
        pq.ParquetWriter(file, schema, version="2.6", compression="zstd", store_schema=False) as writer,
    ):
        for group in _regroup(conform(table, schema) for table in tables):
            writer.write_table(group, row_group_size=ROW_GROUP)
    with path.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def read_catalogue(manifest: Manifest, split: str, columns: Sequence[str] | None = None) -> "pa.Table":
    """The ids, positions and extras of a split's galaxies, a row a sample in storage order.

    Shards that were made before there were catalogues are read from the tars, with a progress bar; those of a store come through
    the cache.

    Args:
        manifest, split: which.
        columns: names in the order wanted; those that the data set does not have are left out. None: all, beginning with
            ``id``, ``ra``, ``dec``.

    Raises:
        UserError: no such split; a file that is missing, damaged or not the manifest's.
    """
    manifest.split(split)
    if catalogue_name(split) not in manifest.catalogues:
        table = _read_tars(manifest, split)
        return table if columns is None else table.select([name for name in columns if name in table.column_names])
    with open_catalogue(manifest, split) as file, _explain(manifest, split):
        names = file.schema_arrow.names
        chosen = names if columns is None else [name for name in columns if name in names]
        return file.read(chosen).select(chosen)


@contextlib.contextmanager
def open_catalogue(manifest: Manifest, split: str) -> Iterator[Any]:
    """A split's catalogue as a ``pyarrow.parquet.ParquetFile`` that is the manifest's; of shards in a store it is fetched now.

    Raises:
        UserError: it is missing, damaged or not the manifest's.
    """
    import pyarrow.parquet as pq

    path = _obtain(manifest, catalogue_name(split))
    with _explain(manifest, split):
        file = pq.ParquetFile(path)
    with file:
        expected = manifest.split(split).num_samples
        if file.metadata.num_rows != expected:
            raise UserError(f"{path} has {file.metadata.num_rows} rows, the manifest says {expected}; {manifest.remedy}")
        yield file


def iterate_catalogue(file: Any, lengths: Iterable[int]) -> Iterator["pa.Table"]:
    """An opened catalogue's rows in pieces of the lengths given, a row group in memory at a time."""
    import pyarrow as pa

    empty = file.schema_arrow.empty_table()
    batches, held = file.iter_batches(ROW_GROUP), empty
    for length in lengths:
        while len(held) < length and (batch := next(batches, None)) is not None:
            held = pa.concat_tables([held, pa.Table.from_batches([batch])])
        yield held.slice(0, length)
        held = held.slice(length)


def _regroup(tables: Iterable["pa.Table"]) -> Iterator["pa.Table"]:
    """The same rows in tables of ``ROW_GROUP``, so that the file does not hang on the size of the shards."""
    import pyarrow as pa

    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= ROW_GROUP:
            rows = pa.concat_tables(held)
            whole = len(rows) // ROW_GROUP * ROW_GROUP
            yield rows.slice(0, whole).combine_chunks()
            held = [rows.slice(whole).combine_chunks()]
    if sum(map(len, held)):
        yield pa.concat_tables(held).combine_chunks()


def _obtain(manifest: Manifest, name: str) -> Path:
    """The path of a catalogue whose checksum is the manifest's."""
    path, expected = manifest.dir / name, manifest.catalogues[name]
    if manifest.remote is None:
        if not path.is_file():
            raise UserError(f"{path} is missing, though the manifest names it; {manifest.remedy}")
        if _sha256(path) != expected:
            raise UserError(f"{path}: its checksum is not the manifest's; {manifest.remedy}")
        return path
    if path.is_file() and _sha256(path) != expected:
        path.unlink(missing_ok=True)  # damaged in the cache: fetched once more
    stop, store = threading.Event(), Store(manifest.remote.url)
    Cache(manifest.remote.cache.folder, manifest.remote.cache.max_bytes).obtain(
        CacheEntry(f"{manifest.dir.name}/{name}"),
        lambda target: download(store, name, target, stop=stop, sha256=bytes.fromhex(expected)),
        stop=stop,
        must=True,
    )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explain(manifest: Manifest, split: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{manifest.dir / catalogue_name(split)} is damaged ({error}); {manifest.remedy}") from error


def _read_tars(manifest: Manifest, split: str) -> "pa.Table":
    """The same table from the samples' .json, found by the index of each tar."""
    import pyarrow as pa

    stop = threading.Event()
    read, source = file_reader(manifest), _Shards(manifest, split, stop)

    def table(number: int, attempt: int = 1) -> pa.Table:
        name = shard_name(split, number).removesuffix(".tar") + ".idx"
        file = source.open(number)
        try:
            return table_of(_metas(file, parse_index(read(name, None).decode("ascii"))))
        except (ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            # Nothing but the tar says what an index should be: what a network did to it is mended by another look.
            if manifest.remote is not None and attempt < ATTEMPTS:
                return table(number, attempt + 1)
            shard = manifest.shard_location(split, number)
            raise UserError(
                f"shard {shard} or its index is damaged ({error}): see what else is with `galaxydist data check "
                f"{manifest.location}`, then {manifest.remedy}"
            ) from error

    tables: list[pa.Table] = []
    total, numbers = manifest.split(split).num_samples, range(manifest.split(split).num_shards)
    with (
        ThreadPoolExecutor(THREADS if manifest.remote is None else manifest.remote.cache.threads) as executor,
        tqdm(total=total, desc=f"catalogue of {split}", unit="img", disable=None) as bar,
    ):
        try:
            for found in executor.map(table, numbers):
                tables.append(found)
                bar.update(len(found))
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)
            raise
    schema = unite(found.schema for found in tables)
    if not tables:
        return schema.empty_table()
    rows = pa.concat_tables([conform(found, schema) for found in tables]).combine_chunks()
    if len(rows) != total:
        raise UserError(f"{manifest.location}: the indexes of {split} name {len(rows)} galaxies, the manifest {total}")
    return rows


def _metas(file: SharedFile, samples: list[list[Member]]) -> Iterator[tuple[str, bytes]]:
    """The key and the .json of each sample of a tar.

    Raises:
        ValueError: the index points elsewhere.
    """
    for members in samples:
        key = members[0].name.partition(".")[0]
        member = next((member for member in members if member.extension == "json"), members[0])
        data = os.pread(file.descriptor, BLOCK + (member.size if member.extension == "json" else 0), member.offset - BLOCK)
        check_header(data[:BLOCK], member)
        yield key, data[BLOCK:]


class _Shards:
    """A split's tars: on this machine, or through the cache, where reading the pictures will find them."""

    def __init__(self, manifest: Manifest, split: str, stop: threading.Event) -> None:
        self._manifest, self._split, self._stop = manifest, split, stop
        self._table = manifest.shards(split)
        self._folder = LocalShards(manifest, split)
        if manifest.remote is not None:
            self._store = Store(manifest.remote.url)
            self._cache = Cache(manifest.remote.cache.folder, manifest.remote.cache.max_bytes)

    def open(self, number: int) -> SharedFile:
        """A tar, whole and on this machine.

        Raises:
            UserError: naming it, if it cannot be had.
        """
        if self._manifest.remote is None:
            return self._folder.open(number)
        name, row = shard_name(self._split, number), self._table[number]
        size, sha256 = int(row["bytes"]), row["sha256"].tobytes()
        file = self._cache.obtain(
            CacheEntry(f"{self._manifest.dir.name}/{name}", size),
            lambda path: download(self._store, name, path, stop=self._stop, num_bytes=size, sha256=sha256),
            stop=self._stop,
            must=True,
        )
        assert file is not None
        return file
