"""Shards for exploration: of a huge set only the samples that are wanted are read, of shards in a store only a few shards."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import DamagedPictureError, UserError
from galaxydist.evaluation.exploration.population import Picture, Population, Position, Positions, chance_order
from galaxydist.galaxy import EncodedImage
from galaxydist.shards.manifest import Manifest, shard_name
from galaxydist.shards.remote.cache import OpenFile
from galaxydist.shards.remote.open import FileReader, file_reader
from galaxydist.shards.tar import Member, parse_index
from galaxydist.shards.writer.encode import decode_picture

# More records than these are not read for the sake of positions: each costs a read of its own.
RECORDS_LIMIT = 100_000
# Of shards in a store so many galaxies are fetched for each that is wanted, so that rare classes are among them.
_FETCHED_FOR_ONE = 2

# (offset, bytes wanted) -> the bytes of a tar.
_Fetch = Callable[[int, int], bytes]


def shard_population(manifest: Manifest) -> Population:
    """The galaxies of a folder of shards, split by split in the order of storage."""
    names = tuple(name for name, split in manifest.splits.items() if split.num_samples)
    labels = [np.asarray(manifest.labels(name), np.int64) for name in names]
    return Population(
        dataset=manifest.dataset,
        variant=manifest.variant,
        kind=f"shards ({manifest.encoding}, {manifest.image_size} pixels)",
        location=manifest.location,
        source_hash=manifest.hash,
        class_names=manifest.class_names,
        labels_N=np.concatenate([*labels, np.empty(0, np.int64)]),
        split_names=names,
        split_N=np.repeat(np.arange(len(names)), [len(part) for part in labels]).astype(np.int8),
        source=ShardSource(manifest, names),
    )


@dataclass(frozen=True)
class _Shard:
    """A shard: its split and number there, and the rows of the population that it holds."""

    split: str
    number: int
    start: int
    stop: int


class ShardSource:
    """Shards as a :class:`~galaxydist.evaluation.exploration.population.Source`."""

    def __init__(self, manifest: Manifest, splits: tuple[str, ...]) -> None:
        self._manifest = manifest
        self._read: FileReader = file_reader(manifest)
        tables = [manifest.shards(split)["samples"] for split in splits]
        ends = np.cumsum(np.concatenate([*tables, np.empty(0, np.int64)])).astype(np.int64)
        places = [(split, number) for split, table in zip(splits, tables, strict=True) for number in range(len(table))]
        self._ends = ends
        self._shards = [
            _Shard(split, number, int(start), int(end))
            for (split, number), start, end in zip(places, [0, *ends[:-1]], ends, strict=True)
        ]

    def pictures(self, rows: NDArray[np.int64]) -> Iterator[Picture]:
        """See ``Source``."""
        for shard, wanted in self._by_shard(rows):
            try:
                records = self._open(shard)
            except UserError as error:
                for row in wanted:
                    yield Picture(row, f"{shard.split} {row - shard.start}", None, Position(), str(error))
                continue
            for row in wanted:
                yield self._picture(records, shard, row)

    def positions(self) -> Positions | None:
        """See ``Source``."""
        num = int(self._ends[-1]) if len(self._ends) else 0
        if self._manifest.remote is not None or num > RECORDS_LIMIT:
            return None
        found = np.full((num, 3), np.nan)
        for shard, wanted in self._by_shard(np.arange(num)):
            try:
                records = self._open(shard)
            except UserError:
                continue  # named where its pictures are wanted
            for row in wanted:
                position = records.position(row - shard.start)
                found[row] = position.ra, position.dec, position.redshift
        return Positions(np.arange(num), *found.T)

    def candidates(self, number: int, seed: int) -> NDArray[np.bool_] | None:
        """See ``Source``: shards hold galaxies in random order, so a few whole shards are a random choice."""
        if self._manifest.remote is None:
            return None
        allowed_N, left = np.zeros(int(self._ends[-1]), np.bool_), _FETCHED_FOR_ONE * number
        for place in chance_order(np.arange(len(self._shards)), seed).tolist():
            if left <= 0:
                break
            shard = self._shards[place]
            allowed_N[shard.start : shard.stop] = True
            left -= shard.stop - shard.start
        return allowed_N

    def _by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[_Shard, list[int]]]:
        places = np.searchsorted(self._ends, rows, side="right")
        for place in np.unique(places).tolist():
            yield self._shards[place], rows[places == place].tolist()

    def _open(self, shard: _Shard) -> "_Records":
        """Raises:
        UserError: the shard, or its index, cannot be read.
        """
        name = shard_name(shard.split, shard.number)
        location = self._manifest.shard_location(shard.split, shard.number)
        try:
            index = parse_index(self._read(name.removesuffix(".tar") + ".idx", None).decode("ascii"))
            if self._manifest.remote is not None:
                data = self._read(name, self._manifest.shards(shard.split)[shard.number]["sha256"].tobytes())
                return _Records(index, lambda offset, size: data[offset : offset + size])
            file = OpenFile.at(str(self._manifest.shard_path(shard.split, shard.number)))
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"shard {location} cannot be read ({error}); {self._manifest.remedy}") from None
        return _Records(index, lambda offset, size: os.pread(file.descriptor, size, offset))

    def _picture(self, records: "_Records", shard: _Shard, row: int) -> Picture:
        number = row - shard.start
        key, position = records.key(number) or f"number {number}", records.position(number)
        try:
            image = self._decode(records.content(number, self._manifest.extension))
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).removeprefix("galaxy picture: ")
            location = self._manifest.shard_location(shard.split, shard.number)
            return Picture(row, key, None, position, f"shard {location}, galaxy {key}: {reason}")
        return Picture(row, key, image, position)

    def _decode(self, data: bytes) -> NDArray[np.uint8]:
        """Raises:
        ValueError: it is not a picture of the manifest's size.
        """
        if self._manifest.encoding == "raw":
            pixels = np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        else:
            try:
                pixels = decode_picture(EncodedImage(data, self._manifest.encoding))
            except DamagedPictureError as error:
                raise ValueError(error.reason) from None
        size = self._manifest.image_size
        if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"its picture is {pixels.shape} of {pixels.dtype}, the manifest says {size} x {size} pixels")
        return pixels


@dataclass(frozen=True)
class _Records:
    """The samples of an opened shard."""

    index: list[list[Member]]
    fetch: _Fetch

    def key(self, number: int) -> str:
        return self.index[number][0].name.partition(".")[0] if number < len(self.index) else ""

    def content(self, number: int, extension: str) -> bytes:
        """Raises:
        ValueError: the index or the tar ends before.
        """
        members = {member.extension: member for member in self.index[number]} if number < len(self.index) else {}
        if extension not in members:
            raise ValueError(f"the shard's index has no .{extension} of it")
        member = members[extension]
        data = self.fetch(member.offset, member.size)
        if len(data) != member.size:
            raise ValueError("the shard is cut short")
        return data

    def position(self, number: int) -> Position:
        """What its .json says; unknown where there is none."""
        try:
            record: dict[str, Any] = json.loads(self.content(number, "json"))
            values = [record.get(name) for name in ("ra", "dec", "redshift")]
        except (ValueError, AttributeError, OSError):
            return Position()
        return Position(*(float(value) if isinstance(value, int | float) else np.nan for value in values))
