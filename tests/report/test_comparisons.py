"""Comparisons with published values, and bootstrap draws: nominal level, power, and closed forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from galaxydist.report.published_results import PublishedResult
from galaxydist.report.statistics import (
    ONE_SEED,
    CellOutcomes,
    Difference,
    compare_with_published,
    draw_accuracy,
    draw_recalls,
    estimate_accuracy,
    estimate_mean,
    estimate_outcomes,
)

OURS, THEIRS, TABLES = 300, 200, 2000
Bools = NDArray[np.bool_]


def draw(
    random: np.random.Generator, seeds: int, galaxies: int | NDArray[np.float64], *, seed_sd: float, shift: float = 0.3
) -> Bools:
    """Correct or not, S x N: a galaxy is as hard under all seeds, a seed as good on all galaxies, and chance does the rest."""
    hard_N = 0.8 * random.normal(size=galaxies) if isinstance(galaxies, int) else galaxies
    correct_SN: Bools = (
        shift + hard_N + seed_sd * random.normal(size=(seeds, 1)) + 0.6 * random.normal(size=(seeds, len(hard_N))) > 0
    )
    return correct_SN


def rejections(make: Callable[[np.random.Generator], Difference | None], number: int = 0) -> float:
    """Share of the simulated tables with p < 5 %."""
    random = np.random.default_rng(number)
    found = [make(random) for _ in range(TABLES)]
    return sum(one is not None and one.p_value < 0.05 for one in found) / TABLES


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (2, 0.04), (3, 0.0), (3, 0.06), (5, 0.08)])
def test_t_test_against_a_published_accuracy_keeps_its_nominal_level(seeds: int, seed_sd: float) -> None:
    """Both are runs of one model on galaxies of one kind. A seed_sd of 0.06 is a deviation of 2.2 points between seeds."""

    def one(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, seeds, OURS, seed_sd=seed_sd), draw(random, 1, THEIRS, seed_sd=seed_sd)
        return compare_with_published(estimate_outcomes(ours), PublishedResult(float(theirs.mean()), 1.0, THEIRS), "accuracy")

    assert 0.015 <= rejections(one) <= 0.07


def test_t_test_from_counts_only_rejects_at_most_at_its_nominal_level() -> None:
    def one(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, 3, OURS, seed_sd=0.05), draw(random, 1, THEIRS, seed_sd=0.05)
        estimate = estimate_accuracy(ours.mean(axis=1).tolist(), OURS)
        return compare_with_published(estimate, PublishedResult(float(theirs.mean()), 1.0, THEIRS), "accuracy")

    assert 0.005 <= rejections(one) <= 0.05


def test_t_test_without_the_published_or_the_seed_error_exceeds_its_level() -> None:
    """Why both samples and the seeds are in the test: without them it is no test at 5 %."""

    def published_known(random: np.random.Generator) -> Difference | None:
        ours, theirs = estimate_outcomes(draw(random, 3, OURS, seed_sd=0.0)), float(draw(random, 1, THEIRS, seed_sd=0.0).mean())
        return compare_with_published(ours, PublishedResult(theirs, 1.0, 10**9), "accuracy")

    def one_training_each(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, 1, OURS, seed_sd=0.15), float(draw(random, 1, THEIRS, seed_sd=0.15).mean())
        found = compare_with_published(estimate_outcomes(ours), PublishedResult(theirs, 1.0, THEIRS), "accuracy")
        assert found is not None
        assert ONE_SEED in found.notes
        return found

    assert rejections(published_known) > 0.09
    assert rejections(one_training_each) > 0.15


def test_t_test_against_a_published_accuracy_detects_12_points_in_most_samples() -> None:
    """12 points apart with 3 seeds of 300 galaxies, against 200: an error of some 4.5 points, so a power of three quarters."""

    def one(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, 3, OURS, seed_sd=0.05, shift=0.65), draw(random, 1, THEIRS, seed_sd=0.05)
        return compare_with_published(estimate_outcomes(ours), PublishedResult(float(theirs.mean()), 1.0, THEIRS), "accuracy")

    assert 0.6 < rejections(one) < 0.95


def test_t_test_against_a_published_loss_keeps_its_nominal_level() -> None:
    """Losses are skew; ours are used for the published variance between galaxies."""

    def losses(random: np.random.Generator, seeds: int, galaxies: int) -> NDArray[np.float64]:
        hard_N = random.normal(size=galaxies)
        return np.logaddexp(0, hard_N + 0.1 * random.normal(size=(seeds, 1)) + 0.5 * random.normal(size=(seeds, galaxies)))

    def one(random: np.random.Generator) -> Difference | None:
        published = PublishedResult(0.5, float(losses(random, 1, THEIRS).mean()), THEIRS)
        found = compare_with_published(estimate_outcomes(losses(random, 3, OURS)), published, "loss")
        assert found is not None
        assert "ours is used in its place" in found.notes[0]
        return found

    assert 0.03 <= rejections(one) <= 0.07


def test_comparison_with_a_published_value_matches_closed_forms() -> None:
    published = PublishedResult(0.5259, 1.3268, 1774)
    single = compare_with_published(estimate_accuracy([0.6], 1774), published, "accuracy")
    assert single is not None
    error = math.sqrt(0.6 * 0.4 / 1774 + 0.5259 * 0.4741 / 1774)
    assert single.value == pytest.approx(0.0741)
    assert single.standard_error == pytest.approx(error)
    assert single.p_value == pytest.approx(2 * stats.norm.sf(0.0741 / error), rel=0.05)
    assert single.interval == pytest.approx((0.0741 - 1.96 * error, 0.0741 + 1.96 * error), rel=0.01)
    seeds = [0.58, 0.60, 0.62]
    three = compare_with_published(estimate_accuracy(seeds, 1774), published, "accuracy")
    assert three is not None
    variance = np.var(seeds, ddof=1)
    assert three.standard_error**2 == pytest.approx(error**2 + variance / 3 + variance)
    freedom = three.standard_error**4 / ((4 / 3 * variance) ** 2 / 2 + 0.24**2 / 1774**3 + (0.5259 * 0.4741) ** 2 / 1774**3)
    assert three.p_value == pytest.approx(2 * stats.t.sf(0.0741 / three.standard_error, freedom), rel=0.01)
    assert compare_with_published(estimate_mean([1.1, 1.2], 1774, None), published, "loss") is None
    assert compare_with_published(estimate_mean([1.1], 1774, 0.0), published, "loss") is None
    loss = compare_with_published(estimate_mean([1.1], 1774, 0.9), published, "loss")
    assert loss is not None
    assert loss.standard_error == pytest.approx(math.sqrt(2 * 0.9 / 1774))


@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 99))
def test_two_accuracies_are_compared_by_welchs_test(first: int, second: int, correct: int) -> None:
    """Of one seed and counts alone, the test is Welch's of the two samples' moments."""
    ours, theirs = 0.5, correct / 100
    found = compare_with_published(estimate_accuracy([ours], first), PublishedResult(theirs, 1.0, second), "accuracy")
    moments = [(p, math.sqrt(p * (1 - p)), n) for p, n in ((ours, first), (theirs, second))]
    expected = stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False)
    assert found is not None
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.p_value < 0.05) == (not found.interval[0] <= 0 <= found.interval[1])


def outcomes_of(correct_SN: Bools, num_classes: int = 2) -> CellOutcomes:
    ids_N = np.array([f"g{number:04}" for number in range(correct_SN.shape[1])])
    return CellOutcomes(ids_N, np.arange(len(ids_N)) % num_classes, correct_SN, np.zeros(correct_SN.shape))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_recall_draws_have_about_the_variance_of_repeated_experiments(seeds: int) -> None:
    """New galaxies and new seeds each time; the chance of single outcomes is counted twice, so the draws vary slightly more."""
    random = np.random.default_rng(1)
    accuracies, recalls, drawn = [], [], []
    for number in range(300):
        correct_SN = draw(random, seeds, 100, seed_sd=0.1 if seeds > 1 else 0.0)
        accuracy_R, recalls_RK = draw_recalls(outcomes_of(correct_SN), 2, stream=number)
        assert accuracy_R[0] == pytest.approx(correct_SN.mean())
        assert recalls_RK[0] == pytest.approx([correct_SN[:, ::2].mean(), correct_SN[:, 1::2].mean()])
        accuracies.append(accuracy_R[0])
        recalls.append(recalls_RK[0, 0])
        drawn.append((accuracy_R[1:].var(), recalls_RK[1:, 0].var()))
    of_accuracy, of_recall = np.mean(drawn, axis=0)
    assert 0.8 * np.var(accuracies) < of_accuracy < 1.6 * np.var(accuracies)
    assert 0.8 * np.var(recalls) < of_recall < 1.6 * np.var(recalls)


def test_draws_of_two_models_on_the_same_galaxies_are_paired() -> None:
    random = np.random.default_rng(0)
    hard_N = 0.8 * random.normal(size=800)
    pair = [draw(random, 1, hard_N, seed_sd=0.0) for _ in range(2)]
    drawn = [draw_recalls(outcomes_of(correct_SN), 2, stream=number)[0][1:] for number, correct_SN in enumerate(pair)]
    differences_N = pair[0][0].astype(float) - pair[1][0]
    assert (drawn[0] - drawn[1]).var() == pytest.approx(differences_N.var() / 800, rel=0.1)
    assert (drawn[0] - drawn[1]).var() < 0.8 * (drawn[0].var() + drawn[1].var())


def test_accuracy_draws_from_counts_have_binomial_and_seed_variance() -> None:
    single_R = draw_accuracy([0.6], 400, stream=1)
    assert single_R[0] == 0.6
    assert single_R[1:].var() == pytest.approx(0.24 / 400, rel=0.1)
    seeds = [0.55, 0.6, 0.65]
    several_R = draw_accuracy(seeds, 400, stream=1)
    assert several_R[0] == pytest.approx(0.6)
    assert several_R[1:].var() == pytest.approx(0.24 / 400 + np.var(seeds, ddof=1) / 3, rel=0.1)


def test_recall_draws_are_reproducible_and_nan_for_an_empty_class() -> None:
    outcomes = outcomes_of(draw(np.random.default_rng(5), 2, 60, seed_sd=0.1))
    accuracy_R, recalls_RK = draw_recalls(outcomes, 3, stream=1)
    assert np.isnan(recalls_RK[:, 2]).all() and np.isfinite(recalls_RK[:, :2]).all()
    assert np.array_equal(accuracy_R, draw_recalls(outcomes, 3, stream=1)[0])
    assert not np.array_equal(accuracy_R, draw_recalls(outcomes, 3, stream=2)[0])
