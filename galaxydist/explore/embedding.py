"""Two-dimensional map of a sample, in which similar galaxies lie close together.

The features are principal components, which need no download, or those of an encoder from a file of features.
"""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galaxydist.errors import name_some
from galaxydist.explore.datasets import random_order
from galaxydist.explore.features_file import FeaturesFile
from galaxydist.explore.scan import THUMBNAIL, ImageScan

logger = logging.getLogger(__name__)

# t-SNE of this number takes about ten seconds on one core.
MAX_GALAXIES = 2000
_LEAST_GALAXIES = 10
COMPONENTS = 20
_NEIGHBOURS = 10
# Smallest share of the neighbours that must have one other class for a label to be doubtful, while none has its own.
_DOUBTFUL_SHARE = 0.8
# Cells along each side of the map of images.
CELLS = 22
_CELL = 48  # pixels


@dataclass(frozen=True, slots=True)
class DoubtfulLabel:
    """A galaxy none of whose nearest neighbours has its label, while most of them have one other.

    Args:
        index: in the sample.
        other: most frequent label of its neighbours.
        votes: number of neighbours that have it.
    """

    index: int
    other: int
    votes: int


@dataclass(frozen=True, slots=True)
class Map:
    """Coordinates of m galaxies on the map.

    Args:
        indices: (m,) in the sample.
        xy_m2: in 0 ... 1, y upwards.
        features: description of the features.
        agreement: share of the galaxies whose class is the most common one among their ten nearest neighbours in feature space.
        by_chance: share of the largest class: the agreement of uninformative features.
        doubtful: galaxies whose label may be wrong, the most doubtful first; empty for principal components.
    """

    indices: NDArray[np.int64]
    xy_m2: NDArray[np.float64]
    features: str
    agreement: float
    by_chance: float
    doubtful: tuple[DoubtfulLabel, ...] = ()


def map_sample(scan: ImageScan, seed: int, features: FeaturesFile | None = None) -> Map | None:
    """Map at most ``MAX_GALAXIES`` by t-SNE (van der Maaten & Hinton 2008, JMLR 9, 2579); None for fewer than ten.

    Args:
        seed: of the choice of galaxies and of t-SNE.
        features: of an encoder; galaxies without features are left out, with a warning. None: principal components.
    """
    indices = np.sort(np.searchsorted(scan.rows, random_order(scan.rows, seed)[:MAX_GALAXIES]))
    if features is not None:
        indices, features_mD, description = encoder_features(scan, indices, features)
    if len(indices) < _LEAST_GALAXIES:
        return None
    if features is None:
        features_mD, description = principal_components(scan.thumbnails_nHWC[indices])
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(indices) - 1) / 3)
    xy_m2 = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(features_mD)
    xy_m2 = (xy_m2 - xy_m2.min(axis=0)) / np.maximum(np.ptp(xy_m2, axis=0), 1e-9)
    labels_m = scan.labels[indices]
    near_mK = _nearest(features_mD)
    agreement, by_chance = _agreement(near_mK, labels_m)
    doubtful = [] if features is None else find_doubtful(near_mK, labels_m, indices)
    return Map(indices, np.asarray(xy_m2, np.float64), description, agreement, by_chance, tuple(doubtful))


def encoder_features(
    scan: ImageScan, indices: NDArray[np.int64], features: FeaturesFile
) -> tuple[NDArray[np.int64], NDArray[np.float32], str]:
    """Return the indices of the galaxies with features, their features as unit vectors, and a description of them.

    Each feature is standardised first, as in a probe: distances of the unit vectors are in the order of their cosines.
    """
    ids = [scan.ids[index] for index in indices.tolist()]
    found_m, features_mD = features.find(ids)
    if missing := sorted(set(ids) - {ids[number] for number in found_m.tolist()}):
        logger.warning("%d galaxies of the sample have no features and are not on the map: %s", len(missing), name_some(missing))
    if len(found_m):
        deviation_D = features_mD.std(axis=0)
        features_mD = (features_mD - features_mD.mean(axis=0)) / np.where(deviation_D > 0, deviation_D, 1)
        features_mD /= np.maximum(np.linalg.norm(features_mD, axis=1, keepdims=True), 1e-12)
    encoder = features.info.encoder
    return indices[found_m], features_mD, f"{encoder.num_features} features of {encoder.title}"


