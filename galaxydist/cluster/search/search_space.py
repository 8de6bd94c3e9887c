"""Search of a sweep file: the values that its trials try, and the corners that are checked before.

The keys of a search, in place of ``grid`` and ``list``:

    search:
      optim.lr: {low: 1e-4, high: 1e-2, log: true}    # an interval; log: evenly on a logarithmic scale
      model.width: [16, 32, 64]                       # or a list of values
    method: tpe          # or random
    trials: 40
    prune: median        # or asha: end poor trials early (default: none)
    seed: 0              # of the search, not of its runs (default: 0)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard
from zlib import crc32

from galaxydist.counter_rng import uniform
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.scalars import parse_text, to_text
from galaxydist.recipe.yaml12 import Document

# Largest number of runs of a sweep.
MAX_RUNS = 100_000
SEARCH_KEYS = ("search", "method", "trials", "prune", "seed")
METHODS, PRUNERS = ("random", "tpe"), ("median", "asha")
_BOUNDS = ("low", "high", "log")
# Result keys that a search cannot vary -> why.
_FIXED = {
    "recipe": "all trials have the same recipe; write recipe: NAME under set",
    "train.metric": "trials are compared by it; write it under set",
    "eval.every": "trials are compared after the same epochs; write it under set",
}
# Digits of the numbers that a random search draws, so that they are the same on any machine.
_DIGITS = 6


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``.

    Args:
        low, high: bounds, both included.
        log: draw evenly on a logarithmic scale.
        is_int: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    is_int: bool = False

    @property
    def corners(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def at(self, share: float) -> float:
        """Return the number at a share of the interval, 0 <= share < 1."""
        half = 0.5 if self.is_int else 0.0
        low, high = self.low - half, self.high + half
        if self.log:
            low, high = math.log(low), math.log(high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        value = round(value) if self.is_int else float(f"{value:.{_DIGITS}g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choices:
    """Listed values.

    Args:
        values: text, numbers, booleans, null or lists of those.
    """

    values: tuple[Any, ...]

    @property
    def corners(self) -> tuple[Any, ...]:
        return self.values

    def at(self, share: float) -> Any:
        """Return the value at a share of the list, 0 <= share < 1."""
        return self.values[int(share * len(self.values))]


Dimension = Interval | Choices


@dataclass(frozen=True)
class Search:
    """The search of a sweep file.

    Args:
        space: recipe key -> its values.
        origins: file and line of each key.
        method: ``random`` or ``tpe``.
        trials: their number.
        prune: ``median``, ``asha`` or None.
        seed: of the search.
    """

    space: Mapping[str, Dimension]
    origins: Mapping[str, str]
    method: str
    trials: int
    prune: str | None = None
    seed: int = 0

    def corners(self) -> list[dict[str, Any]]:
        """Return the settings at the corners, all of which must be valid recipes.

        They are the lowest values, the highest values, and each other value beside the lowest ones of the other keys.
        """
        lowest = {key: dimension.corners[0] for key, dimension in self.space.items()}
        highest = {key: dimension.corners[-1] for key, dimension in self.space.items()}
        others = [{**lowest, key: value} for key, dimension in self.space.items() for value in dimension.corners[1:]]
        found = [lowest, highest, *others]
        return [settings for number, settings in enumerate(found) if settings not in found[:number]]


def draw(space: Mapping[str, Dimension], seed: int, number: int) -> dict[str, Any]:
    """Return the values of a trial of a random search; they depend on seed, number and key only."""
    return {key: dimension.at(float(uniform(seed, number, crc32(key.encode())))) for key, dimension in space.items()}


def short_text(value: Any) -> str:
    """Return a value as text, a number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else to_text(value)


def describe_values(values: Mapping[str, Any]) -> str:
    """Return text such as ``optim.lr=0.003162 model.width=32``."""
    return " ".join(f"{key}={short_text(value)}" for key, value in values.items())


