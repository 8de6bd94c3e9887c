"""Picture files: handed on as the bytes they are where a decoder of shards will read them, else as pixels."""

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from galaxydist.cpus import available_cores
from galaxydist.errors import DamagedPictureError, UserError
from galaxydist.galaxy import EncodedImage

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".jp2", ".j2k", ".avif"}
)
_PASSED_ON = {"JPEG": "jpg", "PNG": "png"}
_EIGHT_BIT_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "1", "PA"})
# What Pillow raises for damaged files of various formats.
_UNDECODABLE = (OSError, SyntaxError, ValueError, OverflowError, struct.error, zlib.error, Image.DecompressionBombError)


def read_picture(path: Path) -> NDArray[np.uint8] | EncodedImage:
    """A picture file: the bytes of an RGB JPEG or PNG, unopened but for its header; H x W x 3 uint8 pixels of anything else.

    Pictures that are not to be shown as they are stored (turned by their EXIF orientation, or transparent) are pixels, too.

    Raises:
        DamagedPictureError: the file cannot be read, is no picture or has no 8-bit colours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        target = f", a broken link to {path.readlink()}" if path.is_symlink() and not path.exists() else ""
        raise DamagedPictureError(f"{path} cannot be read: {error.strerror}{target}") from error
    try:
        with Image.open(io.BytesIO(data)) as picture:
            is_plain = picture.mode == "RGB" and not picture.has_transparency_data and not _is_turned(picture, data)
            if is_plain and picture.format in _PASSED_ON:
                return EncodedImage(data, _PASSED_ON[picture.format], str(path))
    except _UNDECODABLE as error:
        raise _undecodable(path, len(data), error) from error
    return decode_file(data, path)


def decode_file(data: bytes, name: object) -> NDArray[np.uint8]:
    """H x W x 3 uint8 RGB pixels of a picture file's bytes, decoded to the end: upright, and on black where it is transparent.

    Args:
        data: the file's bytes.
        name: the file, for messages.

    Raises:
        DamagedPictureError: truncated, damaged, no picture, or no 8-bit colours.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in _EIGHT_BIT_MODES:
                raise DamagedPictureError(f"{name} has pixels of kind {picture.mode!r}, not 8-bit RGB or grey: convert it first")
            return np.asarray(to_rgb(ImageOps.exif_transpose(picture) if _is_turned(picture, data) else picture))
    except DamagedPictureError:
        raise
    except _UNDECODABLE as error:
        raise _undecodable(name, len(data), error) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture in RGB, on black where it is transparent: the colours behind full transparency are arbitrary."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA")).convert("RGB")


def _is_turned(picture: Image.Image, data: bytes) -> bool:
    """Return True if the file says that it is to be shown turned or mirrored. A search for the mark tells that most do not."""
    if not any(mark in data for mark in (b"Exif", b"eXIf", b"tiff:Orientation")):
        return False
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except _UNDECODABLE:  # the mark is damaged, which says nothing of the pixels
        return False


def _undecodable(name: object, size: int, error: Exception) -> DamagedPictureError:
    reason = "no picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return DamagedPictureError(f"{name} ({size} bytes) cannot be decoded: {reason}")


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """A lossless PNG file of H x W x 3 uint8 pixels."""
    stream = io.BytesIO()
    # Run-length matching: on noisy pictures smaller than zlib's default at level 1, and a quarter faster (measured).
    Image.fromarray(image_HWC).save(stream, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()


# The bytes of a folder's picture files: their hashes, and which files are equal.

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
        pixels = decode_file(image.data, path) if isinstance(image, EncodedImage) else image
    except UserError:
        return True
    return bool((pixels == pixels[:1, :1]).all())


def _some(files: Sequence[str], groups: Sequence[NDArray[np.int64]]) -> str:
    named = ", ".join(" = ".join(files[row] for row in rows[:_NAMED].tolist()) for rows in groups[:_NAMED])
    return named + (f" and {len(groups) - _NAMED} more" if len(groups) > _NAMED else "")
