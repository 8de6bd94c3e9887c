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
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from galaxydist.atomic_files import whole_file
from galaxydist.errors import UserError
from galaxydist.shards.cache import Cache, Wanted
from galaxydist.shards.catalogue_table import conform, table_of, unite
from galaxydist.shards.manifest import Manifest, catalogue_name, shard_name
from galaxydist.shards.open import file_reader
from galaxydist.shards.openfile import OpenFile
from galaxydist.shards.source import FolderSource
from galaxydist.shards.store import Store
from galaxydist.shards.tar import BLOCK, Member, check_header, parse_index
from galaxydist.shards.transfer import transfer

if TYPE_CHECKING:
    import pyarrow as pa

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
        Wanted(f"{manifest.dir.name}/{name}"),
        lambda target: transfer(store, name, target, stop=stop, sha256=bytes.fromhex(expected)),
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


def _metas(file: OpenFile, samples: list[list[Member]]) -> Iterator[tuple[str, bytes]]:
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
        self._folder = FolderSource(manifest, split)
        if manifest.remote is not None:
            self._store = Store(manifest.remote.url)
            self._cache = Cache(manifest.remote.cache.folder, manifest.remote.cache.max_bytes)

    def open(self, number: int) -> OpenFile:
        """A tar, whole and on this machine.

        Raises:
            UserError: naming it, if it cannot be had.
        """
        if self._manifest.remote is None:
            return self._folder.open(number)
        name, row = shard_name(self._split, number), self._table[number]
        size, sha256 = int(row["bytes"]), row["sha256"].tobytes()
        file = self._cache.obtain(
            Wanted(f"{self._manifest.dir.name}/{name}", size),
            lambda path: transfer(self._store, name, path, stop=self._stop, num_bytes=size, sha256=sha256),
            stop=self._stop,
            must=True,
        )
        assert file is not None
        return file
