"""Pictures of a folder: its layout, its classes, its files in natural order, and what of it is left out."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, SPLITS
from galaxydist.paths import is_dataset_name
from galaxydist.surveys.folder_metadata import METADATA_FILE
from galaxydist.surveys.image_files import EXTENSIONS

# Names that shards, folders and file systems all take: letters, digits, ``_``, ``-`` and ``+`` only.

_UNSAFE = re.compile(r"[^A-Za-z0-9_+-]+")
_FOLD = re.compile(r"-fold\d+of\d+$")
_DIGITS = re.compile(r"(\d+)")

_OTHER_WAY = re.compile(r"(anti|counter)[ _-]*clockwise")
# Words for the two hands of a pair.
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
    """``text`` with everything else replaced by ``_``; never empty."""
    return _UNSAFE.sub("_", text).strip("_") or "unnamed"


def check_name(name: str) -> None:
    """See that a data set may be called ``name``.

    Raises:
        UserError: with a name that it may have.
    """
    if not is_dataset_name(name):
        raise UserError(
            f"the name {name!r} cannot be a data set's: it names a folder under the data root and stands in commands, so it has "
            f"letters, digits, _, -, + and . only, and no . at its start; try {safe_name(name)}"
        )


def fold_name(name: str, number: int, count: int) -> str:
    """The data set name of fold ``number`` (0 ... n - 1) of ``count``: another data set than the whole, and than other folds."""
    return f"{name}-fold{number + 1}of{count}"


def same_survey(one: str, other: str) -> bool:
    """Whether two data sets, by their names, are of one survey, so that an id means one galaxy in both: a survey's variants have
    its name, its folds names of their own."""
    return _FOLD.sub("", one) == _FOLD.sub("", other)


def mirrored_classes(names: Sequence[str]) -> list[str]:
    """The classes of which another is the mirror image, by their names: clockwise and anticlockwise, left and right, S and Z."""
    by_rest: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        words = re.findall(r"[a-z]+|\d+", _OTHER_WAY.sub("anticlockwise", name.lower()))
        hands = [_HANDS[word] for word in words if word in _HANDS]
        if len(hands) == 1:
            rest = tuple(hands[0][0] if word in _HANDS else word for word in words)
            by_rest.setdefault(rest, {}).setdefault(hands[0][1], []).append(name)
    return [name for hands in by_rest.values() if len(hands) == 2 for same in hands.values() for name in same]


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key under which ``class2`` comes before ``class10``. Two texts never share it: ``010`` comes before ``10``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(text) if part), text


def unique_ids(candidates: Sequence[Sequence[str]]) -> list[str]:
    """A safe and unique id for each item, by the shortest naming scheme that keeps all apart.

    Args:
        candidates: for each item the same number of names, from the shortest to the most specific.

    Returns:
        One id an item; where even the most specific names collide, later items get ``-2``, ``-3``, ...
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
}
_NUMBERED = {str(label) for label in range(len(GALAXY10_CLASSES))}
_FITS = (".fits", ".fit", ".fts", ".fz")
# Folders that file servers and desktops put beside the user's own; what is in them are thumbnails and deleted files.
_CLUTTER = {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
# Names that a message gives before it says how many more there are.
_NAMED = 5


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


def scan_folder(root: Path, *, as_galaxy10: bool = False) -> tuple[tuple[str, ...], list[PictureFile]]:
    """Class names and pictures of ``root/[train|val|test/]<class>/**``, classes and files in natural order.

    Folders that bear the names of Galaxy10's ten classes get Galaxy10's labels. A folder or file that links lead to a second
    time is read once. A broken link is among the pictures: reading it fails, as reading a damaged picture does.

    Args:
        root: the folder.
        as_galaxy10: the folders are Galaxy10's classes, by their names or by the numbers 0-9.

    Raises:
        UserError: no such folder, no class folders, an empty class, a single class, no train folder beside val or test, other
            classes than Galaxy10's where they were asked for.
    """
    if not root.is_dir():
        raise UserError(f"no folder at {root}; give a folder with one folder of pictures for each class")
    finder = _Finder(root)
    top = finder.list_folders("")
    class_folders: list[tuple[str, str, str | None]]
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in top if name.lower() in _SPLIT_FOLDERS}
    if splits and len(splits) == len(top) and "train" not in splits.values():
        raise UserError(f"{root} has {', '.join(splits)} but no train folder; put the training pictures into {root / 'train'}")
    if "train" in splits.values():
        _refuse_twins(root, splits)
        _warn_ignored(root, [name for name in top if name not in splits])
        class_folders = [
            (f"{folder}/{name}", name, split) for folder, split in splits.items() for name in finder.list_folders(folder)
        ]
    else:
        class_folders = [(name, name, None) for name in top]
    class_names, labels = _labels({name for _, name, _ in class_folders}, root, as_galaxy10=as_galaxy10)
    found = finder.find([folder for folder, _, _ in class_folders])
    pictures = [PictureFile(file, split, labels[name]) for folder, name, split in class_folders for file in found[folder]]
    order = {"train": 0, "val": 1, "test": 2, None: 0}
    return class_names, sorted(pictures, key=lambda picture: (order[picture.split], picture.label))


