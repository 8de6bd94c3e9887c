"""Any folder of pictures, sorted into class folders, as a survey; with or without train, val and test above them."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.cores import available_cores
from galaxydist.errors import UserError
from galaxydist.galaxy import SPLITS, Galaxy
from galaxydist.surveys import official
from galaxydist.surveys.foldermeta import FolderRow, read_info, read_metadata
from galaxydist.surveys.folderscan import PictureFile, scan_folder
from galaxydist.surveys.names import safe_name, unique_ids
from galaxydist.surveys.pictures import read_picture
from galaxydist.surveys.split import (
    NONE,
    TEST,
    TRAIN,
    VAL,
    Codes,
    Population,
    build_population,
    cut,
    rows_by_split,
    split_balanced,
    split_fold,
    split_original,
)

logger = logging.getLogger(__name__)

_SLAB = 256
# The trees that `data export` writes side by side, by variant.
TREES = {"original": "Galaxy10_DECaLS", "balanced": "Galaxy10_DECaLS_Balanced"}


@dataclass(frozen=True)
class FolderSurvey:
    """A picture folder as a :class:`galaxydist.galaxy.Survey`; pictures are read from their files when asked for."""

    root: Path
    name: str
    variant: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: Mapping[str, NDArray[np.int64]]
    files: tuple[str, ...] = field(repr=False)
    rows: tuple[FolderRow, ...] = field(repr=False)
    slab_length: int = _SLAB

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        """The galaxies of rows ``start`` ... ``stop - 1``: RGB JPEG and PNG files as their bytes, others as pixels.

        Raises:
            UserError: a file cannot be read or is no picture (a truncated one is found where it is decoded).
        """
        for number in range(start, stop):
            row = self.rows[number]
            image = read_picture(self.root / self.files[number])
            yield Galaxy(row.id, image, int(self.labels[number]), row.ra, row.dec, row.extras)

    @cached_property
    def source_hash(self) -> str:
        """SHA-256 over names, labels, splits and the files' bytes, read when it is first asked for."""
        from tqdm import tqdm

        digest = hashlib.sha256(f"{self.name} {self.class_names}".encode())
        digest.update(self.labels.tobytes())
        for split, rows in self.splits.items():
            digest.update(split.encode() + rows.tobytes())
        with (
            ThreadPoolExecutor(available_cores()) as pool,
            tqdm(total=len(self.files), desc=f"hash {self.name}", unit="picture", disable=None, delay=2.0) as bar,
        ):
            for row, hexdigest in zip(self.rows, pool.map(self._file_hash, self.files), strict=True):
                digest.update(f"{row} {hexdigest}".encode())
                bar.update()
        return digest.hexdigest()

    def _file_hash(self, file: str) -> str:
        return hashlib.sha256((self.root / file).read_bytes()).hexdigest()


def open_image_folder(
    path: Path,
    variant: str = "original",
    *,
    conflicting: str = "keep",
    name: str | None = None,
    fold: tuple[int, int] | None = None,
) -> FolderSurvey:
    """Open a folder of pictures: ``[train|val|test/]<class>/...``; a split that is missing is cut from train, and said.

    Args:
        path: the folder, or one that `data export` wrote its trees into.
        variant: ``original``, or ``balanced``: every class undersampled to the smallest.
        conflicting: ``keep`` or ``drop`` galaxies that the folder's metadata marks as standing in the source with two labels.
        name: the data set's name; the exported one, else the folder's, where None.
        fold: ``(k, n)``: fold k of an n-fold cross-validation, for a folder without splits.

    Raises:
        UserError: no pictures, an empty class, a class without training pictures, no such variant.
    """
    if variant not in TREES:
        raise UserError(f"no variant {variant!r}; there are {', '.join(TREES)}")
    candidates = (path / TREES[variant], path / TREES["original"])
    root = next((tree for tree in candidates if tree.is_dir()), path)
    info = read_info(root)
    is_balanced = info is not None and info.variant == "balanced"
    if is_balanced and variant == "original":
        raise UserError(f"{root} holds the balanced variant alone; give the folder of the original one, or data.variant=balanced")
    class_names, pictures = scan_folder(root)
    pictures, rows = _with_metadata(root, pictures)
    population = _population([picture.label for picture in pictures], class_names, rows)
    codes = _folder_codes(pictures, rows)
    codes = _fold(root, population, codes, fold) if fold is not None else _complete(root, population, codes)
    if variant == "balanced" and not is_balanced:
        codes = split_balanced(population, codes)
    if conflicting == "drop":
        marked = np.array([bool(row.extras.get("conflicting")) for row in rows])
        codes = np.where(marked | population.sky.conflicting, NONE, codes).astype(np.int8)
    return FolderSurvey(
        root=root,
        name=name or (info.name if info else safe_name(root.resolve().name)),
        variant=variant,
        class_names=class_names,
        labels=np.asarray(population.labels, np.int64),
        splits=rows_by_split(codes),
        files=tuple(picture.file for picture in pictures),
        rows=tuple(rows),
    )


