"""Splits by cells of the sky: every galaxy's part follows from its own position, so that no new galaxy moves an old one.

A HEALPix cell (Gorski et al. 2005, ApJ 622, 759) of nside 16, 3.7 degrees wide, belongs to train, val or test by a hash of its
number: 80, 10 and 10 of a hundred cells. Galaxies within one cutout width of a cell of another split are in the margin. So no two
galaxies of different splits appear in each other's images, however many a survey has on a square degree.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.counter_rng import Stream, uniform
from galaxydist.surveys.official_split import SPLIT_SEED
from galaxydist.surveys.split import CUTOUT_ARCSEC, IN_MARGIN, TEST, TRAIN, VAL, Codes, chord, id_keys, unit_vectors

# HEALPix depth, nested numbering: 2^DEPTH = nside 16.
DEPTH = 4
NUM_CELLS = 12 << (2 * DEPTH)
# Shares of the cells, and of galaxies without a position.
SHARES = {TRAIN: 0.8, VAL: 0.1, TEST: 0.1}
# Fewer occupied cells do not give shares near these: of 100, val gets 10 with a standard deviation of 3.
MIN_CELLS = 100

# Galaxies in the inner part of a cell, this fraction of its width away from all sides, are at least 139 arcsec from its border.
_RIM = 1 / 64
# Points on each side of a cell, and their largest distance from one another.
_SIDE_POINTS, _SPACING_ARCSEC = 1024, 20.0
# Columns of cdshealpix's table of neighbours: the cell across each side, in the order of its vertices.
_ACROSS = [1, 5, 7, 3]
# Galaxies located at a time, and cells whose sides are drawn at a time.
_GALAXIES, _CELLS = 1 << 20, 256


def split_by_cell(ra: NDArray[np.float64], dec: NDArray[np.float64], ids: Sequence[str], *, seed: int = SPLIT_SEED) -> Codes:
    """Return the split codes of galaxies: 0 train, 1 val, 2 test, 3 margin.

    A code depends on the galaxy's position (or id) and the seed alone, neither on other galaxies nor on their order.

    Args:
        ra, dec: (N,) degrees, nan where unknown.
        ids: N ids; those of galaxies without a position decide their split, see :func:`split_by_id`.
        seed: of the cells' splits.

    Returns:
        (N,) int8.
    """
    codes = np.empty(len(ra), np.int8)
    is_known = np.isfinite(ra) & np.isfinite(dec)
    codes[~is_known] = split_by_id([ids[row] for row in np.flatnonzero(~is_known).tolist()], seed=seed)
    splits_of_cells = _draw(np.arange(NUM_CELLS), seed, Stream.SPLIT_CELL)
    rows = np.flatnonzero(is_known)
    cells, is_rim = _locate(ra[rows], dec[rows])
    codes[rows] = splits_of_cells[cells]
    rim = rows[is_rim]
    codes[rim[_is_near_border(ra[rim], dec[rim], cells[is_rim], splits_of_cells)]] = IN_MARGIN
    return codes


def split_by_id(ids: Sequence[str], *, seed: int = SPLIT_SEED) -> Codes:
    """Return (N,) int8 split codes from a hash of each id, for galaxies without positions: 80/10/10, no margin."""
    return _draw(id_keys(ids), seed, Stream.SPLIT_ID)


def is_spread(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> bool:
    """Return True if a split by cells comes out near 80/10/10: 100 cells are occupied, and each split has half its share.

    Args:
        ra, dec: (N,) degrees, nan where unknown.
    """
    is_known = np.isfinite(ra) & np.isfinite(dec)
    cells, _ = _locate(ra[is_known], dec[is_known])
    counts = np.bincount(cells, minlength=NUM_CELLS)
    if np.count_nonzero(counts) < MIN_CELLS:
        return False
    codes = _draw(np.arange(NUM_CELLS), SPLIT_SEED, Stream.SPLIT_CELL)
    return all(counts[codes == code].sum() >= share / 2 * len(cells) for code, share in SHARES.items())


def _draw(keys: ArrayLike, seed: int, stream: Stream) -> Codes:
    bounds = np.cumsum([SHARES[TRAIN], SHARES[VAL]])
    return np.searchsorted(bounds, uniform(seed, keys, stream), side="right").astype(np.int8)


def _locate(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the (N,) cells of positions (degrees), and the (N,) mask of positions that may be near the border of their cell."""
    from astropy.coordinates import Latitude, Longitude
    from cdshealpix.nested import lonlat_to_healpix

    cells, is_rim = np.empty(len(ra), np.int64), np.empty(len(ra), np.bool_)
    for start in range(0, len(ra), _GALAXIES):
        part = slice(start, start + _GALAXIES)
        lon, lat = Longitude(ra[part], "deg"), Latitude(dec[part], "deg")
        cells[part], x, y = lonlat_to_healpix(lon, lat, DEPTH, return_offsets=True, num_threads=1)
        is_rim[part] = (np.minimum(x, y) < _RIM) | (np.maximum(x, y) > 1 - _RIM)
    return cells, is_rim


