"""Images that a table lists by file name."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.surveys.image_files import EXTENSIONS, group_equal_files, hash_files, read_image

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_SLAB = 256


@dataclass(frozen=True)
class ListedImages:
    """Image files on this machine, one for each row of a table; an :class:`galaxydist.surveys.image_table.ImageSource`.

    Attributes:
        name: the table, for progress bars.
        root: the folder that relative files start from.
        files: N files, relative to the root or absolute; empty for a row without an image.
    """

    name: str
    root: Path
    files: Sequence[str] = field(repr=False)
    slab_length: int = _SLAB

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        """Yield the images of rows ``start`` ... ``stop - 1``; raises DamagedImageError at one that cannot be read."""
        for row in range(start, stop):
            if not self.files[row]:
                raise DamagedImageError(f"row {row + 1} of {self.name} has no image")
            yield read_image(self.root / self.files[row])

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the bytes of all files."""
        return hashlib.sha256("\n".join(self._digests).encode()).hexdigest()

    def group_equal(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) group numbers, equal for files of equal bytes; -1 for a file without a copy."""
        rows = np.array([row for row, file in enumerate(self.files) if file], np.int64)
        groups = np.full(len(self.files), -1, np.int64)
        files, digests = ([values[row] for row in rows.tolist()] for values in (self.files, self._digests))
        groups[rows] = group_equal_files(self.root, files, digests, labels[rows])
        return groups

    def __getstate__(self) -> dict[str, object]:
        """Leave the hashes out of a pickle: workers do not need them."""
        return {key: value for key, value in vars(self).items() if key != "_digests"}

    @cached_property
    def _digests(self) -> list[str]:
        found = iter(hash_files(self.root, [file for file in self.files if file], self.name))
        return [next(found) if file else "" for file in self.files]


def open_listed_images(texts: "pa.Array", root: str, location: str, column: str) -> tuple[ListedImages, NDArray[np.bool_]]:
    """Return the images that the cells of a file column name, and (N,) True for rows whose image exists; see ``find_files``."""
    files = find_files(texts.to_pylist(), Path(root), location, column)
    return ListedImages(location, Path(root), files), np.array([bool(file) for file in files])


def find_files(texts: Sequence[str | None], root: Path, location: str, column: str) -> list[str]:
    """Return the file of each row, empty for a row whose file does not exist.

    A text may have backslashes, and may lack the extension if exactly one image has that name.

    Args:
        texts: N cells of the file column, None where empty.
        root: the folder that relative files start from.
        location, column: the table and its file column, for messages.

    Raises:
        UserError: the column is empty, or none of the files exists.
    """
    listings = _Listings(root)
    files = [listings.find(text) if text else "" for text in texts]
    if not any(files):
        first = next((text for text in texts if text), None)
        if first is None:
            raise UserError(f"{location}, column {column!r} is empty, so that no row has an image; name another one with --file")
        raise UserError(
            f"{location}: none of the {sum(map(bool, texts))} images exists; the first, {first!r} in column {column!r}, would be "
            f"{root / first}. Give the folder that these names start from with --images, or another column with --file"
        )
    return files


class _Listings:
    """Contents of the folders that files are looked for in; each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, dict[str, list[str]]] = {}  # folder -> name, with and without extension -> names

    def find(self, text: str) -> str:
        """Return the file that a text means, or an empty text."""
        plain = text.strip()
        for name in dict.fromkeys((plain, plain.replace("\\", "/"))):
            path = PurePosixPath(name)
            found = self._names(str(path.parent)).get(path.name, [])
            if path.name in found:
                return str(path)
            if len(found) == 1:
                return str(path.parent / found[0])
        return ""

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._folders:
            names: dict[str, list[str]] = {}
            try:
                with os.scandir(self._root / folder) as entries:
                    listed = [entry.name for entry in entries if not entry.is_dir()]
            except OSError:
                listed = []
            for name in listed:
                path = PurePosixPath(name)
                names.setdefault(name, []).append(name)
                if path.suffix.lower() in EXTENSIONS:
                    names.setdefault(path.stem, []).append(name)
            self._folders[folder] = names
        return self._folders[folder]
