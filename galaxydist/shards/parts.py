"""First stage of writing: rows of the source, in storage order, to encoded samples sorted by where they will be stored.

A part is a run of consecutive rows. Its file holds their samples in the order of their final places, so that the second stage
reads what a shard needs from each part in one piece; memory stays at one part a worker, whatever the source's size.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import whole_file
from galaxydist.errors import DamagedPictureError
from galaxydist.galaxy import Survey
from galaxydist.shards.damaged import Damaged, TooManyDamagedError, read_rows
from galaxydist.shards.encode import Encoding, Pixels, encode_galaxy

# One sample in a part: its final place (over all splits), where its record starts, and the lengths of the record's pieces.
PART_ROW = np.dtype(
    [("place", "<i8"), ("offset", "<i8"), ("key", "<i4"), ("image", "<i4"), ("meta", "<i4"), ("label", "<i4"), ("hash", "<u8")]
)


RGB = tuple[float, float, float]


@dataclass(frozen=True)
class PartTask:
    """Rows ``start`` ... ``stop - 1``; ``places`` has each one's final place or -1; training's are below ``num_train``. With more
    than ``most_damaged`` damaged pictures the part is given up."""

    survey: Survey
    encoding: Encoding
    start: int
    stop: int
    places: NDArray[np.int64]
    num_train: int
    path: Path
    most_damaged: int


@dataclass
class PixelSums:
    """Exact sums over training pixels, by channel: 3 integers each."""

    count: int = 0
    sums: tuple[int, ...] = (0, 0, 0)
    squares: tuple[int, ...] = (0, 0, 0)

    def add(self, pixels: Pixels) -> None:
        height, width, channels = pixels.shape
        rows = pixels.reshape(height, width * channels)
        sums = np.add.reduce(rows, axis=0, dtype=np.uint32).reshape(width, channels).sum(0, dtype=np.int64)
        squared = np.multiply(rows, rows, dtype=np.uint16)
        squares = np.add.reduce(squared, axis=0, dtype=np.uint32).reshape(width, channels).sum(0, dtype=np.int64)
        self.merge(PixelSums(height * width, tuple(sums.tolist()), tuple(squares.tolist())))

    def merge(self, other: "PixelSums") -> None:
        self.count += other.count
        self.sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        self.squares = tuple(a + b for a, b in zip(self.squares, other.squares, strict=True))

    def mean_std(self) -> tuple[RGB, RGB]:
        """Mean and standard deviation by channel, full scale being 1."""
        count = max(1, self.count)
        mean = [s / count for s in self.sums]
        variance = [(q - s * s / count) / count for s, q in zip(self.sums, self.squares, strict=True)]
        red, green, blue = (round(m / 255, 6) for m in mean)
        deviation_red, deviation_green, deviation_blue = (round(max(v, 0.0) ** 0.5 / 255, 6) for v in variance)
        return (red, green, blue), (deviation_red, deviation_green, deviation_blue)


def write_part(task: PartTask) -> int:
    """Encode a part, unless an earlier call finished it; its .json stands last and says that it is whole.

    Returns:
        the number of rows it covers.

    Raises:
        TooManyDamagedError: it holds more damaged pictures than the task allows. What was found of them is kept.
    """
    done = task.path.with_suffix(".json")
    if done.exists():
        return task.stop - task.start
    records: list[tuple[tuple[int, ...], bytes]] = []
    damaged: list[Damaged] = []
    sums = PixelSums()
    rows = zip(range(task.start, task.stop), read_rows(task.survey, task.start, task.stop), task.places.tolist(), strict=True)
    for row, galaxy, place in rows:
        if place < 0:
            continue
        try:
            if isinstance(galaxy, DamagedPictureError):
                raise galaxy
            image, meta, pixels = encode_galaxy(galaxy, task.encoding, len(task.survey.class_names))
        except DamagedPictureError as error:
            damaged.append(Damaged(row, place, error.reason))
            if len(damaged) > task.most_damaged:
                _write_json(task.path.with_suffix(".damaged.json"), [asdict(picture) for picture in damaged])
                raise TooManyDamagedError from None
            continue
        if place < task.num_train:
            sums.add(pixels)
        key = galaxy.id.encode()
        label = -1 if galaxy.label is None else galaxy.label
        records.append(((place, len(key), len(image), len(meta), label, key_hash(key)), key + image + meta))
    records.sort(key=lambda record: record[0][0])
    _write_records(task.path, records)
    content = {"count": sums.count, "sums": sums.sums, "squares": sums.squares}
    _write_json(done, {**content, "damaged": [asdict(picture) for picture in damaged]})
    return task.stop - task.start


def _write_json(path: Path, content: Any) -> None:
    with whole_file(path, path.with_name(path.name + ".tmp")) as file:
        file.write(json.dumps(content).encode())


def _write_records(path: Path, records: list[tuple[tuple[int, ...], bytes]]) -> None:
    rows = np.zeros(len(records), PART_ROW)
    offset = 0
    with whole_file(path, path.with_name(path.name + ".tmp")) as file:
        for number, ((place, *lengths), record) in enumerate(records):
            rows[number] = (place, offset, *lengths)
            file.write(record)
            offset += len(record)
    table = path.with_suffix(".npy")
    with whole_file(table, table.with_name(table.name + ".tmp")) as file:
        np.save(file, rows)


def read_part_sums(path: Path) -> PixelSums:
    """The pixel sums of a finished part."""
    content = json.loads(path.with_suffix(".json").read_bytes())
    return PixelSums(content["count"], tuple(content["sums"]), tuple(content["squares"]))


def read_damaged(path: Path) -> list[Damaged]:
    """The damaged pictures of a part, in the order of their rows, as far as it was written."""
    given_up, done = path.with_suffix(".damaged.json"), path.with_suffix(".json")
    if done.exists():
        found = json.loads(done.read_bytes())["damaged"]
    else:
        found = json.loads(given_up.read_bytes()) if given_up.exists() else []
    return [Damaged(**picture) for picture in found]


def key_hash(key: bytes) -> int:
    """64 bits that two different keys of one data set share with a chance of 10^-6 at ten million keys."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
