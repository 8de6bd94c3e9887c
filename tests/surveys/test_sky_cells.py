"""Splits by cells of the sky: the same part whatever else is in the survey, and no neighbours in two splits."""

import hashlib
from pathlib import Path

import astropy.units as u
import numpy as np
import pyarrow as pa
import pytest
from astropy.coordinates import Latitude, Longitude
from cdshealpix.nested import healpix_to_lonlat, lonlat_to_healpix, vertices
from numpy.typing import ArrayLike, NDArray

from galaxydist.evaluation.leakage import find_overlap
from galaxydist.surveys.sky_cells import DEPTH, NUM_CELLS, is_spread, split_by_cell, split_by_id
from galaxydist.surveys.split import CUTOUT_ARCSEC, IN_MARGIN, TEST, TRAIN, Codes, close_pairs, unit_vectors

# Parts of the first cells, and of the ids J0 ... J23.
CELLS = [0, 0, 2, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
IDS = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 2]

Positions = tuple[NDArray[np.float64], NDArray[np.float64]]


def split(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> Codes:
    return split_by_cell(ra, dec, [""] * len(ra))


def uniform_sky(count: int, dec: tuple[float, float] = (-90, 90)) -> Positions:
    rng = np.random.default_rng(7)
    return rng.uniform(0, 360, count), np.degrees(np.arcsin(rng.uniform(*np.sin(np.radians(dec)), count)))


def moved(ra: NDArray[np.float64], dec: NDArray[np.float64], arcsec: ArrayLike, angle: ArrayLike) -> Positions:
    """Positions at a distance from others, in a direction (radians)."""
    here, distance = unit_vectors(ra, dec), np.radians(np.asarray(arcsec) / 3600)
    east = np.stack([-np.sin(np.radians(ra)), np.cos(np.radians(ra)), np.zeros(ra.shape)], axis=-1)
    direction = np.sin(angle)[..., None] * east + np.cos(angle)[..., None] * np.cross(here, east)
    x, y, z = np.moveaxis(np.cos(distance)[..., None] * here + np.sin(distance)[..., None] * direction, -1, 0)
    return np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y)))


def near_borders(each: int, arcsec: float) -> Positions:
    """Positions around all corners of all cells (also at the poles and at 360 degrees), and around points of the sides."""
    lon, lat = vertices(np.arange(NUM_CELLS, dtype=np.uint64), DEPTH, step=3)
    ra, dec = np.repeat(lon.deg, each), np.repeat(lat.deg, each)
    rng = np.random.default_rng(1)
    return moved(ra, dec, arcsec * np.sqrt(rng.random(len(ra))), rng.uniform(0, 2 * np.pi, len(ra)))


def cells_of(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.int64]:
    return lonlat_to_healpix(Longitude(ra, u.deg), Latitude(dec, u.deg), DEPTH).astype(np.int64)


def centres() -> Positions:
    lon, lat = healpix_to_lonlat(np.arange(NUM_CELLS, dtype=np.uint64), DEPTH)
    return lon.deg, lat.deg


def test_parts_of_all_cells_are_those_of_the_first_version() -> None:
    codes = split(*centres())
    assert codes[:24].tolist() == CELLS
    assert hashlib.sha256(codes.tobytes()).hexdigest() == "975ab18f95b2b903cf9aad6c47f42be10f805e36f69c4f7487056398f4fda87f"
    assert split_by_id([f"J{number}" for number in range(24)]).tolist() == IDS


def test_no_two_galaxies_of_different_splits_are_within_a_cutout_of_each_other() -> None:
    ra, dec = near_borders(each=6, arcsec=150)
    codes = split(ra, dec)
    pairs = close_pairs(ra, dec, CUTOUT_ARCSEC)
    parts = codes[pairs]
    assert len(pairs) > 100_000
    cells = cells_of(ra, dec)[pairs]
    splits_of_cells = split(*centres())
    assert (splits_of_cells[cells[:, 0]] != splits_of_cells[cells[:, 1]]).sum() > 10_000, "the margin has nothing to prevent"
    assert not ((parts[:, 0] != parts[:, 1]) & (parts != IN_MARGIN).all(axis=1)).any()


