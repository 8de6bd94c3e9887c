"""Samples of WebDataset tars as a table and its images: labels, ids, splits and properties from names, texts and JSON."""

import hashlib
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import EncodedImage
from galaxydist.surveys.folder_scan import known_split
from galaxydist.surveys.image_files import UNREADABLE, group_equal_images, is_blank, parse_image
from galaxydist.surveys.image_table import TableOptions, TableSurvey, open_table
from galaxydist.surveys.table_columns import NO_COLUMN, USUAL_NAMES, ColumnNames
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
        return group_equal_images(self.location, self.names, digests, labels, self._is_blank)

    def _is_blank(self, row: int) -> bool:
        ((_, data),) = self.read_bytes([row])
        return is_blank(data, self._name(row))

    def read_bytes(self, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield rows and the bytes of their images; ascending rows of one tar are read in one pass."""
        number, file = -1, None
        try:
            for row in rows:
                if self.offset[row] < 0:
                    raise DamagedImageError(f"{self._name(row)} has no image")
                if file is None or number != self.tar[row]:
                    if file is not None:
                        file.close()
                    number = int(self.tar[row])
                    file = open_tar(self.tars[number], threading.Event())
                file.seek(int(self.offset[row]))
                yield row, file.read(int(self.length[row]))
        finally:
            if file is not None:
                file.close()

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
    names = _Names(columns, location)
    for tar in scanned:
        pieces.append(names.read(tar))
        if is_labelled and len(pieces) == 1:
            names.check_label(tar)
        tars.append(replace(tar, samples=tar.samples.select(OWN)))
    schema = pa.schema(unite_fields(piece.schema for piece in pieces))
    table = pa.concat_tables([conform(piece, schema) for piece in pieces]).combine_chunks()
    found = names.resolve(table.column_names)
    table = table.rename_columns([found[name] for name in table.column_names])
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
    table, has_folders = _add_names(table, samples[KEY], images)
    splits = _splits(locations, number, samples[KEY].to_pylist()) if columns.split is None else None
    if splits is not None:
        table = table.append_column(SPLIT, pa.array(splits, pa.string()))
    chosen = _complete(names.chosen(found), table.column_names, has_folders=has_folders)
    if splits is not None:
        chosen = replace(chosen, split=SPLIT)
    return TarTable(table, images, images.offset >= 0, chosen, facts, [replace(tar, samples=tar.samples[:0]) for tar in tars])


class _Names:
    """Names of the columns that tars give, and the user's choice among them."""

    def __init__(self, columns: ColumnNames, location: str) -> None:
        self._columns, self._location = columns, location
        self._given = {
            kind: name for kind in ("label", "id", "split", "ra", "dec") if (name := getattr(columns, kind)) is not None
        }
        self._found: dict[str, None] = {}  # names with extensions, in order of appearance

    def read(self, tar: ScannedTar) -> pa.Table:
        """Return the texts of a tar as typed columns; JSON members are named ``EXTENSION:KEY``."""
        is_first, fields, columns = not self._found, [], []
        for extension in [name for name in tar.samples.column_names if name not in OWN]:
            texts = tar.samples[extension].to_pylist()
            if extension.rpartition(".")[2] not in JSON_ENDINGS:
                self._found[extension] = None
                values: Mapping[str, list[Any]] = {extension: [self._text(tar, row, text) for row, text in enumerate(texts)]}
            else:
                values = self._members(tar, extension, texts)
            for name, column in values.items():
                typed = typed_column(name, column)
                fields.append(typed[0])
                columns.append(typed[1])
        if is_first:
            self._check(tar.path)
        if not fields:  # a table without columns has no rows
            fields, columns = [pa.field("", pa.null(), metadata={b"kind": "nothing"})], [pa.nulls(len(tar.samples))]
        return pa.Table.from_arrays(columns, schema=pa.schema(fields))

    def resolve(self, names: Sequence[str]) -> dict[str, str]:
        """Return the final name of each column: the plain key where it is unique."""
        plain = [name.partition(":")[2] or name for name in self._found]
        taken = {*USED, *(name for name in self._found if ":" not in name)}
        final = {}
        for name in names:
            key = name.partition(":")[2]
            final[name] = key if key and plain.count(key) == 1 and key not in taken else name
        return final

    def chosen(self, final: Mapping[str, str]) -> ColumnNames:
        """Return the user's columns by their final names.

        Raises:
            UserError: a column has no single values.
        """
        chosen = {}
        for kind, given in self._given.items():
            name = self._match(given)
            if name is not None and name not in final:
                raise UserError(
                    f"{self._location}: {name} (--{kind}) is empty or has lists or values of several types; name another one"
                )
            chosen[kind] = given if name is None else final[name]
        return replace(self._columns, **chosen)

    def check_label(self, tar: ScannedTar) -> None:
        """Raise a UserError if nothing in the first tar can be a label, before all others are read."""
        plain = [name.partition(":")[2] or name for name in self._found]
        is_usual = any(name.lower() in USUAL_NAMES["label"] or name.rpartition(".")[2] in CLASS_ENDINGS for name in plain)
        if self._columns.label is None and not is_usual and not any("/" in key for key in tar.samples[KEY].to_pylist()):
            raise UserError(
                f"{tar.path} has no label with a usual name: name a text or JSON key with --label, or give --unlabelled if there "
                f"are no labels. It has {name_some(plain, 40) or 'images only'}"
            )

    def _members(self, tar: ScannedTar, extension: str, texts: Sequence[bytes | None]) -> dict[str, list[Any]]:
        rows = []
        for row, text in enumerate(texts):
            try:
                rows.append(parse_object(text or b""))
            except ValueError as error:
                raise UserError(
                    f"{tar.path}: the .{extension} of {tar.samples[KEY][row]} is damaged ({error}); write or copy the tar again"
                ) from None
        keys = dict.fromkeys(f"{extension}:{key}" for content in rows for key in content)
        self._found |= keys
        return {name: [content.get(name.partition(":")[2]) for content in rows] for name in keys}

    def _text(self, tar: ScannedTar, row: int, text: bytes | None) -> str | None:
        try:
            return None if text is None else text.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"{tar.path}: a text of {tar.samples[KEY][row]} is not UTF-8; write the tar again") from None

    def _match(self, given: str) -> str | None:
        """Return the name with extension that the user means; None for a column that no text gives."""
        if given in self._found:
            return given
        matches = [name for name in self._found if name.partition(":")[2] == given]
        lowered = given.lower()
        matches = matches or [name for name in self._found if lowered in (name.lower(), name.partition(":")[2].lower())]
        if len(matches) > 1:
            raise UserError(f"{self._location}: {given} is in several JSON files: choose one of {', '.join(matches)}")
        return matches[0] if matches else None

    def _check(self, path: str) -> None:
        for kind, given in self._given.items():
            if self._match(given) is None and given not in (NO_COLUMN, FOLDER):
                names = [name.partition(":")[2] or name for name in self._found]
                raise UserError(
                    f"{path} has no text or JSON key {given!r} (--{kind}). It has {name_some(names, 40) or 'images only'}"
                    + ("; or name the folder in the tar: folder" if kind == "label" else "")
                )


