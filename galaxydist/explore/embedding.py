"""A map of a sample: galaxies that look alike lie together. Features are simple and need no download, or are handed in."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galaxydist.explore.datasets import chance_order
from galaxydist.explore.scan import THUMBNAIL, ImageScan

# t-SNE of these takes some ten seconds on a core.
MAX_GALAXIES = 2000
_LEAST_GALAXIES = 10
_COMPONENTS = 20
_NEIGHBOURS = 10
# Cells along each side of the map of pictures.
CELLS = 22


@dataclass(frozen=True, slots=True)
class Map:
    """Where m galaxies lie.

    Args:
        places: (m,) places in the sample.
        xy_m2: in 0 ... 1, y upwards.
        features: what they were placed by, in words.
        agreement: share of the galaxies whose class is the commonest among their ten nearest others in the features.
        by_chance: the share of the commonest class: what agreement would be if the features said nothing.
    """

    places: NDArray[np.int64]
    xy_m2: NDArray[np.float64]
    features: str
    agreement: float
    by_chance: float


# Thumbnails n x H x W x 3 uint8 -> (n, D) features, and what they are in words.
Features = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], str]]


def map_sample(looked: ImageScan, seed: int, features: Features | None = None) -> Map | None:
    """t-SNE (van der Maaten & Hinton 2008, JMLR 9, 2579) of at most ``MAX_GALAXIES``; None of fewer than ten.

    Args:
        seed: of the choice of galaxies and of t-SNE.
        features: of thumbnails; their principal components where None.
    """
    if len(looked) < _LEAST_GALAXIES:
        return None
    from sklearn.manifold import TSNE

    places = np.sort(np.searchsorted(looked.rows, chance_order(looked.rows, seed)[:MAX_GALAXIES]))
    features_mD, named = (features or principal_components)(looked.thumbnails_nHWC[places])
    perplexity = min(30.0, (len(places) - 1) / 3)
    place_m2 = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(features_mD)
    low_2, high_2 = place_m2.min(axis=0), place_m2.max(axis=0)
    xy_m2 = (place_m2 - low_2) / np.maximum(high_2 - low_2, 1e-9)
    labels_m = looked.labels[places]
    agreement, by_chance = _agreement(features_mD, labels_m)
    return Map(places, np.asarray(xy_m2, np.float64), named, agreement, by_chance)


def principal_components(pictures_mHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], str]:
    """The first principal components of the middles of the pictures, in colour, and words that say so.

    The middle half and twenty components: on real galaxies these agree best with the classes (45 % of the galaxies; whole
    pictures 40 %, whose edges hold other galaxies and stars).
    """
    from sklearn.decomposition import PCA

    middle_mD = _middle(pictures_mHWC).reshape(len(pictures_mHWC), -1).astype(np.float32)
    number = min(_COMPONENTS, len(middle_mD) - 1)
    analysis = PCA(number, svd_solver="randomized", random_state=0)
    features_mD = np.asarray(analysis.fit_transform(middle_mD), np.float32)
    explained = float(np.nan_to_num(analysis.explained_variance_ratio_.sum()))
    words = f"{number} principal components of the pictures' middle halves at {THUMBNAIL // 2} x {THUMBNAIL // 2} pixels"
    return features_mD, f"{words} ({100 * explained:.0f} % of their variance)"


def _middle(pictures_mHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    quarter = THUMBNAIL // 4
    return pictures_mHWC[..., quarter:-quarter, quarter:-quarter, :]


def _agreement(features_mD: NDArray[np.float32], labels_m: NDArray[np.int64]) -> tuple[float, float]:
    from sklearn.neighbors import NearestNeighbors

    number = min(_NEIGHBOURS, len(labels_m) - 1)
    near_mK = NearestNeighbors(n_neighbors=number).fit(features_mD).kneighbors(return_distance=False)
    _, codes_m = np.unique(labels_m, return_inverse=True)
    votes_mC = (codes_m[near_mK][..., None] == np.arange(codes_m.max() + 1)).sum(axis=1)
    return float((votes_mC.argmax(axis=1) == codes_m).mean()), float(np.bincount(codes_m).max() / len(codes_m))


def picture_map(found: Map, looked: ImageScan, colours: dict[int, str], cell: int = 48) -> Image.Image:
    """The map as pictures: in each cell the middle half of the galaxy nearest to it, framed in the colour of its class.

    Args:
        colours: label -> ``#rrggbb``.
        cell: width of a picture in pixels.
    """
    sheet = Image.new("RGB", (CELLS * cell, CELLS * cell), "#101216")
    scaled_m2 = np.minimum(found.xy_m2 * CELLS, CELLS - 1e-6)
    cells_m2 = scaled_m2.astype(np.int64)
    distance_m = np.abs(scaled_m2 - cells_m2 - 0.5).max(axis=1)
    order = np.lexsort((distance_m, cells_m2[:, 0] * CELLS + cells_m2[:, 1]))
    number_m = (cells_m2[:, 0] * CELLS + cells_m2[:, 1])[order]
    for nearest in order[np.concatenate([[True], number_m[1:] != number_m[:-1]])].tolist():
        place = int(found.places[nearest])
        frame = Image.new("RGB", (cell - 1, cell - 1), colours[int(looked.labels[place])])
        middle = Image.fromarray(_middle(looked.thumbnails_nHWC[place]))
        picture = middle.resize((cell - 5, cell - 5), Image.Resampling.LANCZOS)
        frame.paste(picture, (2, 2))
        column, row = cells_m2[nearest].tolist()
        sheet.paste(frame, (column * cell, (CELLS - 1 - row) * cell))
    return sheet


def sprite(found: Map, looked: ImageScan, cell: int = 48) -> tuple[Image.Image, int]:
    """All pictures of the map side by side, in its order, and the number of columns."""
    columns = int(np.ceil(np.sqrt(len(found.places))))
    sheet = Image.new("RGB", (columns * cell, -(-len(found.places) // columns) * cell))
    for number, place in enumerate(found.places.tolist()):
        picture = Image.fromarray(looked.thumbnails_nHWC[place]).resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(picture, (number % columns * cell, number // columns * cell))
    return sheet, columns
