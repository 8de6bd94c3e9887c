"""A sheet of chosen galaxies: a row a class, each galaxy as it is and with what the model looked at, its prediction below."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE, _TEXT, _MARGIN = 6, 14, 11, 10


@dataclass(frozen=True, slots=True)
class SheetCell:
    """A galaxy: its picture and the one with the map, H x W x 3 uint8, and lines of text."""

    picture: NDArray[np.uint8]
    overlay: NDArray[np.uint8]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SheetRow:
    """A class: its name, a note, and its galaxies."""

    name: str
    note: str
    cells: Sequence[SheetCell]


def compose_sheet(rows: Sequence[SheetRow], title: str, width: int) -> Image.Image:
    """Draw the sheet.

    Args:
        rows: those without a galaxy only get their note.
        title: one line.
        width: of a picture in pixels; a galaxy takes two.
    """
    font, bold = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT + 2)
    columns = max((len(row.cells) for row in rows), default=0)
    num_lines = max((len(cell.lines) for row in rows for cell in row.cells), default=0)
    pair = 2 * width + 2
    across = 2 * _MARGIN + max(columns, 1) * (pair + _GAP)
    across = max(across, 2 * _MARGIN + 320)
    head, foot = _LINE + 8, num_lines * _LINE + 6
    heights = [head + (width + foot if row.cells else 0) for row in rows]
    sheet = Image.new("RGB", (across, _MARGIN + _LINE + 10 + sum(heights) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), _shortened(title, bold, across - 2 * _MARGIN), fill="black", font=bold)
    top = _MARGIN + _LINE + 10
    for row, height in zip(rows, heights, strict=True):
        pen.line((_MARGIN, top, across - _MARGIN, top), fill="#bbbbbb")
        pen.text((_MARGIN, top + 4), row.name, fill="black", font=bold)
        left = _MARGIN + bold.getlength(row.name) + 10
        pen.text((left, top + 5), _shortened(row.note, font, across - _MARGIN - left), fill="#555555", font=font)
        for column, cell in enumerate(row.cells):
            left, under = _MARGIN + column * (pair + _GAP), top + head
            for number, picture in enumerate((cell.picture, cell.overlay)):
                small = Image.fromarray(picture).resize((width, width), Image.Resampling.LANCZOS)
                sheet.paste(small, (left + number * (width + 2), under))
            for number, line in enumerate(cell.lines):
                pen.text((left, under + width + 2 + _LINE * number), _shortened(line, font, pair), fill="black", font=font)
        top += height
    return sheet


def _shortened(text: str, font: Any, width: float) -> str:
    """With an ellipsis where it is wider than that."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
