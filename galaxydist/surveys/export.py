"""Export of a survey to ImageFolder trees of lossless PNG files, both variants in one pass."""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import disk_error, remove_stale
from galaxydist.cpus import available_cores, bounded_map
from galaxydist.errors import UserError
from galaxydist.galaxy import STORED_SPLITS, VARIANTS, EncodedImage, Galaxy, Survey
from galaxydist.surveys.folder_metadata import FolderInfo, read_info, write_info, write_metadata
from galaxydist.surveys.folder_scan import CLUTTER, safe_name
from galaxydist.surveys.image_files import decode_file, encode_png
from galaxydist.surveys.official_split import NAME as GALAXY10
from galaxydist.surveys.survey_sources import SourceOptions, open_survey

_BATCH = 16  # galaxies per task of a thread


@dataclass(frozen=True, slots=True)
class ExportedTree:
    """An exported folder: variant, path, number of galaxies by split, and ``existed``: True if an earlier call wrote it."""

    variant: str
    path: Path
    num_galaxies: dict[str, int]
    existed: bool


@dataclass(slots=True)
class _Tree:
    """A tree that is being written into a temporary folder."""

    survey: Survey
    target: Path
    temporary: Path
    split_of_row: NDArray[np.int8]
    written: list[tuple[str, str, Galaxy]] = field(default_factory=list)

    def relative_path(self, galaxy: Galaxy, row: int) -> str | None:
        """Return a galaxy's file relative to the tree, or None if the galaxy is in no split of this variant."""
        code = int(self.split_of_row[row])
        if code < 0 or galaxy.label is None:
            return None
        # The balanced tree has only train and test folders, as published; metadata.csv marks its validation galaxies.
        folder = "train" if STORED_SPLITS[code] == "val" and self.survey.variant == "balanced" else STORED_SPLITS[code]
        return f"{folder}/{_class_folder(self.survey.class_names[galaxy.label])}/{galaxy.id}.png"


def export_image_folders(
    source: str | Path,
    out_dir: Path,
    *,
    workers: int | None = None,
    classes: str | None = None,
    options: SourceOptions | None = None,
) -> list[ExportedTree]:
    """Write ``NAME/{train,val,test}/<class>/*.png`` and ``NAME_balanced/{train,test}/...`` of a data set.

    Those of Galaxy10 have their published names, ``Galaxy10_DECaLS`` and ``Galaxy10_DECaLS_Balanced``. Each tree appears under
    its name once it is complete. An existing tree of the same galaxies is left unchanged.

    Args:
        source: anything that ``open_survey`` takes.
        out_dir: parent folder of the trees.
        workers: encoding threads; None for the cores available to this process.
        classes: ``galaxy10``: the folder's classes are Galaxy10's.
        options: for other sources than image folders and survey files.

    Raises:
        UserError: the source cannot be used, two classes need one folder, another file or folder has a tree's name, or the disk
            is full.
    """
    surveys = [open_survey(source, variant, classes=classes, source=options) for variant in VARIANTS]
    if len({_class_folder(name) for name in surveys[0].class_names}) < len(surveys[0].class_names):
        raise UserError(f"{source} has classes that cannot be told apart as names of folders: rename some with --classes")
    out_dir.mkdir(parents=True, exist_ok=True)
    exists = [_is_exported(survey, _target(survey, out_dir)) for survey in surveys]
    missing = [_start_tree(survey, out_dir) for survey, existed in zip(surveys, exists, strict=True) if not existed]
    try:
        if missing:
            _write_images(missing, workers or available_cores())
        for tree in missing:
            _publish_tree(tree)
    except OSError as error:
        raise disk_error(out_dir, error) from error
    finally:
        for tree in missing:
            shutil.rmtree(tree.temporary, ignore_errors=True)
    return [
        ExportedTree(
            survey.variant, _target(survey, out_dir), {split: len(rows) for split, rows in survey.splits.items()}, existed
        )
        for survey, existed in zip(surveys, exists, strict=True)
    ]


def _target(survey: Survey, out_dir: Path) -> Path:
    name, ending = ("Galaxy10_DECaLS", "_Balanced") if survey.name == GALAXY10 else (survey.name, "_balanced")
    return out_dir / (name + ending if survey.variant == "balanced" else name)


