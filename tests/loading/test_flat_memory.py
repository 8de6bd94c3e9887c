"""Memory, in real processes: writing holds what its workers hold, whatever the input's size; reading stays flat over epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Images are drawn when they are read, parts are small, so that a small survey already has more than its workers hold at a time.
WRITE = """
import json, resource, sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from galaxydist.galaxy import Galaxy
from galaxydist.shards.writer import layout
from galaxydist.shards.writer import writer

@dataclass(frozen=True)
class Drawn:
    num_galaxies: int
    name: str = "drawn"
    variant: str = "original"
    class_names: tuple = ("a", "b")
    source_hash: str = "3" * 64
    slab_length: int = 64

    @property
    def labels(self):
        return np.arange(self.num_galaxies) % 2

    @property
    def splits(self):
        return {"train": np.arange(self.num_galaxies), "val": np.arange(0), "test": np.arange(0)}

    def read(self, start, stop):
        for row in range(start, stop):
            pixels = np.random.default_rng(row).integers(0, 256, (128, 128, 3), np.uint8)
            yield Galaxy(f"d-{row:06d}", pixels, row % 2)

if __name__ == "__main__":
    writer.FEW_GALAXIES, layout.PART_BYTES = 0, 8 * 1024 * 1024
    writer.write_shards(Drawn(int(sys.argv[2])), Path(sys.argv[1]), encoding="raw", shard_size=64, workers=2)
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(peaks))
"""

READ = """
import json, sys
from pathlib import Path
import psutil
from galaxydist.shards.manifest import read_manifest
from galaxydist.loading.loader import DecodeOptions, TrainLoader

process, sizes = psutil.Process(), []
with TrainLoader(read_manifest(Path(sys.argv[1])), seed=0, batch_size=64, decode=DecodeOptions(threads=2)) as reader:
    for batch in reader:
        if (batch.step + 1) % reader.steps_per_epoch == 0:
            sizes.append(process.memory_info().rss / 1024**2)
        if len(sizes) == 10:
            break
print(json.dumps(sizes))
"""


def run(script: Path, text: str, *arguments: object) -> list[float]:
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    figures: list[float] = json.loads(done.stdout)
    return figures


@pytest.mark.slow
@pytest.mark.multiprocess
def test_writing_four_times_the_images_needs_at_most_30_mb_more_memory(tmp_path: Path) -> None:
    few = run(tmp_path / "write.py", WRITE, tmp_path / "few", 1500)
    many = run(tmp_path / "write.py", WRITE, tmp_path / "many", 6000)
    print(f"peak MB of the parent and of the largest worker: {few} for 74 MB of images, {many} for 295 MB")
    assert all(after < before + 30 for before, after in zip(few, many, strict=True)), (few, many)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_loader_memory_grows_by_under_10_mb_over_ten_epochs(tmp_path: Path) -> None:
    run(tmp_path / "write.py", WRITE, tmp_path / "shards", 1500)
    sizes = run(tmp_path / "read.py", READ, tmp_path / "shards")
    print(f"resident MB after each epoch: {[round(size) for size in sizes]}")
    # The shards' pages are the kernel's, not the process's, and the buffers are all there after the first epoch.
    assert max(sizes[1:]) - sizes[0] < 10, sizes
