"""Two stages of writing shards: encode rows of a survey to parts, then pack parts into tars.

A part is a range of consecutive rows of the survey. Its file holds the encoded samples sorted by storage index, so that the
second stage reads a shard's samples from each part in one piece. Each worker holds one part in memory, for a survey of any size.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galaxydist.atomic_files import whole_file
from galaxydist.errors import DamagedImageError
from galaxydist.galaxy import Survey
from galaxydist.shards.catalogue import table_of
from galaxydist.shards.manifest import SHARD_ROW
from galaxydist.shards.tar import Member, end_of_tar, index_text, sample_members
from galaxydist.shards.writer.damaged import DamagedImage, TooManyDamagedError, read_rows
from galaxydist.shards.writer.encode import Encoding, Pixels, encode_galaxy

# One sample in a part: its storage index (over all splits), the offset of its record, and the lengths of the record's pieces.
PART_ROW = np.dtype(
    [("index", "<i8"), ("offset", "<i8"), ("key", "<i4"), ("image", "<i4"), ("meta", "<i4"), ("label", "<i4"), ("hash", "<u8")]
)


RGB = tuple[float, float, float]
# Exact sums over training pixels, (7,) int64: count, R G B sums, R G B sums of squares.
PixelSums = NDArray[np.int64]


@dataclass(frozen=True)
class PartTask:
    """First-stage task for one part: rows ``start`` ... ``stop - 1`` of a survey.

    ``indexes`` holds each row's storage index, or -1 to skip it; training samples have indexes below ``num_train``. A part with
    more than ``most_damaged`` damaged images is abandoned.
    """

    survey: Survey
    encoding: Encoding
    start: int
    stop: int
    indexes: NDArray[np.int64]
    num_train: int
    path: Path
    most_damaged: int


def pixel_sums(pixels: Pixels) -> PixelSums:
    """Return the number of an image's pixels, and the sums and the sums of squares of its channels."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    sums = np.add.reduce(rows, axis=0, dtype=np.uint32).reshape(width, channels).sum(0, dtype=np.int64)
    squared = np.multiply(rows, rows, dtype=np.uint16)
    squares = np.add.reduce(squared, axis=0, dtype=np.uint32).reshape(width, channels).sum(0, dtype=np.int64)
    return np.array([height * width, *sums, *squares])


def channel_statistics(total: PixelSums) -> tuple[RGB, RGB]:
    """Return the mean and the standard deviation of each channel, full scale 1."""
    count, *sums = total.tolist()  # Python's integers: exact
    count = max(1, count)
    variances = [(square - plain * plain / count) / count for plain, square in zip(sums[:3], sums[3:], strict=True)]
    mean = tuple(round(plain / count / 255, 6) for plain in sums[:3])
    std = tuple(round(max(variance, 0.0) ** 0.5 / 255, 6) for variance in variances)
    return cast(RGB, mean), cast(RGB, std)


def write_part(task: PartTask) -> int:
    """Encode a part, unless an earlier call finished it; its .json is written last and marks it as complete.

    Returns:
        the number of rows that the part covers.

    Raises:
        TooManyDamagedError: more images are damaged than the task allows. The damaged images found so far are recorded.
    """
    finished = task.path.with_suffix(".json")
    if finished.exists():
        return task.stop - task.start
    records: list[tuple[tuple[int, ...], bytes]] = []
    damaged: list[DamagedImage] = []
    sums, sides = np.zeros(7, np.int64), set[int]()
    galaxies = read_rows(task.survey, task.start, task.stop)
    for row, galaxy, index in zip(range(task.start, task.stop), galaxies, task.indexes.tolist(), strict=True):
        if index < 0:
            continue
        try:
            if isinstance(galaxy, DamagedImageError):
                raise galaxy
            image, meta, pixels, side = encode_galaxy(galaxy, task.encoding, len(task.survey.class_names))
        except DamagedImageError as error:
            damaged.append(DamagedImage(row, index, error.reason))
            if len(damaged) > task.most_damaged:
                write_json(task.path.with_suffix(".damaged.json"), [asdict(image) for image in damaged])
                raise TooManyDamagedError from None
            continue
        sides.add(side)
        if index < task.num_train:
            sums += pixel_sums(pixels)
        key = galaxy.id.encode()
        label = -1 if galaxy.label is None else galaxy.label
        records.append(((index, len(key), len(image), len(meta), label, key_hash(key)), key + image + meta))
    records.sort(key=lambda record: record[0][0])
    _write_records(task.path, records)
    extent = [min(sides), max(sides)] if sides else []
    write_json(finished, {"sums": sums.tolist(), "sides": extent, "damaged": [asdict(image) for image in damaged]})
    return task.stop - task.start


