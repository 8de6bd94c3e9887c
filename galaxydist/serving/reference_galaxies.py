"""Training galaxies of a published model: their embeddings, thumbnails and thresholds for pictures that are unlike them.

The distances are described in ``serving/app/reference_set.py``. Their thresholds come from the run's validation galaxies alone;
the share of false alarms is measured on test galaxies, and the share of detected pictures on ``unlike_pictures.KINDS``.
"""

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from galaxydist.evaluation.metrics import wilson_interval
from galaxydist.loading.decode import read_samples, read_stored_files
from galaxydist.loading.image_ops import ImageTransform
from galaxydist.loading.training_data import build_augment, has_split
from galaxydist.models.build import evaluation_mode
from galaxydist.models.features import extract_features
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.trained_model import TrainedModel
from galaxydist.serving.app.pictures import PictureError, read_picture
from galaxydist.serving.app.published_model import EXAMPLES, REFERENCE, THUMBNAILS
from galaxydist.serving.app.reference_set import (
    EXAMPLES_LIST,
    REFERENCE_FORMAT,
    SETS,
    SHEET_SIDE,
    THUMBNAIL_SIDE,
    Gaussian,
    largest_distances,
    picture_statistics,
    sheet_name,
)
from galaxydist.serving.unlike_pictures import KINDS
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.surveys.data_origin import may_redistribute_images

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Stored training galaxies, and those of the quick form, for the first start of the app.
COUNT, QUICK_COUNT = 1000, 400
# Largest numbers of validation galaxies for the threshold and of test galaxies for the false alarms, and pictures of each kind.
VALIDATION, TEST, PICTURES = 2000, 2000, 48
# Share of validation galaxies beyond each of the two thresholds. Together they are at most half of the 2 % of false alarms that
# are allowed, so that a split of some hundred galaxies stays below them in spite of its scatter.
FALSE_ALARMS = 0.005
# Fewest validation galaxies for thresholds: the largest distance of n galaxies is exceeded by 1 in n + 1, and there are two.
LEAST_VALIDATION = 99
# Share of the unit matrix in the correlation matrix of the statistics, which a few galaxies do not determine in all directions.
# 0.001 to 0.1 and 60 to 700 training galaxies gave nearly the same detection.
SHRINKAGE = 0.01
_MOST_EXAMPLES, _LEAST_EXAMPLES = 10, 8
_BATCH = 32
# float16 ends at 65,504.
_LARGEST_HALF = 60_000
_JPEG_QUALITY = 88
# What Pillow finds in a JPEG file that says nothing about where the picture was made.
_PLAIN_JPEG = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive", "progression"}


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
    quick: bool = False,
) -> dict[str, Any]:
    """Write the embeddings of training galaxies, thumbnails and examples into a published folder.

    Args:
        trained: the model, on the CPU.
        out: the folder, in which ``reference.npz``, ``thumbnails`` and ``examples`` do not exist yet.
        environ: names the data root of the run's shards.
        count: largest number of training galaxies, as equal numbers of each class as there are.
        manifest: path or URL of the shards that the run was trained on; None: where they were.
        quick: store at most ``QUICK_COUNT`` galaxies, take the threshold from as many, and measure neither false alarms nor
            detection.

    Returns:
        For ``results.json``: ``reference`` (what was stored) and ``unlike`` (method, thresholds, false alarms, detection).

    Raises:
        UserError: the shards are not there, a galaxy cannot be read, or the model has no usable embedding.
    """
    shards = trained.open_shards(environ, manifest)
    reader = GalaxyReader(trained, shards)
    may_show = may_redistribute_images(shards.origin or trained.stored.origin)
    galaxies = choose_galaxies(shards, "train", min(count, QUICK_COUNT) if quick else count, by_class=True)
    pixels = [*reader.read(galaxies)]
    embeddings_ND = reader.embed(pixels)
    if not np.isfinite(embeddings_ND).all() or not embeddings_ND.std(axis=0).any():
        raise UserError(f"the embeddings of {trained.path} are not finite, or all alike: the model has not learnt anything")
    half = np.float16 if np.abs(embeddings_ND).max() < _LARGEST_HALF else np.float32
    arrays: dict[str, Any] = {
        "format": np.int64(REFERENCE_FORMAT),
        "embeddings": embeddings_ND.astype(half),
        "labels": galaxies.labels.astype(np.int32),
        "ids": np.array(galaxies.ids),
    }
    found, unlike = _measure_distances(reader, reader.statistics(pixels), quick=quick)
    _write_arrays(out / REFERENCE, arrays | found)
    examples = 0
    if may_show:
        _write_sheets(out / THUMBNAILS, pixels)
        examples = _write_examples(out / EXAMPLES, shards)
    stored = {"galaxies": len(galaxies), "split": "train", "thumbnails": may_show, "examples": examples}
    if not may_show:
        logger.info("no thumbnails and no examples: the licence of the data does not permit it, or is unknown")
    return {"reference": stored, "unlike": unlike}


