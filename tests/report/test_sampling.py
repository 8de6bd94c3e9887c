"""Means over seeds and galaxies: their errors by closed forms and by simulation, and Holm's adjustment."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from galaxydist.report.statistics import estimate_accuracy, estimate_mean, estimate_outcomes, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(st.integers(2, 6), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_seed_and_galaxy_errors_are_the_standard_errors_of_the_means(seeds: int, galaxies: int, number: int) -> None:
    random = np.random.default_rng(number)
    values_SN = random.normal(size=(seeds, galaxies)) + 2 * random.normal(size=galaxies) + random.normal(size=(seeds, 1))
    found = estimate_outcomes(values_SN)
    assert found.mean == pytest.approx(values_SN.mean())
    assert found.seed_error == pytest.approx(stats.sem(values_SN.mean(axis=1)))
    assert found.galaxy_error == pytest.approx(stats.sem(values_SN.mean(axis=0)))
    assert found.standard_error == pytest.approx(math.hypot(found.seed_error or 0, found.galaxy_error or 0))


@given(st.integers(2, 500), st.data())
def test_a_single_seed_has_the_binomial_error(galaxies: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, galaxies))
    single = estimate_outcomes([[True] * correct + [False] * (galaxies - correct)])
    share = correct / galaxies
    assert single.seed_error is None
    assert single.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (galaxies - 1)))
    assert estimate_accuracy([share], galaxies).standard_error == pytest.approx(math.sqrt(share * (1 - share) / galaxies))


def test_more_seeds_do_not_reduce_the_error_of_the_galaxies() -> None:
    one_N = np.random.default_rng(1).random(400) < 0.7
    single, many = estimate_outcomes([one_N]), estimate_outcomes([one_N] * 20)
    assert many.seed_error == pytest.approx(0, abs=1e-10)
    assert many.galaxy_error == pytest.approx(single.galaxy_error)
    assert estimate_accuracy([0.7] * 20, 400).standard_error == pytest.approx(estimate_accuracy([0.7], 400).standard_error)


def test_standard_error_is_close_to_the_spread_of_repeated_experiments() -> None:
    """New galaxies and new seeds each time: the error is slightly too large, that from counts alone is much too large."""
    random = np.random.default_rng(2)
    means, with_outcomes, counts_alone = [], [], []
    for _ in range(3000):
        latent_SN = 0.8 * random.normal(size=120) + 0.1 * random.normal(size=(3, 1)) + 0.6 * random.normal(size=(3, 120))
        correct_SN = latent_SN > -0.5
        found, bound = estimate_outcomes(correct_SN), estimate_accuracy(correct_SN.mean(axis=1).tolist(), 120)
        assert found.standard_error is not None
        assert bound.standard_error is not None
        assert found.mean == pytest.approx(bound.mean)
        means.append(found.mean)
        with_outcomes.append(found.standard_error**2)
        counts_alone.append(bound.standard_error**2)
    variance = np.var(means)
    assert variance < np.mean(with_outcomes) < 1.3 * variance
    assert 1.3 * variance < np.mean(counts_alone) < 2 * variance


def test_loss_without_predictions_has_only_the_error_between_seeds() -> None:
    found = estimate_mean([1.0, 1.2, 1.1], 500, None)
    assert found.standard_error is None
    assert found.seed_error == pytest.approx(stats.sem([1.0, 1.2, 1.1]))
    known = estimate_mean([1.0, 1.2, 1.1], 500, 0.5)
    assert known.standard_error == pytest.approx(math.sqrt(0.5 / 500 + stats.sem([1.0, 1.2, 1.1]) ** 2))


def test_holm_matches_values_computed_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.6]) == [1.0, 1.0]


@given(P_VALUES, st.randoms())
def test_holm_lies_between_the_p_value_and_bonferronis(p_values: list[float], random: object) -> None:
    adjusted = holm(p_values)
    for p, found in zip(p_values, adjusted, strict=True):
        assert p <= found <= min(1.0, len(p_values) * p) or found == pytest.approx(p)
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p_values[index] for index in order]) == [adjusted[index] for index in order]
    by_size = sorted(zip(p_values, adjusted, strict=True))
    assert all(left[1] <= right[1] for left, right in pairwise(by_size))
