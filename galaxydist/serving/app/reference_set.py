"""Training galaxies stored with a published model: the most similar ones to a picture, and pictures that are unlike all.

Similar galaxies are those whose embeddings point into the same direction. An embedding does not say whether a picture is like
them at all: a fine-tuned network can give a drawing the embedding of a galaxy (measured in docs/benchmarks.md). So statistics of
the pixels decide: those of the texture, after the marginal statistics of Portilla & Simoncelli (2000, Int. J. Comput. Vis. 40,
49), and the radial profile. A picture is called unlike the training galaxies if its Mahalanobis distance from them in either is
larger than that of nearly all validation galaxies (Lee et al. 2018, arXiv:1807.03888, equation 2, with one Gaussian for all
classes).
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from .published_model import EXAMPLES, REFERENCE, THUMBNAILS, PublishedFolderError

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

# List of the examples, in their folder.
EXAMPLES_LIST = "examples.json"
# Version of ``reference.npz``.
REFERENCE_FORMAT = 1
# Side of a thumbnail in pixels, and thumbnails in a row and in a column of a sheet. Whole blocks of JPEG, so that none bleeds
# into its neighbour.
THUMBNAIL_SIDE, SHEET_SIDE = 64, 16
_PER_SHEET = SHEET_SIDE**2
# Decoded sheets that are kept, 3 MB each.
_KEPT_SHEETS = 8
# Arrays of ``reference.npz``: number of dimensions and kind of the values.
_ARRAYS = {"embeddings": (2, "f"), "labels": (1, "i"), "ids": (1, "U")}
# Its arrays of each set of statistics, with the name of the set before theirs.
_GAUSSIAN = {"mean": (1, "f"), "whitening": (2, "f"), "threshold": (0, "f")}
# Sets of statistics.
TEXTURE, PROFILE = "texture", "profile"
SETS = TEXTURE, PROFILE
# Radii of the centre, where a galaxy is, and of the ring around it, in half-sides. Rings farther out made it worse.
_RINGS = (0.0, 0.15, 0.35)
# Radii of the rings of the profile, and that beyond which there is sky.
_PROFILE_RINGS, _SKY = (0.0, 0.06, 0.12, 0.2, 0.3, 0.45), 0.7
# Brightness (full scale 1) above which the profile's scale becomes logarithmic: five grey levels of 255.
_FAINT = 0.02
# Added to spreads (full scale 1) before their logarithms: less than one grey level of 255.
_SMALLEST_SPREAD = 0.003
# Width in pixels below which a picture is not halved further.
_SMALLEST_WIDTH = 8


def picture_statistics(images_BHWC: Pixels) -> dict[str, Floats]:
    """Return statistics of pictures that do not change if these are turned or flipped: B x S float32 for each of ``SETS``.

    Args:
        images_BHWC: uint8, square, as the network sees them before the normalisation.
    """
    images_BCHW = images_BHWC.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    size = images_BCHW.shape[2]
    offsets = np.arange(size) - (size - 1) / 2
    radius_HW = np.hypot(offsets[:, None], offsets) / (size / 2)
    return {TEXTURE: _texture(images_BCHW, radius_HW), PROFILE: _radial_profile(images_BCHW.mean(axis=1), radius_HW)}


def _radial_profile(grey_BHW: Floats, radius_HW: NDArray[np.float64]) -> Floats:
    """Return the brightness of rings above the sky, from the centre outwards, on a scale like that of magnitudes.

    The median of a ring and of the sky leaves stars out. In small pictures, rings without a pixel are left out.
    """
    sky_B = np.median(grey_BHW[:, radius_HW > _SKY], axis=1)
    rings = [(radius_HW >= inner) & (radius_HW < outer) for inner, outer in pairwise(_PROFILE_RINGS)]
    profile_RB = [np.median(grey_BHW[:, ring], axis=1) - sky_B for ring in rings if ring.any()]
    return np.asarray(np.arcsinh(np.stack(profile_RB, axis=1) / np.float32(_FAINT)), np.float32)


def _texture(images_BCHW: Floats, radius_HW: NDArray[np.float64]) -> Floats:
    """Return statistics of brightness, spreads and steps.

    They are the mean and the spread of each channel in the centre and in a ring around it, and, at the full size and at each half
    of it, the spread of the channels and of their differences (R - G and G - B), and the mean size of the steps between
    neighbouring pixels in them. Of spreads and steps it is the logarithm.
    """
    found = []
    for inner, outer in pairwise(_RINGS):
        ring = images_BCHW[:, :, (radius_HW >= inner) & (radius_HW < outer)]
        found += [ring.mean(axis=2), _logarithm(ring.std(axis=2))]
    planes = np.concatenate([images_BCHW, images_BCHW[:, :2] - images_BCHW[:, 1:]], axis=1)
    while True:
        across, down = np.diff(planes, axis=3), np.diff(planes, axis=2)
        found.append(_logarithm(planes.std(axis=(2, 3))))
        found.append(_logarithm(np.sqrt(((across**2).mean(axis=(2, 3)) + (down**2).mean(axis=(2, 3))) / 2)))
        found.append(_logarithm((np.abs(across).mean(axis=(2, 3)) + np.abs(down).mean(axis=(2, 3))) / 2))
        half = planes.shape[2] // 2
        if half < _SMALLEST_WIDTH:
            return np.concatenate(found, axis=1)
        blocks = planes[:, :, : 2 * half, : 2 * half].reshape(len(planes), -1, half, 2, half, 2)
        planes = blocks.mean(axis=(3, 5))


def _logarithm(spreads: Floats) -> Floats:
    return np.asarray(np.log(spreads + np.float32(_SMALLEST_SPREAD)), np.float32)


@dataclass(frozen=True)
class Gaussian:
    """Normal distribution of one set of statistics of the training galaxies.

    Args:
        mean: S float32.
        whitening: S x S float32: whitening @ (statistics - mean) has unit covariance.
        threshold: distance above which a picture is unlike the training galaxies.
    """

    mean: Floats
    whitening: Floats
    threshold: float = 1.0

    def distances(self, statistics_BS: ArrayLike) -> NDArray[np.float64]:
        """Return B Mahalanobis distances over the threshold.

        They are first divided by the square root of S, so that a typical training galaxy has about 1, with a threshold of 1.
        """
        white_BS = (np.asarray(statistics_BS, np.float64) - self.mean) @ self.whitening.T.astype(np.float64)
        return np.asarray(np.sqrt((white_BS**2).mean(axis=1)) / self.threshold, np.float64)


def largest_distances(gaussians: Mapping[str, Gaussian], statistics: Mapping[str, Floats]) -> NDArray[np.float64]:
    """Return the largest of the distances of B pictures in each set of statistics: above 1, a picture is unlike the galaxies."""
    distances = [gaussian.distances(statistics[name]) for name, gaussian in gaussians.items()]
    return np.asarray(np.max(distances, axis=0), np.float64)


@dataclass(frozen=True)
class Novelty:
    """Distance of a picture from the training galaxies.

    Args:
        distance: over the threshold above which a picture is called unlike them; the larger one of texture and radial profile.
        share: share of the validation galaxies that are as far away or farther.
        num_validation: number of these galaxies.
    """

    distance: float
    share: float
    num_validation: int

    @property
    def is_unlike(self) -> bool:
        """True if the picture is unlike the training galaxies."""
        return not self.distance <= 1


@dataclass(frozen=True)
class Neighbour:
    """A training galaxy that is similar to a picture.

    Args:
        id: in the survey.
        label: class number.
        similarity: cosine of the embeddings around their mean, -1 to 1.
        thumbnail: THUMBNAIL_SIDE x THUMBNAIL_SIDE x 3 uint8, the part that the network sees; None if thumbnails were not stored.
    """

    id: str
    label: int
    similarity: float
    thumbnail: Pixels | None


@dataclass(frozen=True)
class Example:
    """A galaxy that was not trained on, to try the model with.

    Args:
        path: of its image file.
        id: in the survey.
        label: class number.
        split: ``test``, or ``val`` if there is no test split.
    """

    path: Path
    id: str
    label: int
    split: str


def read_examples(folder: Path) -> list[Example]:
    """Return the examples of a published folder by class; none if they were not stored.

    Raises:
        PublishedFolderError: their list is damaged, or a file is missing.
    """
    path = folder / EXAMPLES / EXAMPLES_LIST
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Example(path.parent / Path(one["file"]).name, str(one["id"]), int(one["label"]), str(one["split"])) for one in listed
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PublishedFolderError(f"{path} is damaged ({error!r}): publish the run again") from error
    if missing := [example.path for example in found if not example.path.is_file()]:
        raise PublishedFolderError(f"{missing[0]} is missing: publish the run again")
    return found


class Reference:
    """Stored training galaxies of a published model; threads may share it.

    Args:
        folder: the published folder, for thumbnails.
        arrays: of ``reference.npz``.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._folder = folder
        self.ids, self.labels = arrays["ids"], arrays["labels"]
        embeddings_ND = arrays["embeddings"].astype(np.float32)
        self._centre = embeddings_ND.mean(axis=0)
        self._directions_ND = unit_vectors(embeddings_ND - self._centre)
        self._distances = arrays.get("distances")
        self._gaussians = {
            name: Gaussian(arrays[f"{name}_mean"], arrays[f"{name}_whitening"], float(arrays[f"{name}_threshold"]))
            for name in (SETS if self._distances is not None else ())
        }
        self._sheet = lru_cache(maxsize=_KEPT_SHEETS)(self._read_sheet)

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """Open the stored galaxies of a published folder; None if it has none.

        Raises:
            PublishedFolderError: they are damaged, or were written by a later version.
        """
        path = folder / REFERENCE
        if not path.is_file():
            return None
        try:
            # Without a file object numpy would leave the file open where it is no archive.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            _check(arrays)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise PublishedFolderError(f"{path} is damaged ({error}): publish the run again") from error
        return cls(folder, arrays)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_features(self) -> int:
        """D, length of an embedding."""
        return int(self._directions_ND.shape[1])

    def nearest(self, embedding_D: ArrayLike, k: int = 6) -> list[Neighbour]:
        """Return the k most similar training galaxies, the most similar first.

        Args:
            embedding_D: of the picture.
            k: number of galaxies, or fewer if fewer are stored.

        Raises:
            ValueError: an embedding of another length.
        """
        embedding = self._vector(embedding_D)
        if not np.isfinite(embedding).all():
            return []
        similarity_N = self._directions_ND @ unit_vectors((embedding - self._centre)[None])[0]
        order = np.argsort(-similarity_N, kind="stable")[:k].tolist()
        return [
            Neighbour(str(self.ids[row]), int(self.labels[row]), float(similarity_N[row]), self.thumbnail(row)) for row in order
        ]

    def novelty(self, picture: Pixels) -> Novelty | None:
        """Return the distance of a picture from the training galaxies; None if it was not published.

        Args:
            picture: T x T x 3 uint8, as the network sees it before the normalisation.

        Raises:
            ValueError: a picture of another size.
        """
        if self._distances is None:
            return None
        statistics = picture_statistics(picture[None])
        if any(statistics[name].shape[1] != len(gaussian.mean) for name, gaussian in self._gaussians.items()):
            raise ValueError(f"a picture of the shape {picture.shape} is not of the network's size")
        distance = float(largest_distances(self._gaussians, statistics)[0])
        count = len(self._distances)
        share = (count - int(np.searchsorted(self._distances, distance, side="left"))) / count
        return Novelty(distance, share, count)

    def thumbnail(self, row: int) -> Pixels | None:
        """Return the thumbnail of a stored galaxy; None if thumbnails were not stored or their sheet cannot be read."""
        sheet = self._sheet(row // _PER_SHEET)
        if sheet is None:
            return None
        top, left = (THUMBNAIL_SIDE * place for place in divmod(row % _PER_SHEET, SHEET_SIDE))
        return sheet[top : top + THUMBNAIL_SIDE, left : left + THUMBNAIL_SIDE]

    def _read_sheet(self, number: int) -> Pixels | None:
        side = SHEET_SIDE * THUMBNAIL_SIDE
        try:
            data = (self._folder / THUMBNAILS / sheet_name(number)).read_bytes()
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                if image.size != (side, side):
                    return None
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    def _vector(self, embedding_D: ArrayLike) -> Floats:
        embedding = np.asarray(embedding_D, np.float32)
        if embedding.shape != (self.num_features,):
            raise ValueError(f"an embedding has the shape {embedding.shape}, and the stored ones have {self.num_features} values")
        return embedding


def unit_vectors(vectors_ND: Floats) -> Floats:
    """Return the rows divided by their lengths; a row of zeros stays as it is."""
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.maximum(lengths_N1, np.finfo(np.float32).tiny), np.float32)


