"""Contact sheets: a few images of each class, with or without saliency maps, in one small file."""

import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from galaxydist.atomic_files import replace_bytes
from galaxydist.evaluation.text_table import readable

MAX_COLUMNS = 10
_LEAST_WIDTH = 24  # of an image, in pixels
_GAP, _TEXT_SIZE, _LINE = 3, 12, 14


def write_class_sheet(
    path: Path,
    images: Mapping[str, Sequence[NDArray[np.uint8]]],
    title: str,
    *,
    cell: int = 96,
    max_bytes: int = 300_000,
) -> None:
    """Write a JPEG contact sheet with one column per class, ten columns per band.

    Args:
        path: ends in ``.jpg``; its folder exists. The file is replaced atomically.
        images: by class name: H x W x 3 uint8 images of any size, from top to bottom.
        title: contents of the sheet, with the number of images shown and in total.
        cell: initial width of an image in pixels.
        max_bytes: file size to stay below; JPEG quality and image size are reduced for it, the latter down to 24 pixels.

    Raises:
        ValueError: no images.
    """
    if not any(images.values()):
        raise ValueError(f"{path}: a contact sheet needs images")
    write_sheet(path, lambda width: _compose(images, title, width), cell=cell, max_bytes=max_bytes)


def write_sheet(path: Path, compose: Callable[[int], Image.Image], *, cell: int, max_bytes: int) -> None:
    """Write a contact sheet as large as the size limit allows; one of many images may exceed it.

    Args:
        path, cell, max_bytes: as in ``write_class_sheet``.
        compose: draws the sheet for an image width in pixels.
    """
    data = b""
    for data in _encodings(compose, cell):
        if len(data) <= max_bytes:
            break
    replace_bytes(path, data)


def _encodings(compose: Callable[[int], Image.Image], width: int) -> Iterator[bytes]:
    """Yield a sheet as smaller and smaller JPEG files."""
    while width >= _LEAST_WIDTH:
        sheet = compose(width)
        for quality in (90, 82, 74):
            buffer = io.BytesIO()
            sheet.save(buffer, "JPEG", optimize=True, quality=quality)
            yield buffer.getvalue()
        width = int(width * 0.85)