def test_the_margin_is_as_wide_as_a_cutout() -> None:
    """Galaxies are in the margin if and only if a circle around them reaches another split.

    Its 128 points may miss the tip of a cell, hence three arcsec of tolerance.
    """
    ra, dec = near_borders(each=1, arcsec=100)
    codes, splits_of_cells = split(ra, dec), split(*centres())
    angles = np.linspace(0, 2 * np.pi, 128, endpoint=False)

    def reaches_another(arcsec: float) -> NDArray[np.bool_]:
        here = splits_of_cells[cells_of(ra, dec)]
        return np.any([splits_of_cells[cells_of(*moved(ra, dec, arcsec, angle))] != here for angle in angles], axis=0)

    is_margin = codes == IN_MARGIN
    assert not (reaches_another(CUTOUT_ARCSEC) & ~is_margin).any()
    assert not (is_margin & ~reaches_another(CUTOUT_ARCSEC + 3)).any()
    assert 1000 < is_margin.sum() < len(codes) - 1000


def test_a_galaxy_keeps_its_part_in_a_larger_survey_and_in_any_order() -> None:
    ra, dec = (np.concatenate(parts) for parts in zip(near_borders(1, 100), uniform_sky(3000, dec=(-90, -50)), strict=True))
    ra, dec = ra[-6000:], dec[-6000:]  # a part of the sky, with the pole: few borders to draw
    ra[::50] = np.nan
    ids = [f"J{number}" for number in range(len(ra))]
    codes = split_by_cell(ra, dec, ids)
    rng = np.random.default_rng(0)
    for count in (1, 300, 4000):
        rows = rng.permutation(len(ra))[:count]
        assert (split_by_cell(ra[rows], dec[rows], [ids[row] for row in rows]) == codes[rows]).all()
    assert (split_by_cell(ra - 360 * (ra > 180), dec, ids) == codes).all(), "right ascensions may be negative"
    assert (split_by_cell(ra, dec, ids, seed=1) != codes).mean() > 0.2


def test_shares_are_80_10_10_and_under_a_hundredth_is_margin() -> None:
    codes = split(*uniform_sky(200_000))
    shares = np.bincount(codes, minlength=4) / len(codes)
    assert shares == pytest.approx([0.8, 0.1, 0.1, 0.007], abs=0.012)
    assert 0.005 < shares[IN_MARGIN] < 0.009


def test_galaxies_without_a_position_are_split_by_their_ids() -> None:
    ids = [f"J{number}" for number in range(20_000)]
    nowhere = np.full(len(ids), np.nan)
    codes = split_by_cell(nowhere, nowhere, ids)
    assert (codes == split_by_id(ids)).all()
    assert np.bincount(codes) / len(ids) == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_a_survey_is_spread_if_its_cells_give_every_split_its_share(real_data: Path) -> None:
    table = np.genfromtxt(real_data / "galaxy10_decals_positions.csv", delimiter=",", names=True)
    ra, dec = table["ra"], table["dec"]
    assert is_spread(ra, dec)
    in_field = (np.abs(ra - 180) < 5) & (np.abs(dec) < 5)
    assert in_field.sum() > 50
    assert not is_spread(ra[in_field], dec[in_field])
    assert not is_spread(ra[:0], dec[:0])
    in_one_cell = np.concatenate([ra, np.full(len(ra) * 2, 180.0)]), np.concatenate([dec, np.full(len(ra) * 2, 40.0)])
    assert not is_spread(*in_one_cell), "two thirds of the survey are in one cell"
    assert not is_spread(np.full(9, np.nan), np.full(9, np.nan))


def test_an_evaluation_finds_no_training_galaxy_beside_a_test_galaxy_at_the_density_of_gz_desi() -> None:
    """8.7 million galaxies on 14,000 square degrees, here on 1,000 of them."""
    ra, dec = uniform_sky(621 * 1000, dec=(30, 34.9))
    codes = split(ra, dec)
    ids = pa.array([str(number) for number in range(len(ra))])
    table = pa.table({"id": ids, "ra": ra, "dec": dec})

    def number_near(parts: Codes) -> int:
        train, test = (table.filter(pa.array(parts == code)) for code in (TRAIN, TEST))
        assert len(test) > 30_000
        return int(find_overlap(train, test, are_one_survey=True).rows.sum())

    assert number_near(codes) == 0
    assert number_near(split(*centres())[cells_of(ra, dec)]) > 100, "without a margin there are such galaxies"