def write_json(path: Path, content: Any) -> None:
    """Write a file of the work folder; it appears under its name once it is complete."""
    with whole_file(path, path.with_name(path.name + ".tmp")) as file:
        file.write(json.dumps(content).encode())


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file; it appears under its name once it is complete."""
    with whole_file(path, path.with_name(path.name + ".tmp")) as file:
        np.save(file, array)


def _write_records(path: Path, records: list[tuple[tuple[int, ...], bytes]]) -> None:
    rows = np.zeros(len(records), PART_ROW)
    offset = 0
    with whole_file(path, path.with_name(path.name + ".tmp")) as file:
        for number, ((index, *lengths), record) in enumerate(records):
            rows[number] = (index, offset, *lengths)
            file.write(record)
            offset += len(record)
    write_array(path.with_suffix(".npy"), rows)


def read_part_sums(path: Path) -> PixelSums:
    """Return the pixel sums of a finished part."""
    return np.array(json.loads(path.with_suffix(".json").read_bytes())["sums"], np.int64)


def read_source_sides(paths: Sequence[Path]) -> tuple[int, int]:
    """Return the smallest and the largest shorter side of the images of finished parts, in pixels before resampling."""
    sides = [side for path in paths for side in json.loads(path.with_suffix(".json").read_bytes())["sides"]]
    return min(sides), max(sides)


def read_damaged(path: Path) -> list[DamagedImage]:
    """Return the damaged images found in a part, finished or abandoned, in the order of their rows."""
    abandoned, finished = path.with_suffix(".damaged.json"), path.with_suffix(".json")
    if finished.exists():
        found = json.loads(finished.read_bytes())["damaged"]
    else:
        found = json.loads(abandoned.read_bytes()) if abandoned.exists() else []
    return [DamagedImage(**image) for image in found]


def key_hash(key: bytes) -> int:
    """Return a 64-bit hash of a key; among ten million keys, two share a hash with a probability of the order of 10^-6."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


# Second stage: collect the samples of a few neighbouring shards from all parts, and write tars and indexes.

# One sample's values in the columns.
PACKED_ROW = np.dtype([("offset", "<i8"), ("length", "<i4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """A tar to write: its name, and its storage indexes ``start`` ... ``stop - 1`` (over all splits)."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class PackTask:
    """Second-stage task: neighbouring shards to write to ``out_dir`` from the samples in ``parts``.

    ``gaps`` are the storage indexes (ascending) of images that are left out; later indexes are lowered by their number.
    """

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
    """Write the shards of a task that no earlier call finished.

    Returns:
        the number of samples in all shards of the task.
    """
    missing = [shard for shard in task.shards if not packed_path(task.packed_dir, shard).exists()]
    if missing:
        records = _collect(task.parts, task.gaps, missing[0].start, missing[-1].stop)
        for shard in missing:
            _write_shard(shard, (records.pop(index) for index in range(shard.start, shard.stop)), task)
    return task.shards[-1].stop - task.shards[0].start


def packed_path(packed_dir: Path, shard: Shard) -> Path:
    """Return the path of a finished shard's column rows, kept until all shards are finished."""
    return packed_dir / f"{shard.name}.npz"


def read_packed_catalogue(packed_dir: Path, shard: Shard) -> pa.Table:
    """Return a finished shard's catalogue rows, as ``catalogue.table_of`` made them."""
    with np.load(packed_path(packed_dir, shard)) as packed, pa.ipc.open_stream(packed["catalogue"].tobytes()) as stream:
        return stream.read_all()


def read_packed(packed_dir: Path, shard: Shard) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Return a finished shard's row of the shard table, and its samples' rows of the columns."""
    with np.load(packed_path(packed_dir, shard)) as packed:
        return packed["shard"], packed["samples"]


def _collect(parts: Sequence[Path], gaps: NDArray[np.int64], start: int, stop: int) -> dict[int, _Record]:
    """Return the samples of storage indexes ``start`` ... ``stop - 1``, with one read per part, since parts are sorted."""
    records: dict[int, _Record] = {}
    for part in parts:
        table: NDArray[np.void] = np.load(part.with_suffix(".npy"))
        assert table.dtype == PART_ROW
        table["index"] -= np.searchsorted(gaps, table["index"])
        low, high = np.searchsorted(table["index"], (start, stop))
        if low == high:
            continue
        rows = table[low:high]
        first = int(rows["offset"][0])
        with part.open("rb") as file:
            file.seek(first)
            last = rows[-1]
            data = file.read(int(last["offset"]) + int(last["key"]) + int(last["image"]) + int(last["meta"]) - first)
        for index, offset, *lengths, label, _ in rows.tolist():
            ends = np.cumsum([offset - first, *lengths]).tolist()
            key, image, meta = (data[begin:end] for begin, end in itertools.pairwise(ends))
            records[index] = _Record(key.decode(), image, meta, label)
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
    """Return the catalogue rows as the bytes of an Arrow stream."""
    table, sink = table_of(metas), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)