def _compose(images: Mapping[str, Sequence[NDArray[np.uint8]]], title: str, cell: int) -> Image.Image:
    columns, rows = min(len(images), MAX_COLUMNS), max(len(members) for members in images.values())
    labels = {name: textwrap.wrap(readable(name), max(cell // 6, 9), break_long_words=False) for name in images}
    label_height = _LINE * max(len(lines) for lines in labels.values()) + 4
    width = columns * (cell + _GAP) + _GAP
    title_lines = textwrap.wrap(title, max(width // 7, 12))
    title_height = _LINE * len(title_lines) + 8
    band_height = label_height + rows * (cell + _GAP) + 4
    sheet = Image.new("RGB", (width, title_height + band_height * -(-len(images) // MAX_COLUMNS)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_SIZE)
    for number, line in enumerate(title_lines):
        pen.text((width / 2, 4 + _LINE * number), line, fill="black", font=font, anchor="ma")
    for column, (name, members) in enumerate(images.items()):
        left = _GAP + column % MAX_COLUMNS * (cell + _GAP)
        bottom = title_height + column // MAX_COLUMNS * band_height + label_height  # of the labels, top of the images
        for number, line in enumerate(reversed(labels[name]), start=1):
            pen.text((left + cell / 2, bottom - 4 - _LINE * number), line, fill="black", font=font, anchor="ma")
        for row, image in enumerate(members):
            small = Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(small, (left, bottom + row * (cell + _GAP)))
    return sheet


# Sheet of selected galaxies.

_SHEET_GAP, _SHEET_LINE, _TEXT, _MARGIN = 6, 14, 11, 10


@dataclass(frozen=True, slots=True)
class SheetCell:
    """A galaxy: its image and the image with the saliency map, H x W x 3 uint8, and lines of text."""

    image: NDArray[np.uint8]
    overlay: NDArray[np.uint8]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SheetRow:
    """A class: its name, a note, and its galaxies."""

    name: str
    note: str
    cells: Sequence[SheetCell]


def compose_sheet(rows: Sequence[SheetRow], title: str, width: int) -> Image.Image:
    """Draw a sheet of selected galaxies: per galaxy its image, the image with the saliency map, and lines of text below.

    Args:
        rows: one per class; a row without galaxies shows only its note.
        title: one line.
        width: width of an image in pixels; each galaxy has two images.
    """
    font, bold = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT + 2)
    columns = max((len(row.cells) for row in rows), default=0)
    num_lines = max((len(cell.lines) for row in rows for cell in row.cells), default=0)
    pair = 2 * width + 2
    across = 2 * _MARGIN + max(columns, 1) * (pair + _SHEET_GAP)
    across = max(across, 2 * _MARGIN + 320)
    head, foot = _SHEET_LINE + 8, num_lines * _SHEET_LINE + 6
    heights = [head + (width + foot if row.cells else 0) for row in rows]
    sheet = Image.new("RGB", (across, _MARGIN + _SHEET_LINE + 10 + sum(heights) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), _shortened(title, bold, across - 2 * _MARGIN), fill="black", font=bold)
    top = _MARGIN + _SHEET_LINE + 10
    for row, height in zip(rows, heights, strict=True):
        pen.line((_MARGIN, top, across - _MARGIN, top), fill="#bbbbbb")
        pen.text((_MARGIN, top + 4), row.name, fill="black", font=bold)
        left = _MARGIN + bold.getlength(row.name) + 10
        pen.text((left, top + 5), _shortened(row.note, font, across - _MARGIN - left), fill="#555555", font=font)
        for column, cell in enumerate(row.cells):
            left, under = _MARGIN + column * (pair + _SHEET_GAP), top + head
            for number, image in enumerate((cell.image, cell.overlay)):
                small = Image.fromarray(image).resize((width, width), Image.Resampling.LANCZOS)
                sheet.paste(small, (left + number * (width + 2), under))
            for number, line in enumerate(cell.lines):
                pen.text((left, under + width + 2 + _SHEET_LINE * number), _shortened(line, font, pair), fill="black", font=font)
        top += height
    return sheet


def _shortened(text: str, font: Any, width: float) -> str:
    """Shorten ``text`` with an ellipsis to at most ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


# Overlay of saliency maps.

# Perceptually uniform, readable with any colour vision, and green, which galaxies are not (Smith & van der Walt 2015,
# bids.github.io/colormap).
COLOUR_MAP = "viridis"
OPACITY = 0.6


def overlay(image_HWC: NDArray[np.uint8], map_TT: NDArray[np.float32], *, crop: float = 1.0) -> NDArray[np.uint8]:
    """Blend a saliency map over an image: transparent where the map is 0, ``OPACITY`` where it is 1.

    Args:
        image_HWC: H x W x 3 uint8, H == W, as stored.
        map_TT: map of the central crop, 0 to 1, at any size.
        crop: central fraction of the width that the model saw; the image outside is unchanged.

    Returns:
        H x W x 3 uint8.
    """
    from matplotlib import colormaps

    width = image_HWC.shape[1]
    kept = crop_width(width, crop)
    margin = (width - kept) // 2
    resized = Image.fromarray(np.ascontiguousarray(map_TT, np.float32)).resize((kept, kept), Image.Resampling.BILINEAR)
    values_HW = np.zeros((width, width))
    values_HW[margin : margin + kept, margin : margin + kept] = np.asarray(resized).clip(0, 1)
    colours_HWC = 255 * colormaps[COLOUR_MAP](values_HW)[..., :3]
    alpha_HW1 = OPACITY * values_HW[..., None]
    mixed: NDArray[np.uint8] = np.rint((1 - alpha_HW1) * image_HWC + alpha_HW1 * colours_HWC).astype(np.uint8)
    return mixed


def crop_width(width: int, crop: float) -> int:
    """Return the width of the central crop in pixels, equal to that of ``loading.augment.Normalise``."""
    kept = max(1, round(crop * width))
    return kept + (width - kept) % 2