# Names that no JSON member gets.
USED = (NAME, FOLDER, SPLIT)


def _add_names(table: pa.Table, keys: pa.ChunkedArray, images: TarImages) -> tuple[pa.Table, bool]:
    """Return the table with the names of the images and their folders, and True if these differ."""
    stems = [PurePosixPath(path).name.partition(".")[0] for path in images.tars]
    names = [
        f"{stems[tar]}/{key}{PurePosixPath(name).suffix.lower()}"
        for tar, key, name in zip(images.tar.tolist(), keys.to_pylist(), images.names, strict=True)
    ]
    folders = [PurePosixPath(key).parent.name for key in keys.to_pylist()]
    table = table.append_column(NAME, pa.array(names, pa.string())) if table.num_columns else pa.table({NAME: names})
    if any(folders) and FOLDER not in table.column_names:
        table = table.append_column(FOLDER, pa.array(folders, pa.string()))
    return table, len({*folders}) > 1


def _complete(columns: ColumnNames, names: Sequence[str], *, has_folders: bool) -> ColumnNames:
    """Return the columns with the image's name, and the label's: a class file, or the folder where nothing else is a label."""
    columns = replace(columns, file=NAME)
    if columns.label is not None:
        return columns
    classes = [name for name in names if ":" not in name and name.rpartition(".")[2] in CLASS_ENDINGS[:2]]
    usual = [name for name in names if name.lower() in USUAL_NAMES["label"]]
    if len(classes) == 1:
        logger.info("labels are those of the files .%s (--label names others)", classes[0])
        return replace(columns, label=classes[0])
    if not usual and has_folders:
        logger.info("labels are the names of the folders in the tars (--label names others)")
        return replace(columns, label=FOLDER)
    return columns


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
