"""Metadata of an image folder: ``dataset.json`` (the data set) and ``metadata.csv`` (each galaxy)."""

import contextlib
import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from galaxydist.errors import UserError
from galaxydist.galaxy import Galaxy
from galaxydist.paths import is_dataset_name

DATASET_FILE = "dataset.json"
METADATA_FILE = "metadata.csv"
FORMAT = 1
_FIXED = ("file", "id", "split", "label", "ra", "dec")
# Accepted names of the file column in a user's own table; `file_name` is the one of Hugging Face's ImageFolder.
_FILE_COLUMNS = ("file", "file_name", "filename", "path")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
# Numbers, also in forms that JSON lacks: +1.5, 1. and .5. Others with leading zeros are names.
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)\.?\d*|\.\d+)([eE][+-]?\d+)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FolderInfo:
    """``dataset.json``: written last, so a folder that has it is complete."""

    name: str
    variant: str
    source_hash: str
    num_galaxies: int
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class FolderRow:
    """A line of ``metadata.csv``: a galaxy's data besides its image."""

    id: str
    split: str
    ra: float | None
    dec: float | None
    extras: Mapping[str, Any]


def write_info(folder: Path, info: FolderInfo) -> None:
    """Write ``dataset.json``."""
    (folder / DATASET_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> FolderInfo | None:
    """Read ``dataset.json`` of a folder, or return None if there is none (any other ImageFolder).

    Raises:
        UserError: `data export` did not write the file.
    """
    path = folder / DATASET_FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        info = FolderInfo(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} was not written by `galaxydist data export` ({error}); remove it or export again") from error
    if not isinstance(info.name, str) or not is_dataset_name(info.name):
        raise UserError(f"{path}: the name {info.name!r} cannot be a data set's; give it letters, digits, _ and - only")
    if info.format != FORMAT:
        raise UserError(f"{path} has format {info.format}, this galaxydist reads {FORMAT}; export again")
    return info


def exported_tree(folder: Path, variant: str) -> Path:
    """Return the tree of a variant (else of the original one) in a folder that `data export` wrote, else the folder itself.

    Raises:
        UserError: the folder has the trees of several data sets.
    """
    trees: list[tuple[FolderInfo, Path]] = []
    for file in sorted(folder.glob(f"*/{DATASET_FILE}")):
        with contextlib.suppress(UserError):  # another program's file
            trees += [(info, file.parent) for info in [read_info(file.parent)] if info is not None]
    if len(names := sorted({info.name for info, _ in trees})) > 1:
        raise UserError(f"{folder} has exports of several data sets, {', '.join(names)}: give the folder of one")
    found = {info.variant: tree for info, tree in trees}
    return found.get(variant, found.get("original", folder))


def write_metadata(folder: Path, rows: Iterable[tuple[str, str, Galaxy]]) -> None:
    """Write ``metadata.csv`` from (file relative to the folder, split, galaxy); all galaxies have the same extras."""
    with (folder / METADATA_FILE).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        names: tuple[str, ...] | None = None
        for file, split, galaxy in rows:
            if names is None:
                names = tuple(name for name in galaxy.extras if name not in _FIXED)  # `file` now names the exported image
                writer.writerow((*_FIXED, *names))
            values = (galaxy.label, galaxy.ra, galaxy.dec, *(galaxy.extras.get(name) for name in names))
            writer.writerow((file, galaxy.id, split, *map(_format, values)))


def read_metadata(folder: Path) -> tuple[dict[str, FolderRow], bool]:
    """Read ``metadata.csv``: one written by `data export`, possibly re-saved by a spreadsheet, or the user's own.

    A user's own table needs a column of image files named ``file``, ``file_name``, ``filename`` or ``path``; without one it is
    ignored with a warning. Columns ``id``, ``split``, ``ra`` and ``dec`` (decimal degrees) are known, all others are extras.

    Returns:
        rows by image file relative to the folder, and True if `data export` wrote them (or there is no file).

    Raises:
        UserError: the file is not UTF-8 or not a table, a position is not a number, or an image is listed twice.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        return {}, True
    rows: dict[str, FolderRow] = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            columns = _read_header(path, stream)
            if columns is None:
                return {}, False
            cells = csv.reader(stream, delimiter=columns.delimiter)
            for line in cells:
                if not any(line):
                    continue
                location = f"{path}, line {cells.line_num + 1}"
                file, row = columns.row(line, location)
                if file in rows:
                    raise UserError(f"{location}: {file} is listed twice; remove one of the lines")
                rows[file] = row
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text ({error.reason}); save it as "CSV UTF-8", or remove it') from error
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV table ({error}); save it again, or remove it") from error
    return rows, columns.is_exported


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a table and the rules for parsing its cells.

    Args:
        names: column names in file order.
        fixed: index of each known column.
        is_exported: True if the columns are those of ``write_metadata``.
        is_loose: True if another program wrote the cells, so that ``TRUE`` is a boolean.
        delimiter: cell separator; with ``;``, numbers may have a decimal comma.
    """

    names: tuple[str, ...]
    fixed: Mapping[str, int]
    is_exported: bool
    is_loose: bool
    delimiter: str

    def row(self, cells: list[str], location: str) -> tuple[str, FolderRow]:
        """Return the image file and the metadata of a line; ``location`` names the line in errors."""
        if len(cells) > len(self.names) and any(cells[len(self.names) :]):
            raise UserError(
                f"{location}: {len(cells)} cells under {len(self.names)} columns; put cells with {self.delimiter!r} in quotes"
            )
        cells += [""] * (len(self.names) - len(cells))
        known = {name: cells[number] for name, number in self.fixed.items()}
        extras = {
            name: self.value(cell)
            for number, (name, cell) in enumerate(zip(self.names, cells, strict=False))
            if name and number not in self.fixed.values() and not (self.is_exported and name in _FIXED)
        }
        if not isinstance(extras.get("conflicting"), bool | None):
            raise UserError(f"{location}: conflicting={extras['conflicting']!r} is neither true nor false")
        if not known["file"]:
            raise UserError(f"{location}: no file; name the image, or remove the line")
        ra, dec = (self._degrees(name, known.get(name, ""), location) for name in ("ra", "dec"))
        return known["file"], FolderRow(known.get("id", ""), known.get("split", ""), ra, dec, extras)

    def value(self, cell: str) -> Any:
        """Parse a cell as a JSON value, or return its text if it is not JSON."""
        if self.is_loose and cell.lower() in ("true", "false"):
            return cell.lower() == "true"
        if self.delimiter == ";" and _DECIMAL_COMMA.fullmatch(cell):
            return float(cell.replace(",", "."))
        value = _parse(cell)
        if self.is_loose and isinstance(value, str) and _NUMBER.fullmatch(cell):
            return float(cell)
        return None if self.is_loose and isinstance(value, float) and not math.isfinite(value) else value

    def _degrees(self, name: str, cell: str, location: str) -> float | None:
        value = self.value(cell)
        if isinstance(value, str):  # "nan", and leading zeros
            with contextlib.suppress(ValueError):
                value = float(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{location}: {name}={cell!r} is not a number; give decimal degrees, or an empty cell")
        return None if value is None or math.isnan(value) else value


def _read_header(path: Path, stream: TextIO) -> _Columns | None:
    """Read the header line; return None, with a warning, if no column names image files."""
    first = stream.readline()
    line = first.removeprefix("\ufeff")  # the mark of a file saved as "CSV UTF-8"
    delimiter = max(",;\t", key=line.count)
    names = tuple(name.strip() for name in next(csv.reader([line], delimiter=delimiter), []))
    if set(_FIXED) <= set(names):
        is_loose = line != first or line.endswith("\r\n") or delimiter != ","
        return _Columns(names, {name: names.index(name) for name in _FIXED}, True, is_loose, delimiter)
    lowered = [name.lower() for name in names]
    file = next((name for name in _FILE_COLUMNS if name in lowered), None)
    if file is None:
        logger.warning(
            "%s is ignored: none of its columns (%s) is named %s; rename the column with the image files",
            path,
            ", ".join(names),
            " or ".join(_FILE_COLUMNS),
        )
        return None
    fixed = {"file": lowered.index(file)}
    fixed |= {name: lowered.index(name) for name in ("id", "split", "ra", "dec") if name in lowered}
    return _Columns(names, fixed, False, True, delimiter)


def _format(value: Any) -> str:
    """Format a JSON value as a cell: empty for None, plain text unless it would parse as something else."""
    if value is None:
        return ""
    if isinstance(value, str) and value and _parse(value) == value:
        return value
    return json.dumps(value)


def _parse(cell: str) -> Any:
    if not cell:
        return None
    try:
        return json.loads(cell)
    except ValueError:
        return cell
