"""``galaxydist bench remote``: an epoch from a slow, failing server, with a cold and a warm cache.

The reading processes run ``python -m galaxydist.bench.remote JSON``.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galaxydist.bench.common import run_together, show, show_json
from galaxydist.bench.flaky_server import Behaviour, FileServer, every
from galaxydist.bench.loader_speed import find_source, repeat_source
from galaxydist.cpus import available_cores
from galaxydist.loading.loader import RankInfo, TrainLoader
from galaxydist.shards.manifest import Manifest, read_manifest, shard_name
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards

SHARD_SIZE = 128


@dataclass(frozen=True)
class ReadingJob:
    """Work of one reading process.

    Args:
        location: path or URL of the shards.
        cache_dir: cache of the node.
        rank, world_size: of this process.
        step_s: time that the consumer takes for a batch.
        batch_size, num_streams: of the run.
    """

    location: str
    cache_dir: str
    rank: int
    world_size: int
    step_s: float
    batch_size: int
    num_streams: int


@dataclass(frozen=True)
class Reading:
    """Times of an epoch.

    Args:
        open_s: until the manifest and the columns were read.
        first_s: from then to the first batch.
        wait_s: spent waiting for all later batches.
        epoch_s: from the first batch to the end.
        digest: of all images and their sample numbers, in the order of reading.
    """

    open_s: float
    first_s: float
    wait_s: float
    epoch_s: float
    digest: str


def read_epoch(job: ReadingJob) -> Reading:
    """Read this process's part of one epoch as training does."""
    started = time.perf_counter()
    manifest = open_shards(job.location, CacheConfig(Path(job.cache_dir), 1 << 40))
    opened = time.perf_counter()
    digest = hashlib.sha256()
    first_s = wait_s = 0.0
    with TrainLoader(
        manifest,
        seed=1,
        batch_size=job.batch_size,
        num_streams=job.num_streams,
        ranks=RankInfo(job.rank, job.world_size, ranks_on_node=job.world_size),
    ) as loader:
        for step in range(loader.steps_per_epoch):
            asked = time.perf_counter()
            batch = next(loader)
            waited = time.perf_counter() - asked
            if step:
                wait_s += waited
            else:
                first_s, first = time.perf_counter() - opened, time.perf_counter()
            digest.update(batch.samples_B.numpy().tobytes() + batch.images_BHWC.numpy().tobytes())
            time.sleep(max(0.0, asked + waited + job.step_s - time.perf_counter()))
    return Reading(opened - started, first_s, wait_s, time.perf_counter() - first, digest.hexdigest())


@dataclass(frozen=True)
class RemoteConditions:
    """Settings of the measurement.

    Args:
        delay_s: delay of the server before each answer.
        fail_every: one request in this number fails: 503, a body cut short, a wrong byte, a reset connection, in turn.
        step_s: time that the consumer takes for a batch.
        batch_size, num_streams: of the run.
    """

    delay_s: float = 0.05
    fail_every: int = 50
    step_s: float = 0.1
    batch_size: int = 64
    num_streams: int = 1


def measure_remote(
    root: Path, environ: Mapping[str, str], conditions: RemoteConditions, *, data: Path | None = None, num_images: int = 12_800
) -> list[dict[str, Any]]:
    """Print a table and, last, a line of JSON for each reading.

    Args:
        root: folder of the benchmark's files; its cache is emptied.
        environ: environment variables of the processes.
        conditions: settings of the measurement.
        data: local shards to serve; None: simulated galaxies.
        num_images: in the epoch, if ``data`` is not given.

    Returns:
        The content of the lines of JSON.

    Raises:
        UserError: the data do not exist, or hold too few galaxies.
    """
    manifest = read_manifest(data) if data is not None else _simulated(root, num_images)
    split = manifest.split("train")
    show(
        f"{split.num_samples:,} {manifest.dataset} galaxies in {split.num_shards} shards, from a server that waits "
        f"{conditions.delay_s * 1000:g} ms and fails one request in {conditions.fail_every}; batches of "
        f"{conditions.batch_size}, {conditions.step_s * 1000:g} ms per step, {conditions.num_streams} streams"
    )
    show(f"{'':17} {'to open':>8} {'1st batch':>9} {'then waits':>10}   requests for shards")
    results = []
    for ranks in (1, 2):
        local = _jobs(str(manifest.path), root / "cache", ranks, dataclasses.replace(conditions, step_s=0.0))
        expected = [read_epoch(job).digest for job in local]
        shutil.rmtree(root / "cache", ignore_errors=True)
        for state in ("cold", "warm"):
            with FileServer(manifest.dir, Behaviour(conditions.delay_s, every(conditions.fail_every))) as server:
                jobs = [json.dumps(dataclasses.asdict(job)) for job in _jobs(server.url, root / "cache", ranks, conditions)]
                commands = [[sys.executable, "-m", "galaxydist.bench.remote", job] for job in jobs]
                readings = [Reading(**found) for found in run_together(commands, [environ] * ranks)]
            result = {
                "task": f"remote.{state}",
                "ranks": ranks,
                "open_s": max(reading.open_s for reading in readings),
                "first_batch_s": max(reading.first_s for reading in readings),
                "data_wait": max(reading.wait_s / reading.epoch_s for reading in readings),
                **_requests(server, split.num_shards),
                "is_exact": [reading.digest for reading in readings] == expected,
                **dataclasses.asdict(conditions),
                "data": manifest.dataset,
                "images": split.num_samples,
                "shards": split.num_shards,
            }
            results.append(result)
            title = f"{ranks} process{'es' if ranks > 1 else ''}, {state}"
            show(
                f"{title:17} {result['open_s']:6.2f} s {result['first_batch_s']:7.2f} s {result['data_wait']:10.1%}   "
                f"{result['gets']} = {result['shards_fetched']} shards + {result['failures']} failures"
                f"{'' if result['is_exact'] else '; NOT THE LOCAL EPOCH'}"
            )
        shutil.rmtree(root / "cache", ignore_errors=True)
    show_json(*results)
    return results


def _requests(server: FileServer, num_shards: int) -> dict[str, Any]:
    gets = {name: server.gets[name] for name in (shard_name("train", number) for number in range(num_shards))}
    return {
        "gets": sum(gets.values()),
        "failures": sum(server.failures[name] for name in gets),
        "shards_fetched": sum(count > 0 for count in gets.values()),
        "is_once_each": all(count in (0, 1 + server.failures[name]) for name, count in gets.items()),
        "other_requests": len(server.others),
    }


def _jobs(location: str, cache_dir: Path, ranks: int, conditions: RemoteConditions) -> list[ReadingJob]:
    """Return the job of each process."""
    run = (conditions.step_s, conditions.batch_size, conditions.num_streams)
    return [ReadingJob(location, str(cache_dir), rank, ranks, *run) for rank in range(ranks)]


def _simulated(root: Path, num_images: int) -> Manifest:
    workers = available_cores()
    source = find_source(root, data=None, real=None, workers=workers)
    return repeat_source(source, root, num_images=num_images, least=num_images, shard_size=SHARD_SIZE, workers=workers)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(read_epoch(ReadingJob(**json.loads(sys.argv[1]))))) + "\n")
