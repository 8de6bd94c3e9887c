"""Picture files: handed on as the bytes they are where a decoder of shards will read them, else as pixels."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from galaxydist.errors import DamagedPictureError
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
    return decode_picture(data, path)


def decode_picture(data: bytes, name: object) -> NDArray[np.uint8]:
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
