"""Picture files: handed on as the bytes they are where a decoder of shards will read them, else as pixels."""

import io
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})
_PASSED_ON = {"JPEG": "jpg", "PNG": "png"}
_EIGHT_BIT_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "1"})


def read_picture(path: Path) -> NDArray[np.uint8] | EncodedImage:
    """A picture file: the bytes of an RGB JPEG or PNG, unopened but for its header; H x W x 3 uint8 pixels of anything else.

    Raises:
        UserError: the file cannot be read, is no picture or has no 8-bit colours.
    """
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode == "RGB" and picture.format in _PASSED_ON:
                return EncodedImage(data, _PASSED_ON[picture.format])
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _undecodable(path, len(data), error) from error
    return decode_picture(data, path)


def decode_picture(data: bytes, name: object) -> NDArray[np.uint8]:
    """H x W x 3 uint8 RGB pixels of a picture file's bytes, decoded to the end.

    Args:
        data: the file's bytes.
        name: the file, for messages.

    Raises:
        UserError: truncated, damaged, no picture, or no 8-bit colours.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in _EIGHT_BIT_MODES:
                raise UserError(f"{name} has pixels of kind {picture.mode!r}; convert it to 8-bit RGB or grey first")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _undecodable(name, len(data), error) from error


def _undecodable(name: object, size: int, error: Exception) -> UserError:
    reason = "no picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return UserError(f"{name} ({size} bytes) cannot be decoded: {reason}; replace the file or remove it")


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """A lossless PNG file of H x W x 3 uint8 pixels."""
    stream = io.BytesIO()
    # Run-length matching: on noisy pictures smaller than zlib's default at level 1, and a quarter faster (measured).
    Image.fromarray(image_HWC).save(stream, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()