class GalaxyReader:
    """Reads galaxies as a trained model's network sees them, and computes their embeddings and statistics.

    Args:
        trained: the model, on the CPU.
        shards: of its training.
    """

    def __init__(self, trained: TrainedModel, shards: Manifest) -> None:
        self.shards = shards
        self._form = ImageForm.of(trained.stored, trained.recipe.data, resize=True)
        self._model = trained.model
        self._normalise = build_augment(trained.recipe, trained.trained_on, threads=available_cores()).normalise

    @property
    def factor(self) -> int:
        """The factor by which stored images are decoded smaller."""
        return self._form.factor

    def read(self, galaxies: ChosenGalaxies) -> Iterator[Pixels]:
        """Yield stored galaxies as T x T x 3 uint8, before the normalisation.

        Raises:
            UserError: a galaxy cannot be read.
        """
        from tqdm import tqdm

        stored = read_samples(self.shards, galaxies.split, galaxies.samples, (self.factor,))
        for _, (pixels,) in tqdm(stored, f"{galaxies.split} galaxies", len(galaxies), unit="img", disable=None):
            yield self._seen(pixels)

    def prepare(self, pictures: Iterable[Pixels]) -> Iterator[Pixels]:
        """Yield pictures of any size as T x T x 3 uint8."""
        for picture in pictures:
            yield self._seen(self._form.prepare(np.ascontiguousarray(picture), "a picture"))

    def _seen(self, pixels: Pixels) -> Pixels:
        own = np.require(pixels, requirements=["C", "W"])  # torch takes no memory of Pillow's
        return np.asarray(self._normalise.crop_and_resize(torch.from_numpy(own[None])).numpy()[0])

    def embed(self, images: Iterable[Pixels]) -> Floats:
        """Return the embeddings B x D of images from :meth:`read`: the pooled input of the head, not averaged over views."""
        with evaluation_mode(self._model), torch.inference_mode():
            return np.concatenate([self._features(batch) for batch in _batches(images)])

    def _features(self, images_BHWC: Pixels) -> Floats:
        normalised = torch.from_numpy(self._normalise.on_cpu(images_BHWC, ImageTransform()))
        return np.asarray(extract_features(self._model, normalised).numpy(), np.float32)

    def statistics(self, images: Iterable[Pixels]) -> dict[str, Floats]:
        """Return the statistics B x S of images from :meth:`read` or :meth:`prepare`, for each set."""
        found = [picture_statistics(batch) for batch in _batches(images)]
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _batches(images: Iterable[Pixels]) -> Iterator[Pixels]:
    iterator = iter(images)
    while batch := list(islice(iterator, _BATCH)):
        yield np.stack(batch)


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


def fit_gaussian(statistics_NS: Floats) -> Gaussian:
    """Fit a normal distribution, whose correlation matrix is mixed with the unit matrix (``SHRINKAGE``)."""
    from scipy import linalg

    mean_S = statistics_NS.mean(axis=0, dtype=np.float64)
    # Statistics that never change count from a thousandth on: a grey level has 0.004.
    spread_S = np.maximum(statistics_NS.std(axis=0, dtype=np.float64), 1e-3)
    scaled_NS = (statistics_NS - mean_S) / spread_S
    correlation_SS = (1 - SHRINKAGE) * (scaled_NS.T @ scaled_NS) / len(scaled_NS) + SHRINKAGE * np.eye(len(mean_S))
    lower_SS = linalg.cholesky(correlation_SS, lower=True)
    whitening_SS = linalg.solve_triangular(lower_SS, np.diag(1 / spread_S), lower=True)
    return Gaussian(mean_S.astype(np.float32), whitening_SS.astype(np.float32))


def find_threshold(distances_N: NDArray[np.float64]) -> float:
    """Return the distance that a further galaxy exceeds with a probability of at most ``FALSE_ALARMS``.

    That is the ceil((N + 1) (1 - FALSE_ALARMS))-th smallest of N distances (conformal prediction; Vovk et al. 2005, "Algorithmic
    Learning in a Random World"), or the largest if N is below 199, which 1 in N + 1 exceeds. It is above 0 if all are 0.
    """
    place = int(np.ceil((len(distances_N) + 1) * (1 - FALSE_ALARMS)))
    return max(float(np.sort(distances_N)[min(place, len(distances_N)) - 1]), float(np.finfo(np.float32).tiny))


