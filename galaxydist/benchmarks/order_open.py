"""How long a new process takes from a large data set's files on disk to the galaxies of a batch.

The files are real but for the columns of samples, which are all zeros and take no disk (sparse): nothing reads them to open.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galaxydist.counter_rng import hash64
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.shards.manifest import COLUMNS, SHARD_ROW, Manifest, Split, column_name, manifest_json, read_manifest
from galaxydist.shards.order import EpochOrder

OPEN_LIMIT_S, MEMORY_LIMIT_MB, POSITION_LIMIT_MS = 0.5, 300, 5.0
BATCH_SIZE = 192
EPOCH = 3
_IN_A_NEW_PROCESS = """
import time
begin = time.perf_counter()
import sys
from pathlib import Path
from galaxydist.benchmarks.order_open import open_and_read
open_and_read(Path(sys.argv[1]), int(sys.argv[2]), begin)
"""


def write_sparse_shards(folder: Path, num_shards: int, shard_samples: int) -> Path:
    """A manifest and its columns, of shards that are not there.

    Returns:
        manifest.json.
    """
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
    """In a new process: from the files to the first batch, then batches at places all over the epoch; prints JSON.

    Args:
        path: manifest.json.
        num_batches: how many, after the first.
        begin_s: ``time.perf_counter()`` before anything was imported.
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
    print(json.dumps(found))


def measure_opening(
    folder: Path, num_shards: int, shard_samples: int, repeats: int = 5, num_batches: int = 500
) -> dict[str, Any]:
    """Write the files, open them in new processes, each time after the system was asked to forget the files' content.

    Args:
        folder: an empty folder, on a file system with sparse files.
        num_shards, shard_samples: the data set.
        repeats: processes; medians are over them.
        num_batches: batches of 192 at random places, in each process.

    Returns:
        ``{"task", "num_samples", "num_shards", "open_s": from the files to the ids of a batch, "inside_s": from the interpreter's
        start, with imports, "process_s": the whole process with interpreter, "peak_mb": resident memory, "batch_ms": {"median",
        "max", "max_processor"}: ids of a batch at a random place, the last without the time that other processes took, "limits":
        {...}, "passed", "torch": was it imported, "same": did all processes find the same ids}``.
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


def print_opening(result: Mapping[str, Any]) -> None:
    """A line a figure, with its limit."""
    print(f"\nopening {result['num_samples']:,} samples in {result['num_shards']:,} shards, in a new process")
    print(f"{'':<66}{'measured':>10}{'limit':>10}")
    batch = result["batch_ms"]
    lines = [
        ("from the files to the ids of a batch", f"{result['open_s'] * 1000:.1f} ms", ""),
        ("from the interpreter's start to the ids of a batch, with imports", f"{result['inside_s']:.3f} s", f"{OPEN_LIMIT_S} s"),
        ("the whole process, with the interpreter", f"{result['process_s']:.3f} s", ""),
        ("resident memory at most", f"{result['peak_mb']:.0f} MB", f"{MEMORY_LIMIT_MB} MB"),
        (f"ids of a batch of {BATCH_SIZE} at a random place: median", f"{batch['median']:.3f} ms", ""),
        ("    longest", f"{batch['max']:.3f} ms", ""),
        ("    longest, other processes not counted", f"{batch['max_processor']:.3f} ms", f"{POSITION_LIMIT_MS:.0f} ms"),
    ]
    for title, value, limit in lines:
        print(f"{title:<66}{value:>10}{limit:>10}")


def _forget(folder: Path) -> None:
    """Ask the system to drop the files from its memory, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_memory_mb() -> float:
    """The most resident memory of this process so far. Linux's ru_maxrss would count the parent's too."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
