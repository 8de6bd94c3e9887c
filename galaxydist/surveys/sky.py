"""What positions on the sky say about a survey: which galaxies show in each other's pictures, and which place has two labels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError

CUTOUT_ARCSEC = 256 * 0.262  # width of a Galaxy10 cutout: closer galaxies show in each other's pictures
SAME_PLACE_ARCSEC = 1.0


@dataclass(frozen=True, slots=True)
class Sky:
    """Neighbours among N galaxies.

    Args:
        groups: (N,) int64, equal for galaxies whose pictures overlap (directly or through others); -1 for a galaxy on its own.
        conflicting: (N,) bool, True where a galaxy of another label has the same place.
    """

    groups: NDArray[np.int64]
    conflicting: NDArray[np.bool_]


def read_sky(labels: NDArray[np.integer], ra: NDArray[np.float64] | None, dec: NDArray[np.float64] | None) -> Sky:
    """Groups of galaxies closer than one cutout width, and places with two labels.

    Args:
        labels: (N,) class numbers.
        ra, dec: (N,) degrees, nan where unknown; None where the survey has no positions.
    """
    groups = np.full(len(labels), -1, np.int64)
    conflicting = np.zeros(len(labels), np.bool_)
    if ra is None or dec is None:
        return Sky(groups, conflicting)
    pairs = close_pairs(ra, dec, CUTOUT_ARCSEC)
    groups = _connect(pairs, len(labels))
    same = close_pairs(ra, dec, SAME_PLACE_ARCSEC)
    conflicting[same[labels[same[:, 0]] != labels[same[:, 1]]]] = True
    return Sky(groups, conflicting)


def check_positions(ra: NDArray[np.float64], dec: NDArray[np.float64], *, name: Callable[[int], str]) -> None:
    """See that positions can lie on the sky.

    Args:
        ra, dec: (N,) degrees, nan where unknown.
        name: of a row, for the message.

    Raises:
        UserError: a declination outside -90 ... 90, or a right ascension outside -180 ... 360.
    """
    wrong = np.flatnonzero((np.abs(dec) > 90) | (ra < -180) | (ra > 360))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{name(row)}: ra={ra[row]:g}, dec={dec[row]:g} is no place on the sky ({len(wrong)} such of {len(ra)}): ra and dec "
            "are degrees, from 0 to 360 and from -90 to 90, nan (or nothing) where they are unknown"
        )


def join_groups(sky: Sky, equal: NDArray[np.int64], labels: NDArray[np.integer]) -> Sky:
    """Neighbours of which those with equal pictures are of one group as well, and conflicting if they have two labels.

    Args:
        sky: what the positions say.
        equal: (N,) a number that galaxies of equal pictures share; -1 where there is no other.
        labels: (N,) class numbers.
    """
    if not (equal >= 0).any():
        return sky
    pairs = _pairs_of_group(equal)
    two_labels = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
    is_conflicting = np.zeros(int(equal.max()) + 1, np.bool_)
    is_conflicting[equal[two_labels[:, 0]]] = True
    groups = _connect(np.concatenate([_pairs_of_group(sky.groups), pairs]), len(labels))
    return Sky(groups, sky.conflicting | ((equal >= 0) & is_conflicting[equal]))


def close_pairs(ra: NDArray[np.float64], dec: NDArray[np.float64], arcsec: float) -> NDArray[np.int64]:
    """(P, 2) rows of all pairs within ``arcsec`` on the sky, the smaller row first, sorted.

    Args:
        ra, dec: (N,) degrees; a galaxy whose position is nan has no pair.
    """
    from scipy.spatial import cKDTree

    known = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    tree = cKDTree(unit_vectors(ra[known], dec[known]))
    pairs = known[tree.query_pairs(chord(arcsec), output_type="ndarray")].reshape(-1, 2)
    pairs.sort(axis=1)
    return np.asarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], np.int64)


def unit_vectors(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3) points of the unit sphere: there is no seam at 360 degrees and no crowd at the poles. ``ra``, ``dec`` in degrees."""
    lon, lat = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def chord(arcsec: float) -> float:
    """The straight distance between two points of the unit sphere that are so far apart on it."""
    return float(2 * np.sin(np.radians(arcsec / 3600) / 2))


def _pairs_of_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P, 2) rows that follow one another in a group: enough of its pairs to connect it."""
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    pairs: NDArray[np.int64] = np.stack([rows[:-1], rows[1:]], axis=1)[groups[rows[:-1]] == groups[rows[1:]]]
    return pairs


def _connect(pairs: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(length,) numbers of the groups that pairs of rows make; -1 for a row in no pair."""
    groups = np.full(length, -1, np.int64)
    if len(pairs):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        links = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(length, length))
        component = connected_components(links, directed=False)[1]
        grouped = np.unique(pairs)
        groups[grouped] = _number_by_first_row(component[grouped])
    return groups


def _number_by_first_row(component: NDArray[np.integer]) -> NDArray[np.int64]:
    """Components renumbered 0, 1, ... in the order in which they first occur, so that numbers do not hang on a library."""
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse], np.int64)