def sheet_name(number: int) -> str:
    """Return the file name of a sheet of thumbnails."""
    return f"{number:03d}.jpg"


def _check(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check the shapes and types of the arrays of ``reference.npz``.

    Raises:
        ValueError, KeyError: they do not belong together.
    """
    if int(arrays["format"]) != REFERENCE_FORMAT:
        raise ValueError(f"its format is {int(arrays['format'])}, and this version reads {REFERENCE_FORMAT}")
    sets = SETS if "distances" in arrays else ()
    expected = _ARRAYS | ({"distances": (1, "f")} if sets else {})
    expected |= {f"{name}_{part}": form for name in sets for part, form in _GAUSSIAN.items()}
    for name, (ndim, kind) in expected.items():
        if arrays[name].ndim != ndim or arrays[name].dtype.kind != kind:
            raise ValueError(f"{name} has {arrays[name].ndim} dimensions of {arrays[name].dtype}")
        if kind == "f" and not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not finite")
    num = len(arrays["embeddings"])
    if not num == len(arrays["labels"]) == len(arrays["ids"]) or num == 0:
        raise ValueError(f"it has {num} embeddings, {len(arrays['labels'])} labels and {len(arrays['ids'])} ids")
    if sets and not len(arrays["distances"]):
        raise ValueError("distances is empty")
    for name in sets:
        mean, whitening, threshold = (arrays[f"{name}_{part}"] for part in _GAUSSIAN)
        if whitening.shape != (len(mean), len(mean)) or threshold <= 0:
            raise ValueError(f"{name} has {len(mean)} means, whitening of the shape {whitening.shape}, threshold {threshold}")
