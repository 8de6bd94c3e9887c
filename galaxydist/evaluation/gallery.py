"""Contact sheets: a few pictures of each class (or of each kind of mistake) in one image of bounded size."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from galaxydist.atomic_files import replace_bytes
from galaxydist.evaluation.text_table import readable

MAX_COLUMNS = 10
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
_GAP, _TEXT_SIZE, _LINE = 3, 12, 14


def write_gallery(
    path: Path,
    images: Mapping[str, Sequence[NDArray[np.uint8]]],
    title: str,
    *,
    cell: int = 96,
    max_bytes: int = 300_000,
) -> None:
    """Write a contact sheet: a column a class, ten columns beside each other, the next ten below.

    Args:
        path: ends in ``.jpg`` or ``.png``; its folder exists. Replaced whole or not at all.
        images: by class name: H x W x 3 uint8 pictures of any size, shown from above in their order.
        title: what they are pictures of, and how many there are of how many.
        cell: width of a picture in pixels, to begin with.
        max_bytes: the quality (JPEG), then the pictures' size is lowered until the file is no larger.

    Raises:
        ValueError: no pictures, another suffix, or a limit that cannot be kept.
    """
    if path.suffix.lower() not in _FORMATS or not any(images.values()):
        raise ValueError(f"{path}: a gallery needs pictures and a name in .jpg or .png")
    write_sheet(path, lambda width: _compose(images, title, width), cell=cell, max_bytes=max_bytes)


def write_sheet(path: Path, compose: Callable[[int], Image.Image], *, cell: int, max_bytes: int) -> None:
    """Write a picture of pictures, the larger the better within a limit.

    Args:
        path, cell, max_bytes: as in ``write_gallery``.
        compose: the sheet with pictures of so many pixels.

    Raises:
        ValueError: another suffix, or a limit that cannot be kept.
    """
    kind, width = _FORMATS[path.suffix.lower()], cell
    while width >= 24:
        sheet = compose(width)
        for quality in (90, 82, 74) if kind == "JPEG" else (None,):
            buffer = io.BytesIO()
            sheet.save(buffer, kind, optimize=True, **({} if quality is None else {"quality": quality}))
            if buffer.tell() <= max_bytes:
                replace_bytes(path, buffer.getvalue())
                return
        width = int(width * 0.85)
    raise ValueError(f"{path}: so many pictures do not fit into {max_bytes} bytes")


def _compose(images: Mapping[str, Sequence[NDArray[np.uint8]]], title: str, cell: int) -> Image.Image:
    names = list(images)
    bands = [names[start : start + MAX_COLUMNS] for start in range(0, len(names), MAX_COLUMNS)]
    columns, rows = min(len(names), MAX_COLUMNS), max(len(pictures) for pictures in images.values())
    labels = {name: textwrap.wrap(readable(name), max(cell // 6, 9), break_long_words=False) for name in names}
    label_height = _LINE * max(len(lines) for lines in labels.values()) + 4
    width = columns * (cell + _GAP) + _GAP
    title_lines = textwrap.wrap(title, max(width // 7, 12))
    title_height = _LINE * len(title_lines) + 8
    band_height = label_height + rows * (cell + _GAP) + 4
    sheet = Image.new("RGB", (width, title_height + band_height * len(bands)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_SIZE)
    for number, line in enumerate(title_lines):
        pen.text((width / 2, 4 + _LINE * number), line, fill="black", font=font, anchor="ma")
    for band, members in enumerate(bands):
        top = title_height + band * band_height
        for column, name in enumerate(members):
            left = _GAP + column * (cell + _GAP)
            first = label_height - 4 - _LINE * len(labels[name])  # the last line stands just above the pictures
            for number, line in enumerate(labels[name]):
                pen.text((left + cell / 2, top + first + _LINE * number), line, fill="black", font=font, anchor="ma")
            for row, picture in enumerate(images[name]):
                small = Image.fromarray(picture).resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(small, (left, top + label_height + row * (cell + _GAP)))
    return sheet
