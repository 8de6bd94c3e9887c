"""A data set as exploration sees it: what is known of all its galaxies without a picture, and the pictures of a few of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import hash64

UNLABELLED = -1
# Tells this choice of galaxies from every other use of the same hash.
_PURPOSE = 0x6578706C6F7265  # "explore"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a galaxy is, each nan where unknown: degrees (J2000), and redshift."""

    ra: float = np.nan
    dec: float = np.nan
    redshift: float = np.nan


@dataclass(frozen=True, slots=True)
class Picture:
    """A galaxy that was asked for.

    Args:
        row: its number among the N galaxies.
        id: its name in the source.
        image: H x W x 3 uint8, or None where it cannot be read.
        problem: why not.
    """

    row: int
    id: str
    image: NDArray[np.uint8] | None
    position: Position
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Positions:
    """``rows`` of the galaxies that were asked, and their ``ra``, ``dec`` and ``redshift`` (nan where unknown)."""

    rows: NDArray[np.int64]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    redshift: NDArray[np.float64]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which have a place on the sky."""
        return np.asarray(np.isfinite(self.ra) & np.isfinite(self.dec))


class Source(Protocol):
    """Where pictures and positions come from; rows are numbers among the population's N galaxies."""

    def pictures(self, rows: NDArray[np.int64]) -> Iterator[Picture]:
        """The pictures of these rows (sorted), in order; one that cannot be read is handed on with its problem."""
        ...

    def positions(self) -> Positions | None:
        """The positions of all galaxies, if they can be had without opening (nearly) every picture's file; else None."""
        ...

    def candidates(self, number: int, seed: int) -> NDArray[np.bool_] | None:
        """Where not all galaxies are as cheap to read: which ones to choose some ``number`` from, at random; else None."""
        ...


@dataclass(frozen=True)
class Population:
    """N galaxies that stand in a split.

    Args:
        dataset, variant: as every table and figure names them.
        kind: what the source is, in words.
        location: path or URL.
        source_hash: SHA-256 (hex), empty where finding it would mean reading every picture.
        class_names: by label.
        labels_N: class numbers, -1 where nobody has labelled it.
        split_names: the splits, in order.
        split_N: numbers of ``split_names``.
    """

    dataset: str
    variant: str
    kind: str
    location: str
    source_hash: str
    class_names: tuple[str, ...]
    labels_N: NDArray[np.int64]
    split_names: tuple[str, ...]
    split_N: NDArray[np.int8]
    source: Source

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def groups(self) -> Mapping[int, str]:
        """Label -> class name of every class that has galaxies or a name; the unlabelled last, if there are any."""
        named = dict(enumerate(self.class_names))
        return named | ({UNLABELLED: "unlabelled"} if (self.labels_N == UNLABELLED).any() else {})

    def counts(self) -> dict[str, list[int]]:
        """Split name -> number of galaxies by group, in the order of ``groups``; exact."""
        return {
            name: [int(((self.labels_N == label) & (self.split_N == number)).sum()) for label in self.groups]
            for number, name in enumerate(self.split_names)
        }


def chance_order(rows: NDArray[np.int64], seed: int, number: int | None = None) -> NDArray[np.int64]:
    """The rows (the first ``number`` of them) in an order that depends on the seed and on each row alone."""
    hashes = hash64(seed, _PURPOSE, rows)
    if number is not None and number < len(rows):
        first = np.argpartition(hashes, number)[:number]  # of millions, a few thousand are wanted
        rows, hashes = rows[first], hashes[first]
    return rows[np.argsort(hashes, kind="stable")]


def choose_sample(population: Population, number: int, seed: int) -> NDArray[np.int64]:
    """Sorted rows of a sample: as many of each class as of every other, as far as they go.

    Args:
        number: of galaxies, at most.
        seed: of the choice; a larger sample of the same seed holds the smaller one of each class.
    """
    if number >= len(population):
        return np.arange(len(population))
    allowed_N = population.source.candidates(number, seed)
    groups = [population.labels_N == label for label in population.groups]
    if allowed_N is not None:
        groups = [members_N & allowed_N for members_N in groups]
    orders = sorted((chance_order(np.flatnonzero(members_N), seed, number) for members_N in groups), key=len)
    chosen, left = [], number
    for place, rows in enumerate(orders):
        share = min(len(rows), left // (len(orders) - place))
        chosen.append(rows[:share])
        left -= share
    return np.sort(np.concatenate(chosen))
