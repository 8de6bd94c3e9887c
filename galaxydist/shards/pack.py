"""Second stage of writing: the samples of a few neighbouring shards, collected from all parts, to tars and their indexes."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import whole_file
from galaxydist.shards.catalogue import table_of
from galaxydist.shards.manifest import SHARD_ROW
from galaxydist.shards.parts import PART_ROW
from galaxydist.shards.tar import Member, end_of_tar, index_text, sample_members

if TYPE_CHECKING:
    import pyarrow as pa

# What the columns keep of one sample.
PACKED_ROW = np.dtype([("offset", "<i8"), ("length", "<i4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """A tar to be made: its name, and the places ``start`` ... ``stop - 1`` (over all splits) that it holds."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class PackTask:
    """Neighbouring shards, the parts to take them from, the picture's extension, where the tars go, and the places of the storage
    order (ascending) that stay empty, since their pictures are left out: those after them move up."""

    shards: tuple[Shard, ...]
    parts: tuple[Path, ...]
    extension: str
    out_dir: Path
    packed_dir: Path
    gaps: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Record:
    key: str
    image: bytes
    meta: bytes
    label: int


def pack_shards(task: PackTask) -> int:
    """Write the shards of a task, but those that an earlier call finished.

    Returns:
        the number of samples in them.
    """
    missing = [shard for shard in task.shards if not packed_path(task.packed_dir, shard).exists()]
    if missing:
        records = _collect(task.parts, task.gaps, missing[0].start, missing[-1].stop)
        for shard in missing:
            _write_shard(shard, (records.pop(place) for place in range(shard.start, shard.stop)), task)
    return task.shards[-1].stop - task.shards[0].start


def packed_path(packed_dir: Path, shard: Shard) -> Path:
    """Where a finished shard's rows of the columns wait until all are there."""
    return packed_dir / f"{shard.name}.npz"


def read_packed_catalogue(packed_dir: Path, shard: Shard) -> "pa.Table":
    """A finished shard's rows of the catalogue, before those of other shards are known (see ``catalogue_table.table_of``)."""
    import pyarrow as pa

    with np.load(packed_path(packed_dir, shard)) as packed, pa.ipc.open_stream(packed["catalogue"].tobytes()) as stream:
        return stream.read_all()


def read_packed(packed_dir: Path, shard: Shard) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """A finished shard's row of the shard table and its samples' rows of the columns."""
    with np.load(packed_path(packed_dir, shard)) as packed:
        return packed["shard"], packed["samples"]


def _collect(parts: Sequence[Path], gaps: NDArray[np.int64], start: int, stop: int) -> dict[int, _Record]:
    """The samples of places ``start`` ... ``stop - 1``: one read from each part, since a part is sorted by place."""
    records: dict[int, _Record] = {}
    for part in parts:
        table: NDArray[np.void] = np.load(part.with_suffix(".npy"))
        assert table.dtype == PART_ROW
        table["place"] -= np.searchsorted(gaps, table["place"])
        low, high = np.searchsorted(table["place"], (start, stop))
        if low == high:
            continue
        rows = table[low:high]
        first = int(rows["offset"][0])
        with part.open("rb") as file:
            file.seek(first)
            last = rows[-1]
            data = file.read(int(last["offset"]) + int(last["key"]) + int(last["image"]) + int(last["meta"]) - first)
        for place, offset, key, image, meta, label, _ in rows.tolist():
            at = offset - first
            ends = at + key, at + key + image, at + key + image + meta
            records[place] = _Record(data[at : ends[0]].decode(), data[ends[0] : ends[1]], data[ends[1] : ends[2]], label)
    return records


def _write_shard(shard: Shard, records: Iterator[_Record], task: PackTask) -> None:
    path = task.out_dir / shard.name
    samples: list[list[Member]] = []
    metas: list[tuple[str, bytes]] = []
    rows = np.zeros(shard.stop - shard.start, PACKED_ROW)
    digest, length = hashlib.sha256(), 0
    with whole_file(path, path.with_name(path.name + ".tmp")) as file:
        for number, record in enumerate(records):
            contents = {task.extension: record.image, "json": record.meta}
            if record.label >= 0:
                contents["cls"] = str(record.label).encode()
            members, pieces = sample_members(record.key, contents, length)
            block = b"".join(pieces)
            digest.update(block)
            file.write(block)
            length += len(block)
            image = next(member for member in members if member.extension == task.extension)
            rows[number] = (image.offset, image.size, record.label)
            samples.append(members)
            metas.append((record.key, record.meta))
        end = end_of_tar(length)
        digest.update(end)
        file.write(end)
    index = path.with_suffix(".idx")
    with whole_file(index, index.with_name(index.name + ".tmp")) as file:
        file.write(index_text(samples).encode("ascii"))
    table = np.zeros(1, SHARD_ROW)
    table[0] = (len(samples), length + len(end), np.frombuffer(digest.digest(), np.uint8))
    packed = packed_path(task.packed_dir, shard)
    with whole_file(packed, packed.with_name(packed.name + ".tmp")) as file:
        np.savez(file, shard=table, samples=rows, catalogue=_catalogue(metas))


def _catalogue(metas: list[tuple[str, bytes]]) -> NDArray[np.uint8]:
    """The rows of the catalogue as the bytes of an Arrow stream."""
    import pyarrow as pa

    table, sink = table_of(metas), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)
