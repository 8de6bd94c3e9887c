"""Surveys from image folders: one folder per class, with or without train, val and test above them."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import STORED_SPLITS
from galaxydist.surveys import official_split
from galaxydist.surveys.folder_metadata import METADATA_FILE, FolderRow, exported_tree, read_info, read_metadata
from galaxydist.surveys.folder_scan import ImageFile, file_ids, safe_name, scan_folder, unique_ids
from galaxydist.surveys.given_split import SplitOptions, choose_split, is_complete, split_code
from galaxydist.surveys.hdf5_schema import SIMULATED
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.split import (
    NONE,
    Codes,
    SplitCandidates,
    build_candidates,
    check_positions,
    id_keys,
    join_groups,
    rows_by_split,
)
from galaxydist.surveys.tables.listed_images import ListedImages

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSurvey(TableSurvey):
    """An image folder as a table of its files; its hash is that of versions before there were tables."""

    rows: tuple[FolderRow, ...] = field(repr=False, default=())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the rows out of a pickle: workers do not need the hash."""
        return super().__getstate__() | {"rows": ()}

    @cached_property
    def source_hash(self) -> str:
        """SHA-256 of names, labels, splits and the files' bytes, which are read at first access."""
        assert isinstance(self.images, ListedImages)
        digest = hashlib.sha256(f"{self.name} {self.class_names}".encode())
        digest.update(self.labels.tobytes())
        for split, rows in self.splits.items():
            digest.update(split.encode() + rows.tobytes())
        for row, hexdigest in zip(self.rows, self.images.digests, strict=True):
            digest.update(f"{row} {hexdigest}".encode())
        return digest.hexdigest()


def open_image_folder(
    path: Path,
    variant: str = "original",
    *,
    conflicting: str = "keep",
    name: str | None = None,
    fold: tuple[int, int] | None = None,
    classes: str | None = None,
    has_val: bool = True,
) -> FolderSurvey:
    """Open an image folder ``[train|val|test/]<class>/...``; a missing split is cut from train, with a warning.

    Args:
        path: the folder, or one that `data export` wrote its trees into.
        variant: ``original``, or ``balanced``: every class undersampled to the smallest.
        conflicting: ``keep`` or ``drop`` galaxies with two labels, by the folder's metadata or its positions and equal files.
        name: the data set's name; None for the exported name, else the folder's.
        fold: ``(k, n)``: fold k of an n-fold cross-validation, for a folder without splits.
        classes: ``galaxy10``: the folders, named 0 to 9 or by class, are Galaxy10's classes.
        has_val: False for no validation split; its galaxies stay in train.

    Raises:
        UserError: no images, an empty class, a class without training images.
    """
    root = exported_tree(path, variant)
    info = read_info(root)
    is_balanced = info is not None and info.variant == "balanced"
    if is_balanced and variant == "original":
        raise UserError(f"{root} holds only the balanced variant; give the folder of the original one, or data.variant=balanced")
    is_galaxy10 = classes == "galaxy10" or (info is not None and info.name in (official_split.NAME, SIMULATED))
    class_names, images = scan_folder(root, as_galaxy10=is_galaxy10, may_be_empty=info is not None)
    images, rows, source_ids = _with_metadata(root, images)
    galaxies = _candidates([image.label for image in images], class_names, rows)
    given = _folder_codes(root, images, rows)
    labels = np.asarray(galaxies.labels, np.int64)
    name = name or (info.name if info else safe_name(root.resolve().name))
    listed = ListedImages(name, root, tuple(image.file for image in images))
    if info is None and (variant == "balanced" or not is_complete(root, given, has_val=has_val)):
        galaxies = replace(galaxies, sky=join_groups(galaxies.sky, listed.group_equal(labels), labels))
    options = SplitOptions(variant="original" if is_balanced else variant, conflicting=conflicting, fold=fold, has_val=has_val)
    codes = choose_split(root, galaxies, given, options)
    if conflicting == "drop":  # the marks of an exported folder's metadata
        codes = np.where([bool(row.extras.get("conflicting")) for row in rows], NONE, codes).astype(np.int8)
    ra, dec = _positions(rows)
    return FolderSurvey(
        location=str(root),
        name=name,
        variant=variant,
        class_names=class_names,
        labels=labels,
        splits=rows_by_split(codes),
        ids=[row.id for row in rows],
        ra=ra,
        dec=dec,
        extras=_extras(rows, listed.files, source_ids),
        images=listed,
        rows=tuple(rows),
    )


def _extras(rows: Sequence[FolderRow], files: Sequence[str], source_ids: Sequence[str | None]) -> "pa.Table":
    """Return the metadata's own columns, and of galaxies that `data export` did not write the user's id and the file."""
    import pyarrow as pa

    columns: dict[str, Sequence[Any]] = {
        name: [row.extras.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row.extras)
    }
    if any(name is not None for name in source_ids):
        if "source_id" in columns and None not in source_ids:  # a column of the user's own
            columns["source_id_"] = columns.pop("source_id")
        shown = [None if name is None else _printable(file) for name, file in zip(source_ids, files, strict=True)]
        columns = {"source_id": source_ids, **columns, "file": shown}
    found = {}
    for name, values in columns.items():
        try:
            found[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):  # values of several types
            found[name] = pa.array([value if isinstance(value, str | None) else json.dumps(value) for value in values])
    return pa.table(found)


