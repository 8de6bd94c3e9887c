"""Splits of any survey: exact counts, neighbours together, nothing leaks, the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.surveys.split import (
    NONE,
    TEST,
    TRAIN,
    VAL,
    SplitCandidates,
    build_candidates,
    close_pairs,
    cut,
    read_sky,
    rows_by_split,
    split_balanced,
    split_counts,
    split_fold,
    split_original,
)


def crowded(counts: list[int], pair_share: float, seed: int) -> SplitCandidates:
    """Galaxies of which a share sits next to another one, some of these at the very place of a galaxy of another class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    ra, dec = rng.uniform(0, 360, len(labels)), rng.uniform(-80, 80, len(labels))
    moved = np.flatnonzero(rng.random(len(labels)) < pair_share)
    to = rng.integers(0, len(labels), len(moved))
    ra[moved], dec[moved] = ra[to], dec[to] + rng.choice([0.0, 0.01], len(moved))
    return build_candidates(labels, ra, dec, class_names=[f"c{k}" for k in range(len(counts))], seed=seed)


def groups_are_whole(galaxies: SplitCandidates, codes: NDArray[np.int8]) -> bool:
    groups = galaxies.sky.groups
    inside = (groups >= 0) & (codes != NONE)
    return all(len(np.unique(codes[inside & (groups == group)])) <= 1 for group in np.unique(groups[inside]))


populations = st.builds(
    crowded, st.lists(st.integers(20, 120), min_size=2, max_size=6), st.floats(0, 0.15), st.integers(0, 2**32)
)


@given(populations)
def test_original_split_keeps_counts_groups_together_and_conflicts_in_training(galaxies: SplitCandidates) -> None:
    codes = split_original(galaxies)
    wanted = split_counts(np.bincount(galaxies.labels, minlength=galaxies.num_classes), galaxies.seed)
    assert groups_are_whole(galaxies, codes)
    assert (codes[galaxies.sky.conflicting] == TRAIN).all()
    for code in (VAL, TEST):
        found = galaxies.counts(codes == code)
        assert (found <= wanted[code]).all() and (found >= 1).all()
    if (galaxies.sky.groups < 0).mean() > 0.9:
        assert np.array_equal(galaxies.counts(codes == TEST), wanted[TEST])


@given(populations)
def test_balanced_split_is_balanced_and_never_tests_training_galaxies_of_the_original(galaxies: SplitCandidates) -> None:
    original = split_original(galaxies)
    balanced = split_balanced(galaxies, original)
    both = (balanced == TRAIN) | (balanced == VAL)
    for members in (both, balanced == TEST):  # equal counts of all classes
        assert len(set(galaxies.counts(members).tolist())) == 1
    assert groups_are_whole(galaxies, balanced)
    assert not (both & (original == TEST)).any()
    assert not ((balanced == TEST) & (original == TRAIN)).any()
    assert (balanced[galaxies.sky.conflicting] <= TRAIN).all()


def test_split_depends_only_on_seed_and_keys_not_on_order() -> None:
    galaxies = crowded([50, 60, 70], 0.1, 1)
    again = crowded([50, 60, 70], 0.1, 1)
    assert np.array_equal(split_original(galaxies), split_original(again))
    other_seed = SplitCandidates(galaxies.labels, galaxies.class_names, galaxies.sky, galaxies.keys, 2)
    assert not np.array_equal(split_original(galaxies), split_original(other_seed))
    order = np.random.default_rng(0).permutation(len(galaxies.labels))
    unknown = np.full(len(galaxies.labels), np.nan)
    sky = read_sky(galaxies.labels, unknown, unknown)
    plain = SplitCandidates(galaxies.labels, galaxies.class_names, sky, galaxies.keys, 1)
    mixed = SplitCandidates(galaxies.labels[order], galaxies.class_names, sky, galaxies.keys[order], 1)
    assert np.array_equal(split_original(plain)[order], split_original(mixed))


def test_counts_keep_one_galaxy_everywhere() -> None:
    counts = split_counts(np.array([3, 1000]), 0)
    assert counts[:, 0].tolist() == [1, 1, 1] and counts.sum(axis=0).tolist() == [3, 1000]


@pytest.mark.parametrize(("counts", "word"), [([30, 0, 30], "an empty class"), ([30, 2, 30], "too small")])
def test_empty_and_too_small_classes_are_refused_by_name(counts: list[int], word: str) -> None:
    labels = np.repeat(np.arange(3), counts)
    unknown = np.full(len(labels), np.nan)
    galaxies = build_candidates(labels, unknown, unknown, class_names=["a", "b", "c"], seed=0)
    with pytest.raises(UserError, match=f"{word}.*'b' has {counts[1]}"):
        split_original(galaxies)


def test_class_with_only_neighbours_of_other_classes_is_refused() -> None:
    labels = np.array([0] * 20 + [1] * 4)
    ra, dec = np.linspace(0, 200, 24), np.zeros(24)
    ra[20:], labels[:1] = ra[0], 0  # all of class 1 sit on a galaxy of class 0
    with pytest.raises(UserError, match="neighbours"):
        split_original(build_candidates(labels, ra, dec, class_names=["a", "b"], seed=0))


def test_folds_cover_each_galaxy_once_and_are_stratified() -> None:
    galaxies = crowded([31, 45, 60], 0.1, 3)
    folds = [split_fold(galaxies, k, 3) for k in range(3)]
    assert (np.stack([codes == TEST for codes in folds]).sum(axis=0) == 1).all()
    for codes in folds:
        assert set(np.unique(codes)) == {TRAIN, TEST} and groups_are_whole(galaxies, codes)
        assert (np.abs(galaxies.counts(codes == TEST) - np.array([31, 45, 60]) / 3) <= 8).all()
    with pytest.raises(UserError, match="fold 3 of 3"):
        split_fold(galaxies, 3, 3)


def test_cut_moves_a_tenth_of_each_class_without_splitting_groups() -> None:
    galaxies = crowded([40, 50], 0.1, 4)
    codes = cut(galaxies, np.full(90, TRAIN, np.int8), VAL)
    assert galaxies.counts(codes == VAL).tolist() == [4, 5] and groups_are_whole(galaxies, codes)
    assert not (codes[galaxies.sky.conflicting] == VAL).any()


def test_rows_by_split_are_sorted_and_disjoint() -> None:
    rows = rows_by_split(np.array([0, 2, -1, 1, 0], np.int8))
    assert {name: split.tolist() for name, split in rows.items()} == {"train": [0, 4], "val": [3], "test": [1]}


@given(st.integers(0, 2**32), st.floats(-89, 89))
def test_close_pairs_equal_brute_force_everywhere_on_the_sky(seed: int, dec_centre: float) -> None:
    rng = np.random.default_rng(seed)
    ra = (rng.uniform(-0.05, 0.05, 40) / np.cos(np.radians(dec_centre))) % 360  # across 0 = 360 degrees
    dec = np.clip(dec_centre + rng.uniform(-0.05, 0.05, 40), -90, 90)
    ra[0] = np.nan
    x, y = np.radians(ra), np.radians(dec)
    haversine = np.sin((y[:, None] - y) / 2) ** 2 + np.cos(y[:, None]) * np.cos(y) * np.sin((x[:, None] - x) / 2) ** 2
    arcsec = np.degrees(2 * np.arcsin(np.sqrt(haversine))) * 3600
    expected = np.argwhere(np.triu(arcsec < 67, k=1))
    assert np.array_equal(close_pairs(ra, dec, 67.0), expected)
