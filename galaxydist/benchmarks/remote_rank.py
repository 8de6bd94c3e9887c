"""One process of ``galaxydist bench remote``: reads its part of an epoch as training does, and says what it waited for.

Run as ``python -m galaxydist.benchmarks.remote_rank JSON``; prints a line of JSON.
"""

import dataclasses
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from galaxydist.loading.loader import TrainReader
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards


@dataclass(frozen=True)
class Job:
    """What a process reads.

    Args:
        location: path or URL of the shards.
        cache_dir, cache_bytes: of the node.
        rank, world_size: this process.
        batch_size, num_streams: of the run.
        step_s: what the consumer takes for a batch.
    """

    location: str
    cache_dir: str
    cache_bytes: int
    rank: int
    world_size: int
    batch_size: int
    num_streams: int
    step_s: float


@dataclass(frozen=True)
class Reading:
    """How an epoch went.

    Args:
        open_s: until the manifest and the columns were there.
        first_s: from there to the first batch.
        wait_s: spent waiting for all later batches.
        epoch_s: from the first batch to the end.
        digest: of all pictures and their numbers, in the order in which they came.
    """

    open_s: float
    first_s: float
    wait_s: float
    epoch_s: float
    digest: str


def read_epoch(job: Job) -> Reading:
    """Read one epoch."""
    started = time.perf_counter()
    manifest = open_shards(job.location, CacheConfig(Path(job.cache_dir), job.cache_bytes))
    opened = time.perf_counter()
    digest = hashlib.sha256()
    first_s = wait_s = 0.0
    with TrainReader(
        manifest,
        seed=1,
        batch_size=job.batch_size,
        rank=job.rank,
        world_size=job.world_size,
        num_streams=job.num_streams,
        ranks_on_node=job.world_size,
    ) as reader:
        for step in range(reader.steps_per_epoch):
            asked = time.perf_counter()
            batch = next(reader)
            waited = time.perf_counter() - asked
            if step:
                wait_s += waited
            else:
                first_s, first = time.perf_counter() - opened, time.perf_counter()
            digest.update(batch.samples_B.numpy().tobytes() + batch.images_BHWC.numpy().tobytes())
            time.sleep(max(0.0, asked + waited + job.step_s - time.perf_counter()))
    return Reading(opened - started, first_s, wait_s, time.perf_counter() - first, digest.hexdigest())


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(read_epoch(Job(**json.loads(sys.argv[1]))))))
