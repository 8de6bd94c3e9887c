"""Encoding of one galaxy to the bytes stored in a shard."""

import hashlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.shards.manifest import ANY_FILE
from galaxydist.shards.tar import LONGEST_KEY
from galaxydist.surveys.image_files import parse_image, plain_jpeg_shape, to_rgb

Pixels = NDArray[np.uint8]

# Name in a galaxy's extras, and so in the catalogue, of :func:`hash_pixels` of the original image.
PIXEL_HASH = "pixel_hash"

_KEY = re.compile(r"[A-Za-z0-9_+-]+")


@dataclass(frozen=True, slots=True)
class Encoding:
    """Storage format of images.

    Args:
        name: ``jpeg``, ``png`` or ``raw`` (a uint8 .npy).
        quality: JPEG quality, 1 to 100; colour is stored at full resolution (4:4:4), since it is evidence for the class.
        image_size: side of the square in pixels; images of another size are cut to their central square and resampled if
            ``resize``, else rejected.
        resize: True if the user gave that size.
    """

    name: str
    quality: int
    image_size: int
    resize: bool


def encode_galaxy(galaxy: Galaxy, encoding: Encoding, num_classes: int) -> tuple[bytes, bytes, Pixels, int]:
    """Return the image file to store, the contents of the .json, the stored pixels, and the shorter side of the image as it came.

    Raises:
        DamagedImageError: the image does not decode; names its file or the galaxy.
        UserError: an image of another size, a key that a tar cannot hold, or a label outside the classes; names the galaxy.
    """
    if not _KEY.fullmatch(galaxy.id) or len(galaxy.id) > LONGEST_KEY:
        raise UserError(
            f"galaxy id {galaxy.id[:60]!r} ({len(galaxy.id)} characters) cannot name a file in a shard: use up to "
            f"{LONGEST_KEY} letters, digits, _, - and +, or other ids (--id COLUMN, --id none)"
        )
    if galaxy.label is not None and not 0 <= galaxy.label < num_classes:
        raise UserError(f"galaxy {galaxy.id}: label {galaxy.label} is outside 0 ... {num_classes - 1}")
    size = encoding.image_size
    pixels = to_pixels(galaxy)
    meta, side = _meta(galaxy, pixels), min(pixels.shape[:2])
    if pixels.shape != (size, size, 3):
        if not encoding.resize:
            height, width = pixels.shape[:2]
            raise UserError(
                f"galaxy {galaxy.id} is {width} x {height} pixels, the first galaxy {size} x {size}: "
                f"give an image size (--image-size {size}) so that all are cut to a square and resampled"
            )
        pixels = resize_square(pixels, size)
    elif isinstance(galaxy.image, EncodedImage) and _same_format(galaxy.image, encoding.name):
        return galaxy.image.data, meta, pixels, side
    return encode_image(pixels, encoding.name, encoding.quality), meta, pixels, side


def decode_image(image: EncodedImage, prefix: str = "") -> Pixels:
    """Decode an image file to H x W x 3 uint8 RGB pixels.

    Args:
        image: the encoded image.
        prefix: start of error messages if the image has no file name.

    Raises:
        DamagedImageError: the file is truncated or not an image.
    """
    prefix = f"{image.file}: " if image.file else prefix
    try:
        if simplejpeg.is_jpeg(image.data) and simplejpeg.decode_jpeg_header(image.data)[2] != "CMYK":
            return np.asarray(simplejpeg.decode_jpeg(image.data, "RGB"))
        with Image.open(io.BytesIO(image.data)) as opened:
            return np.asarray(to_rgb(opened))
    except UnidentifiedImageError:
        raise DamagedImageError(f"{prefix}its image does not decode (of no known format)") from None
    except (ValueError, OSError, SyntaxError, struct.error, zlib.error) as error:
        raise DamagedImageError(f"{prefix}its image does not decode ({error})") from None


def decode_stored(data: bytes, encoding: str, size: int) -> Pixels:
    """Decode an image of a shard to size x size x 3 uint8 RGB pixels.

    Raises:
        ValueError: it does not decode, or has another size.
    """
    if encoding == ANY_FILE:
        return decode_any_file(data, size)
    if encoding == "raw":
        header = raw_header(size)
        if not data.startswith(header) or len(data) != len(header) + size * size * 3:
            raise ValueError(f"its image is not a .npy file of {size} x {size} x 3 uint8")
        return np.frombuffer(data, np.uint8, offset=len(header)).reshape(size, size, 3)
    try:
        pixels = decode_image(EncodedImage(data, encoding))
    except DamagedImageError as error:
        raise ValueError(error.reason) from None
    if pixels.shape != (size, size, 3):
        raise ValueError(f"its image is {pixels.shape}, the manifest says {size} x {size} pixels")
    return pixels


