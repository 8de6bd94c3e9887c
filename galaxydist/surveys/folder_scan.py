"""Scan of an image folder: layout, classes and image files in natural order; names and ids.

Names that are valid in shards, folders and file systems have letters, digits, ``_``, ``-`` and ``+`` only.
"""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from galaxydist.errors import UserError, name_some
from galaxydist.galaxy import GALAXY10_CLASSES, MARGIN, SPLITS, STORED_SPLITS
from galaxydist.paths import is_dataset_name
from galaxydist.surveys.folder_metadata import METADATA_FILE
from galaxydist.surveys.image_files import EXTENSIONS

_UNSAFE = re.compile(r"[^A-Za-z0-9_+-]+")
_FOLD = re.compile(r"-fold\d+of\d+$")
_DIGITS = re.compile(r"(\d+)")

_OTHER_WAY = re.compile(r"(anti|counter)[ _-]*clockwise")
# Words that distinguish two mirror-image classes: word -> (kind of pair, handedness).
_HANDS = {
    word: (kind, hand)
    for kind, *hands in (
        ("turn", ("clockwise", "cw"), ("anticlockwise", "acw", "ccw")),
        ("side", ("left", "lefthanded"), ("right", "righthanded")),
        ("letter", ("s", "swise"), ("z", "zwise")),
    )
    for hand, words in zip(("one", "other"), hands, strict=True)
    for word in words
}


def safe_name(text: str) -> str:
    """Replace each run of unsafe characters of ``text`` by ``_``; the result is never empty."""
    return _UNSAFE.sub("_", text).strip("_") or "unnamed"


def check_name(name: str) -> None:
    """Raise a UserError that suggests another name if ``name`` is not a valid data set name."""
    if not is_dataset_name(name):
        raise UserError(
            f"the name {name!r} is not valid for a data set: it is used in folder names and commands, so it may have letters, "
            f"digits, _, -, + and . only, and no . at its start; try {safe_name(name)}"
        )


def fold_name(name: str, number: int, count: int) -> str:
    """Return the data set name of fold ``number`` (0 ... n - 1) of ``count``; each fold is a data set of its own."""
    return f"{name}-fold{number + 1}of{count}"


def same_survey(one: str, other: str) -> bool:
    """Return True if two data set names, of variants or folds, belong to one survey, so that equal ids mean one galaxy."""
    return _FOLD.sub("", one) == _FOLD.sub("", other)


def mirrored_classes(names: Sequence[str]) -> list[str]:
    """Return the classes whose mirror image is another class, by their names: (anti)clockwise, left and right, S and Z."""
    by_rest: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        words = re.findall(r"[a-z]+|\d+", _OTHER_WAY.sub("anticlockwise", name.lower()))
        hands = [_HANDS[word] for word in words if word in _HANDS]
        if len(hands) == 1:
            rest = tuple(hands[0][0] if word in _HANDS else word for word in words)
            by_rest.setdefault(rest, {}).setdefault(hands[0][1], []).append(name)
    return [name for hands in by_rest.values() if len(hands) == 2 for same in hands.values() for name in same]


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Return a sort key that puts ``class2`` before ``class10``. It is unique for each text: ``010`` comes before ``10``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(text) if part), text


def unique_ids(candidates: Sequence[Sequence[str]]) -> list[str]:
    """Return a safe and unique id for each item, by the shortest naming scheme without collisions.

    Args:
        candidates: for each item the same number of names, from the shortest to the most specific.

    Returns:
        One id per item; if even the most specific names collide, later items get ``-2``, ``-3``, ...
    """
    for scheme in zip(*candidates, strict=True):
        ids = [safe_name(name) for name in scheme]
        if len({name.lower() for name in ids}) == len(ids):
            return ids
    seen: Counter[str] = Counter()
    taken = {safe_name(names[-1]).lower() for names in candidates}
    result = []
    for names in candidates:
        name = safe_name(names[-1])
        seen[name.lower()] += 1
        number = seen[name.lower()]
        while number > 1 and f"{name}-{number}".lower() in taken:
            number += 1
        seen[name.lower()] = number
        result.append(name if number == 1 else f"{name}-{number}")
        taken.add(result[-1].lower())
    return result


logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    MARGIN: MARGIN,
}
_NUMBERED = {str(label) for label in range(len(GALAXY10_CLASSES))}
_FITS = (".fits", ".fit", ".fts", ".fz")
# Folders that file servers and desktops create; they hold thumbnails and deleted files.
CLUTTER = {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image: its file relative to the folder, the split of its folder (None without split folders), its class number."""

    file: str
    split: str | None
    label: int


def file_ids(file: str) -> tuple[str, str, str, str]:
    """Return ids for an image file, from the shortest to the most specific, for :func:`unique_ids`."""
    parts = PurePosixPath(file).with_suffix("").parts
    return parts[-1], "-".join(parts[-2:]), "-".join(parts), file.replace("/", "-")


def scan_folder(root: Path, *, as_galaxy10: bool = False, may_be_empty: bool = False) -> tuple[tuple[str, ...], list[ImageFile]]:
    """Return class names and images of ``root/[train|val|test|margin/]<class>/**``, classes and files in natural order.

    Folders with the names of Galaxy10's ten classes get Galaxy10's labels. A folder or file that links reach a second time is
    read once. A broken link is listed as an image: reading it fails like reading a damaged image.

    Args:
        root: the folder.
        as_galaxy10: the folders are Galaxy10's classes, named by class or by the numbers 0-9.
        may_be_empty: a class folder without images is no error.

    Raises:
        UserError: no such folder, no class folders, an empty class, a single class, val or test without a train folder, or
            other classes than Galaxy10's with ``as_galaxy10``.
    """
    if not root.is_dir():
        raise UserError(f"no folder at {root}; give a folder with one folder of images for each class")
    finder = _Finder(root)
    top = finder.list_folders("")
    class_folders: list[tuple[str, str, str | None]]
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in top if name.lower() in _SPLIT_FOLDERS}
    if splits and len(splits) == len(top) and "train" not in splits.values():
        raise UserError(f"{root} has {', '.join(splits)} but no train folder; put the training images into {root / 'train'}")
    if "train" in splits.values():
        _check_unique_splits(root, splits)
        if ignored := [name for name in top if name not in splits]:
            logger.warning("%s: %s beside the train folder left out", root, ", ".join(ignored))
        class_folders = [
            (f"{folder}/{name}", name, split) for folder, split in splits.items() for name in finder.list_folders(folder)
        ]
    else:
        class_folders = [(name, name, None) for name in top]
    class_names, labels = _labels({name for _, name, _ in class_folders}, root, as_galaxy10=as_galaxy10)
    found = finder.find([folder for folder, _, _ in class_folders], may_be_empty=may_be_empty)
    images = [ImageFile(file, split, labels[name]) for folder, name, split in class_folders for file in found[folder]]
    order: dict[str | None, int] = {None: 0, **{split: code for code, split in enumerate(STORED_SPLITS)}}
    return class_names, sorted(images, key=lambda image: (order[image.split], image.label))


def _check_unique_splits(root: Path, splits: Mapping[str, str]) -> None:
    """Raise UserError if two folders name the same split: one of them probably means another split."""
    for split in SPLITS:
        if len(names := [name for name in splits if splits[name] == split]) > 1:
            raise UserError(
                f"{root}: the folders {', '.join(names)} all name the {split} split; put their images into one folder, or "
                "rename those that mean another split (train, val, test)"
            )


def known_split(name: str) -> str | None:
    """Return the split (``train``, ``val``, ``test`` or ``margin``) that a folder or table calls ``name``, or None."""
    return _SPLIT_FOLDERS.get(name.strip().lower())


def _labels(found: set[str], root: Path, *, as_galaxy10: bool) -> tuple[tuple[str, ...], dict[str, int]]:
    if len(found) < 2:
        tables = sorted(path for ending in ("csv", "jsonl", "parquet", "fits") for path in root.glob(f"*.{ending}"))
        hint = f". If {tables[0].name} lists the images with their classes, give --from {tables[0]}" if tables else ""
        raise UserError(
            f"{root} has {f'only the class {next(iter(found))!r}' if found else 'no class folder'}; "
            f"expected one folder of images for each class, at least two, or such folders inside train, val and test{hint}"
        )
    return label_classes(found, root, as_galaxy10=as_galaxy10)


def label_classes(found: Collection[str], location: object, *, as_galaxy10: bool) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names by label, and the label of each name found: Galaxy10's if these are its classes, else sorted names.

    Args:
        found: the names of the classes in a folder or a table.
        location: the folder or table, for messages.
        as_galaxy10: the user's word that they are Galaxy10's classes, named by class or by the numbers 0-9.

    Raises:
        UserError: other classes than Galaxy10's with ``as_galaxy10``.
    """
    found = set(found)
    if found == set(GALAXY10_CLASSES) or (as_galaxy10 and found and found <= set(GALAXY10_CLASSES)):
        return GALAXY10_CLASSES, {name: label for label, name in enumerate(GALAXY10_CLASSES)}
    names = tuple(sorted(found, key=natural_key))
    if as_galaxy10 and found and found <= _NUMBERED:
        return GALAXY10_CLASSES, {name: int(name) for name in found}
    if as_galaxy10:
        raise UserError(
            f"{location} does not have Galaxy10's classes but {_quoted(names)}; they are named 0 to 9, or "
            f"{', '.join(GALAXY10_CLASSES)}: rename the classes, or leave out --classes"
        )
    if found == _NUMBERED:
        logger.warning("%s: its classes are named 0 to 9; if they are Galaxy10's labels, give --classes galaxy10", location)
    return names, {name: label for label, name in enumerate(names)}


class _Finder:
    """Finds the images of class folders: first regular files, then the targets of links that were not found before."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._files: dict[str, list[str]] = {}
        self._links: list[tuple[str, str]] = []  # class folder, path relative to the root
        self._repeated: list[tuple[str, str]] = []  # likewise, for paths found before
        self._folders: set[str] = set()  # real paths
        self._seen: set[str] | None = None  # real paths of images; None until the first link
        self._left_out: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by class folder

    def list_folders(self, relative: str) -> list[str]:
        """Return the visible subfolders of a folder in natural order, and count images and tables beside them as left out."""
        folders = []
        for entry in _entries(self._root / relative):
            if entry.name.startswith((".", "__")):
                continue
            if not entry.is_dir():
                if _ending(entry.name) in EXTENSIONS.union(_FITS) or (relative and entry.name == METADATA_FILE):
                    self._left_out[""][f"{_ending(entry.name)} beside the class folders"] += 1
            elif entry.name.lower() in CLUTTER:
                self._leave_out_folder("", f"{relative}/{entry.name}")
            else:
                folders.append(entry.name)
        return sorted(folders, key=natural_key)

    def find(self, folders: Sequence[str], *, may_be_empty: bool) -> dict[str, list[str]]:
        """Return the image files of each class folder, relative to the root, in natural order; warn about files left out.

        Raises:
            UserError: a class folder has no images or cannot be read.
        """
        self._files = {folder: [] for folder in folders}
        for folder in folders:
            path = f"{self._real_root}/{folder}"
            if os.path.realpath(path) == path:
                self._walk(folder, folder, path)
            else:
                self._links.append((folder, folder))
        order = {folder: number for number, folder in enumerate(folders)}
        while self._links:
            links = sorted(self._links, key=lambda link: (order[link[0]], natural_key(link[1])))
            self._links = []
            for folder, path in links:
                self._follow(folder, path)
        self._warn()
        for folder, files in self._files.items():
            if not files and not may_be_empty:
                raise self._empty(folder)
            files.sort(key=natural_key)
        return self._files

    def _walk(self, folder: str, relative: str, real: str) -> None:
        self._folders.add(real)
        for entry in _entries(Path(real)):
            name, path = entry.name, f"{relative}/{entry.name}"
            if name.startswith("."):
                continue
            if entry.is_symlink():
                self._links.append((folder, path))
            elif entry.is_file():
                self._add(folder, path, entry.path)
            elif not entry.is_dir():
                self._left_out[folder]["pipe, socket or device"] += 1  # reading it might never end
            elif name.lower() in CLUTTER:
                self._leave_out_folder(folder, path)
            elif entry.path in self._folders:
                self._repeated.append((folder, path))
            else:
                self._walk(folder, path, entry.path)

    def _follow(self, folder: str, path: str) -> None:
        if self._seen is None:
            self._seen = {f"{self._real_root}/{file}" for files in self._files.values() for file in files}
        link = self._root / path
        real = os.path.realpath(link)  # unlike Path.resolve, it accepts circular links
        if not Path(real).is_dir():
            self._add(folder, path, real)
        elif real in self._folders or Path(os.path.realpath(link.parent)).is_relative_to(real):
            self._repeated.append((folder, path))
        else:
            self._walk(folder, path, real)

    def _add(self, folder: str, path: str, real: str) -> None:
        ending = _ending(path)
        if ending not in EXTENSIONS:
            self._left_out[folder][ending or "without an ending"] += 1
            return
        if self._seen is not None and Path(real).exists():
            if real in self._seen:
                self._repeated.append((folder, path))
                return
            self._seen.add(real)
        self._files[folder].append(path)

    def _leave_out_folder(self, folder: str, path: str) -> None:
        count = sum(len(files) for _, _, files in os.walk(self._root / path.lstrip("/")))
        self._left_out[folder][f"in {PurePosixPath(path).name}"] += count

    def _warn(self) -> None:
        if self._repeated:
            logger.warning(
                "%s: each folder and image is read once, though several links lead to some: %s",
                self._root,
                _quoted([path for _, path in self._repeated]),
            )
        left_out: Counter[str] = sum(self._left_out.values(), Counter())
        if left_out:
            logger.warning("%s: left out: %s", self._root, _count(left_out))

    def _empty(self, folder: str) -> UserError:
        """Return the error for a class without images, listing the files found instead."""
        repeated = [path for owner, path in self._repeated if owner == folder]
        reasons = []
        if folder in self._left_out:
            reasons.append(f"it has {_count(self._left_out[folder])}")
        if repeated:
            reasons.append(f"its links lead to images that are elsewhere in {self._root}: {_quoted(repeated)}")
        reason = f": {'; '.join(reasons)}" if reasons else ""
        return UserError(
            f"an empty class: {self._root / folder} has no images ({', '.join(sorted(EXTENSIONS))}){reason}; "
            "add some or remove the folder"
        )


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}; make it readable, or remove it") from error


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _count(left_out: Counter[str]) -> str:
    numbers = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
    has_fits = any(what.split(" ")[0] in _FITS for what in left_out)
    return numbers + (" (FITS is not read: convert it to PNG with a stretch of your choice)" if has_fits else "")


def _quoted(names: Sequence[str]) -> str:
    return name_some([*map(repr, names)])