def _with_metadata(root: Path, pictures: list[PictureFile]) -> tuple[list[PictureFile], list[FolderRow]]:
    """The pictures in the order of the folder's metadata, those that it does not list last, and what each carries."""
    metadata = dict(read_metadata(root))
    place = {file: number for number, file in enumerate(metadata)}
    pictures = sorted(pictures, key=lambda picture: place.get(picture.file, len(place)))
    unlisted = [picture for picture in pictures if picture.file not in place]
    if metadata and (unlisted or len(pictures) < len(metadata)):
        gone = len(metadata) - (len(pictures) - len(unlisted))
        logger.warning("%s: %d pictures of its metadata are gone, %d are not in it", root, gone, len(unlisted))
    new_ids = iter(unique_ids([picture.id_candidates() for picture in unlisted]))
    rows = [
        metadata.get(picture.file) or FolderRow(next(new_ids), "", None, None, {"file": picture.file}) for picture in pictures
    ]
    _check_unique(root, [row.id for row in rows])
    return pictures, rows


def _population(labels: list[int], class_names: tuple[str, ...], rows: list[FolderRow]) -> Population:
    """The galaxies with the same keys as in the survey they were exported from, so that they are split in the same way."""
    ra = np.array([np.nan if row.ra is None else row.ra for row in rows], np.float64)
    dec = np.array([np.nan if row.dec is None else row.dec for row in rows], np.float64)
    source_rows = [row.extras.get("row") for row in rows]
    if all(isinstance(number, int) for number in source_rows):
        keys = np.array(source_rows, np.uint64)
    else:
        digests = (hashlib.sha256(row.id.encode()).digest() for row in rows)
        keys = np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)
    seed = official.SPLIT_SEED
    return build_population(np.array(labels, np.int64), ra, dec, class_names=class_names, seed=seed, keys=keys)


def _folder_codes(pictures: list[PictureFile], rows: list[FolderRow]) -> Codes | None:
    """The codes that folders and metadata give (exported balanced trees keep val inside train); None without split folders."""
    if pictures[0].split is None:
        return None
    has_val = any(picture.split == "val" for picture in pictures)
    names = [
        row.split if picture.split == "train" and row.split == "val" and not has_val else picture.split
        for picture, row in zip(pictures, rows, strict=True)
    ]
    return np.array([SPLITS.index(name or "train") for name in names], np.int8)


def _fold(root: Path, population: Population, codes: Codes | None, fold: tuple[int, int]) -> Codes:
    if codes is not None:
        raise UserError(f"{root} has split folders of its own; a cross-validation needs a folder with class folders alone")
    return split_fold(population, *fold)


def _complete(root: Path, population: Population, codes: Codes | None) -> Codes:
    """All three splits: those that the folder lacks are cut from train, with a word about it."""
    if codes is None:
        logger.warning("%s has no train, val and test folders: its pictures are split 80/10/10 by class", root)
        return split_original(population)
    for target, split in ((TEST, "test"), (VAL, "val")):
        if not (codes == target).any():
            logger.warning("%s has no %s folder: a tenth of train, by class, is taken for it", root, split)
            codes = cut(population, codes, target)
    for code, split in enumerate(SPLITS):
        absent = [population.class_names[label] for label in np.flatnonzero(population.counts(codes == code) == 0).tolist()]
        if absent and code == TRAIN:
            raise UserError(f"{root}: class {absent[0]!r} has no training pictures; add some or remove the class everywhere")
        if absent:
            logger.warning("%s: %s has no picture of %s", root, split, ", ".join(absent))
    return codes


def _check_unique(root: Path, ids: list[str]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"{root}: two galaxies have the id {twice!r} (metadata.csv and file names); rename one, or export again")
