"""Surveys for the tests of shards: images in memory, from pixels or from JPEG files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.shards.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class MemorySurvey:
    """The galaxies given, dealt 3 : 1 : 1 to train, val and test; every eleventh row is in no split."""

    galaxies: tuple[Galaxy, ...]
    name: str = "memory"
    variant: str = "original"
    class_names: tuple[str, ...] = ("a", "b", "c")
    source_hash: str = "1" * 64
    slab_length: int = 8
    deal: tuple[str, ...] = field(default=("train", "val", "train", "test", "train"))

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([-1 if galaxy.label is None else galaxy.label for galaxy in self.galaxies])

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        rows = np.arange(len(self.galaxies))
        return {
            split: np.array([row for row in rows if self.deal[row % 5] == split and row % 11 != 10], np.int64)
            for split in ("train", "val", "test")
        }

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        yield from self.galaxies[start:stop]


def draw_galaxies(count: int, size: int = 32, **extras: Any) -> tuple[Galaxy, ...]:
    """Smooth coloured images, each another; labels 0, 1, 2 in turn."""
    y_HW, x_HW = np.mgrid[:size, :size] / size
    galaxies = []
    for row in range(count):
        waves = [np.sin(2 * np.pi * (x_HW * (1 + row % 3) + y_HW * (row % 5) + c / 3 + row / 7)) for c in range(3)]
        image_HWC = np.stack([110 + 70 * wave + row % 40 for wave in waves], -1).astype(np.uint8)
        galaxies.append(Galaxy(f"g-{row:04d}+x", image_HWC, row % 3, 10.0 + row, -5.0, {"row": row, **extras}))
    return tuple(galaxies)


def as_jpeg(galaxy: Galaxy, quality: int = 90) -> Galaxy:
    """The same galaxy as the bytes of a JPEG file."""
    assert isinstance(galaxy.image, np.ndarray)
    data = simplejpeg.encode_jpeg(galaxy.image, quality, "RGB", "420")
    return Galaxy(galaxy.id, EncodedImage(data, "jpg"), galaxy.label, galaxy.ra, galaxy.dec, galaxy.extras)


def make_old(folder: Path) -> Manifest:
    """Shards as they were before there were catalogues."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for name in content.pop("catalogues"):
        (folder / name).unlink()
    path.write_text(json.dumps(content, indent=1) + "\n")
    return read_manifest(folder)
