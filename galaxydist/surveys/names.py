"""Names that shards, folders and file systems all take: letters, digits, ``_``, ``-`` and ``+`` only."""

import re
from collections import Counter
from collections.abc import Sequence

from galaxydist.errors import UserError
from galaxydist.paths import is_dataset_name

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
