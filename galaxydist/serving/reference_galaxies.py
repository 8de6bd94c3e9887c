"""Training galaxies of a published model: their embeddings, thumbnails and a threshold for pictures that are unlike them.

The distance is described in ``serving/app/reference.py``. Its threshold comes from the run's validation galaxies alone; the share
of false alarms is measured on test galaxies, and the share of detected pictures on ``unlike_pictures.KINDS``.
"""

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from galaxydist.atomic_files import to_json, write_bytes
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.evaluation.leakage import open_training_shards
from galaxydist.evaluation.metrics import wilson_interval
from galaxydist.loading.decode import read_samples
from galaxydist.loading.training_data import build_augment, find_cache, find_manifest, has_split
from galaxydist.models.build import evaluation_mode
from galaxydist.models.features import extract_features
from galaxydist.paths import data_root
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.trained_model import TrainedModel
from galaxydist.serving.app.published_model import EXAMPLES, REFERENCE, THUMBNAILS
from galaxydist.serving.app.reference import (
    EXAMPLES_LIST,
    REFERENCE_FORMAT,
    SHEET_SIDE,
    THUMBNAIL_SIDE,
    Gaussian,
    sheet_name,
)
from galaxydist.serving.unlike_pictures import KINDS
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.surveys.data_origin import DataOrigin

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Stored training galaxies. More than 400 changed no detection in the measurements of docs/sharing.md; similar galaxies gain.
COUNT = 1000
# Largest numbers of validation galaxies for the threshold and of test galaxies for the false alarms, and pictures of each kind.
VALIDATION, TEST, PICTURES = 1000, 1000, 48
# Share of validation galaxies beyond the threshold: half of the 2 % of false alarms that are allowed, so that a test split of
# some hundred galaxies stays below them in spite of its scatter.
FALSE_ALARMS = 0.01
# Fewest validation galaxies for a threshold: the largest distance of n galaxies is exceeded by 1 in n + 1.
LEAST_VALIDATION = 49
COMPONENTS = 128
_MOST_EXAMPLES, _LEAST_EXAMPLES = 10, 8
_BATCH = 64
# float16 ends at 65,504.
_LARGEST_HALF = 60_000
_JPEG_QUALITY = 88


@dataclass(frozen=True)
class ChosenGalaxies:
    """Galaxies of one split: S stored sample numbers, ascending, their ids and labels."""

    split: str
    samples: NDArray[np.int64]
    ids: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.samples)


