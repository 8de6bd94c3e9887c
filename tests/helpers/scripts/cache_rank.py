"""One rank of several, for the tests of the cache: reads epochs from a server and compares them with local shards.

``python -m tests.helpers.scripts.cache_rank URL FOLDER CACHE MAX_BYTES RANK WORLD_SIZE STEPS`` prints a line for each batch.
"""

import sys
from itertools import islice
from pathlib import Path

import torch

from galaxydist import object_store
from galaxydist.loading.loader import DecodeOptions, RankInfo, TrainLoader
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.order import EpochOrder
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards


def read_as_rank(url: str, folder: str, cache: str, *numbers: str) -> None:
    """Read as one rank; the numbers are those of the command line."""
    max_bytes, rank, world_size, steps = map(int, numbers)
    object_store.FIRST_PAUSE_S = 0.01
    EpochOrder.__init__.__kwdefaults__["window"] = 8  # as in a survey many times the size of the usual window
    remote = open_shards(url, CacheConfig(Path(cache), max_bytes))
    settings = {"seed": 5, "batch_size": 4, "num_streams": 2, "decode": DecodeOptions(prefetch=1)}
    with (
        TrainLoader(remote, **settings, ranks=RankInfo(rank, world_size, world_size)) as found,  # type: ignore[arg-type]
        TrainLoader(read_manifest(Path(folder)), **settings, ranks=RankInfo(rank, world_size)) as expected,  # type: ignore[arg-type]
    ):
        print("open", flush=True)
        for here, there in islice(zip(expected, found, strict=True), steps):
            assert here.samples_B.tolist() == there.samples_B.tolist()
            assert torch.equal(here.images_BHWC, there.images_BHWC)
            print(here.step, flush=True)


if __name__ == "__main__":
    read_as_rank(*sys.argv[1:])
