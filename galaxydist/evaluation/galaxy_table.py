"""Details of the validations of a training: counts by class, calibration, and a table of a few galaxies.

The table has the same galaxies in every validation, in every run on the same split and on any number of ranks: they are chosen by
a hash of their sample numbers, spread over the classes. Their predictions and small images are taken from the pass that counts
all galaxies.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from galaxydist.atomic_files import replace_bytes
from galaxydist.counter_rng import Stream, hash64
from galaxydist.distributed import World
from galaxydist.errors import UserError, first_line
from galaxydist.evaluation.counts import FRACTION_BITS, Predicted
from galaxydist.loading.decode import sample_key
from galaxydist.loading.loader import Batch
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.catalogue import ID, read_catalogue
from galaxydist.shards.manifest import Manifest, catalogue_name

logger = logging.getLogger(__name__)

NUM_GALAXIES = 32
# Width of a small image in pixels, and quality of the JPEG: some 3 kB, at most about 10 kB for pure noise.
IMAGE_WIDTH, IMAGE_QUALITY = 96, 80
# Metrics of a validation that metrics.jsonl holds, beside the calibration error.
LOGGED_METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_f1")


def choose_galaxies(labels_N: NDArray[np.int32], count: int = NUM_GALAXIES) -> NDArray[np.int64]:
    """Return the numbers of at most ``count`` samples, ascending: one of each class, then a second one, and so on.

    Args:
        labels_N: class numbers of all samples, -1 for none.
        count: number of samples.
    """
    samples = np.flatnonzero(labels_N >= 0)
    hashes, labels = hash64(samples, Stream.GALAXY_TABLE), labels_N[samples]
    order = np.lexsort((hashes, labels))
    labels = labels[order]
    rank_in_class = np.arange(labels.size) - np.searchsorted(labels, labels)
    chosen = order[np.lexsort((hashes[order], rank_in_class))[:count]]
    return np.sort(samples[chosen])


@dataclass
class GalaxyTable:
    """Predictions and small images of a few galaxies of a split. All ranks make one together.

    Args:
        world: the processes.
        folder: run folder, in which rank 0 writes the images that are missing.
        manifest, split: the data set and its split.

    Attributes:
        samples_M: stored sample numbers, ascending.
        rows: sample, label, predicted class and probability of each galaxy in the last pass, for JSON.
    """

    world: World
    folder: RunFolder
    manifest: Manifest
    split: str
    samples_M: NDArray[np.int64] = field(init=False)
    rows: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.samples_M = choose_galaxies(self.manifest.labels(self.split))
        self._ids: list[str] = []
        self._images: dict[int, bytes] = {}  # of this rank
        self._missing: set[int] = set(self.world.run_on_main(self._find_missing))
        self._sums_2M: torch.Tensor | None = None

    def add(self, batch: Batch, predicted: Predicted) -> None:
        """Take the galaxies of the table out of a batch; the host does not wait for the device.

        Args:
            batch: on the CPU.
            predicted: its predictions.
        """
        samples, rows, places = np.intersect1d(batch.samples_B.numpy(), self.samples_M, return_indices=True)
        if rows.size == 0:
            return
        device = predicted.classes_B.device
        if self._sums_2M is None:
            self._sums_2M = torch.zeros(2, self.samples_M.size, dtype=torch.int64, device=device)
        index = torch.from_numpy(np.stack([rows, places]))
        index = index.pin_memory() if device.type == "cuda" else index  # a copy from other memory would make the host wait
        rows_m, places_m = index.to(device, non_blocking=True)
        # Class numbers from 1: the other ranks add 0.
        values_2B = torch.stack([predicted.classes_B + 1, predicted.confidence_B])
        self._sums_2M.index_copy_(1, places_m, values_2B.index_select(1, rows_m))
        for sample, row in zip(samples.tolist(), rows.tolist(), strict=True):
            if sample in self._missing:
                self._images[sample] = small_jpeg(batch.images_BHWC[row].numpy())

    def reduce(self) -> None:
        """Share the predictions of a pass with all ranks, and write the missing images. All ranks take part."""
        sums_2M = torch.zeros(2, self.samples_M.size, dtype=torch.int64) if self._sums_2M is None else self._sums_2M
        self._sums_2M = None
        predicted_M, probability_M = self.world.all_reduce(sums_2M.to(self.world.device)).tolist()
        labels_M = self.manifest.labels(self.split)[self.samples_M].tolist()
        self.rows = [
            {"sample": sample, "label": label, "predicted": predicted - 1, "probability": probability / 2**FRACTION_BITS}
            for sample, label, predicted, probability in zip(
                self.samples_M.tolist(), labels_M, predicted_M, probability_M, strict=True
            )
        ]
        if self._missing:
            images = {sample: image for found in self.world.all_gather(self._images) for sample, image in found.items()}
            self.world.run_on_main(lambda: self._write(images))
            self._missing, self._images = set(), {}

    def details(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return a line of validation.jsonl, without its step; on rank 0.

        Args:
            metrics: of the pass, from ``evaluate_split``.
        """
        self._ids = self._ids or _read_ids(self.manifest, self.split, self.samples_M)
        calibration = metrics["calibration"]
        return {
            "classes": list(self.manifest.class_names),
            "confusion": metrics["confusion"],
            "recall": metrics["per_class"]["recall"],
            "calibration": calibration["reliability"] if calibration is not None else [],
            "galaxies": [{"id": name, **row} for name, row in zip(self._ids, self.rows, strict=True)],
        }

    def _find_missing(self) -> list[int]:
        return [sample for sample in self.samples_M.tolist() if not self.folder.galaxy_image(sample).exists()]

    def _write(self, images: Mapping[int, bytes]) -> None:
        try:
            self.folder.galaxies_dir.mkdir(exist_ok=True)
            for sample, image in images.items():
                replace_bytes(self.folder.galaxy_image(sample), image)
        except (OSError, UserError) as error:  # a training does not need them
            logger.warning("images of galaxies are missing in %s: %s", self.folder.galaxies_dir, first_line(error))


def logged_metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of a validation for metrics.jsonl, from those of ``evaluate_split``."""
    calibration = metrics["calibration"]
    found = {f"val/{name}": metrics[name] for name in LOGGED_METRICS}
    return {**found, "val/ece": calibration["ece"] if calibration is not None else None}


def small_jpeg(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """Return an image as a JPEG of at most ``IMAGE_WIDTH`` pixels.

    Args:
        pixels_HWC: RGB, square.
    """
    image, buffer = Image.fromarray(pixels_HWC), io.BytesIO()
    if image.width > IMAGE_WIDTH:
        image = image.resize((IMAGE_WIDTH, IMAGE_WIDTH), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=IMAGE_QUALITY)
    return buffer.getvalue()


def _read_ids(manifest: Manifest, split: str, samples_M: NDArray[np.int64]) -> list[str]:
    """Return the galaxies' ids; their keys in the shards if there is no catalogue."""
    if catalogue_name(split) in manifest.catalogues:
        try:
            ids: list[str] = read_catalogue(manifest, split, [ID]).column(ID).take(samples_M).to_pylist()
        except UserError:  # a damaged catalogue, which a training does not need
            pass
        else:
            return ids
    return [sample_key(manifest, split, sample) for sample in samples_M.tolist()]
