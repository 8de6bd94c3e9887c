"""Samples of WebDataset tars as a table and its images: labels, ids, splits and properties from names, texts and JSON."""

import hashlib
import itertools
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import EncodedImage
from galaxydist.surveys.folder_scan import known_split
from galaxydist.surveys.image_files import UNREADABLE, group_equal_images, parse_image
from galaxydist.surveys.image_table import TableOptions, TableSurvey, open_table
from galaxydist.surveys.table_columns import USUAL_NAMES, ColumnNames, find_columns
from galaxydist.surveys.tables.json_columns import conform, parse_object, typed_column, unite_fields
from galaxydist.surveys.tables.tar_scan import (
    CLASS_ENDINGS,
    FACTS,
    FILE,
    JSON_ENDINGS,
    KEY,
    LENGTH,
    OFFSET,
    OWN,
    ScannedTar,
    TarLocation,
    describe_tars,
    open_tar,
)

logger = logging.getLogger(__name__)

# Columns that no text of a tar gives: the image's name with its tar, its folder in the tar, and the split of the tar.
NAME, FOLDER, SPLIT = "__name", "folder", "__split"
_SLAB = 256


@dataclass(frozen=True)
class TarImages:
    """Images in tars, one for each row of a table; an :class:`galaxydist.surveys.image_table.ImageSource`.

    Attributes:
        location: the tars, for messages.
        tars: their paths or URLs.
        versions: SHA-256 of each, else its size and version.
        names: N names of the images in their tars, for messages.
        tar: N numbers of the tars.
        offset, length: (N,) int64, position and size of each image in bytes; -1 for a row without an image.
        digests: N hashes of the images' bytes, None if the tars were not read completely.
    """

    location: str
    tars: tuple[str, ...]
    versions: tuple[str, ...] = field(repr=False)
    names: Sequence[str] = field(repr=False)
    tar: NDArray[np.int32] = field(repr=False)
    offset: NDArray[np.int64] = field(repr=False)
    length: NDArray[np.int64] = field(repr=False)
    digests: Sequence[str | None] | None = field(repr=False, default=None)
    slab_length: int = _SLAB

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        """Yield the images of rows ``start`` ... ``stop - 1``; raises DamagedImageError at one that cannot be read."""
        for row, data in self.read_bytes(range(start, stop)):
            yield parse_image(data, self._name(row))

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the tars' SHA-256, or of their sizes and versions where they were not read completely."""
        text = "\n".join((*self.versions, *map(str, (self.tar.tolist(), self.offset.tolist(), self.length.tolist()))))
        return hashlib.sha256(text.encode()).hexdigest()

    def group_equal(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) group numbers, equal for images of equal bytes that are not of one colour; -1 for the others."""
        if self.digests is None:
            return np.full(len(self.tar), -1, np.int64)
        digests = [digest or f"{UNREADABLE} {row}" for row, digest in enumerate(self.digests)]
        return group_equal_images(self.location, self.names, digests, labels, lambda row: next(self.read(row, row + 1)))

    def read_bytes(self, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield rows and the bytes of their images; ascending rows of one tar are read in one pass."""
        for number, of_tar in itertools.groupby(rows, key=self.tar.__getitem__):
            with open_tar(self.tars[number], threading.Event()) as file:
                for row in of_tar:
                    if self.offset[row] < 0:
                        raise DamagedImageError(f"{self._name(row)} has no image")
                    file.seek(int(self.offset[row]))
                    yield row, file.read(int(self.length[row]))

    def _name(self, row: int) -> str:
        return f"{self.tars[self.tar[row]]}, {self.names[row]}"


@dataclass(frozen=True)
class TarTable:
    """The samples of several tars as a table, for ``open_table``.

    Attributes:
        table: a row per sample, in the order of the tars.
        images: its images.
        has_image: (N,) False for a sample without an image.
        columns: the columns to use, of those that the user leaves open.
        facts: the scan's facts about each image.
        tars: the tars, without their samples.
    """

    table: pa.Table
    images: TarImages
    has_image: NDArray[np.bool_]
    columns: ColumnNames
    facts: pa.Table
    tars: Sequence[ScannedTar]

    def survey(self, options: TableOptions) -> TableSurvey:
        """Return the samples as a survey; raises as ``open_table``."""
        options = replace(options, columns=self.columns)
        return open_table(self.table, self.images, self.images.location, options, self.has_image)


