"""Damaged images of a survey: they are reported together, and left out of the shards if the user allows it.

Rows of a table that have no image or no label are listed with them.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import Galaxy, Survey
from galaxydist.shards.writer.encode import Pixels, to_pixels
from galaxydist.surveys.image_table import LeftOutRow, TableSurvey

# The list of the images and rows left out, beside the shards' manifest.
LEFT_OUT_NAME = "left_out.csv"
# Damaged images that an error message names.
NAMED = 100


@dataclass(frozen=True, slots=True)
class DamagedImage:
    """A damaged image: its row in the survey, its storage index, and the reason."""

    row: int
    index: int
    reason: str


class TooManyDamagedError(Exception):
    """A part of a survey holds too many damaged images; the rest of the part was not read."""


def read_rows(survey: Survey, start: int, stop: int) -> Iterator[Galaxy | DamagedImageError]:
    """Yield rows ``start`` ... ``stop - 1`` of a survey, with an error instead of each damaged image."""
    while start < stop:
        try:
            for galaxy in survey.read(start, stop):
                yield galaxy
                start += 1
            return
        except DamagedImageError:
            # One damaged row fails the whole slab that is read with it.
            try:
                yield next(iter(survey.read(start, start + 1)))
            except DamagedImageError as error:
                yield error
            start += 1


def first_image(survey: Survey) -> tuple[Galaxy, Pixels]:
    """Return the first galaxy with an undamaged image, and its pixels.

    Raises:
        UserError: all images are damaged.
    """
    reason = None
    for row in range(len(survey.labels)):
        (galaxy,) = read_rows(survey, row, row + 1)
        try:
            if isinstance(galaxy, DamagedImageError):
                raise galaxy
            return galaxy, to_pixels(galaxy)
        except DamagedImageError as error:
            reason = reason or error.reason
    raise UserError(f"none of the {len(survey.labels)} images can be read; the first: {reason}")


def check_damaged(damaged: Sequence[DamagedImage], num_galaxies: int, max_errors: int | None) -> None:
    """Raise an error if more images are damaged than the user allows.

    Args:
        damaged: the damaged images, in the order of their rows.
        num_galaxies: number of all images.
        max_errors: number of images that may be left out; None: none.

    Raises:
        UserError: names the first hundred.
    """
    if len(damaged) <= (max_errors or 0):
        return
    lines = [f"  {image.reason}" for image in damaged[:NAMED]]
    if max_errors is None:
        count = f"{len(damaged)} of the {num_galaxies} images" if len(damaged) <= NAMED else f"more than {NAMED} images"
        advice = "replace or remove the files, or leave them out with --on-error skip (--max-errors N: N at most)"
    else:
        count = f"more than the {max_errors} images that --max-errors allows"
        advice = "replace or remove the files, or raise --max-errors"
    raise UserError("\n".join([f"{count} cannot be read:", *lines, advice]))


def check_classes_left(survey: Survey, damaged: Sequence[DamagedImage]) -> None:
    """Check that each class with training images has undamaged ones.

    Raises:
        UserError: names the class that has none.
    """
    train = np.asarray(survey.splits["train"], np.int64)
    undamaged = train[~np.isin(train, rows_of(damaged))]
    missing = np.setdiff1d(survey.labels[train], survey.labels[undamaged])
    if len(missing):
        name = survey.class_names[int(missing[0])]
        raise UserError(f"all training images of the class {name!r} are damaged; replace them, or remove the class everywhere")


def rows_of(damaged: Sequence[DamagedImage]) -> NDArray[np.int64]:
    """Return the rows of damaged images."""
    return np.array([image.row for image in damaged], np.int64)


def rows_left_out(survey: Survey) -> tuple[LeftOutRow, ...]:
    """Return the rows of a table that are in no split, because they have no image, label or split."""
    return survey.left_out if isinstance(survey, TableSurvey) else ()


def write_left_out(path: Path, survey: Survey, damaged: Sequence[DamagedImage]) -> None:
    """Write the list of the images left out: split, class, and reason, which begins with the file name or the table's row."""
    split_of = {row: split for split, rows in survey.splits.items() for row in np.intersect1d(rows, rows_of(damaged)).tolist()}
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("split", "class", "reason"))
    for image in damaged:
        label = int(survey.labels[image.row])
        table.writerow((split_of[image.row], survey.class_names[label] if label >= 0 else "", image.reason))
    for left_out in rows_left_out(survey):
        table.writerow(("", "", f"row {left_out.row + 1} ({left_out.id}): {left_out.reason}"))
    replace_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))


def count_left_out(folder: Path) -> int:
    """Return the number of images and rows that were left out of the shards of a folder."""
    path = folder / LEFT_OUT_NAME
    if not path.is_file():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.reader(file)) - 1
