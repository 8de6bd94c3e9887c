"""Layout of shards before writing: the storage index of every galaxy, and the tasks of both stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import Stream, hash64
from galaxydist.galaxy import DivisibleSurvey, Survey
from galaxydist.shards.manifest import EXTENSIONS, shard_name
from galaxydist.shards.writer.encode import Encoding
from galaxydist.shards.writer.stages import PackTask, PartTask, Shard

# Bytes that a worker holds in memory at a time.
PART_BYTES = 64 * 1024 * 1024

# The shards of each split.
Layout = dict[str, list[Shard]]


@dataclass(frozen=True)
class Settings:
    """The user's settings of the writer; together with the source's hash they determine every byte."""

    encoding: str
    quality: int
    image_size: int | None
    shard_size: int | None
    seed: int


def ordered_splits(survey: Survey) -> list[tuple[str, NDArray[np.int64]]]:
    """Return the splits and their rows, training first."""
    names = sorted(survey.splits, key=lambda name: (name != "train", [*survey.splits].index(name)))
    return [(name, np.asarray(survey.splits[name], np.int64)) for name in names]


def shard_layout(survey: Survey, settings: Settings, left_out: NDArray[np.int64]) -> Layout:
    """Return the shards of each split, of nearly equal size; storage indexes continue over the splits, without rows left out."""
    layout: Layout = {}
    start = 0
    for name, all_rows in ordered_splits(survey):
        rows = all_rows[~np.isin(all_rows, left_out)]
        size = settings.shard_size or default_shard_size(rows.size)
        few, more = divmod(rows.size, max(1, -(-rows.size // size)))
        layout[name] = []
        for number in range(-(-rows.size // size)):
            stop = start + few + (number < more)
            layout[name].append(Shard(shard_name(name, number), start, stop))
            start = stop
    return layout


def default_shard_size(num_samples: int) -> int:
    """Return the default number of galaxies in a shard: 64 to 1,024, so that a small split still has several shards."""
    return min(max(-(-num_samples // 16), 64), 1024)


def storage_order(survey: Survey, seed: int) -> NDArray[np.int64]:
    """Return the storage index of every row, -1 for rows of no split; each split is sorted by a hash."""
    indexes = np.full(len(survey.labels), -1, np.int64)
    start = 0
    for number, (_, rows) in enumerate(ordered_splits(survey)):
        order = np.argsort(hash64(seed, number, rows, Stream.STORAGE), kind="stable")
        indexes[rows[order]] = start + np.arange(rows.size)
        start += rows.size
    return indexes


def part_tasks(
    survey: Survey, encoding: Encoding, indexes: NDArray[np.int64], parts_dir: Path, workers: int, *, most_damaged: int
) -> list[PartTask]:
    """Divide the rows into tasks of whole slabs, small enough for a worker's memory and for sharing among workers."""
    raw_bytes = encoding.image_size**2 * 3
    rows = PART_BYTES // (raw_bytes if encoding.name == "raw" else max(1, raw_bytes // 4))
    rows = min(rows, -(-len(indexes) // (4 * workers)))
    rows = max(1, -(-rows // survey.slab_length)) * survey.slab_length
    num_train = len(survey.splits["train"])
    return [
        PartTask(
            survey.part(start, stop) if isinstance(survey, DivisibleSurvey) else survey,
            encoding,
            start,
            stop,
            indexes[start:stop],
            num_train,
            parts_dir / f"{start:012d}-{stop:012d}.bin",
            most_damaged,
        )
        for start in range(0, len(indexes), rows)
        for stop in [min(start + rows, len(indexes))]
    ]


def pack_tasks(layout: Layout, parts: Sequence[Path], encoding: str, work_dir: Path, gaps: NDArray[np.int64]) -> list[PackTask]:
    """Group the shards into tasks of about ``PART_BYTES``, which limits each worker's memory."""
    written = sum(part.stat().st_size for part in parts)
    total = sum(shard.stop - shard.start for shards in layout.values() for shard in shards)
    most = max(1, PART_BYTES * total // max(1, written))
    groups: list[list[Shard]] = []
    for shard in (shard for shards in layout.values() for shard in shards):
        if not groups or shard.stop - groups[-1][0].start > most:
            groups.append([])
        groups[-1].append(shard)
    return [PackTask(tuple(group), tuple(parts), EXTENSIONS[encoding], work_dir, work_dir / "packed", gaps) for group in groups]
