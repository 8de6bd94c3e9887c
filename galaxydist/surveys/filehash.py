"""The bytes of a folder's picture files: their hashes, and which files are equal."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.surveys.pictures import decode_picture, read_picture

logger = logging.getLogger(__name__)

# Begins what stands for the hash of a file that cannot be read.
UNREADABLE = "unreadable"
# Groups of equal files that a message names.
_NAMED = 5


def hash_files(root: Path, files: Sequence[str], name: str) -> list[str]:
    """SHA-256 (hex) of each file, on all cores; ``name`` is the data set's, for the progress bar.

    Raises:
        UserError: a disk or a file server failed. A file that is not there or may not be read has a text that says so instead:
            where pictures are read, all such are named.
    """
    from tqdm import tqdm

    def one(file: str) -> str:
        path = root / file
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except (FileNotFoundError, PermissionError) as error:
            return f"{UNREADABLE} ({error.strerror})"
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; see to the disk or the file server that it lies on"
            ) from error

    with (
        ThreadPoolExecutor(available_cores()) as pool,
        tqdm(total=len(files), desc=f"hash {name}", unit="picture", disable=None, delay=2.0) as bar,
    ):
        digests = []
        for digest in pool.map(one, files):
            digests.append(digest)
            bar.update()
    return digests


def group_equal_files(root: Path, files: Sequence[str], digests: Sequence[str], labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Groups of files of equal bytes, with a word about them; those with two labels are named.

    Args:
        root, files: the folder and its picture files.
        digests: of the files' bytes.
        labels: (N,) class numbers.

    Returns:
        (N,) a number that equal files share; -1 for a file like no other, and for pictures of one colour, which show nothing.
    """
    groups = np.full(len(files), -1, np.int64)
    _, number_N, count = np.unique(np.array(digests, np.str_), return_inverse=True, return_counts=True)
    order = np.argsort(number_N, kind="stable")
    members = np.split(order, np.cumsum(count)[:-1])
    found = [rows for rows in members if len(rows) > 1 and not digests[rows[0]].startswith(UNREADABLE)]
    found = sorted((rows for rows in found if not _is_blank(root / files[rows[0]])), key=lambda rows: int(rows[0]))
    for number, rows in enumerate(found):
        groups[rows] = number
    two_labels = [rows for rows in found if len(set(labels[rows].tolist())) > 1]
    if found:
        copies = sum(len(rows) - 1 for rows in found)
        logger.warning(
            "%s: %d pictures are copies of others, byte for byte (%s); they stay together",
            root,
            copies,
            _some(files, found),
        )
    if two_labels:
        logger.warning(
            "%s: %d pictures stand in two classes, byte for byte: %s; --conflicting drop leaves them out",
            root,
            len(two_labels),
            _some(files, two_labels),
        )
    return groups


def _is_blank(path: Path) -> bool:
    """Return True if a picture has one colour, or cannot be read at all, which is said where pictures are read."""
    try:
        image = read_picture(path)
        pixels = decode_picture(image.data, path) if isinstance(image, EncodedImage) else image
    except UserError:
        return True
    return bool((pixels == pixels[:1, :1]).all())


def _some(files: Sequence[str], groups: Sequence[NDArray[np.int64]]) -> str:
    named = ", ".join(" = ".join(files[row] for row in rows[:_NAMED].tolist()) for rows in groups[:_NAMED])
    return named + (f" and {len(groups) - _NAMED} more" if len(groups) > _NAMED else "")