def _with_metadata(root: Path, images: list[ImageFile]) -> tuple[list[ImageFile], list[FolderRow], list[str | None]]:
    """Return images in metadata order, unlisted ones last, their rows, and the user's ids (None if `data export` wrote them)."""
    metadata, is_exported = read_metadata(root)
    listed = metadata if is_exported else _match(metadata, images)
    order = {file: number for number, file in enumerate(listed)}
    images = sorted(images, key=lambda image: order.get(image.file, len(order)))
    num_unlisted = sum(image.file not in order for image in images)
    num_missing = len(listed) - (len(images) - num_unlisted)
    if listed and (num_unlisted or num_missing):
        logger.warning("%s: %d images of its metadata are missing, %d images are not in it", root, num_missing, num_unlisted)
    exported = listed if is_exported else {}
    others = [image for image in images if image.file not in exported]
    own_ids = [listed[image.file].id if image.file in listed else "" for image in others]
    candidates = [
        (own_id, own_id, own_id, f"{own_id}-{image.file}") if own_id else file_ids(image.file)
        for image, own_id in zip(others, own_ids, strict=True)
    ]
    ids = dict(zip((image.file for image in others), unique_ids(candidates), strict=True))
    source_ids = {image.file: own_id or _printable(Path(image.file).stem) for image, own_id in zip(others, own_ids, strict=True)}
    rows = []
    for image in images:
        row = listed.get(image.file) or FolderRow("", "", None, None, {"file": image.file})
        rows.append(replace(row, id=ids[image.file]) if image.file in ids else row)
    if twice := [name for name, count in Counter(row.id for row in rows).items() if count > 1]:
        raise UserError(
            f"{root}: two galaxies have the id {twice[0]!r} (metadata.csv and file names); rename one, or export again"
        )
    check_positions(*_positions(rows), name=lambda number: f"{root / METADATA_FILE}, {images[number].file}")
    return images, rows, [source_ids.get(image.file) for image in images]


def _match(metadata: Mapping[str, FolderRow], images: list[ImageFile]) -> dict[str, FolderRow]:
    """Return the rows of a user's own table by image file; the table may name files without their folders."""
    files = {image.file for image in images}
    of_name: dict[str, list[str]] = {}
    for image in images:
        of_name.setdefault(Path(image.file).name, []).append(image.file)
    rows = {}
    for given, row in metadata.items():
        file = given.replace("\\", "/").removeprefix("./")
        if file not in files and len(found := of_name.get(file, [])) == 1:
            file = found[0]
        rows[file] = row
    return rows


def _candidates(labels: list[int], class_names: tuple[str, ...], rows: list[FolderRow]) -> SplitCandidates:
    """Return the galaxies with the keys of the survey they were exported from, so that they are split in the same way."""
    ra, dec = _positions(rows)
    source_rows = [row.extras.get("row") for row in rows]
    if all(isinstance(number, int) and number >= 0 for number in source_rows):
        keys = np.array(source_rows, np.uint64)
    else:
        keys = id_keys(row.id for row in rows)
    seed = official_split.SPLIT_SEED
    return build_candidates(np.array(labels, np.int64), ra, dec, class_names=class_names, seed=seed, keys=keys)


def _positions(rows: list[FolderRow]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return right ascensions and declinations in degrees, nan where unknown."""
    ra = np.array([np.nan if row.ra is None else row.ra for row in rows], np.float64)
    dec = np.array([np.nan if row.dec is None else row.dec for row in rows], np.float64)
    return ra, dec


def _folder_codes(root: Path, images: list[ImageFile], rows: list[FolderRow]) -> Codes | None:
    """Return the split codes that folders and metadata give, or None (exported balanced trees keep val inside train)."""
    if images[0].split is None:
        return _table_codes(root, rows)
    has_val = any(image.split == "val" for image in images)
    names = [
        row.split if image.split == "train" and row.split == "val" and not has_val else image.split
        for image, row in zip(images, rows, strict=True)
    ]
    return np.array([STORED_SPLITS.index(name or "train") for name in names], np.int8)


def _table_codes(root: Path, rows: list[FolderRow]) -> Codes | None:
    """Return the split codes of the metadata for a folder without split folders, or None if it names no split."""
    if not any(row.split for row in rows):
        return None
    codes = [split_code(row.split) for row in rows]
    if None in codes:
        row = rows[codes.index(None)]
        raise UserError(
            f"{root / METADATA_FILE}: the split of {row.id} is {row.split!r}, not train, val or test; "
            "name one of these for every image, or remove the column"
        )
    return np.array(codes, np.int8)


def _printable(text: str) -> str:
    """Return a file name as valid UTF-8 text: other bytes are written as escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")
