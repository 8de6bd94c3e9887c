"""``galaxydist bench order``: quality of the shuffling, opening time, and shards fetched by nodes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.bench.common import show, show_json
from galaxydist.counter_rng import Stream, hash64
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.shards.manifest import COLUMNS, SHARD_ROW, Manifest, Split, column_name, manifest_json, read_manifest
from galaxydist.shards.order import EpochOrder
from galaxydist.shards.shard_usage import peak_bytes, usage_of_nodes, usage_of_rank
from galaxydist.surveys.official_split import read_official_split
from galaxydist.surveys.split import TRAIN

# Shards that each node of a large job fetches in an epoch, and holds at once: computed, without reading.


@dataclass(frozen=True)
class OpeningJob:
    """Job with contiguous ranks on nodes, and a data set of ``num_shards`` shards of ``shard_samples`` each."""

    num_nodes: int
    ranks_per_node: int
    num_shards: int
    shard_samples: int

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node


def default_choices(world_size: int) -> list[tuple[int, int]]:
    """Return the (C, G) to compare: the default C, one that shares more divisors with 1,024, and multiples of the world size."""
    return [
        (192, world_size),
        (192, world_size * 3 // 2),
        (256, world_size),
        (world_size, world_size),
        (world_size, world_size * 3 // 2),
        (world_size, world_size * 4),
        (world_size * 3, world_size * 3),
    ]


def measure_fetches(job: OpeningJob, choices: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Count the shards that a node fetches in an epoch, if each node fetches once every shard that it needs.

    Returns:
        ``{"task", "num_nodes", "ranks_per_node", "num_shards", "shard_samples", "choices": [...]}``, for each choice
        ``num_streams``, ``batch_size``, ``divides_streams`` and ``divides_batch`` (True if W divides them), ``shards_per_node``
        {"min", "median", "max"}, ``fetches_per_shard`` (total over the nodes, divided by the number of shards), ``held_per_node``
        (the most that any node needs at one step) and ``held_by_one`` (the same with all ranks on one node).
    """
    counted = []
    for num_streams, batch_size in choices:
        order = EpochOrder(np.full(job.num_shards, job.shard_samples), seed=0, epoch=0, num_streams=num_streams)
        uses = usage_of_nodes(order, batch_size, job.num_nodes, job.ranks_per_node)
        fetched = [np.unique(use["shard"]).size for use in uses]
        choice = {
            "num_streams": num_streams,
            "batch_size": batch_size,
            "divides_streams": num_streams % job.world_size == 0,
            "divides_batch": batch_size % job.world_size == 0,
            "shards_per_node": {"min": min(fetched), "median": float(np.median(fetched)), "max": max(fetched)},
            "fetches_per_shard": sum(fetched) / job.num_shards,
            "held_per_node": max(peak_bytes(use, 1) for use in uses),
            "held_by_one": peak_bytes(usage_of_rank(order, batch_size, np.arange(batch_size)), 1),
        }
        counted.append(choice)
    return {"task": "order.fetch", **asdict(job), "choices": counted}


def show_fetches(result: Mapping[str, Any]) -> None:
    """Print a row per choice of C and G."""
    world_size = result["num_nodes"] * result["ranks_per_node"]
    show(
        f"\nshards fetched in an epoch: W = {world_size:,} ranks in {result['num_nodes']} nodes, "
        f"{result['num_shards']:,} shards of {result['shard_samples']:,}"
    )
    show(f"{'W divides':>22}{'shards fetched by a node':>30}{'fetches':>10}{'held at once':>14}{'all ranks on':>14}")
    show(f"{'C':>6}{'G':>6}{'C':>5}{'G':>5}{'min':>10}{'median':>10}{'max':>10}{'a shard':>10}{'by a node':>14}{'one node':>14}")
    for choice in result["choices"]:
        shards = choice["shards_per_node"]
        divides = "".join(f"{'yes' if choice[key] else 'no':>5}" for key in ("divides_streams", "divides_batch"))
        show(
            f"{choice['num_streams']:6d}{choice['batch_size']:6d}{divides}"
            f"{shards['min']:10,d}{shards['median']:10,.0f}{shards['max']:10,d}{choice['fetches_per_shard']:10.2f}"
            f"{choice['held_per_node']:14,d}{choice['held_by_one']:14,d}"
        )