def read_tar_table(
    scanned: Iterable[ScannedTar], locations: Sequence[TarLocation], columns: ColumnNames, *, is_labelled: bool = True
) -> TarTable:
    """Return the samples of tars as a table.

    Each JSON member is a column named by its key, ``EXTENSION:KEY`` if that is not unique. Each other text is a column named by
    its extension. The user may name a column in either way.

    Args:
        scanned: the contents of the tars, in the order of ``locations``.
        locations: the tars.
        columns: the user's columns.
        is_labelled: False if no labels are wanted.

    Raises:
        UserError: a column that does not exist (after the first tar, not after all), or JSON that is damaged.
    """
    tars: list[ScannedTar] = []
    pieces: list[pa.Table] = []
    location = describe_tars(locations)
    for tar in scanned:
        pieces.append(_texts(tar))
        if len(pieces) == 1:  # a wrong name is found before the other tars are read
            _choose(columns, pieces[0], tar.path, is_labelled=is_labelled)
        tars.append(replace(tar, samples=tar.samples.select(OWN)))
    final = _final_names(name for piece in pieces for name in piece.column_names)
    schema = pa.schema(unite_fields(piece.schema for piece in pieces))
    table = pa.concat_tables([conform(piece, schema) for piece in pieces]).combine_chunks()
    chosen = _choose(columns, table, location, is_labelled=is_labelled, final=final)
    samples = pa.concat_tables([tar.samples for tar in tars]).combine_chunks()
    number = np.repeat(np.arange(len(tars), dtype=np.int32), [len(tar.samples) for tar in tars])
    facts = samples.select([FACTS]).flatten()
    facts = facts.rename_columns([name.removeprefix(f"{FACTS}.") for name in facts.column_names])
    is_hashed = facts["digest"].null_count < len(facts)
    images = TarImages(
        location=location,
        tars=tuple(tar.path for tar in tars),
        versions=tuple(tar.sha256 or f"{tar.num_bytes} {tar.version}" for tar in tars),
        names=samples[FILE].to_pylist(),
        tar=number,
        offset=samples[OFFSET].to_numpy(),
        length=samples[LENGTH].to_numpy(),
        digests=facts["digest"].to_pylist() if is_hashed else None,
    )
    table = table.rename_columns([final[name] for name in table.column_names])
    keys = samples[KEY].to_pylist()
    table = table.append_column(NAME, pa.array(_file_names(keys, images), pa.string()))
    if FOLDER not in table.column_names and any(folders := [_folder(key) for key in keys]):
        table = table.append_column(FOLDER, pa.array(folders, pa.string()))
    if columns.split is None and (splits := _splits(locations, number, keys)) is not None:
        table = table.append_column(SPLIT, pa.array(splits, pa.string()))
        chosen = replace(chosen, split=SPLIT)
    return TarTable(table, images, images.offset >= 0, chosen, facts, [replace(tar, samples=tar.samples[:0]) for tar in tars])


def _texts(tar: ScannedTar) -> pa.Table:
    """Return the keys and texts of a tar as typed columns; JSON members are named ``EXTENSION:KEY``."""
    keys = tar.samples[KEY].to_pylist()
    columns: dict[str, Sequence[Any]] = {KEY: keys}
    for extension in [name for name in tar.samples.column_names if name not in OWN]:
        found = []
        for key, text in zip(keys, tar.samples[extension].to_pylist(), strict=True):
            try:
                is_json = extension.rpartition(".")[2] in JSON_ENDINGS
                found.append(parse_object(text or b"") if is_json else None if text is None else {"": text.decode().strip()})
            except ValueError as error:
                raise UserError(
                    f"{tar.path}: the .{extension} of {key} is damaged ({error}); write or copy the tar again"
                ) from None
        names = dict.fromkeys(name for content in found for name in content or ())
        columns |= {f"{extension}:{name}" if name else extension: [(row or {}).get(name) for row in found] for name in names}
    typed = [typed_column(name, values) for name, values in columns.items()]
    return pa.Table.from_arrays([array for _, array in typed], schema=pa.schema([field for field, _ in typed]))


