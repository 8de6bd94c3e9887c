"""A few pictures of a split by their sample numbers, read where they lie; of shards in a store only those that hold them come."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from galaxydist.shards.decode import Picture, PictureReader, Pixels
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.prefetcher import open_source
from galaxydist.shards.shard_usage import evaluation_uses, lengthened


def read_chosen(
    manifest: Manifest, split: str, samples: NDArray[np.int64], factors: Sequence[int] = (1,)
) -> Iterator[tuple[int, tuple[Pixels, ...]]]:
    """Decode pictures.

    Args:
        manifest, split: of which.
        samples: stored sample numbers, ascending, each once.
        factors: decode each picture once for every one of these, by so much smaller (see ``decode.reduction``).

    Returns:
        in turn: sample number, and for each factor H x W x 3 uint8 pixels.

    Raises:
        UserError: naming shard and galaxy, what cannot be read.
    """
    if samples.size == 0:
        return
    sizes = manifest.shards(split)["samples"]
    uses = evaluation_uses(sizes, 1, 0, 1)  # batches of one sample: the steps are the sample numbers
    needed = np.unique(np.searchsorted(np.cumsum(sizes), samples, side="right"))
    uses = uses[np.isin(uses["shard"], needed)]
    source = open_source(manifest, split, iter([uses]), iter([lengthened(uses, 1)]), steps_ahead=1, why="a few pictures")
    readers = [PictureReader(manifest, split, factor, source) for factor in factors]
    try:
        for picture in readers[0].locate(samples):
            yield picture.sample, tuple(_read(reader, picture) for reader in readers)
            source.advance(picture.sample)
    finally:
        source.close()


def _read(reader: PictureReader, picture: Picture) -> Pixels:
    pixels = np.empty((reader.size, reader.size, 3), np.uint8)
    reader.read_into(picture, pixels)
    return pixels