def _refuse_twins(root: Path, splits: Mapping[str, str]) -> None:
    """Two folders of one split are more likely two splits, of which one has an unlucky name, than one in two parts."""
    for split in SPLITS:
        if len(names := [name for name in splits if splits[name] == split]) > 1:
            raise UserError(
                f"{root}: the folders {', '.join(names)} would all be the {split} split; put their pictures into one folder, or "
                "rename those that mean another split (train, val, test)"
            )


def known_split(name: str) -> str | None:
    """The split that a folder or a table calls ``name``: ``train``, ``val`` or ``test``; None where it is none."""
    return _SPLIT_FOLDERS.get(name.strip().lower())


def _labels(found: set[str], root: Path, *, as_galaxy10: bool) -> tuple[tuple[str, ...], dict[str, int]]:
    if len(found) < 2:
        raise UserError(
            f"{root} has {'no class folder' if not found else f'the class {next(iter(found))!r} alone'}; "
            "expected one folder of pictures for each class, at least two, or such folders inside train, val and test"
        )
    if found == set(GALAXY10_CLASSES):
        return GALAXY10_CLASSES, {name: label for label, name in enumerate(GALAXY10_CLASSES)}
    names = tuple(sorted(found, key=natural_key))
    if found == _NUMBERED and as_galaxy10:
        return GALAXY10_CLASSES, {name: int(name) for name in found}
    if as_galaxy10:
        raise UserError(
            f"{root} does not have Galaxy10's classes but {_some(names)}; they are folders named 0 to 9, or "
            f"{', '.join(GALAXY10_CLASSES)}: rename the folders, or leave out --classes"
        )
    if found == _NUMBERED:
        logger.warning("%s: its classes are named 0 to 9; if they are Galaxy10's labels, give --classes galaxy10", root)
    return names, {name: label for label, name in enumerate(names)}