def _class_folder(name: str) -> str:
    """Return the folder of a class: its name, unless that is no visible folder beside the others."""
    is_plain = "/" not in name and not name.startswith((".", "__")) and name.lower() not in CLUTTER
    return name if is_plain else safe_name(name)


def _is_exported(survey: Survey, target: Path) -> bool:
    """Return True if ``target`` already holds this survey; raise UserError if `data export` did not write it."""
    if not target.exists():
        return False
    info = read_info(target) if target.is_dir() else None
    if info is None:
        raise UserError(f"{target} exists, and `galaxydist data export` did not write it; move it or choose another folder")
    return info.source_hash == survey.source_hash


def _start_tree(survey: Survey, out_dir: Path) -> _Tree:
    target = _target(survey, out_dir)
    temporary = out_dir / f".{target.name}.{os.getpid()}.partial"
    remove_stale(out_dir, f".{target.name}.*.partial")
    split_of_row = np.full(len(survey.labels), -1, np.int8)
    for split, rows in survey.splits.items():
        split_of_row[rows] = STORED_SPLITS.index(split)
    for folder in ("train", "test") if survey.variant == "balanced" else survey.splits:
        for name in survey.class_names:
            (temporary / folder / _class_folder(name)).mkdir(parents=True, exist_ok=True)
    return _Tree(survey, target, temporary, split_of_row)


def _write_images(trees: Sequence[_Tree], workers: int) -> None:
    """Read the survey once, slab by slab, and write each galaxy to the trees that contain it."""
    from tqdm import tqdm

    survey = trees[0].survey
    wanted = np.any([tree.split_of_row >= 0 for tree in trees], axis=0)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=int(wanted.sum()), desc=f"export {survey.name}", unit="galaxy", disable=None) as bar,
    ):
        galaxies = _read_wanted(survey, wanted)
        batches = iter(lambda: [*islice(galaxies, _BATCH)], [])
        tasks = (([_plan_files(trees, row, galaxy) for row, galaxy in batch],) for batch in batches)
        for written in bounded_map(pool, _write_batch, tasks, 2 * workers):
            bar.update(written)


def _read_wanted(survey: Survey, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Galaxy]]:
    """Yield wanted rows with their galaxies; slabs without a wanted row are not read."""
    for start in range(0, len(wanted), survey.slab_length):
        stop = min(start + survey.slab_length, len(wanted))
        if wanted[start:stop].any():
            yield from ((row, galaxy) for row, galaxy in enumerate(survey.read(start, stop), start) if wanted[row])


def _plan_files(trees: Sequence[_Tree], row: int, galaxy: Galaxy) -> tuple[Galaxy, list[Path]]:
    """Return the files to write a galaxy to, and record it, without its pixels, for the trees' metadata."""
    files = []
    for tree in trees:
        path = tree.relative_path(galaxy, row)
        if path is not None:
            files.append(tree.temporary / path)
            tree.written.append((path, STORED_SPLITS[tree.split_of_row[row]], replace(galaxy, image=_NO_IMAGE)))
    return galaxy, files


def _write_batch(batch: Sequence[tuple[Galaxy, list[Path]]]) -> int:
    for galaxy, files in batch:
        image = galaxy.image
        pixels = decode_file(image.data, galaxy.id) if isinstance(image, EncodedImage) else image
        is_png = isinstance(image, EncodedImage) and image.format == "png"
        data = image.data if is_png else encode_png(pixels)
        for file in files:
            file.write_bytes(data)
    return len(batch)


def _publish_tree(tree: _Tree) -> None:
    """Write the tree's metadata and rename it to its final name, replacing an older export."""
    survey = tree.survey
    write_metadata(tree.temporary, tree.written)
    write_info(tree.temporary, FolderInfo(survey.name, survey.variant, survey.source_hash, len(tree.written)))
    old = tree.temporary.with_suffix(".old.partial")  # a later export removes it after a kill
    if tree.target.exists():
        tree.target.rename(old)
    tree.temporary.rename(tree.target)
    shutil.rmtree(old, ignore_errors=True)


_NO_IMAGE = EncodedImage(b"", "png")
