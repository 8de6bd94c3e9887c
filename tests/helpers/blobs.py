"""A survey of drawn blobs, in memory: three classes that a small model tells apart within seconds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.galaxy import Galaxy

CLASS_NAMES = ("round", "flat", "pair")


@dataclass(frozen=True)
class BlobSurvey:
    """``num_galaxies`` blobs of ``size`` x ``size`` pixels; rows are dealt 6 : 2 : 2 to train, val and test."""

    num_galaxies: int = 120
    size: int = 32
    name: str = "blobs"
    variant: str = "original"
    class_names: tuple[str, ...] = CLASS_NAMES
    source_hash: str = "0" * 64
    slab_length: int = 16

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(self.num_galaxies) % 3

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        rows = np.arange(self.num_galaxies)
        place = (rows // 3) % 10
        return {"train": rows[place < 6], "val": rows[(place >= 6) & (place < 8)], "test": rows[place >= 8]}

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row in range(start, stop):
            yield Galaxy(f"blob-{row:05d}", self._draw(row), int(self.labels[row]), extras={"row": row})

    def _draw(self, row: int) -> NDArray[np.uint8]:
        y_HW, x_HW = np.mgrid[: self.size, : self.size] - (self.size - 1) / 2
        angle = row * 2.399963
        u_HW, v_HW = x_HW * np.cos(angle) + y_HW * np.sin(angle), y_HW * np.cos(angle) - x_HW * np.sin(angle)
        width = self.size / 8
        if row % 3 == 2:
            light_HW = sum(np.exp(-((u_HW - s * 2 * width) ** 2 + v_HW**2) / width**2) for s in (-1, 1))
        else:
            flatness = 1.0 if row % 3 == 0 else 4.0
            light_HW = np.exp(-(u_HW**2 + flatness**2 * v_HW**2) / (2 * width) ** 2)
        gain = 150 + 20 * np.sin(row)
        image_HWC = np.stack([light_HW * gain + 20, light_HW * gain * 0.9 + 20, light_HW * gain * 0.8 + 20], axis=-1)
        return image_HWC.clip(0, 255).astype(np.uint8)
