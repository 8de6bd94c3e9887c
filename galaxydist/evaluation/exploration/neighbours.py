"""Galaxies that show in each other's pictures, and places on the sky that carry two labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.exploration.population import Population, Positions
from galaxydist.surveys.split import CUTOUT_ARCSEC, SAME_PLACE_ARCSEC, close_pairs


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the positions say.

    Args:
        pairs_P2: rows of galaxies closer than a cutout's width, pairs of two labels at one place first, then the closest first.
        separation_P: arcsec.
        num_galaxies: in these pairs.
        two_labels_P: whether a pair is one place with two labels.
        across_P: whether the two stand in different splits.
    """

    pairs_P2: NDArray[np.int64]
    separation_P: NDArray[np.float64]
    num_galaxies: int
    two_labels_P: NDArray[np.bool_]
    across_P: NDArray[np.bool_]


def find_neighbours(population: Population, positions: Positions) -> Neighbours:
    """Pairs among the galaxies whose positions are known."""
    pairs_P2 = close_pairs(positions.ra, positions.dec, CUTOUT_ARCSEC)
    separation_P = _separations(positions, pairs_P2)
    rows_P2 = positions.rows[pairs_P2].reshape(-1, 2)
    first_P, second_P = rows_P2.T
    two_labels_P = (separation_P <= SAME_PLACE_ARCSEC) & (population.labels_N[first_P] != population.labels_N[second_P])
    across_P = population.split_N[first_P] != population.split_N[second_P]
    order = np.lexsort((separation_P, ~two_labels_P))
    return Neighbours(rows_P2[order], separation_P[order], len(np.unique(rows_P2)), two_labels_P[order], across_P[order])


def _separations(positions: Positions, pairs_P2: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) arcsec between the two, by the haversine formula, which is exact for small angles too."""
    ra_P2, dec_P2 = np.radians(positions.ra[pairs_P2]), np.radians(positions.dec[pairs_P2])
    half = np.sin(np.diff(dec_P2)[:, 0] / 2) ** 2
    half += np.cos(dec_P2).prod(axis=1) * np.sin(np.diff(ra_P2)[:, 0] / 2) ** 2
    return np.asarray(np.degrees(2 * np.arcsin(np.sqrt(half))) * 3600)
