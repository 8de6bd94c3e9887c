"""Training galaxies stored with a published model: the most similar ones to a picture, and whether it is like them at all.

A picture is called unlike the training galaxies if its embedding is farther from them than those of nearly all validation
galaxies. The distance is Mahalanobis's (Lee et al. 2018, arXiv:1807.03888, equation 2, with one Gaussian for all classes). The
covariance is that of probabilistic principal components (Tipping & Bishop 1999, J. R. Stat. Soc. B 61, 611, equations 7 and 8):
the largest ones, and the mean variance of the others in all other directions.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
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
_GAUSSIAN = {"mean": (1, "f"), "components": (2, "f"), "variances": (1, "f"), "rest": (0, "f"), "distances": (1, "f")}


@dataclass(frozen=True)
class Gaussian:
    """Normal distribution of embeddings: principal components, and one variance in all other directions.

    Args:
        mean: D float32.
        components: P x D float32, orthonormal.
        variances: P float32, of the components.
        rest: variance in each other direction.
    """

    mean: Floats
    components: Floats
    variances: Floats
    rest: float

    def distances(self, embeddings_BD: ArrayLike) -> NDArray[np.float64]:
        """Return B Mahalanobis distances over the square root of D: about 1 for a typical training galaxy; nan becomes inf."""
        centred_BD = np.asarray(embeddings_BD, np.float64) - self.mean
        along_BP = centred_BD @ self.components.T.astype(np.float64)
        across_B = np.maximum((centred_BD**2).sum(axis=1) - (along_BP**2).sum(axis=1), 0)
        squares_B = (along_BP**2 / self.variances).sum(axis=1) + across_B / self.rest
        return np.asarray(np.nan_to_num(np.sqrt(squares_B / len(self.mean)), nan=np.inf), np.float64)


@dataclass(frozen=True)
class Novelty:
    """Distance of a picture from the training galaxies.

    Args:
        distance: about 1 for a typical training galaxy.
        threshold: above which a picture is called unlike the training galaxies.
        share: share of the validation galaxies that are as far away or farther.
        num_validation: number of these galaxies.
    """

    distance: float
    threshold: float
    share: float
    num_validation: int

    @property
    def is_unlike(self) -> bool:
        """True if the picture is unlike the training galaxies."""
        return not self.distance <= self.threshold


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
        self._gaussian: Gaussian | None = None
        if "mean" in arrays:
            mean, components, variances, rest = (arrays[name] for name in ("mean", "components", "variances", "rest"))
            self._gaussian = Gaussian(mean, components, variances, float(rest))
            self._distances, self._threshold = arrays["distances"], float(arrays["threshold"])
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
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            _check(arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise PublishedFolderError(f"{path} is damaged ({error}): publish the run again") from error
        return cls(folder, arrays)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_features(self) -> int:
        """D, length of an embedding."""
        return self._directions_ND.shape[1]

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

    def novelty(self, embedding_D: ArrayLike) -> Novelty | None:
        """Return the distance of a picture from the training galaxies; None if it was not published.

        Raises:
            ValueError: an embedding of another length.
        """
        if self._gaussian is None:
            return None
        distance = float(self._gaussian.distances(self._vector(embedding_D)[None])[0])
        count = len(self._distances)
        share = (count - int(np.searchsorted(self._distances, distance, side="left"))) / count
        return Novelty(distance, self._threshold, share, count)

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
    expected = _ARRAYS | (_GAUSSIAN | {"threshold": (0, "f")} if "mean" in arrays else {})
    for name, (ndim, kind) in expected.items():
        if arrays[name].ndim != ndim or arrays[name].dtype.kind != kind:
            raise ValueError(f"{name} has {arrays[name].ndim} dimensions of {arrays[name].dtype}")
        if kind == "f" and not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not finite")
    num, length = arrays["embeddings"].shape
    if not num == len(arrays["labels"]) == len(arrays["ids"]) or num == 0:
        raise ValueError(f"it has {num} embeddings, {len(arrays['labels'])} labels and {len(arrays['ids'])} ids")
    if "mean" in arrays:
        shape = (len(arrays["variances"]), length)
        if arrays["mean"].shape != (length,) or arrays["components"].shape != shape or len(arrays["distances"]) == 0:
            raise ValueError("the distribution of its embeddings has another length than they")
        if min(float(arrays["rest"]), *arrays["variances"].tolist(), 1.0) <= 0:
            raise ValueError("a variance is not positive")