ADVICE = """
If W divides train.batch_size (G), each shard is fetched by about W / gcd(C, W) nodes: by one if W divides data.num_streams (C)
too. The order does not depend on W, but the number of times that a shard crosses the network does. For shards in an object
store, set data.num_streams to a multiple of the largest number of processes that you will use: it is fixed for a run. With more
streams, more shards are in use at once, so that few nodes need a larger cache (last column). C should not be many times G: a
batch smaller than C consists of neighbouring streams, which lie in the same shards if there are few shards.
"""


# Time of a new process from the files of a large data set to the galaxies of a batch.
#
# The columns of samples are sparse files of zeros: nothing reads them to open the data set.

OPEN_LIMIT_S, MEMORY_LIMIT_MB, POSITION_LIMIT_MS = 0.5, 300, 5.0
BATCH_SIZE = 192
EPOCH = 3
_IN_A_NEW_PROCESS = """
import time
begin = time.perf_counter()
import sys
from pathlib import Path
from galaxydist.bench.order_speed import open_and_read
open_and_read(Path(sys.argv[1]), int(sys.argv[2]), begin)
"""


def write_sparse_shards(folder: Path, num_shards: int, shard_samples: int) -> Path:
    """Write a manifest and its columns, without the shards; return the path of manifest.json."""
    num_samples = num_shards * shard_samples
    manifest = Manifest(
        dir=folder,
        hash="",
        dataset="benchmark",
        variant="original",
        class_names=GALAXY10_CLASSES,
        encoding="jpeg",
        image_size=256,
        splits={"train": Split(num_samples, num_shards, num_samples * 12_000, (num_samples, *[0] * 9))},
        channel_mean=(0.17, 0.16, 0.16),
        channel_std=(0.13, 0.12, 0.11),
        source_hash="0" * 64,
        columns={column_name("train", column): "0" * 64 for column in ("shards", *COLUMNS)},
        settings={},
    )
    (folder / "columns").mkdir(parents=True)
    table = np.zeros(num_shards, SHARD_ROW)
    table["samples"], table["bytes"] = shard_samples, shard_samples * 12_000
    table["sha256"] = hash64(np.arange(num_shards)[:, None], np.arange(4)).view(np.uint8)
    np.save(folder / column_name("train", "shards"), table)
    for column, dtype in COLUMNS.items():
        np.lib.format.open_memmap(folder / column_name("train", column), mode="w+", dtype=dtype, shape=(num_samples,))
    manifest.path.write_bytes(manifest_json(manifest))
    return manifest.path


def open_and_read(path: Path, num_batches: int, begin_s: float) -> None:
    """Open a data set in a new process, and locate batches at positions all over the epoch; print the times as JSON.

    Args:
        path: manifest.json.
        num_batches: number of batches after the first.
        begin_s: ``time.perf_counter()`` before all imports.
    """
    imported_s = time.perf_counter()
    manifest = read_manifest(path)
    order = EpochOrder(manifest.shards("train")["samples"], seed=1, epoch=EPOCH)
    num_steps = order.num_positions // BATCH_SIZE
    offsets = np.arange(BATCH_SIZE)
    first = order.samples((num_steps - 1) * BATCH_SIZE + offsets)
    opened_s = time.perf_counter()
    wall_ms, processor_ms = [], []
    for step in (hash64(np.arange(num_batches)) % np.uint64(num_steps)).astype(np.int64):
        start_s, start_processor_s = time.perf_counter(), time.thread_time()
        order.samples(step * BATCH_SIZE + offsets)
        processor_ms.append((time.thread_time() - start_processor_s) * 1000)
        wall_ms.append((time.perf_counter() - start_s) * 1000)
    found = {
        "samples": first.tolist(),
        "inside_s": opened_s - begin_s,
        "open_s": opened_s - imported_s,
        "peak_mb": _peak_memory_mb(),
        "wall_ms": wall_ms,
        "processor_ms": processor_ms,
        "torch": "torch" in sys.modules,
    }
    sys.stdout.write(json.dumps(found))


