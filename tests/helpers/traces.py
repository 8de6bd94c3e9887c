"""What ``traced_launch.py`` wrote, put together over the ranks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step over all ranks: checksums by position in the epoch, samples by position, the learning rate, the world size."""

    samples: dict[int, int]
    images: dict[int, int]
    rate: float
    world_size: int


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of all ranks (a killed process may have left half of one)."""
    texts = [path.read_text() for path in sorted(folder.glob("rank-*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_steps(folder: Path) -> dict[int, Step]:
    """Each step as it was taken at last."""
    lines = read_lines(folder)
    found: dict[int, Step] = {}
    for step in sorted({line["step"] for line in lines}):
        sizes = {line["world_size"] for line in lines if line["step"] == step}
        for size in sizes:  # repeated after a restart: any of them must be the same
            ranks = {line["rank"]: line for line in lines if line["step"] == step and line["world_size"] == size}
            if len(ranks) < size:
                continue  # killed within this step
            samples = {int(position): sample for line in ranks.values() for position, sample in line["samples"].items()}
            images = {int(position): checksum for line in ranks.values() for position, checksum in line["images"].items()}
            (rate,) = {line["rate"] for line in ranks.values()}
            taken = Step(samples, images, rate, size)
            if step in found:
                assert (taken.samples, taken.images, taken.rate) == (found[step].samples, found[step].images, found[step].rate)
            found[step] = taken
    return found
