"""Which pictures a folder holds: its layout, its classes, its files in natural order."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.surveys.names import natural_key
from galaxydist.surveys.pictures import EXTENSIONS

logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture: its file relative to the folder, the split its folder names (None without split folders), its class number."""

    file: str
    split: str | None
    label: int

    def id_candidates(self) -> tuple[str, ...]:
        """Names for the picture, from the shortest to the most specific."""
        parts = PurePosixPath(self.file).with_suffix("").parts
        return parts[-1], "-".join(parts[-2:]), "-".join(parts), self.file.replace("/", "-")


def scan_folder(root: Path) -> tuple[tuple[str, ...], list[PictureFile]]:
    """Class names and pictures of ``root/[train|val|test/]<class>/**``, classes and files in natural order.

    Folders that bear the names of Galaxy10's ten classes, or the numbers 0-9, get Galaxy10's labels and names.

    Raises:
        UserError: no such folder, no class folders, an empty class, a single class, no train folder beside val or test.
    """
    if not root.is_dir():
        raise UserError(f"no folder at {root}; give a folder with one folder of pictures for each class")
    top = _folders(root)
    class_folders: list[tuple[str, str, str | None]]
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in top if name.lower() in _SPLIT_FOLDERS}
    if splits and len(splits) == len(top) and "train" not in splits.values():
        raise UserError(f"{root} has {', '.join(splits)} but no train folder; put the training pictures into {root / 'train'}")
    if "train" in splits.values():
        _warn_ignored(root, [name for name in top if name not in splits])
        class_folders = [
            (f"{folder}/{name}", name, split) for folder, split in splits.items() for name in _folders(root / folder)
        ]
    else:
        class_folders = [(name, name, None) for name in top]
    class_names, labels = _labels({name for _, name, _ in class_folders}, root)
    pictures = [
        PictureFile(file, split, labels[name])
        for folder, name, split in class_folders
        for file in _nonempty(root, folder, list(_pictures_in(root, folder)))
    ]
    order = {"train": 0, "val": 1, "test": 2, None: 0}
    return class_names, sorted(pictures, key=lambda picture: (order[picture.split], picture.label))


def _labels(found: set[str], root: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    if len(found) < 2:
        raise UserError(
            f"{root} has {'no class folder' if not found else f'the class {next(iter(found))!r} alone'}; "
            "expected one folder of pictures for each class, at least two, or such folders inside train, val and test"
        )
    if found == set(GALAXY10_CLASSES):
        return GALAXY10_CLASSES, {name: label for label, name in enumerate(GALAXY10_CLASSES)}
    if found == {str(label) for label in range(len(GALAXY10_CLASSES))}:
        logger.info("%s: the folders 0-9 are taken as Galaxy10's labels", root)
        return GALAXY10_CLASSES, {name: int(name) for name in found}
    names = tuple(sorted(found, key=natural_key))
    return names, {name: label for label, name in enumerate(names)}


def _folders(path: Path) -> list[str]:
    """Names of the folders in ``path``, in natural order, without hidden ones."""
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__"))]
    return sorted(names, key=natural_key)


def _pictures_in(root: Path, folder: str) -> Iterator[str]:
    """The picture files under ``root/folder``, relative to ``root``, in natural order."""
    found = []
    for place, subfolders, names in os.walk(root / folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(place).relative_to(root)
        found += [
            (relative / name).as_posix() for name in names if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    yield from sorted(found, key=natural_key)


def _nonempty(root: Path, folder: str, files: list[str]) -> list[str]:
    if not files:
        raise UserError(
            f"an empty class: {root / folder} has no pictures ({', '.join(sorted(EXTENSIONS))}); add some or remove the folder"
        )
    return files


def _warn_ignored(root: Path, names: list[str]) -> None:
    if names:
        logger.warning("%s: %s beside the train folder left out", root, ", ".join(names))