def measure_opening(
    folder: Path, num_shards: int, shard_samples: int, repeats: int = 5, num_batches: int = 500
) -> dict[str, Any]:
    """Write the files, and open them in new processes, each after the system was asked to drop the files from its page cache.

    Args:
        folder: an empty folder, on a file system with sparse files.
        num_shards, shard_samples: of the data set.
        repeats: number of processes; medians are over them.
        num_batches: number of batches of 192 at random positions, in each process.

    Returns:
        ``{"task", "num_samples", "num_shards", "open_s": from the files to the ids of a batch, "inside_s": from the start of the
        interpreter, with imports, "process_s": the whole process with interpreter, "peak_mb": resident memory, "batch_ms":
        {"median", "max", "max_processor"}: ids of a batch at a random position, the last in CPU time, "limits": {...}, "passed",
        "torch": True if it was imported, "same": True if all processes found the same ids}``.
    """
    path = write_sparse_shards(folder / "shards", num_shards, shard_samples)
    runs = []
    for _ in range(repeats):
        _forget(path.parent)
        start_s = time.perf_counter()
        command = [sys.executable, "-c", _IN_A_NEW_PROCESS, str(path), str(num_batches)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        runs.append({**json.loads(done.stdout), "process_s": time.perf_counter() - start_s})
    wall_ms = [value for run in runs for value in run["wall_ms"]]
    processor_ms = max(max(run["processor_ms"]) for run in runs)
    medians = {name: float(np.median([run[name] for run in runs])) for name in ("open_s", "inside_s", "process_s")}
    peak_mb = max(run["peak_mb"] for run in runs)
    return {
        "task": "order.open",
        "num_samples": num_shards * shard_samples,
        "num_shards": num_shards,
        **medians,
        "peak_mb": peak_mb,
        "batch_ms": {"median": float(np.median(wall_ms)), "max": max(wall_ms), "max_processor": processor_ms},
        "limits": {"inside_s": OPEN_LIMIT_S, "peak_mb": MEMORY_LIMIT_MB, "max_processor": POSITION_LIMIT_MS},
        "passed": medians["inside_s"] < OPEN_LIMIT_S and peak_mb < MEMORY_LIMIT_MB and processor_ms < POSITION_LIMIT_MS,
        "torch": any(run["torch"] for run in runs),
        "same": all(run["samples"] == runs[0]["samples"] for run in runs),
    }


def show_opening(result: Mapping[str, Any]) -> None:
    """Print a row per figure, with its limit."""
    show(f"\nopening {result['num_samples']:,} samples in {result['num_shards']:,} shards, in a new process")
    batch = result["batch_ms"]
    for title, value, limit in [
        ("", "measured", "limit"),
        ("from the files to the ids of a batch", f"{result['open_s'] * 1000:.1f} ms", ""),
        ("from the interpreter's start to the ids of a batch, with imports", f"{result['inside_s']:.3f} s", f"{OPEN_LIMIT_S} s"),
        ("the whole process, with the interpreter", f"{result['process_s']:.3f} s", ""),
        ("resident memory at most", f"{result['peak_mb']:.0f} MB", f"{MEMORY_LIMIT_MB} MB"),
        (f"ids of a batch of {BATCH_SIZE} at a random position: median", f"{batch['median']:.3f} ms", ""),
        ("    longest", f"{batch['max']:.3f} ms", ""),
        ("    longest, in CPU time", f"{batch['max_processor']:.3f} ms", f"{POSITION_LIMIT_MS:.0f} ms"),
    ]:
        show(f"{title:<66}{value:>10}{limit:>10}")


def _forget(folder: Path) -> None:
    """Ask the system to drop the files from its page cache, if it has such a call."""
    for path in folder.rglob("*") if hasattr(os, "posix_fadvise") else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far. On Linux, ru_maxrss would include the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


# Quality of the shuffling, compared with that of a uniformly random permutation.
#
# The same galaxies are in two kinds of shards: sorted by class (as Galaxy10's file is), and as our writer stores them.

NUM_STREAMS = 192
WORLD_SIZE = 8
EPOCHS = 3
_BLOCK = 10
_CHUNK = 1 << 18
_TITLES = {
    "rank_correlation": "rank correlation of storage and reading order (rms)",
    "recurring_mates": "pairs of a batch again in one batch of the next epoch, over chance",
    "sorted_run": "class-sorted shards: mean run of one class",
    "sorted_longest_run": "                     longest run",
    "sorted_batch_spread": "                     class counts of a batch, chi2/dof",
    "sorted_rank_spread": f"                     of one rank's share of it (of {WORLD_SIZE})",
    "sorted_block_spread": f"                     of {_BLOCK} successive batches",
    "written_run": "as our writer stores: mean run of one class",
    "written_longest_run": "                     longest run",
    "written_batch_spread": "                     class counts of a batch, chi2/dof",
    "written_rank_spread": f"                     of one rank's share of it (of {WORLD_SIZE})",
    "written_block_spread": f"                     of {_BLOCK} successive batches",
}


@dataclass(frozen=True)
class StoredSurvey:
    """Training split with its name, the samples in each shard, and the labels in storage order, sorted by class."""

    name: str
    shard_samples: NDArray[np.int64]
    sorted_labels: NDArray[np.int64]


def galaxy10_store() -> StoredSurvey:
    """Return Galaxy10's training split in the default shards."""
    official = read_official_split()
    labels = np.sort(official.labels[official.original == TRAIN].astype(np.int64))
    return StoredSurvey("Galaxy10 DECaLS, train", _even_shards(labels.size, 16), labels)


def survey_store(num_shards: int, shard_samples: int = 1000) -> StoredSurvey:
    """Return a survey with Galaxy10's mix of classes."""
    counts = np.bincount(galaxy10_store().sorted_labels)
    num_samples = num_shards * shard_samples
    labels = np.searchsorted(np.cumsum(counts), (np.arange(num_samples) + 0.5) / num_samples * counts.sum(), side="right")
    return StoredSurvey("survey-like", _even_shards(num_samples, num_shards), labels.astype(np.int64))


def measure_quality(store: StoredSurvey, batch_size: int = 192) -> dict[str, Any]:
    """Measure the order's first epochs on a store, and as many random permutations.

    Args:
        store: at least ten batches.
        batch_size: G.

    Returns:
        ``{"task", "store", "num_samples", "num_shards", "batch_size", "num_streams", "order": {...}, "random": {...}}``. Both
        hold ``rank_correlation`` (Spearman's, root mean square over the epochs); ``recurring_mates``: pairs of one batch that
        share a batch in the next epoch too, divided by their number expected by chance; and for both ways of storing
        (``sorted_``, ``written_``) ``run`` and ``longest_run`` of equal labels, and the ``spread`` of class counts in a batch, in
        a rank's share of it and in successive batches: chi square over degrees of freedom, 1 by chance, less if batches are more
        alike.
    """
    num_samples = store.sorted_labels.size
    stored_rows = np.argsort(hash64(0, 0, np.arange(num_samples), Stream.STORAGE), kind="stable")  # what the writer does
    labels = {"sorted": store.sorted_labels, "written": store.sorted_labels[stored_rows]}
    random = np.random.default_rng(0)
    drawn = [random.permutation(num_samples) for _ in range(EPOCHS)]
    return {
        "task": "order.quality",
        "store": store.name,
        "num_samples": num_samples,
        "num_shards": store.shard_samples.size,
        "batch_size": batch_size,
        "num_streams": NUM_STREAMS,
        "order": _describe([_read(store, epoch) for epoch in range(EPOCHS)], labels, batch_size),
        "random": _describe(drawn, labels, batch_size),
    }


def show_quality(result: Mapping[str, Any]) -> None:
    """Print a row per measure: the order, and random permutations."""
    show(
        f"\nshuffle quality: {result['store']}, {result['num_samples']:,} samples in {result['num_shards']:,} shards, "
        f"C = {NUM_STREAMS}, G = {result['batch_size']}, {EPOCHS} epochs"
    )
    show(f"{'':<66}{'order':>10}{'random':>10}")
    for name, title in _TITLES.items():
        values = (result[kind][name] for kind in ("order", "random"))
        show(f"{title:<66}" + "".join(f"{value:10d}" if isinstance(value, int) else f"{value:10.4f}" for value in values))


def _describe(epochs: list[NDArray[np.int64]], labels: Mapping[str, NDArray[np.int64]], batch_size: int) -> dict[str, Any]:
    correlations = [_rank_correlation(samples) for samples in epochs]
    found: dict[str, Any] = {
        "rank_correlation": float(np.sqrt(np.mean(np.square(correlations)))),
        "recurring_mates": float(np.mean([_recurring_mates(first, second, batch_size) for first, second in pairwise(epochs)])),
    }
    for way, label in labels.items():
        read = [label[samples] for samples in epochs]
        shares = np.bincount(label) / label.size
        runs = [np.diff(np.flatnonzero(np.diff(classes, prepend=-1, append=-1))) for classes in read]
        found[f"{way}_run"] = float(np.mean([run.mean() for run in runs]))
        found[f"{way}_longest_run"] = int(max(run.max() for run in runs))
        batches = [classes[: classes.size // batch_size * batch_size].reshape(-1, batch_size) for classes in read]
        found[f"{way}_batch_spread"] = float(np.mean([_spread(batch, shares) for batch in batches]))
        found[f"{way}_rank_spread"] = float(np.mean([_spread(batch[:, ::WORLD_SIZE], shares) for batch in batches]))
        blocks = [batch[: len(batch) // _BLOCK * _BLOCK].reshape(-1, _BLOCK * batch_size) for batch in batches]
        found[f"{way}_block_spread"] = float(np.mean([_spread(block, shares) for block in blocks]))
    return found


def _rank_correlation(samples: NDArray[np.int64]) -> float:
    """Return Spearman's correlation: both are permutations of 0 ... N-1, so they are their own ranks."""
    return float(np.corrcoef(np.arange(samples.size, dtype=np.float64), samples.astype(np.float64))[0, 1])


def _recurring_mates(first: NDArray[np.int64], second: NDArray[np.int64], batch_size: int) -> float:
    """Return the number of pairs that share a batch in both epochs, over that expected of two independent permutations."""
    num_batches = first.size // batch_size
    batch_of = np.empty(first.size, np.int64)
    batch_of[second] = np.arange(first.size) // batch_size
    later = batch_of[first[: num_batches * batch_size]]
    meetings = np.arange(later.size) // batch_size * (num_batches + 1) + later
    counts = np.unique(meetings[later < num_batches], return_counts=True)[1]
    same = batch_size * (batch_size - 1) / 2 * num_batches  # pairs that share a batch in one epoch
    expected = same * same / (first.size * (first.size - 1) / 2)
    return float((counts * (counts - 1) // 2).sum() / expected)


def _spread(classes_RB: NDArray[np.int64], shares_K: NDArray[np.float64]) -> float:
    """Return the mean over rows of chi square over degrees of freedom of the class counts."""
    num_rows, row_size = classes_RB.shape
    cells = np.arange(num_rows)[:, None] * shares_K.size + classes_RB
    counts = np.bincount(cells.ravel(), minlength=num_rows * shares_K.size).reshape(num_rows, -1)
    expected = row_size * shares_K
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (shares_K.size - 1))


def _read(store: StoredSurvey, epoch: int) -> NDArray[np.int64]:
    """Return all samples of an epoch, in reading order."""
    order = EpochOrder(store.shard_samples, seed=0, epoch=epoch, num_streams=NUM_STREAMS)
    starts = range(0, order.num_positions, _CHUNK)
    return np.concatenate([order.samples(np.arange(s, min(s + _CHUNK, order.num_positions))) for s in starts])


def _even_shards(num_samples: int, num_shards: int) -> NDArray[np.int64]:
    return np.diff(np.arange(num_shards + 1) * num_samples // num_shards)


def measure_order(*, quick: bool = False) -> list[dict[str, Any]]:
    """Print a table of each measurement and, last, a line of JSON each.

    Args:
        quick: smaller surveys, as a test of the benchmark; the figures are not representative.

    Returns:
        The content of the lines of JSON.
    """
    results = []
    for store, batch_size in ((galaxy10_store(), 192), (galaxy10_store(), 64), (survey_store(60 if quick else 4000), 192)):
        results.append(measure_quality(store, batch_size))
        show_quality(results[-1])
    with tempfile.TemporaryDirectory(prefix="galaxydist-order-") as folder:
        large = {"num_shards": 1000, "repeats": 2, "num_batches": 20} if quick else {"num_shards": 100_000}
        results.append(measure_opening(Path(folder), shard_samples=10_000, **large))
    show_opening(results[-1])
    large_jobs = [OpeningJob(128, 8, num_shards, 10_000) for num_shards in (10_000, 100_000)]
    for job in [OpeningJob(10, 8, 300, 1000)] if quick else large_jobs:
        results.append(measure_fetches(job, default_choices(job.world_size)))
        show_fetches(results[-1])
    show(ADVICE)
    show_json(*results)
    return results
