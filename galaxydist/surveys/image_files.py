"""Image files: reading, decoding, PNG encoding, hashes and groups of equal files.

RGB JPEG and PNG files are kept as bytes, which the shard decoders read; other formats become pixels.
"""

import hashlib
import io
import logging
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from galaxydist.atomic_files import file_sha256
from galaxydist.cpus import available_cores
from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import EncodedImage

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".jp2", ".j2k", ".avif"}
)
_PASSED_ON = {"JPEG": "jpg", "PNG": "png"}
_EIGHT_BIT_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "1", "PA"})
# Exceptions that Pillow raises for damaged files of various formats.
_UNDECODABLE = (OSError, SyntaxError, ValueError, OverflowError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: Path) -> NDArray[np.uint8] | EncodedImage:
    """Read an image file, as :func:`parse_image` does.

    Raises:
        DamagedImageError: the file cannot be read, is not an image or does not have 8-bit colours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        target = f", a broken link to {path.readlink()}" if path.is_symlink() and not path.exists() else ""
        raise DamagedImageError(f"{path} cannot be read: {error.strerror}{target}") from error
    return parse_image(data, path)


def parse_image(data: bytes, name: object) -> NDArray[np.uint8] | EncodedImage:
    """Return the bytes of an RGB JPEG or PNG file, of which only the header is parsed, else H x W x 3 uint8 pixels.

    Images that are not displayed as stored (rotated by EXIF orientation, or transparent) are returned as pixels, too.

    Args:
        data: the file's bytes.
        name: the file, for messages.

    Raises:
        DamagedImageError: the file is not an image or does not have 8-bit colours.
    """
    try:
        if plain_jpeg_shape(data) is not None:  # most files, ten times as fast as Pillow
            return EncodedImage(data, "jpg", str(name))
        with Image.open(io.BytesIO(data)) as image:
            if plain := _plain_format(image, data):
                return EncodedImage(data, plain, str(name))
    except _UNDECODABLE as error:
        raise _undecodable(name, len(data), error) from error
    return decode_file(data, name)


def plain_jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG file in YCbCr; None for others, and if Pillow has to decide how the image is shown.

    That is so with a segment APP1 (EXIF or XMP, which may turn the image) or an APP2 with several images (MPF), and for damaged
    headers and sizes that Pillow refuses.
    """
    if not simplejpeg.is_jpeg(data):
        return None
    place = 2
    while data[place : place + 1] == b"\xff" and (marker := data[place + 1 : place + 2]) not in (b"\xda", b""):
        if marker == b"\xe1" or (marker == b"\xe2" and data[place + 4 : place + 8] == b"MPF\0"):
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    is_plain = colours == "YCbCr" and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return (height, width) if is_plain else None


def read_header(data: bytes) -> tuple[int, int, str] | None:
    """Return width, height and format of an image from the first bytes of its file; None if they are not enough.

    The format is ``jpg`` or ``png`` if :func:`parse_image` would return the file's bytes, else empty.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width, image.height, _plain_format(image, data)
    except _UNDECODABLE:
        return None


def _plain_format(image: Image.Image, data: bytes) -> str:
    """Return ``jpg`` or ``png`` for a file whose bytes show the image as it is stored, in RGB; else an empty text."""
    is_plain = image.mode == "RGB" and not image.has_transparency_data and not _is_turned(image, data)
    return _PASSED_ON.get(image.format or "", "") if is_plain else ""


def decode_file(data: bytes, name: object) -> NDArray[np.uint8]:
    """Decode an image file completely to H x W x 3 uint8 RGB pixels, with EXIF rotation applied and transparency on black.

    Args:
        data: the file's bytes.
        name: the file, for messages.

    Raises:
        DamagedImageError: the file is truncated, damaged, not an image, or does not have 8-bit colours.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return decode_opened(ImageOps.exif_transpose(image) if _is_turned(image, data) else image, name)
    except DamagedImageError:
        raise
    except _UNDECODABLE as error:
        raise _undecodable(name, len(data), error) from error


def decode_opened(image: Image.Image, name: object) -> NDArray[np.uint8]:
    """Return an opened image as H x W x 3 uint8 RGB pixels, with transparency on black.

    Raises:
        DamagedImageError: it does not have 8-bit colours; Pillow's errors for damaged files pass through.
    """
    if image.mode not in _EIGHT_BIT_MODES:
        raise DamagedImageError(f"{name} has pixels of kind {image.mode!r}, not 8-bit RGB or grey: convert it first")
    return np.asarray(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, with transparency on black: the colours of fully transparent pixels are arbitrary."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA")).convert("RGB")


def _is_turned(image: Image.Image, data: bytes) -> bool:
    """Return True if the EXIF orientation rotates or mirrors the image; a byte search rules most files out quickly."""
    if not any(mark in data for mark in (b"Exif", b"eXIf", b"tiff:Orientation")):
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except _UNDECODABLE:  # damaged metadata; the pixels may still be good
        return False


