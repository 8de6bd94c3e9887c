"""Shards that are damaged in one place each, and how to find that place."""

from pathlib import Path

import numpy as np

from galaxydist.shards.manifest import Manifest
from galaxydist.shards.tar import parse_index


def keys(manifest: Manifest, split: str) -> list[str]:
    """The keys of a split's galaxies, in storage order."""
    return [
        sample[0].name.partition(".")[0]
        for number in range(manifest.splits[split].num_shards)
        for sample in parse_index(manifest.shard_path(split, number).with_suffix(".idx").read_text())
    ]


def shard_of(manifest: Manifest, split: str, sample: int) -> Path:
    """The shard that holds a stored sample."""
    ends = np.cumsum(manifest.shards(split)["samples"])
    return manifest.shard_path(split, int(np.searchsorted(ends, sample, side="right")))


def break_image(manifest: Manifest, split: str, sample: int) -> tuple[Path, str]:
    """Overwrite the second half of a JPEG, or a PNG's header (what stands in its middle is not always missed); shard and key."""
    shard = shard_of(manifest, split, sample)
    offset, length = int(manifest.offsets(split)[sample]), int(manifest.lengths(split)[sample])
    first = length // 2 if manifest.encoding == "jpeg" else 8
    with shard.open("r+b") as file:
        file.seek(offset + first)
        file.write(b"\xff\xd9" + b"\0" * (length - first - 2))
    return shard, keys(manifest, split)[sample]


def truncate(manifest: Manifest, split: str, sample: int, num_bytes: int = 0) -> Path:
    """Cut the shard of a sample so that ``num_bytes`` of its image are left."""
    shard = shard_of(manifest, split, sample)
    with shard.open("r+b") as file:
        file.truncate(int(manifest.offsets(split)[sample]) + num_bytes)
    return shard
