"""The plan of a simulated survey: how many galaxies of each class, where they lie, and which of them lie together."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import hash64
from galaxydist.galaxy import GALAXY10_COUNTS
from galaxydist.surveys.simulate.random_draws import PAIRS, PLACES, TWICE, Draws

# A survey smaller than a class's share still has this many galaxies of it (fewer only where there is no room).
HANDFUL = 6
# Galaxy10 has 236 pairs within a picture's width among 17,736 galaxies, one for 75.
_GALAXIES_PER_PAIR = 75
# Pairs lie this far apart, arcsec: apart from each other, yet in one picture (67 arcsec).
_PAIR_SEPARATION = (18.0, 55.0)
# The part of the sky that DECaLS covers, roughly: two stretches of right ascension, one of declination.
_RIGHT_ASCENSIONS = ((112.0, 258.0), (318.0, 418.0))
_DECLINATIONS = (-15.0, 32.0)


@dataclass(frozen=True)
class SurveyPlan:
    """What the survey holds, decided before anything is drawn.

    Attributes:
        seed: of the survey.
        balanced: equally many galaxies of each class.
        labels: N classes, sorted as in the official file.
        ra, dec: N positions, degrees.
        shown: N rows whose galaxy a row shows: its own but for the second label of the galaxy that is there twice.
        pairs: P x 2 rows that lie in each other's pictures.
    """

    seed: int
    balanced: bool
    labels: NDArray[np.int64]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    shown: NDArray[np.int64]
    pairs: NDArray[np.int64]

    def neighbours(self, row: int) -> Iterator[tuple[int, float, float]]:
        """Rows that lie in this row's picture, with their offsets east and north in arcsec."""
        for there in self.pairs[(self.pairs == row).any(axis=1)].ravel():
            if there != row:
                across = (self.ra[there] - self.ra[row] + 180.0) % 360.0 - 180.0
                east = across * np.cos(np.radians(self.dec[row])) * 3600.0
                yield int(there), float(east), float((self.dec[there] - self.dec[row]) * 3600.0)


def plan_survey(num_galaxies: int, seed: int, balanced: bool = False) -> SurveyPlan:
    """Plan a survey of ``num_galaxies`` galaxies: classes in Galaxy10's proportions, or equally many of each.

    From 20 galaxies on there are overlapping pairs, and exactly one place that has two labels.
    """
    labels = np.repeat(np.arange(len(GALAXY10_COUNTS)), class_counts(num_galaxies, balanced))
    ra, dec = scattered(num_galaxies, seed)
    shown = np.arange(num_galaxies)
    pairs = np.zeros((0, 2), np.int64)
    if num_galaxies >= 20:
        order = np.argsort(hash64(seed, PAIRS, np.arange(num_galaxies)), kind="stable")
        first = int(order[0])
        second = int(next(row for row in order if labels[row] != labels[first]))
        rest = order[(order != first) & (order != second)]
        num_pairs = min(max(2, num_galaxies // _GALAXIES_PER_PAIR), len(rest) // 2)
        pairs = rest[: 2 * num_pairs].reshape(-1, 2).astype(np.int64)
        for one, other in pairs:
            _put_beside(ra, dec, (int(one), int(other)), Draws(seed, PAIRS, int(one), 1), _PAIR_SEPARATION)
        _put_beside(ra, dec, (first, second), Draws(seed, TWICE, first), (0.05, 0.5))
        shown[second] = first
    return SurveyPlan(seed, balanced, labels, ra, dec, shown, pairs)


def class_counts(num_galaxies: int, balanced: bool = False) -> NDArray[np.int64]:
    """How many galaxies of each class: Galaxy10's proportions (largest remainders), at least a handful each; or equal shares."""
    num_classes = len(GALAXY10_COUNTS)
    weights = np.ones(num_classes) if balanced else np.array(GALAXY10_COUNTS, np.float64)
    least = min(HANDFUL, num_galaxies // num_classes)
    exact = np.maximum(weights / weights.sum() * num_galaxies, least)
    # Classes above the floor share what the floor leaves them.
    for _ in range(num_classes):
        free = exact > least
        if not free.any():
            break
        exact[free] = weights[free] / weights[free].sum() * (num_galaxies - least * (~free).sum())
        exact = np.maximum(exact, least)
    counts: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: num_galaxies - counts.sum()]:
        counts[i] += 1
    return counts


def scattered(num_galaxies: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (ra, dec in degrees) spread over the survey's area, each in a cell of its own, so that no two meet by chance."""
    widths = [high - low for low, high in _RIGHT_ASCENSIONS]
    low, high = np.sin(np.radians(_DECLINATIONS))
    columns = int(np.ceil(np.sqrt(max(num_galaxies, 1) * 5.0)))
    rows = -(-max(num_galaxies, 1) // columns) + 1
    cell = np.argsort(hash64(seed, PLACES, np.arange(columns * rows)), kind="stable")[:num_galaxies]
    inside = 0.05 + 0.9 * (hash64(seed, PLACES, np.arange(2 * num_galaxies), 1).astype(np.float64) / 2.0**64)
    along = (cell % columns + inside[:num_galaxies]) / columns * sum(widths)
    ra = np.where(along < widths[0], _RIGHT_ASCENSIONS[0][0] + along, _RIGHT_ASCENSIONS[1][0] + along - widths[0]) % 360.0
    dec = np.degrees(np.arcsin(low + (high - low) * (cell // columns + inside[num_galaxies:]) / rows))
    return ra, dec


def _put_beside(
    ra: NDArray[np.float64], dec: NDArray[np.float64], pair: tuple[int, int], dice: Draws, separation: tuple[float, float]
) -> None:
    one, other = pair
    distance, angle = dice.uniform(*separation) / 3600.0, dice.uniform(0.0, 2.0 * np.pi)
    dec[other] = dec[one] + distance * np.sin(angle)
    ra[other] = (ra[one] + distance * np.cos(angle) / np.cos(np.radians(dec[one]))) % 360.0