def write_reference(
    trained: TrainedModel,
    out: Path,
    environ: Mapping[str, str],
    *,
    count: int = COUNT,
    manifest: str | Path | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Write the embeddings of training galaxies, thumbnails and examples into a published folder.

    Args:
        trained: the model, on the CPU.
        out: the folder, in which ``reference.npz``, ``thumbnails`` and ``examples`` do not exist yet.
        environ: names the data root of the run's shards.
        count: largest number of training galaxies, as equal numbers of each class as there are.
        manifest: path or URL of the shards that the run was trained on; None: where they were.
        measure: measure the false alarms on test galaxies, and the detection of pictures that are no galaxies.

    Returns:
        For ``results.json``: ``reference`` (what was stored) and ``unlike`` (method, threshold, false alarms, detection).

    Raises:
        UserError: the shards are not there, a galaxy cannot be read, or the model has no usable embedding.
    """
    root = data_root(trained.recipe.data.dir, environ)
    known, cache = find_manifest(trained.recipe.data, root), find_cache(trained.recipe.data, root)
    shards = open_training_shards(trained.trained_on, known, manifest, cache)
    embedder = Embedder(trained)
    may_show = may_redistribute_images(shards.origin or trained.stored.origin)
    galaxies = choose_galaxies(shards, "train", count, by_class=True)
    embeddings_ND, thumbnails = embedder.embed_galaxies(shards, galaxies, thumbnails=may_show)
    if not np.isfinite(embeddings_ND).all() or not embeddings_ND.std(axis=0).any():
        raise UserError(f"the embeddings of {trained.path} are not finite, or all alike: the model has not learnt anything")
    half = np.float16 if np.abs(embeddings_ND).max() < _LARGEST_HALF else np.float32
    arrays: dict[str, Any] = {
        "format": np.int64(REFERENCE_FORMAT),
        "embeddings": embeddings_ND.astype(half),
        "labels": galaxies.labels.astype(np.int32),
        "ids": np.array(galaxies.ids),
    }
    found, unlike = _measure_distances(embedder, shards, embeddings_ND, measure=measure)
    _write_arrays(out / REFERENCE, arrays | found)
    examples = 0
    if may_show:
        _write_sheets(out / THUMBNAILS, thumbnails)
        examples = _write_examples(out / EXAMPLES, shards)
    stored = {"galaxies": len(galaxies), "split": "train", "thumbnails": may_show, "examples": examples}
    if not may_show:
        logger.info("no thumbnails and no examples: the licence of the data does not permit it, or is unknown")
    return {"reference": stored, "unlike": unlike}


class Embedder:
    """Computes the embeddings of images: the pooled input of the head, of the image itself, not of its eight views.

    Args:
        trained: the model, on the CPU.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self.form = ImageForm.of(trained.stored, trained.recipe.data, resize=True)
        self._model, self._crop = trained.model, trained.recipe.data.crop
        self._normalise = build_augment(trained.recipe, trained.trained_on, threads=available_cores()).normalise

    def embed(self, images: Iterable[Pixels]) -> Floats:
        """Return B x D embeddings of prepared images, ``form.size`` x ``form.size`` x 3 uint8."""
        iterator, parts = iter(images), list[Floats]()
        with evaluation_mode(self._model), torch.inference_mode():
            while batch := list(islice(iterator, _BATCH)):
                images_BCHW = self._normalise(torch.from_numpy(np.stack(batch)))
                parts.append(extract_features(self._model, images_BCHW).numpy())
        return np.concatenate(parts)

    def embed_galaxies(
        self, shards: Manifest, galaxies: ChosenGalaxies, *, thumbnails: bool = False
    ) -> tuple[Floats, list[Pixels]]:
        """Return the S x D embeddings of stored galaxies and, if asked for, their thumbnails.

        Raises:
            UserError: a galaxy cannot be read.
        """
        from tqdm import tqdm

        made: list[Pixels] = []

        def images() -> Iterator[Pixels]:
            stored = read_samples(shards, galaxies.split, galaxies.samples, (self.form.factor,))
            for _, (pixels,) in tqdm(stored, f"embeddings ({galaxies.split})", len(galaxies), unit="img", disable=None):
                if thumbnails:
                    made.append(self._thumbnail(pixels))
                yield pixels

        return self.embed(images()), made

    def _thumbnail(self, pixels: Pixels) -> Pixels:
        """Return the part of an image that the network sees, ``THUMBNAIL_SIDE`` pixels wide."""
        margin = round((1 - self._crop) / 2 * len(pixels))
        seen = Image.fromarray(pixels[margin : len(pixels) - margin, margin : len(pixels) - margin])
        return np.asarray(seen.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS))


def may_redistribute_images(origin: DataOrigin | None) -> bool:
    """Return True if the licence of a data set allows to pass its images on, also in changed form."""
    licence = (origin.licence if origin else None) or ""
    return bool(re.fullmatch(r"(CC-BY(-NC)?(-SA)?-\d\.\d|CC0-1\.0|MIT)", licence, re.IGNORECASE))


