"""Pictures that people give: the bytes of a file to RGB pixels, within limits, or one sentence that says what to do instead.

Nothing here opens a path or an address, and only Pillow's decoders of ``FORMATS`` ever see the bytes. Colours, transparency and
orientation are treated as the training treats them.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

# Pillow's decoders that are used, and their names for people.
FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP"}
READABLE = "JPEG, PNG, WebP, GIF or BMP"
# Largest file, largest number of pixels (known before anything is decoded), and smallest side in pixels.
MAX_BYTES, MAX_PIXELS, MIN_SIDE = 20 << 20, 24_000_000, 16
# Passes of a progressive JPEG. Cameras write about ten; each takes the time of a whole decoding and may be a few bytes long.
MAX_SCANS = 64

_EIGHT_BIT_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "1", "PA"})
_SAVE_AS = "save it as PNG or JPEG with 8 bits for each of red, green and blue"
# Files that are no pictures for this app, by their first bytes: a pattern, and the sentence about them.
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (
        rb"SIMPLE  =",
        "is a FITS file, which holds measured brightness in place of colours: first make an RGB picture of three bands of it, "
        "with the colour stretch of the training images (for example make_lupton_rgb of astropy), and save that as PNG",
    ),
    (rb"%PDF|%!PS", "is a document and not a picture: export the picture in it as PNG or JPEG"),
    (rb"PK\x03\x04|PK\x05\x06", "is a zip archive and not a picture: several pictures at once have a page of their own"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "is a compressed file and not a picture: unpack it first"),
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", f"is a HEIC picture, as phones take them: {_SAVE_AS}"),
    (rb"....ftypavi[fs]", f"is an AVIF picture, which cannot be read here: {_SAVE_AS}"),
    (rb"....ftyp|\x1aE\xdf\xa3", "is a film and not a picture: take a picture of one moment of it"),
    (rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+", f"is a TIFF file, which cannot be read here: {_SAVE_AS}"),
    (rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51", f"is a JPEG 2000 picture, which cannot be read here: {_SAVE_AS}"),
    (rb"\x00\x00\x00\x0cJXL|\xff\x0a", f"is a JPEG XL picture, which cannot be read here: {_SAVE_AS}"),
    (rb"8BPS", f"is a Photoshop file, which cannot be read here: {_SAVE_AS}"),
    (rb"\x89HDF|\x93NUMPY|PAR1|CDF", f"holds numbers and is not a picture: make an RGB picture of them, and {_SAVE_AS}"),
    (
        rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg",
        "is a drawing (SVG) and not a photograph of the sky",
    ),
    (rb"\s*<(!doctype html|html|head|\?xml)", "is a web page and not a picture: save the picture in it instead"),
)


class PictureError(ValueError):
    """Error of a file that is not a picture, or not one that can be used: one sentence for people who do not program."""


@dataclass(frozen=True)
class Picture:
    """A picture that was read.

    Args:
        name: of its file, shortened, without characters that a page or a terminal would interpret.
        pixels: H x W x 3 uint8, R G B.
        notes: sentences about what was changed when it was read.
        jpeg: the bytes of its file if that is a JPEG in R G B, shown as it is stored; the training decodes such files smaller.
    """

    name: str
    pixels: Pixels
    notes: tuple[str, ...] = ()
    jpeg: bytes | None = None


def read_picture(data: bytes, name: str = "the picture") -> Picture:
    """Read a picture from the bytes of a file.

    Of an animation the first image is taken. Transparent parts become black, the orientation that a camera noted is applied, and
    palettes, grey levels and printing colours become R G B, all with a note.

    Args:
        data: the file's bytes.
        name: the file's name, for messages only.

    Raises:
        PictureError: the bytes are no picture, a damaged one, or one outside of the limits.
    """
    shown = safe_name(name)
    if not data:
        raise PictureError(f"{shown} is empty: choose another file.")
    if len(data) > MAX_BYTES:
        raise PictureError(
            f"{shown} has {len(data) / 2**20:.0f} MB, and at most {MAX_BYTES >> 20} MB are taken: cut the galaxy out of it, "
            "or save it smaller."
        )
    for pattern, sentence in _OTHER_FILES:
        if re.match(pattern, data[:1024], re.DOTALL | re.IGNORECASE):
            raise PictureError(f"{shown} {sentence}.")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise PictureError(f"{shown} is a JPEG of too many passes to be decoded: save it once more, without 'progressive'.")
    try:
        with _opened(data, shown) as image:
            return _decode(image, data, shown)
    except PictureError:
        raise
    except Exception as error:  # a decoder may raise anything for damaged bytes
        raise PictureError(
            f"{shown} is damaged or incomplete: open it in a picture viewer, and save or copy it again."
        ) from error


def decode_smaller(jpeg: bytes, size: int) -> Pixels:
    """Decode a square JPEG, 2, 4 or 8 times as large as ``size``, as size x size x 3 pixels in libjpeg's reduced decoding.

    Args:
        jpeg: ``Picture.jpeg``.
        size: side in pixels.
    """
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
        image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB"))


def safe_name(name: str) -> str:
    """Return the last 80 characters of a name, each character that a page or a terminal may interpret replaced by ``_``."""
    shown = re.sub(r"[^\w .,:;+=()/@#%~!-]", "_", name).strip()
    return (f"...{shown[-77:]}" if len(shown) > 80 else shown) or "the picture"


@contextmanager
def _opened(data: bytes, shown: str) -> Iterator[Image.Image]:
    """Open a picture and check its size, which decodes nothing."""
    too_large = (
        f"of which at most {MAX_PIXELS / 1e6:.0f} million are taken: cut the galaxy out of it, so that it fills the picture as "
        "those of the training do."
    )
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=list(FORMATS))
    except Image.DecompressionBombError:
        raise PictureError(f"{shown} has far too many pixels, {too_large}") from None
    except UnidentifiedImageError:
        if re.match(rb"\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP", data, re.DOTALL):
            raise  # damaged
        raise PictureError(f"{shown} is not a picture in one of the formats {READABLE}.") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"{shown} has {width} x {height} pixels, {too_large}")
        if min(width, height) < MIN_SIDE:
            raise PictureError(
                f"{shown} has only {width} x {height} pixels, which show no galaxy: choose a picture of at least "
                f"{MIN_SIDE} x {MIN_SIDE}."
            )
        yield image


def _decode(image: Image.Image, data: bytes, shown: str) -> Picture:
    mode = image.mode
    if mode not in _EIGHT_BIT_MODES:
        raise PictureError(
            f"{shown} has more than 8 bits for each pixel (kind {mode}), so that its brightest and darkest levels are unknown: "
            f"choose them, and {_SAVE_AS}."
        )
    notes = []
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a camera's second view of the same
        notes.append("It is animated: its first image was taken.")
    if image.format == "PNG" and data[24] == 16:
        notes.append("It has 16 bits for each colour, of which the upper 8 were taken.")
    if mode == "CMYK":
        notes.append("Its printing colours (CMYK) were changed to red, green and blue.")
    turned = _upright(image, data)
    if turned is not image:
        notes.append("It was turned upright, as its camera noted.")
    if turned.has_transparency_data:
        rgba = turned if turned.mode == "RGBA" else turned.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            notes.append("Its transparent parts became black.")
        pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB"))
    else:
        pixels = np.asarray(turned if turned.mode == "RGB" else turned.convert("RGB"))
    if all((pixels[..., 0] == pixels[..., channel]).all() for channel in (1, 2)):
        notes.append("It is grey: the model was trained on colours.")
    is_plain = image.format == "JPEG" and mode == "RGB" and turned is image
    return Picture(shown, pixels, tuple(notes), data if is_plain else None)


def _upright(image: Image.Image, data: bytes) -> Image.Image:
    """Return an image as its EXIF orientation shows it; the image itself if there is none, or a damaged one."""
    if not any(mark in data for mark in (b"Exif", b"eXIf", b"tiff:Orientation")):
        return image
    try:
        with _quiet():
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # damaged metadata; the pixels may still be good
        return image
    if not is_turned:
        return image
    image.load()
    with _quiet():
        return ImageOps.exif_transpose(image)


_LOCK = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings about damaged files out of the log; Python's filters are those of all threads, hence the lock."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
