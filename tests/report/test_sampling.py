"""Means over seeds and galaxies: their error by closed forms, by simulation, and the tests that rest on it."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from galaxydist.report.statistics import Difference, difference, from_accuracies, from_means, from_outcomes, holm, t_tail

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def mean_squares(values_SN: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of seeds, galaxies and the rest, from sums of squares: the textbook's way, not the module's."""
    seeds, galaxies = values_SN.shape
    total, correction = float((values_SN**2).sum()), float(values_SN.sum()) ** 2 / values_SN.size
    by_seed = float((values_SN.sum(axis=1) ** 2).sum()) / galaxies - correction
    by_galaxy = float((values_SN.sum(axis=0) ** 2).sum()) / seeds - correction
    rest = total - correction - by_seed - by_galaxy
    return by_seed / (seeds - 1), by_galaxy / (galaxies - 1), rest / ((seeds - 1) * (galaxies - 1))


@given(st.integers(2, 6), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_the_parts_are_the_mean_squares_of_a_two_way_layout(seeds: int, galaxies: int, number: int) -> None:
    random = np.random.default_rng(number)
    values_SN = random.normal(size=(seeds, galaxies)) + 2 * random.normal(size=galaxies) + random.normal(size=(seeds, 1))
    of_seeds, of_galaxies, of_rest = mean_squares(values_SN)
    found = from_outcomes(values_SN)
    count = seeds * galaxies
    assert found.mean == pytest.approx(values_SN.mean())
    assert found.seed_variance == pytest.approx(of_seeds / count)
    assert found.galaxy_variance == pytest.approx(max(0.0, (of_galaxies - of_rest) / count), abs=1e-12)
    assert found.rest_variance == pytest.approx(of_rest / galaxies)
    if of_galaxies >= of_rest:
        assert found.standard_error == pytest.approx(math.sqrt((of_seeds + of_galaxies - of_rest) / count))
    assert found.seed_error == pytest.approx(stats.sem(values_SN.mean(axis=1)))


@given(st.integers(2, 500), st.data())
def test_a_single_seed_has_the_binomial_error(galaxies: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, galaxies))
    single = from_outcomes([[True] * correct + [False] * (galaxies - correct)])
    share = correct / galaxies
    assert single.seed_variance is None
    assert single.seed_error is None
    assert single.between_seeds is None
    assert single.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (galaxies - 1)))
    assert from_accuracies([share], galaxies).standard_error == pytest.approx(math.sqrt(share * (1 - share) / galaxies))


def test_seeds_do_not_take_away_the_error_of_the_galaxies() -> None:
    one_N = np.random.default_rng(1).random(400) < 0.7
    single, many = from_outcomes([one_N]), from_outcomes([one_N] * 20)
    assert many.seed_variance == pytest.approx(0, abs=1e-20)
    assert many.galaxy_variance == pytest.approx(single.galaxy_variance)
    assert from_accuracies([0.7] * 20, 400).standard_error == pytest.approx(from_accuracies([0.7], 400).standard_error)


def test_the_error_is_that_of_repeated_experiments() -> None:
    """New galaxies and new seeds each time: the mean varies by what the estimates say; counts alone say too much."""
    random = np.random.default_rng(2)
    means, with_outcomes, counts_alone = [], [], []
    for _ in range(3000):
        latent_SN = 0.8 * random.normal(size=120) + 0.1 * random.normal(size=(3, 1)) + 0.6 * random.normal(size=(3, 120))
        correct_SN = latent_SN > -0.5
        found, bound = from_outcomes(correct_SN), from_accuracies(correct_SN.mean(axis=1).tolist(), 120)
        assert found.standard_error is not None
        assert bound.standard_error is not None
        assert found.mean == pytest.approx(bound.mean)
        means.append(found.mean)
        with_outcomes.append(found.standard_error**2)
        counts_alone.append(bound.standard_error**2)
    variance = np.var(means)
    assert np.mean(with_outcomes) == pytest.approx(variance, rel=0.08)
    assert 1.3 * variance < np.mean(counts_alone) < 2 * variance


def test_a_loss_without_predictions_has_the_error_of_its_seeds_alone() -> None:
    found = from_means([1.0, 1.2, 1.1], 500, None)
    assert found.standard_error is None
    assert found.seed_error == pytest.approx(stats.sem([1.0, 1.2, 1.1]))
    known = from_means([1.0, 1.2, 1.1], 500, 0.5)
    assert known.standard_error == pytest.approx(math.sqrt(0.5 / 500 + stats.sem([1.0, 1.2, 1.1]) ** 2))


@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_differences_are_welchs(first: int, second: int, number: int) -> None:
    random = np.random.default_rng(number)
    a, b = random.normal(size=first), 0.5 + 2 * random.normal(size=second)
    parts = [(a.var(ddof=1) / first, first - 1.0), (b.var(ddof=1) / second, second - 1.0)]
    found, expected = difference(a.mean() - b.mean(), parts, "t"), stats.ttest_ind(a, b, equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.degrees_of_freedom == pytest.approx(expected.df)
    low, high = expected.confidence_interval(0.95)
    assert found.interval() == pytest.approx((low, high))
    assert (found.p_value < 0.05) == (not low <= 0 <= high)
    assert 2 * min(found.p_above(0), found.p_below(0)) == pytest.approx(found.p_value)
    assert found.p_above(0.3) + found.p_below(0.3) == pytest.approx(1)


def test_no_error_at_all() -> None:
    assert difference(0.0, [(0.0, 5.0)], "t").p_value == 1
    assert difference(0.1, [(0.0, 5.0)], "t").p_value == 0
    assert [t_tail(value, 0, math.inf) for value in (-1, 0, 1)] == [1, 0.5, 0]
    known = Difference(1.96, 1.0, math.inf, 0.05, "z")
    assert known.p_above(0) == pytest.approx(0.025, abs=1e-4)
    assert known.interval() == pytest.approx((0.0, 3.92), abs=1e-3)


def test_holm_by_hand() -> None:
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