def choose_galaxies(shards: Manifest, split: str, count: int, *, by_class: bool) -> ChosenGalaxies:
    """Choose galaxies of a split by the hashes of their ids, so that the choice does not depend on the order of storage.

    Of remote shards, only the first few are read: galaxies are shuffled over shards.

    Args:
        shards: the data set.
        split: its split.
        count: largest number of galaxies.
        by_class: choose equal numbers of each class, as far as the classes suffice, and no unlabelled galaxy.
    """
    labels_N = np.asarray(shards.labels(split), np.int64)
    is_allowed_N = labels_N >= 0 if by_class else np.ones(len(labels_N), np.bool_)
    if shards.has_remote_shards:
        ends = np.cumsum(shards.shards(split)["samples"])
        last = min(int(np.searchsorted(ends, 2 * count)), len(ends) - 1)
        is_allowed_N[int(ends[last]) :] = False
    ids = read_catalogue(shards, split, ("id",)).column("id").to_pylist()
    samples = np.array(sorted(np.flatnonzero(is_allowed_N).tolist(), key=lambda sample: _id_hash(ids[sample])), np.int64)
    if by_class:
        of_class = labels_N[samples]
        order = np.argsort(of_class, kind="stable")
        rank = np.empty(len(samples), np.int64)  # within its class
        rank[order] = np.arange(len(samples)) - np.searchsorted(of_class[order], of_class[order])
        samples = samples[np.lexsort((of_class, rank))]
    samples = np.sort(samples[:count])
    return ChosenGalaxies(split, samples, [ids[sample] for sample in samples.tolist()], labels_N[samples])


def _id_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def fit_gaussian(embeddings_ND: Floats) -> Gaussian:
    """Fit a normal distribution by probabilistic principal components, at most ``COMPONENTS`` of them."""
    from scipy import linalg

    num, length = embeddings_ND.shape
    mean_D = embeddings_ND.mean(axis=0, dtype=np.float64)
    centred_ND = embeddings_ND - mean_D
    # The smaller of the two products has the same positive eigenvalues.
    is_tall = num > length
    product = centred_ND.T @ centred_ND if is_tall else centred_ND @ centred_ND.T
    size = len(product)
    count = max(1, min(COMPONENTS, num - 1, length - 1))
    values, vectors = linalg.eigh(product / (num - 1), subset_by_index=[size - count, size - 1])
    total = float((centred_ND**2).sum()) / (num - 1)
    # Never zero, or the last bit of a constant feature would count.
    floor = 1e-6 * total / length
    is_used = values > floor
    values, vectors = values[is_used][::-1], vectors[:, is_used][:, ::-1]
    components_PD = vectors.T if is_tall else (centred_ND.T @ vectors / np.sqrt(values * (num - 1))).T
    rest = max((total - float(values.sum())) / max(length - len(values), 1), floor)
    return Gaussian(
        mean_D.astype(np.float32), components_PD.astype(np.float32), values.astype(np.float32), float(np.float32(rest))
    )


def find_threshold(distances_N: NDArray[np.float64]) -> float:
    """Return the distance that a further galaxy exceeds with a probability of at most ``FALSE_ALARMS``.

    That is the ceil((N + 1) (1 - FALSE_ALARMS))-th smallest of N distances (conformal prediction; Vovk et al. 2005, "Algorithmic
    Learning in a Random World"), or the largest if N is below 99, which 1 in N + 1 exceeds.
    """
    place = int(np.ceil((len(distances_N) + 1) * (1 - FALSE_ALARMS)))
    return float(np.sort(distances_N)[min(place, len(distances_N)) - 1])