def _undecodable(name: object, size: int, error: Exception) -> DamagedImageError:
    reason = "not an image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return DamagedImageError(f"{name} ({size} bytes) cannot be decoded: {reason}")


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """Encode H x W x 3 uint8 pixels as a lossless PNG file."""
    stream = io.BytesIO()
    # Run-length matching: for noisy images smaller than zlib's default strategy at level 1, and a quarter faster (measured).
    Image.fromarray(image_HWC).save(stream, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()


# Hashes of image files, and groups of equal files.

logger = logging.getLogger(__name__)

# Files that a thread hashes at a time.
_HASH_BATCH = 64
# Prefix of the text that replaces the hash of an unreadable file.
UNREADABLE = "unreadable"
# Largest number of copies of an image that a message names.
_NAMED = 5


def hash_files(root: Path, files: Sequence[str], name: str) -> list[str]:
    """Return the SHA-256 (hex) of each file, computed on all cores; ``name`` labels the progress bar.

    A missing or forbidden file gets a text that begins with ``UNREADABLE``; reading the images reports all such files.

    Raises:
        UserError: a disk or a file server failed.
    """
    from tqdm import tqdm

    def one(file: str) -> str:
        path = root / file
        try:
            return file_sha256(path)
        except (FileNotFoundError, PermissionError) as error:
            return f"{UNREADABLE} ({error.strerror})"
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check its disk or file server") from error

    found: list[str] = []
    batches = [files[start : start + _HASH_BATCH] for start in range(0, len(files), _HASH_BATCH)]
    with (
        ThreadPoolExecutor(available_cores()) as pool,
        tqdm(total=len(files), desc=f"hash {name}", unit="image", disable=None, delay=2.0) as bar,
    ):
        for digests in pool.map(lambda batch: [one(file) for file in batch], batches):
            found += digests
            bar.update(len(digests))
    return found


def group_equal_images(
    location: object,
    names: Sequence[str],
    digests: Sequence[str],
    labels: NDArray[np.integer],
    read_row: Callable[[int], NDArray[np.uint8] | EncodedImage],
) -> NDArray[np.int64]:
    """Group images of equal bytes, with a warning about copies and about copies with two labels.

    Args:
        location, names: the data set and the N images, for messages.
        digests: N hashes of the images' bytes; those that begin with ``UNREADABLE`` are equal to none.
        labels: (N,) class numbers.
        read_row: returns the image of a row; raises DamagedImageError if it cannot be read.

    Returns:
        (N,) group numbers, equal for equal images; -1 for a unique image and for images of a single colour, which show nothing.
    """
    groups = np.full(len(names), -1, np.int64)
    _, number_N, count = np.unique(np.array(digests, np.str_), return_inverse=True, return_counts=True)
    order = np.argsort(number_N, kind="stable")
    members = np.split(order, np.cumsum(count)[:-1])
    found = [rows for rows in members if len(rows) > 1 and not digests[rows[0]].startswith(UNREADABLE)]
    found = sorted((rows for rows in found if not _is_blank(read_row, int(rows[0]))), key=lambda rows: int(rows[0]))
    for number, rows in enumerate(found):
        groups[rows] = number
    two_labels = [rows for rows in found if len(set(labels[rows].tolist())) > 1]
    if found:
        logger.warning(
            "%s: %d images are copies of others, byte for byte (%s); copies are kept in one split",
            location,
            sum(len(rows) - 1 for rows in found),
            _names(names, found),
        )
    if two_labels:
        logger.warning(
            "%s: %d images are in two classes, byte for byte: %s; --conflicting drop leaves them out",
            location,
            len(two_labels),
            _names(names, two_labels),
        )
    return groups


def group_equal_rows(
    location: str, read: Callable[[int, int], Iterator[NDArray[np.uint8] | EncodedImage]], labels: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Group equal images of a source that is read by row numbers, as :func:`group_equal_images` does; all images are read.

    Args:
        location: the source, for messages.
        read: yields the images of rows ``start`` ... ``stop - 1``; raises DamagedImageError at one that cannot be read.
        labels: (N,) class numbers.
    """
    from tqdm import tqdm

    digests: list[str] = []
    with tqdm(total=len(labels), desc=f"hash {location}", unit="image", disable=None, delay=2.0) as bar:
        while len(digests) < len(labels):
            try:
                for image in read(len(digests), len(labels)):
                    data = image.data if isinstance(image, EncodedImage) else np.ascontiguousarray(image).data
                    digests.append(hashlib.sha256(data).hexdigest())
                    bar.update()
            except DamagedImageError:
                digests.append(f"{UNREADABLE} {len(digests)}")
                bar.update()

    names = [f"row {row + 1}" for row in range(len(labels))]
    return group_equal_images(location, names, digests, labels, lambda row: next(iter(read(row, row + 1))))


def _is_blank(read_row: Callable[[int], NDArray[np.uint8] | EncodedImage], row: int) -> bool:
    """Return True if an image has a single colour or cannot be read; reading it later reports the error."""
    try:
        image = read_row(row)
        pixels = decode_file(image.data, row) if isinstance(image, EncodedImage) else image
    except DamagedImageError:
        return True
    return bool((pixels == pixels[:1, :1]).all())


def _names(files: Sequence[str], groups: Sequence[NDArray[np.int64]]) -> str:
    return name_some([" = ".join(files[row] for row in rows[:_NAMED].tolist()) for rows in groups])