def decode_any_file(data: bytes, size: int, pixels: Pixels | None = None) -> Pixels:
    """Decode an image file of any format and size to size x size x 3 uint8 RGB pixels, as the writer of shards does.

    Args:
        data: the file's bytes.
        size: of the image, in pixels.
        pixels: memory for the result; None: new memory.

    Raises:
        ValueError: it does not decode.
    """
    try:
        shape = plain_jpeg_shape(data)
        if shape is not None:  # most files: the same result without Pillow
            decoded = np.asarray(simplejpeg.decode_jpeg(data, "RGB", buffer=pixels if shape == (size, size) else None))
        else:
            image = parse_image(data, "its image")
            decoded = decode_image(image) if isinstance(image, EncodedImage) else image
    except DamagedImageError as error:
        raise ValueError(error.reason) from None
    if decoded.shape != (size, size, 3):
        decoded = resize_square(decoded, size)
    if pixels is None:
        return decoded
    if not np.may_share_memory(decoded, pixels):
        pixels[...] = decoded
    return pixels


@lru_cache
def raw_header(size: int) -> bytes:
    """Return the .npy header of a raw image of size x size x 3 uint8.

    Readers compare headers and do not call ``np.load``, which parses them with ``ast.literal_eval``: in several threads at once
    that raises SystemError on Python 3.11 ("AST constructor recursion depth mismatch").
    """
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (size, size, 3)})
    return stream.getvalue()


def encode_image(pixels: Pixels, encoding: str, quality: int) -> bytes:
    """Encode H x W x 3 uint8 RGB pixels to an image file, with the same bytes for the same pixels."""
    if encoding == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444"))
    stream = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels).save(stream, "png", compress_level=2)
    else:
        np.save(stream, np.ascontiguousarray(pixels))
    return stream.getvalue()


def hash_pixels(pixels: Pixels) -> int | None:
    """Return a signed 64-bit hash of an image's pixels, to be taken before resampling and compression.

    Among ten million different images, two share a hash with a probability below 10^-5. None for an image of one colour: it shows
    nothing, so two of them are not the same galaxy.
    """
    if (pixels == pixels[:1, :1]).all():
        return None
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def resize_square(pixels: Pixels, size: int) -> Pixels:
    """Return the central square of an image, resampled to ``size`` pixels with antialiasing (Lanczos)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def to_pixels(galaxy: Galaxy) -> Pixels:
    """Return a galaxy's H x W x 3 uint8 pixels, decoded if necessary; raises as :func:`encode_galaxy` does."""
    if isinstance(galaxy.image, EncodedImage):
        return decode_image(galaxy.image, f"galaxy {galaxy.id}: ")
    pixels = np.asarray(galaxy.image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"galaxy {galaxy.id}: its image is {pixels.shape} {pixels.dtype}, not H x W x 3 uint8")
    return pixels


def _same_format(source: EncodedImage, encoding: str) -> bool:
    """Return True if the source's bytes can be stored unchanged: the same format, three channels of eight bits."""
    if encoding == "jpeg":
        return bool(simplejpeg.is_jpeg(source.data)) and simplejpeg.decode_jpeg_header(source.data)[2] == "YCbCr"
    if encoding == "png" and source.format == "png":
        with Image.open(io.BytesIO(source.data)) as image:
            return image.format == "PNG" and image.mode == "RGB"
    return False


def _meta(galaxy: Galaxy, pixels: Pixels) -> bytes:
    own: dict[str, Any] = {"id": galaxy.id, "ra": galaxy.ra, "dec": galaxy.dec}
    try:
        return json.dumps(_plain({**own, **galaxy.extras, **own, PIXEL_HASH: hash_pixels(pixels)})).encode()
    except TypeError as error:
        raise UserError(f"galaxy {galaxy.id}: its extras are not plain JSON values ({error})") from None


def _plain(value: Any) -> Any:
    """Convert to JSON values: NaN and infinity, which JSON lacks, become null; numpy numbers become Python numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
