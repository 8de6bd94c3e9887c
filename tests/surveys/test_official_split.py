"""The shipped split of the official Galaxy10 file, on the real positions."""

import gzip
import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from galaxydist.galaxy import GALAXY10_COUNTS
from galaxydist.surveys.official_split import TABLE, TABLE_SHA256, OfficialSplit, read_official_split
from galaxydist.surveys.split import NONE, TEST, TRAIN, VAL, close_pairs
from tests.helpers.split_table import format_table, write_table

PUBLISHED_TEST = [108, 185, 264, 203, 34, 205, 183, 263, 142, 187]


@pytest.fixture(scope="module")
def split() -> OfficialSplit:
    return read_official_split()


@pytest.fixture(scope="module")
def positions(real_data: Path) -> NDArray[np.float64]:
    return np.genfromtxt(real_data / "galaxy10_decals_positions.csv", delimiter=",", names=True)


def counts(split: OfficialSplit, mask: NDArray[np.bool_]) -> list[int]:
    return np.bincount(split.labels[mask], minlength=10).tolist()


def test_official_split_table_is_small_and_has_its_golden_hash(split: OfficialSplit) -> None:
    packed = files("galaxydist.surveys").joinpath(TABLE).read_bytes()
    assert len(packed) < 100_000
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == TABLE_SHA256
    assert format_table(split) == gzip.decompress(packed)


def test_original_has_the_published_counts(split: OfficialSplit) -> None:
    assert counts(split, np.ones(17736, np.bool_)) == list(GALAXY10_COUNTS)
    assert counts(split, split.original == TEST) == PUBLISHED_TEST
    assert [(split.original == code).sum() for code in (TRAIN, VAL, TEST)] == [14188, 1774, 1774]
    assert counts(split, split.original == VAL)[4] == 33
    assert not (split.original == NONE).any()


def test_balanced_has_the_published_counts(split: OfficialSplit) -> None:
    train = (split.balanced == TRAIN) | (split.balanced == VAL)
    assert counts(split, train) == [268] * 10
    assert counts(split, split.balanced == VAL) == [27] * 10
    assert counts(split, split.balanced == TEST) == [66] * 10


def test_galaxies_of_one_variant_never_train_the_other(split: OfficialSplit) -> None:
    train = (split.balanced == TRAIN) | (split.balanced == VAL)
    assert not (train & (split.original == TEST)).any()
    assert not ((split.balanced == TEST) & (split.original == TRAIN)).any()
    marked = (split.balanced == TEST) & (split.original == VAL)
    assert counts(split, marked) == [0, 0, 0, 0, 32, 0, 0, 0, 0, 0]
    assert counts(split, train & (split.original == VAL)) == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    lines = format_table(split).decode().splitlines()[1:]
    assert [line.split(",")[5] == "1" for line in lines] == marked.tolist()


def test_official_splits_separate_no_neighbours_within_67_arcsec(split: OfficialSplit, positions: NDArray[np.float64]) -> None:
    pairs = close_pairs(positions["ra"], positions["dec"], 67.0)
    assert len(pairs) == 236
    assert (split.original[pairs[:, 0]] == split.original[pairs[:, 1]]).all()
    balanced = split.balanced[pairs]
    role = np.where(balanced == VAL, VAL, balanced)
    together = role[(role != NONE).all(axis=1)]
    assert len(together) and (together[:, 0] == together[:, 1]).all()
    # Nor across variants: no galaxy that trains one lies next to a test galaxy of the other.
    for trained, tested in ((split.original, split.balanced), (split.balanced, split.original)):
        for one, other in (pairs.T, pairs[:, ::-1].T):
            assert not ((trained[one] == TRAIN) & (tested[other] == TEST)).any()


def test_positions_with_two_labels_are_only_in_training(split: OfficialSplit, positions: NDArray[np.float64]) -> None:
    same = close_pairs(positions["ra"], positions["dec"], 1.0)
    assert len(same) == 59 and (split.labels[same[:, 0]] != split.labels[same[:, 1]]).all()
    assert np.array_equal(np.flatnonzero(split.sky.conflicting), np.unique(same))
    assert (split.original[same] == TRAIN).all() and (split.balanced[same] <= TRAIN).all()


def test_write_table_reproduces_the_shipped_split_byte_for_byte(real_data: Path, tmp_path: Path) -> None:
    assert write_table(real_data / "galaxy10_decals_positions.csv", tmp_path / TABLE) == TABLE_SHA256
    assert (tmp_path / TABLE).read_bytes() == files("galaxydist.surveys").joinpath(TABLE).read_bytes()
