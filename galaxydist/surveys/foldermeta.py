"""What an exported picture folder says about itself: ``dataset.json`` (the data set) and ``metadata.csv`` (each galaxy)."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from galaxydist.errors import UserError
from galaxydist.galaxy import Galaxy

DATASET_FILE = "dataset.json"
METADATA_FILE = "metadata.csv"
FORMAT = 1
_FIXED = ("file", "id", "split", "label", "ra", "dec")


@dataclass(frozen=True, slots=True)
class FolderInfo:
    """``dataset.json``: written last, so a folder that has it is whole."""

    name: str
    variant: str
    source_hash: str
    num_galaxies: int
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class FolderRow:
    """A line of ``metadata.csv``: what a galaxy carries beside its picture."""

    id: str
    split: str
    ra: float | None
    dec: float | None
    extras: Mapping[str, Any]


def write_info(folder: Path, info: FolderInfo) -> None:
    """Write ``dataset.json``."""
    (folder / DATASET_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> FolderInfo | None:
    """``dataset.json`` of a folder, or None where it has none (any other ImageFolder).

    Raises:
        UserError: the file is not one of ours.
    """
    path = folder / DATASET_FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        info = FolderInfo(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a description that `galaxydist data export` wrote ({error}); remove it or export again"
        ) from error
    if info.format != FORMAT:
        raise UserError(f"{path} has format {info.format}, this galaxydist reads {FORMAT}; export again")
    return info


def write_metadata(folder: Path, rows: Iterable[tuple[str, str, Galaxy]]) -> None:
    """Write ``metadata.csv`` from (file relative to the folder, split, galaxy); all galaxies have the same extras."""
    with (folder / METADATA_FILE).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        names: tuple[str, ...] | None = None
        for file, split, galaxy in rows:
            if names is None:
                names = tuple(galaxy.extras)
                writer.writerow((*_FIXED, *names))
            values = (galaxy.label, galaxy.ra, galaxy.dec, *(galaxy.extras[name] for name in names))
            writer.writerow((file, galaxy.id, split, *map(_format, values)))


def read_metadata(folder: Path) -> Iterator[tuple[str, FolderRow]]:
    """(file relative to the folder, row) of ``metadata.csv`` in its order; nothing where there is none, or none of ours."""
    path = folder / METADATA_FILE
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ())[: len(_FIXED)] != _FIXED:
            return
        for number, line in enumerate(reader, start=2):
            try:
                extras = {name: _parse(text) for name, text in line.items() if name not in _FIXED}
                yield line["file"], FolderRow(line["id"], line["split"], _parse(line["ra"]), _parse(line["dec"]), extras)
            except (TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not as `galaxydist data export` writes it; export again") from error


def _format(value: Any) -> str:
    """A JSON value as a cell: nothing for None, plain text where it cannot be taken for anything else."""
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