def _final_names(names: Iterable[str]) -> dict[str, str]:
    """Return the final name of each column: the plain key of a JSON member where it is unique."""
    names = [*dict.fromkeys(names)]
    plain = {name: name.partition(":")[2] or name for name in names}
    counts = Counter([*plain.values(), *USED])
    return {name: key if counts[key] == 1 else name for name, key in plain.items()}


def _choose(
    columns: ColumnNames, table: pa.Table, location: str, *, is_labelled: bool, final: Mapping[str, str] | None = None
) -> ColumnNames:
    """Return the user's columns by their final names, and the label's: a class file, or the folder where nothing else is a label.

    Args:
        columns: the user's choice, by plain keys or as ``EXTENSION:KEY``.
        table: as ``_texts`` returns it, of the first tar or of all.
        location: for messages.
        is_labelled: a label is needed.
        final: final names of all texts; None: those of the table.

    Raises:
        UserError: a column does not exist, or nothing can be the label.
    """
    all_names = final or _final_names(table.column_names)
    names = [all_names[name] for name in table.column_names if name != KEY]
    given = {kind: all_names.get(name, name) for kind, name in asdict(columns).items() if name is not None}
    for kind, name in given.items():
        if name in all_names.values() and name not in names:
            raise UserError(f"{location}: {name} (--{kind}) is empty or has lists or values of several types; name another one")
    folders = {_folder(key) for key in table[KEY].to_pylist()}
    has_folders = folders != {""}
    columns = replace(columns, **given)
    classes = [name for name in names if ":" not in name and name.rpartition(".")[2] in CLASS_ENDINGS[:2]]
    if columns.label is None and len(classes) == 1:
        columns = replace(columns, label=classes[0])
    elif columns.label is None and has_folders and not any(name.lower() in USUAL_NAMES["label"] for name in names):
        columns = replace(columns, label=FOLDER)
    known = [*names, FOLDER] if has_folders and FOLDER not in names else names
    found = find_columns(known, columns, location, is_labelled=is_labelled)
    if is_labelled and found.label is None:
        raise UserError(
            f"{location} has no label with a usual name: name a text or JSON key with --label, or give --unlabelled if there "
            f"are no labels. It has {name_some(names, 40) or 'images only'}"
        )
    if final is not None and columns.label not in (given.get("label"), None):
        what = "names of the folders in the tars" if columns.label == FOLDER else f"texts of the files .{columns.label}"
        logger.info("labels are the %s (--label names others)", what)
    return replace(columns, file=NAME)


# Names that no JSON member gets.
USED = (NAME, FOLDER, SPLIT)


def _folder(key: str) -> str:
    return PurePosixPath(key).parent.name


def _file_names(keys: Sequence[str], images: TarImages) -> list[str]:
    """Return the name of each image in the catalogue: the tar's, the key, and the ending."""
    stems = [PurePosixPath(path).name.partition(".")[0] for path in images.tars]
    rows = zip(images.tar.tolist(), keys, images.names, strict=True)
    return [f"{stems[tar]}/{key}{PurePosixPath(name).suffix.lower()}" for tar, key, name in rows]


def _splits(locations: Sequence[TarLocation], number: NDArray[np.int32], keys: Sequence[str]) -> list[str] | None:
    """Return the split of each sample by the patterns, the tars' names or folders, or the samples' first folders; None: none."""
    if any(location.split is not None for location in locations):
        return [str(locations[tar].split) for tar in number.tolist()]
    paths = [PurePosixPath(location.path) for location in locations]
    for names in ([_split_in(path.name) for path in paths], [known_split(path.parent.name) for path in paths]):
        if None not in names and "train" in names:
            return [str(names[tar]) for tar in number.tolist()]
    firsts = [known_split(PurePosixPath(key).parts[0]) if "/" in key else None for key in keys]
    return [str(name) for name in firsts] if None not in firsts and "train" in firsts else None


def _split_in(name: str) -> str | None:
    """Return the one split that a file's name has as a word."""
    found = {split for word in re.split(r"[^A-Za-z]+", name) if word and (split := known_split(word)) is not None}
    return found.pop() if len(found) == 1 else None
