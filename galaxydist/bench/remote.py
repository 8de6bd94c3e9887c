"""``galaxydist bench remote``: an epoch from a slow server that fails, by one process and by two, the cache cold and warm."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galaxydist.bench.flaky_server import Behaviour, FileServer, every
from galaxydist.bench.loader_speed import find_source, repeat_source
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.loading.loader import RankInfo, TrainLoader
from galaxydist.shards.manifest import Manifest, read_manifest, shard_name
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards

# One process of ``galaxydist bench remote``: reads its part of an epoch as training does, and says what it waited for.
#
# Run as ``python -m galaxydist.bench.remote JSON``; prints a line of JSON.


@dataclass(frozen=True)
class ReadingJob:
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
        digest: of all images and their numbers, in the order in which they came.
    """

    open_s: float
    first_s: float
    wait_s: float
    epoch_s: float
    digest: str


def read_epoch(job: ReadingJob) -> Reading:
    """Read one epoch."""
    started = time.perf_counter()
    manifest = open_shards(job.location, CacheConfig(Path(job.cache_dir), job.cache_bytes))
    opened = time.perf_counter()
    digest = hashlib.sha256()
    first_s = wait_s = 0.0
    with TrainLoader(
        manifest,
        seed=1,
        batch_size=job.batch_size,
        num_streams=job.num_streams,
        ranks=RankInfo(job.rank, job.world_size, ranks_on_node=job.world_size),
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
    print(json.dumps(dataclasses.asdict(read_epoch(ReadingJob(**json.loads(sys.argv[1]))))))


SHARD_SIZE = 128


@dataclass(frozen=True)
class RemoteConditions:
    """What is read how.

    Args:
        delay_s: of the server, before each answer.
        fail_every: one request in so many fails: 503, a body cut short, a wrong byte, a connection reset, in turn.
        step_s: what the consumer takes for a batch.
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
        conditions: of the readings.
        data: local shards to serve; None: simulated galaxies.
        num_images: in the epoch, where ``data`` is not given.

    Returns:
        What the lines of JSON hold.

    Raises:
        UserError: no such data, or too few galaxies.
    """
    manifest = read_manifest(data) if data is not None else _simulated(root, num_images)
    split = manifest.split("train")
    print(
        f"{split.num_samples:,} {manifest.dataset} galaxies in {split.num_shards} shards, from a server that waits "
        f"{conditions.delay_s * 1000:g} ms and fails one request in {conditions.fail_every}; batches of "
        f"{conditions.batch_size}, {conditions.step_s * 1000:g} ms a step, {conditions.num_streams} streams",
        flush=True,
    )
    print(f"{'':17} {'to open':>8} {'1st batch':>9} {'then waits':>10}   requests for shards", flush=True)
    results = []
    for ranks in (1, 2):
        local = _jobs(str(manifest.path), root / "cache", ranks, dataclasses.replace(conditions, step_s=0.0))
        expected = [read_epoch(job) for job in local]
        shutil.rmtree(root / "cache", ignore_errors=True)
        for state in ("cold", "warm"):
            with FileServer(manifest.dir, Behaviour(conditions.delay_s, every(conditions.fail_every))) as server:
                found = _read(_jobs(server.url, root / "cache", ranks, conditions), environ)
            is_exact = [reading.digest for reading in found] == [reading.digest for reading in expected]
            result = {"task": f"remote.{state}", "ranks": ranks, **_waits(found), **_requests(server, split.num_shards)}
            result |= {"is_exact": is_exact, **dataclasses.asdict(conditions)}
            result |= {"data": manifest.dataset, "images": split.num_samples, "shards": split.num_shards}
            results.append(result)
            _show(result)
        shutil.rmtree(root / "cache", ignore_errors=True)
    for result in results:
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))
    return results


def _waits(found: list[Reading]) -> dict[str, float]:
    """Of the process that waited most."""
    return {
        "open_s": max(reading.open_s for reading in found),
        "first_batch_s": max(reading.first_s for reading in found),
        "data_wait": max(reading.wait_s / reading.epoch_s for reading in found),
    }


def _requests(server: FileServer, num_shards: int) -> dict[str, Any]:
    gets = {name: server.gets[name] for name in (shard_name("train", number) for number in range(num_shards))}
    return {
        "gets": sum(gets.values()),
        "failures": sum(server.failures[name] for name in gets),
        "shards_fetched": sum(count > 0 for count in gets.values()),
        "is_once_each": all(count in (0, 1 + server.failures[name]) for name, count in gets.items()),
        "other_requests": len(server.others),
    }


def _show(result: Mapping[str, Any]) -> None:
    who = f"{result['ranks']} process{'es' if result['ranks'] > 1 else ''}, {result['task'].partition('.')[2]}"
    print(
        f"{who:17} {result['open_s']:6.2f} s {result['first_batch_s']:7.2f} s {result['data_wait']:10.1%}   "
        f"{result['gets']} = {result['shards_fetched']} shards + {result['failures']} failures"
        f"{'' if result['is_exact'] else '; NOT THE LOCAL EPOCH'}",
        flush=True,
    )


def _jobs(location: str, cache_dir: Path, ranks: int, conditions: RemoteConditions) -> list[ReadingJob]:
    """One for each process."""
    return [
        ReadingJob(
            location=location,
            cache_dir=str(cache_dir),
            cache_bytes=1 << 40,
            rank=rank,
            world_size=ranks,
            batch_size=conditions.batch_size,
            num_streams=conditions.num_streams,
            step_s=conditions.step_s,
        )
        for rank in range(ranks)
    ]


def _read(jobs: Sequence[ReadingJob], environ: Mapping[str, str]) -> list[Reading]:
    """One epoch by processes of their own, at the same time."""
    processes = []
    for job in jobs:
        command = [sys.executable, "-m", "galaxydist.bench.remote", json.dumps(dataclasses.asdict(job))]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(environ)))
    try:
        answers = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise UserError("a reading process failed: see above")
    return [Reading(**json.loads(answer.splitlines()[-1])) for answer in answers]


def _simulated(root: Path, num_images: int) -> Manifest:
    workers = available_cores()
    source = find_source(root, data=None, real=None, workers=workers)
    return repeat_source(source, root, num_images=num_images, least=num_images, shard_size=SHARD_SIZE, workers=workers)