def _measure_distances(
    embedder: Embedder, shards: Manifest, embeddings_ND: Floats, *, measure: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of the distribution for ``reference.npz``, and ``unlike`` for ``results.json``; both {} without it."""
    available = shards.splits["val"].num_samples if has_split(shards, "val") else 0
    if available < LEAST_VALIDATION:
        logger.info(
            "unlike pictures are not found: %d validation galaxies, and a threshold needs %d", available, LEAST_VALIDATION
        )
        return {}, {}
    gaussian = fit_gaussian(embeddings_ND)
    validation = choose_galaxies(shards, "val", VALIDATION, by_class=False)
    distances = np.sort(gaussian.distances(embedder.embed_galaxies(shards, validation)[0]))
    threshold = find_threshold(distances)
    arrays = {
        "mean": gaussian.mean,
        "components": gaussian.components,
        "variances": gaussian.variances,
        "rest": np.float32(gaussian.rest),
        "distances": distances.astype(np.float32),
        "threshold": np.float64(threshold),
    }
    unlike: dict[str, Any] = {
        "method": f"Mahalanobis distance of the embedding, {len(gaussian.variances)} principal components",
        "threshold": threshold,
        "validation": len(validation),
        "expected_false_alarms": max(FALSE_ALARMS, 1 / (len(validation) + 1)),
    }
    if measure:
        if has_split(shards, "test"):
            test = choose_galaxies(shards, "test", TEST, by_class=False)
            far = int((gaussian.distances(embedder.embed_galaxies(shards, test)[0]) > threshold).sum())
            unlike["false_alarms"] = _share(far, len(test)) | {"split": "test"}
        unlike["detected"] = measure_detection(embedder, gaussian, threshold)
    return arrays, unlike


def measure_detection(embedder: Embedder, gaussian: Gaussian, threshold: float, count: int = PICTURES) -> dict[str, Any]:
    """Return how many pictures of each kind that is no galaxy are farther than the threshold.

    Args:
        embedder: of the model.
        gaussian: distribution of the training galaxies.
        threshold: of its distances.
        count: pictures of each kind.
    """
    found = {}
    for kind, draw in KINDS.items():
        pictures = (embedder.form.prepare(np.ascontiguousarray(picture), kind) for picture in draw(count, 0))
        far_B = gaussian.distances(embedder.embed(pictures)) > threshold
        found[kind] = _share(int(far_B.sum()), len(far_B))
    return found


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "of": total, "share": count / total, "interval": wilson_interval(count, total)}


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def _write_sheets(folder: Path, thumbnails: list[Pixels]) -> None:
    """Write the thumbnails in sheets, row by row; places behind the last one are black."""
    folder.mkdir()
    per_sheet, side = SHEET_SIDE**2, SHEET_SIDE * THUMBNAIL_SIDE
    for number, start in enumerate(range(0, len(thumbnails), per_sheet)):
        sheet = Image.new("RGB", (side, side))
        for place, thumbnail in enumerate(thumbnails[start : start + per_sheet]):
            row, column = divmod(place, SHEET_SIDE)
            sheet.paste(Image.fromarray(thumbnail), (column * THUMBNAIL_SIDE, row * THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        write_bytes(folder / sheet_name(number), buffer.getvalue())


def _write_examples(folder: Path, shards: Manifest) -> int:
    """Write test galaxies, the same number of each class, as PNG files at their stored size, and ``EXAMPLES_LIST`` about them.

    Without a test split they are validation galaxies; training galaxies, which the model knows, are none.
    """
    split = next((name for name in ("test", "val") if has_split(shards, name)), None)
    if split is None:
        return 0
    classes = shards.num_classes
    number = min(_MOST_EXAMPLES, max(classes, _LEAST_EXAMPLES // classes * classes))
    chosen = choose_galaxies(shards, split, number, by_class=True)
    folder.mkdir()
    listed = []
    for row, (_, (pixels,)) in enumerate(read_samples(shards, split, chosen.samples)):
        label, name = int(chosen.labels[row]), f"{row:02d}.png"
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        write_bytes(folder / name, buffer.getvalue())
        listed.append({"file": name, "id": chosen.ids[row], "label": label, "class": shards.class_names[label], "split": split})
    listed.sort(key=lambda example: (example["label"], example["file"]))
    write_bytes(folder / EXAMPLES_LIST, to_json(listed).encode())
    return len(listed)
