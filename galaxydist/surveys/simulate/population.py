"""Plan of a simulated survey: class counts, sky positions, and pairs of neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import hash64
from galaxydist.galaxy import GALAXY10_COUNTS
from galaxydist.surveys.simulate.random_draws import PAIRS, POSITIONS, TWICE, Draws

# Minimum number of galaxies per class, even if its share is smaller (fewer only in surveys too small for it).
HANDFUL = 6
# Galaxy10 has 236 pairs within an image width among 17,736 galaxies: one per 75.
_GALAXIES_PER_PAIR = 75
# Range of pair separations, arcsec: two distinct galaxies that share one image (67 arcsec wide).
_PAIR_SEPARATION = (18.0, 55.0)
# Approximate DECaLS footprint in degrees: two ranges of right ascension, one of declination.
_RIGHT_ASCENSIONS = ((112.0, 258.0), (318.0, 418.0))
_DECLINATIONS = (-15.0, 32.0)


@dataclass(frozen=True)
class SurveyPlan:
    """Contents of a survey, planned before any image is drawn.

    Attributes:
        seed: seed of the survey.
        balanced: equal number of galaxies of each class.
        labels: N class numbers, sorted as in the official file.
        ra, dec: N positions, degrees.
        shown: N rows whose galaxies the images show: the row itself, except for the second row of the galaxy with two labels.
        pairs: P x 2 rows that lie in each other's images.
    """

    seed: int
    balanced: bool
    labels: NDArray[np.int64]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    shown: NDArray[np.int64]
    pairs: NDArray[np.int64]

    def neighbours(self, row: int) -> Iterator[tuple[int, float, float]]:
        """Yield the rows that lie in this row's image, with their offsets east and north in arcsec."""
        for there in self.pairs[(self.pairs == row).any(axis=1)].ravel():
            if there != row:
                across = (self.ra[there] - self.ra[row] + 180.0) % 360.0 - 180.0
                east = across * np.cos(np.radians(self.dec[row])) * 3600.0
                yield int(there), float(east), float((self.dec[there] - self.dec[row]) * 3600.0)


def plan_survey(num_galaxies: int, seed: int, balanced: bool = False) -> SurveyPlan:
    """Plan a survey of ``num_galaxies`` galaxies: classes in Galaxy10's proportions, or an equal number of each.

    A survey of at least 20 galaxies has overlapping pairs, and exactly one position with two labels.
    """
    labels = np.repeat(np.arange(len(GALAXY10_COUNTS)), class_counts(num_galaxies, balanced))
    ra, dec = random_positions(num_galaxies, seed)
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
            _move_beside(ra, dec, (int(one), int(other)), Draws(seed, PAIRS, int(one), 1), _PAIR_SEPARATION)
        _move_beside(ra, dec, (first, second), Draws(seed, TWICE, first), (0.05, 0.5))
        shown[second] = first
    return SurveyPlan(seed, balanced, labels, ra, dec, shown, pairs)


def class_counts(num_galaxies: int, balanced: bool = False) -> NDArray[np.int64]:
    """Return the number of galaxies of each class: Galaxy10's proportions with at least ``HANDFUL`` each, or equal shares."""
    num_classes = len(GALAXY10_COUNTS)
    weights = np.ones(num_classes) if balanced else np.array(GALAXY10_COUNTS, np.float64)
    least = min(HANDFUL, num_galaxies // num_classes)
    exact = np.maximum(weights / weights.sum() * num_galaxies, least)
    # The classes above the minimum share the galaxies that remain.
    for _ in range(num_classes):
        free = exact > least
        exact[free] = weights[free] / weights[free].sum() * (num_galaxies - least * (~free).sum())
        exact = np.maximum(exact, least)
    counts: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: num_galaxies - counts.sum()]:
        counts[i] += 1
    return counts


def random_positions(num_galaxies: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return random positions (ra, dec in degrees), each in its own cell of the footprint, so that none coincide by chance."""
    widths = [high - low for low, high in _RIGHT_ASCENSIONS]
    low, high = np.sin(np.radians(_DECLINATIONS))
    columns = int(np.ceil(np.sqrt(max(num_galaxies, 1) * 5.0)))
    rows = -(-max(num_galaxies, 1) // columns) + 1
    cell = np.argsort(hash64(seed, POSITIONS, np.arange(columns * rows)), kind="stable")[:num_galaxies]
    inside = 0.05 + 0.9 * (hash64(seed, POSITIONS, np.arange(2 * num_galaxies), 1).astype(np.float64) / 2.0**64)
    along = (cell % columns + inside[:num_galaxies]) / columns * sum(widths)
    ra = np.where(along < widths[0], _RIGHT_ASCENSIONS[0][0] + along, _RIGHT_ASCENSIONS[1][0] + along - widths[0]) % 360.0
    dec = np.degrees(np.arcsin(low + (high - low) * (cell // columns + inside[num_galaxies:]) / rows))
    return ra, dec


def _move_beside(
    ra: NDArray[np.float64], dec: NDArray[np.float64], pair: tuple[int, int], draws: Draws, separation: tuple[float, float]
) -> None:
    one, other = pair
    distance, angle = draws.uniform(*separation) / 3600.0, draws.uniform(0.0, 2.0 * np.pi)
    dec[other] = dec[one] + distance * np.sin(angle)
    ra[other] = (ra[one] + distance * np.cos(angle) / np.cos(np.radians(dec[one]))) % 360.0