class SearchParser:
    """Parses the search of a sweep file.

    Args:
        document: the file.
        origin: returns the text for a line.

    Attributes:
        problems: (origin, text) of each.
    """

    def __init__(self, document: Document, origin: Callable[[int], str]) -> None:
        self.document = document
        self.origin = origin
        self.problems: list[tuple[str, str]] = []

    def parse(self) -> Search | None:
        """Return the search; None if the file has none, or if it is wrong."""
        given = [key for key in SEARCH_KEYS if key in self.document.lines]
        if not given:
            return None
        if "search" not in given:
            for key in given:
                hint = "write a recipe's seed under set, grid or list" if key == "seed" else "remove it"
                self._add(key, f"{key}: belongs to a search; write search: with the keys and values to try, or {hint}")
            return None
        if other := [key for key in ("grid", "list") if key in self.document.lines]:
            self._add("search", f"search: is in place of {' and '.join(other)}; keep one, or write two sweeps")
        space = self._space()
        method = self._choice("method", METHODS)
        prune = self._choice("prune", PRUNERS) if self.document.values.get("prune") is not None else None
        trials, seed = self._count("trials", 1, MAX_RUNS), self._count("seed", 0, 2**63 - 1) if "seed" in given else 0
        if self.problems or method is None or trials is None or seed is None:
            return None
        origins = {key: self.origin(self.document.lines.get(f"search.{key}", 0)) for key in space}
        return Search(space, origins, method, trials, prune, seed)

    def _add(self, key: str, text: str) -> None:
        self.problems.append((self.origin(self.document.lines.get(key, 0)), text))

    def _choice(self, key: str, known: tuple[str, ...]) -> str | None:
        value = self.document.values.get(key)
        if isinstance(value, str) and value in known:
            return value
        if key not in self.document.lines:
            self._add("search", f"{key} is missing: write {key}: {' or '.join(known)}")
        else:
            self._add(key, f"{key}={to_text(value)}: must be {' or '.join(known)}")
        return None

    def _count(self, key: str, least: int, most: int) -> int | None:
        value = self.document.values.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        if key not in self.document.lines:
            self._add("search", f"{key} is missing: write {key}: and their number")
        else:
            self._add(key, f"{key}={to_text(value)}: must be a whole number from {least} to {most}")
        return None

    def _space(self) -> dict[str, Dimension]:
        space: dict[str, Dimension] = {}
        bounds: dict[str, dict[str, Any]] = {}
        order: list[str] = []
        for written, value in self.document.values.items():
            key = written.removeprefix("search.")
            if key == written:
                continue
            outer, _, last = key.rpartition(".")
            if last in _BOUNDS or outer in RECIPE.fields:
                bounds.setdefault(outer, {})[last] = value
                order.append(outer)
            elif isinstance(value, list):
                space[key] = self._choices(key, value)
                order.append(key)
            else:
                shown = to_text(value)
                self._add(written, f"{key}={shown}: write a list of values, like [{shown}], or {{low: ..., high: ...}}")
        for key, given in bounds.items():
            space[key] = self._interval(key, given)
        for key in space:
            self._check_key(key)
        if not space and not self.problems and self.document.values.get("search") is None:
            self._add("search", "search: has no keys; write some like optim.lr: {low: 1e-4, high: 1e-2, log: true}")
        return {key: space[key] for key in order}

    def _choices(self, key: str, values: list[Any]) -> Choices:
        texts = [to_text(value) for value in values]
        repeated = next((text for number, text in enumerate(texts) if text in texts[:number]), None)
        if repeated is not None:
            self._add(f"search.{key}", f"{key}: {repeated} is given twice; keep one")
        if not values:
            self._add(f"search.{key}", f"{key}: has no values; give some, like [16, 32], or remove the key")
        if key == "model.name" and any(":" in text for text in texts):
            self._add(f"search.{key}", f"{key}: functions of your own cannot be searched; write one under set")
        return Choices(tuple(values))

    def _interval(self, key: str, given: Mapping[str, Any]) -> Interval:
        low, high, log = given.get("low"), given.get("high"), given.get("log", False)
        wrong = Interval(0.0, 1.0)
        if unknown := [name for name in given if name not in _BOUNDS]:
            self._add(f"search.{key}", f"{key}: an interval has low, high and log, not {', '.join(unknown)}")
        elif not (_is_number(low) and _is_number(high)):
            self._add(f"search.{key}", f"{key}: low={to_text(low)}, high={to_text(high)}: both must be numbers")
        elif not isinstance(log, bool):
            self._add(f"search.{key}.log", f"{key}: log={to_text(log)}: must be true or false")
        elif low >= high:
            self._add(f"search.{key}", f"{key}: low={to_text(low)} must be less than high={to_text(high)}")
        elif log and low <= 0:
            self._add(f"search.{key}", f"{key}: low={to_text(low)} must be more than 0 with log: true")
        else:
            is_int = isinstance(low, int) and isinstance(high, int) and _is_whole(key)
            return Interval(low, high, log, is_int)
        return wrong

    def _check_key(self, key: str) -> None:
        field = RECIPE.fields.get(key)
        if key in _FIXED:
            self._add(f"search.{key}", f"{key}: {_FIXED[key]}")
        elif field is not None and field.kind == "run":
            self._add(f"search.{key}", f"{key}: does not change a run's numbers; write it under set")
        elif f"set.{key}" in self.document.values:
            self._add(f"search.{key}", f"{key}: is in set too (line {self.document.lines[f'set.{key}']}); keep one")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(key: str) -> bool:
    """Return True for a recipe key of whole numbers."""
    try:
        return key in RECIPE.fields and not isinstance(parse_text("0.5", RECIPE.fields[key].annotation), float)
    except ValueError:
        return True