def _is_near_border(
    ra: NDArray[np.float64], dec: NDArray[np.float64], cells: NDArray[np.int64], splits_of_cells: Codes
) -> NDArray[np.bool_]:
    """Return the (N,) mask of positions within one cutout width of a border between two splits.

    The borders are points on the cells' sides. A side is smooth and nearly straight on this scale, so that the nearest of its
    points is not farther than the hypotenuse of the distance and half their spacing. The mask is at most 1 arcsec too wide, and
    half its width would keep galaxies of two splits a cutout width apart.
    """
    from scipy.spatial import cKDTree

    is_near = np.zeros(len(ra), np.bool_)
    if not len(ra):
        return is_near
    points = _borders(np.unique(cells), splits_of_cells)
    tree = cKDTree(points, balanced_tree=False)
    reach = np.hypot(chord(CUTOUT_ARCSEC), chord(_SPACING_ARCSEC / 2))
    for start in range(0, len(ra), _GALAXIES):
        part = slice(start, start + _GALAXIES)
        distances, _ = tree.query(unit_vectors(ra[part], dec[part]), distance_upper_bound=reach)
        is_near[part] = np.isfinite(distances)
    return is_near


def _borders(cells: NDArray[np.int64], splits_of_cells: Codes) -> NDArray[np.float64]:
    """Return (P, 3) points on the borders between two splits around some cells.

    The borders are those of the cells and of their neighbours, since at a corner a cell of another split may lie behind a
    neighbour of the same split.
    """
    from cdshealpix.nested import neighbours, vertices

    around = np.unique(neighbours(cells, DEPTH, num_threads=1))
    around = around[around >= 0]  # at 8 points of the sky only three cells meet, not four
    across = neighbours(around, DEPTH, num_threads=1)[:, _ACROSS]
    # Each side between two of the cells is drawn once.
    is_border = (splits_of_cells[across] != splits_of_cells[around][:, None]) & (
        (across > around[:, None]) | ~np.isin(across, around)
    )
    found = [np.empty((0, 3))]
    of_side = (np.arange(4)[:, None] * _SIDE_POINTS + np.arange(_SIDE_POINTS + 1)) % (4 * _SIDE_POINTS)
    rows = np.flatnonzero(is_border.any(axis=1))
    for start in range(0, len(rows), _CELLS):
        chosen = rows[start : start + _CELLS]
        lon, lat = vertices(around[chosen].astype(np.uint64), DEPTH, step=_SIDE_POINTS, num_threads=1)
        cell, side = np.nonzero(is_border[chosen])
        outline = cell[:, None], of_side[side]
        vectors = unit_vectors(lon.deg[outline].ravel(), lat.deg[outline].ravel())
        steps = np.diff(vectors.reshape(-1, _SIDE_POINTS + 1, 3), axis=1)
        assert np.linalg.norm(steps, axis=-1).max() < chord(_SPACING_ARCSEC)
        found.append(vectors)
    return np.concatenate(found)