def _measure_distances(
    reader: GalaxyReader, statistics: Mapping[str, Floats], *, quick: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of the distributions for ``reference.npz``, and ``unlike`` for ``results.json``; both {} without them."""
    shards = reader.shards
    available = shards.splits["val"].num_samples if has_split(shards, "val") else 0
    if available < LEAST_VALIDATION:
        logger.info(
            "unlike pictures are not found: the threshold needs %d validation galaxies, not %d", LEAST_VALIDATION, available
        )
        return {}, {}

    def statistics_of(split: str, count: int) -> dict[str, Floats]:
        return reader.statistics(reader.read(choose_galaxies(shards, split, count, by_class=False)))

    validation = statistics_of("val", QUICK_COUNT if quick else VALIDATION)
    gaussians = {name: fit_gaussian(statistics[name]) for name in SETS}
    for name, gaussian in gaussians.items():
        gaussians[name] = replace(gaussian, threshold=find_threshold(gaussian.distances(validation[name])))
    distances = np.sort(largest_distances(gaussians, validation))
    arrays: dict[str, Any] = {"distances": distances.astype(np.float32)}
    for name, gaussian in gaussians.items():
        arrays[f"{name}_mean"], arrays[f"{name}_whitening"] = gaussian.mean, gaussian.whitening
        arrays[f"{name}_threshold"] = np.float64(gaussian.threshold)
    unlike: dict[str, Any] = {
        "method": "Mahalanobis distances of texture and radial profile",
        "thresholds": {name: gaussian.threshold for name, gaussian in gaussians.items()},
        "validation": len(distances),
        "expected_false_alarms": len(SETS) * max(FALSE_ALARMS, 1 / (len(distances) + 1)),
    }
    if not quick:
        if has_split(shards, "test"):
            test = largest_distances(gaussians, statistics_of("test", TEST))
            unlike["false_alarms"] = _share(int((test > 1).sum()), len(test)) | {"split": "test"}
        unlike["detected"] = measure_detection(reader, gaussians)
    return arrays, unlike


def measure_detection(reader: GalaxyReader, gaussians: Mapping[str, Gaussian], count: int = PICTURES) -> dict[str, Any]:
    """Return how many pictures of each kind that is no galaxy are called unlike the training galaxies.

    Args:
        reader: prepares pictures for the model.
        gaussians: distributions of the training galaxies, with their thresholds.
        count: pictures of each kind.
    """
    found = {}
    for kind, draw in KINDS.items():
        is_unlike_B = largest_distances(gaussians, reader.statistics(reader.prepare(draw(count, 0)))) > 1
        found[kind] = _share(int(is_unlike_B.sum()), len(is_unlike_B))
    return found


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "of": total, "share": count / total, "interval": wilson_interval(count, total)}


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def _write_sheets(folder: Path, images: list[Pixels]) -> None:
    """Write thumbnails of images of any size in sheets, row by row; places behind the last one are black."""
    folder.mkdir()
    per_sheet, side = SHEET_SIDE**2, SHEET_SIDE * THUMBNAIL_SIDE
    for number, start in enumerate(range(0, len(images), per_sheet)):
        sheet = Image.new("RGB", (side, side))
        for place, pixels in enumerate(images[start : start + per_sheet]):
            row, column = divmod(place, SHEET_SIDE)
            thumbnail = Image.fromarray(pixels).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
            sheet.paste(thumbnail, (column * THUMBNAIL_SIDE, row * THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        write_bytes(folder / sheet_name(number), buffer.getvalue())


def _write_examples(folder: Path, shards: Manifest) -> int:
    """Write image files of test galaxies, the same number of each class, and ``EXAMPLES_LIST`` about them.

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
    for row, (_, data, pixels) in enumerate(read_stored_files(shards, split, chosen.samples)):
        content, ending = example_file(data, pixels)
        label, name = int(chosen.labels[row]), f"{row:02d}.{ending}"
        write_bytes(folder / name, content)
        listed.append({"file": name, "id": chosen.ids[row], "label": label, "class": shards.class_names[label], "split": split})
    listed.sort(key=lambda example: (example["label"], example["file"]))
    write_bytes(folder / EXAMPLES_LIST, to_json(listed).encode())
    return len(listed)


def example_file(data: bytes, pixels: Pixels) -> tuple[bytes, str]:
    """Return the content and the ending of an example's file.

    A JPEG stays as it is in the shard, so that the app can decode it smaller, as an evaluation does. A file of another kind, one
    with notes of a camera or a program, and one that the app would show otherwise become a PNG of the pixels.
    """
    try:
        picture = read_picture(data)
        with Image.open(io.BytesIO(data)) as image:
            is_plain = picture.jpeg is not None and set(image.info) <= _PLAIN_JPEG
    except (PictureError, OSError):
        is_plain = False
    if is_plain and picture.pixels.shape == pixels.shape:
        return data, "jpg"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), "png"