def principal_components(images_mHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], str]:
    """Return the first principal components of the central halves of the images, in colour, and a description of them.

    On real galaxies, the central half and twenty components agree best with the classes (45 % of the galaxies). Whole images
    reach 40 %, because their edges contain other galaxies and stars.
    """
    from sklearn.decomposition import PCA

    middle_mD = _middle(images_mHWC).reshape(len(images_mHWC), -1).astype(np.float32)
    number = min(COMPONENTS, len(middle_mD) - 1)
    analysis = PCA(number, svd_solver="randomized", random_state=0)
    features_mD = np.asarray(analysis.fit_transform(middle_mD), np.float32)
    explained = float(np.nan_to_num(analysis.explained_variance_ratio_.sum()))
    description = (
        f"{number} principal components of the central halves of the images at {THUMBNAIL // 2} x {THUMBNAIL // 2} pixels"
    )
    return features_mD, f"{description} ({100 * explained:.0f} % of their variance)"


def _middle(images_mHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    quarter = THUMBNAIL // 4
    return images_mHWC[..., quarter:-quarter, quarter:-quarter, :]


def _nearest(features_mD: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the nearest neighbours of each galaxy, m x K, without itself."""
    from sklearn.neighbors import NearestNeighbors

    number = min(_NEIGHBOURS, len(features_mD) - 1)
    return np.asarray(NearestNeighbors(n_neighbors=number).fit(features_mD).kneighbors(return_distance=False))


def _agreement(near_mK: NDArray[np.int64], labels_m: NDArray[np.int64]) -> tuple[float, float]:
    from scipy.stats import mode

    _, codes_m = np.unique(labels_m, return_inverse=True)
    return float((mode(codes_m[near_mK], axis=1).mode == codes_m).mean()), float(np.bincount(codes_m).max() / len(codes_m))


def find_doubtful(near_mK: NDArray[np.int64], labels_m: NDArray[np.int64], indices: NDArray[np.int64]) -> list[DoubtfulLabel]:
    """Return the galaxies whose label none of their neighbours has, while most have one other label; most votes first.

    Args:
        near_mK: neighbours of each galaxy.
        labels_m: labels; galaxies without a label (-1) are never doubtful, and do not vote for having none.
        indices: of the m galaxies in the sample.
    """
    from scipy.stats import mode

    found = mode(labels_m[near_mK], axis=1)
    is_alone_m = (labels_m[near_mK] != labels_m[:, None]).all(axis=1)
    is_doubtful_m = is_alone_m & (labels_m >= 0) & (found.mode >= 0) & (found.count >= _DOUBTFUL_SHARE * near_mK.shape[1])
    rows = np.flatnonzero(is_doubtful_m)
    rows = rows[np.argsort(-found.count[rows], kind="stable")]
    return [DoubtfulLabel(int(indices[row]), int(found.mode[row]), int(found.count[row])) for row in rows.tolist()]


def image_map(found: Map, scan: ImageScan, colours: dict[int, str]) -> Image.Image:
    """Draw the map as a grid of images: each cell shows the galaxy nearest to its centre, framed in the colour of its class.

    Args:
        colours: label -> ``#rrggbb``.
    """
    sheet = Image.new("RGB", (CELLS * _CELL, CELLS * _CELL), "#101216")
    scaled_m2 = np.minimum(found.xy_m2 * CELLS, CELLS - 1e-6)
    cells_m2 = scaled_m2.astype(np.int64)
    distance_m = np.abs(scaled_m2 - cells_m2 - 0.5).max(axis=1)
    order = np.lexsort((distance_m, cells_m2[:, 0] * CELLS + cells_m2[:, 1]))
    number_m = (cells_m2[:, 0] * CELLS + cells_m2[:, 1])[order]
    for nearest in order[np.concatenate([[True], number_m[1:] != number_m[:-1]])].tolist():
        index = int(found.indices[nearest])
        frame = Image.new("RGB", (_CELL - 1, _CELL - 1), colours[int(scan.labels[index])])
        middle = Image.fromarray(_middle(scan.thumbnails_nHWC[index]))
        frame.paste(middle.resize((_CELL - 5, _CELL - 5), Image.Resampling.LANCZOS), (2, 2))
        column, row = cells_m2[nearest].tolist()
        sheet.paste(frame, (column * _CELL, (CELLS - 1 - row) * _CELL))
    return sheet


def sprite(found: Map, scan: ImageScan) -> tuple[Image.Image, int]:
    """Return one image with all thumbnails of the map, in its order, and its number of columns."""
    columns = int(np.ceil(np.sqrt(len(found.indices))))
    sheet = Image.new("RGB", (columns * _CELL, -(-len(found.indices) // columns) * _CELL))
    for number, index in enumerate(found.indices.tolist()):
        image = Image.fromarray(scan.thumbnails_nHWC[index]).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
        sheet.paste(image, (number % columns * _CELL, number // columns * _CELL))
    return sheet, columns