class _Finder:
    """Finds the pictures of class folders: first what lies there itself, then what links lead to and was not found before."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._files: dict[str, list[str]] = {}
        self._links: list[tuple[str, str]] = []  # class folder, path relative to the root
        self._twice: list[tuple[str, str]] = []  # likewise
        self._folders: set[str] = set()  # real paths
        self._seen: set[str] | None = None  # real paths of pictures; needed from the first link on
        self._left_out: dict[str, Counter[str]] = {}  # by class folder

    def list_folders(self, relative: str) -> list[str]:
        """Names of the folders in a folder, in natural order, without hidden ones; notes pictures and tables beside them."""
        folders = []
        for entry in _entries(self._root / relative):
            if entry.name.startswith((".", "__")):
                continue
            if not entry.is_dir():
                if _ending(entry.name) in EXTENSIONS.union(_FITS) or (relative and entry.name == METADATA_FILE):
                    self._leave_out("", f"{_ending(entry.name)} beside the class folders")
            elif entry.name.lower() in _CLUTTER:
                self._leave_out_folder("", f"{relative}/{entry.name}")
            else:
                folders.append(entry.name)
        return sorted(folders, key=natural_key)

    def find(self, folders: Sequence[str]) -> dict[str, list[str]]:
        """The picture files of each class folder, relative to the root, in natural order; says what is left out.

        Raises:
            UserError: a class folder without pictures, or one that cannot be read.
        """
        self._files = {folder: [] for folder in folders}
        for folder in folders:
            place = f"{self._real_root}/{folder}"
            if os.path.realpath(place) == place:
                self._walk(folder, folder, place)
            else:
                self._links.append((folder, folder))
        number = {folder: place for place, folder in enumerate(folders)}
        while self._links:
            links = sorted(self._links, key=lambda link: (number[link[0]], natural_key(link[1])))
            self._links = []
            for folder, path in links:
                self._follow(folder, path)
        self._say()
        for folder, files in self._files.items():
            if not files:
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
            elif not entry.is_dir():
                self._take(folder, path, entry.path)
            elif name.lower() in _CLUTTER:
                self._leave_out_folder(folder, path)
            elif entry.path in self._folders:
                self._twice.append((folder, path))
            else:
                self._walk(folder, path, entry.path)

    def _follow(self, folder: str, path: str) -> None:
        if self._seen is None:
            self._seen = {f"{self._real_root}/{file}" for files in self._files.values() for file in files}
        link = self._root / path
        real = os.path.realpath(link)  # unlike Path.resolve it bears links in a circle
        if not Path(real).is_dir():
            self._take(folder, path, real)
        elif real in self._folders or Path(os.path.realpath(link.parent)).is_relative_to(real):
            self._twice.append((folder, path))
        else:
            self._walk(folder, path, real)

    def _take(self, folder: str, path: str, real: str) -> None:
        ending = _ending(path)
        if ending not in EXTENSIONS:
            self._leave_out(folder, ending or "without an ending")
            return
        if self._seen is not None and Path(real).exists():
            if real in self._seen:
                self._twice.append((folder, path))
                return
            self._seen.add(real)
        self._files[folder].append(path)

    def _leave_out(self, folder: str, what: str, count: int = 1) -> None:
        self._left_out.setdefault(folder, Counter())[what] += count

    def _leave_out_folder(self, folder: str, path: str) -> None:
        count = sum(len(files) for _, _, files in os.walk(self._root / path.lstrip("/")))
        self._leave_out(folder, f"in {PurePosixPath(path).name}", count)

    def _say(self) -> None:
        if self._twice:
            logger.warning(
                "%s: each folder and picture is read once, though links lead to some again: %s",
                self._root,
                _some([path for _, path in self._twice]),
            )
        left_out: Counter[str] = sum(self._left_out.values(), Counter())
        if left_out:
            logger.warning("%s: left out: %s", self._root, _count(left_out))

    def _empty(self, folder: str) -> UserError:
        """An error for a class without pictures, which says what there is instead."""
        twice = [path for owner, path in self._twice if owner == folder]
        reasons = []
        if folder in self._left_out:
            reasons.append(f"it has {_count(self._left_out[folder])}")
        if twice:
            reasons.append(f"links in it lead to pictures that stand elsewhere in {self._root}, as {_some(twice)}")
        reason = f": {'; '.join(reasons)}" if reasons else ""
        return UserError(
            f"an empty class: {self._root / folder} has no pictures ({', '.join(sorted(EXTENSIONS))}){reason}; "
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


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _warn_ignored(root: Path, names: list[str]) -> None:
    if names:
        logger.warning("%s: %s beside the train folder left out", root, ", ".join(names))
