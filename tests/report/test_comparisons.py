"""Cells against published values and against each other: nominal level, power, and closed forms."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from galaxydist.report.published_results import PublishedResult
from galaxydist.report.statistics import (
    NOT_PAIRED,
    ONE_SEED,
    CellOutcomes,
    Difference,
    Estimate,
    Term,
    against_published,
    contrast,
    from_accuracies,
    from_means,
    from_outcomes,
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
def test_level_against_a_published_accuracy(seeds: int, seed_sd: float) -> None:
    """Both are runs of one model on galaxies of one kind. A seed_sd of 0.06 is a deviation of 2.2 points between seeds."""

    def one(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, seeds, OURS, seed_sd=seed_sd), draw(random, 1, THEIRS, seed_sd=seed_sd)
        return against_published(from_outcomes(ours), PublishedResult(float(theirs.mean()), 1.0, THEIRS), "accuracy")

    assert 0.03 <= rejections(one) <= 0.07


def test_level_from_counts_alone_errs_to_the_safe_side() -> None:
    def one(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, 3, OURS, seed_sd=0.05), draw(random, 1, THEIRS, seed_sd=0.05)
        estimate = from_accuracies(ours.mean(axis=1).tolist(), OURS)
        return against_published(estimate, PublishedResult(float(theirs.mean()), 1.0, THEIRS), "accuracy")

    assert 0.005 <= rejections(one) <= 0.05


def test_leaving_out_an_error_rejects_too_often() -> None:
    """Why both samples and the seeds are in the test: without them it is no test at 5 %."""

    def published_known(random: np.random.Generator) -> Difference | None:
        ours, theirs = from_outcomes(draw(random, 3, OURS, seed_sd=0.0)), float(draw(random, 1, THEIRS, seed_sd=0.0).mean())
        return against_published(ours, PublishedResult(theirs, 1.0, 10**9), "accuracy")

    def one_training_each(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, 1, OURS, seed_sd=0.15), float(draw(random, 1, THEIRS, seed_sd=0.15).mean())
        found = against_published(from_outcomes(ours), PublishedResult(theirs, 1.0, THEIRS), "accuracy")
        assert found is not None
        assert ONE_SEED in found.notes
        return found

    assert rejections(published_known) > 0.15
    assert rejections(one_training_each) > 0.15


def test_power_against_a_published_accuracy() -> None:
    """12 points apart with 3 seeds of 300 galaxies, against 200: an error of some 4.5 points, so a power of three quarters."""

    def one(random: np.random.Generator) -> Difference | None:
        ours, theirs = draw(random, 3, OURS, seed_sd=0.05, shift=0.65), draw(random, 1, THEIRS, seed_sd=0.05)
        return against_published(from_outcomes(ours), PublishedResult(float(theirs.mean()), 1.0, THEIRS), "accuracy")

    assert 0.6 < rejections(one) < 0.95


def test_level_against_a_published_loss() -> None:
    """Losses are skew; ours stand in for the published variance between galaxies."""

    def losses(random: np.random.Generator, seeds: int, galaxies: int) -> NDArray[np.float64]:
        hard_N = random.normal(size=galaxies)
        return np.logaddexp(0, hard_N + 0.1 * random.normal(size=(seeds, 1)) + 0.5 * random.normal(size=(seeds, galaxies)))

    def one(random: np.random.Generator) -> Difference | None:
        published = PublishedResult(0.5, float(losses(random, 1, THEIRS).mean()), THEIRS)
        found = against_published(from_outcomes(losses(random, 3, OURS)), published, "loss")
        assert found is not None
        assert "ours stands in" in found.notes[0]
        return found

    assert 0.03 <= rejections(one) <= 0.07


def test_against_published_in_closed_form() -> None:
    published = PublishedResult(0.5259, 1.3268, 1774)
    single = against_published(from_accuracies([0.6], 1774), published, "accuracy")
    assert single is not None
    error = math.sqrt(0.6 * 0.4 / 1774 + 0.5259 * 0.4741 / 1774)
    assert single.value == pytest.approx(0.0741)
    assert single.standard_error == pytest.approx(error)
    assert single.p_value == pytest.approx(2 * stats.norm.sf(0.0741 / error), rel=0.05)
    seeds = [0.58, 0.60, 0.62]
    ours = from_accuracies(seeds, 1774)
    three = against_published(ours, published, "accuracy")
    infinite = against_published(ours, published, "accuracy", num_published_runs=None)
    assert three is not None
    assert infinite is not None
    variance = np.var(seeds, ddof=1)
    assert three.standard_error**2 == pytest.approx(error**2 + variance / 3 + variance)
    assert infinite.standard_error**2 == pytest.approx(error**2 + variance / 3)
    assert three.degrees_of_freedom == pytest.approx(three.standard_error**4 / ((4 / 3 * variance) ** 2 / 2), rel=0.05)
    assert three.degrees_of_freedom < infinite.degrees_of_freedom < 1774
    assert against_published(from_means([1.1, 1.2], 1774, None), published, "loss") is None
    loss = against_published(from_means([1.1], 1774, 0.9), published, "loss")
    assert loss is not None
    assert loss.standard_error == pytest.approx(math.sqrt(2 * 0.9 / 1774))


def term(weight: float, correct_SN: Bools, *, paired: bool = True, name: str = "model") -> Term:
    ids_N = np.array([f"g{number:04}" for number in range(correct_SN.shape[1])])
    estimate: Estimate = from_outcomes(correct_SN)
    outcomes = CellOutcomes(ids_N, np.arange(len(ids_N)) % 10, correct_SN, np.where(correct_SN, 0.1, 2.0))
    return Term(weight, estimate, outcomes if paired else None, name)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 3), (5, 2)])
def test_level_between_two_models_on_the_same_galaxies(first: int, second: int) -> None:
    seed_sd = 0.0 if first == 1 else 0.04

    def one(random: np.random.Generator) -> Difference:
        hard_N = 0.8 * random.normal(size=OURS)
        a, b = draw(random, first, hard_N, seed_sd=seed_sd), draw(random, second, hard_N, seed_sd=seed_sd)
        return contrast([term(1.0, a), term(-1.0, b)])

    # By itself McNemar's exact test keeps below its level.
    assert (0.015 if first == 1 else 0.03) <= rejections(one) <= 0.07


@pytest.mark.slow
def test_pairs_find_what_unpaired_samples_miss() -> None:
    def make(paired: bool) -> Callable[[np.random.Generator], Difference]:
        def one(random: np.random.Generator) -> Difference:
            hard_N = 0.8 * random.normal(size=OURS)
            better, worse = draw(random, 3, hard_N, seed_sd=0.0, shift=0.43), draw(random, 3, hard_N, seed_sd=0.0)
            return contrast([term(1.0, better, paired=paired), term(-1.0, worse, paired=paired)])

        return one

    assert rejections(make(True)) > 1.5 * rejections(make(False))


def test_one_seed_each_is_mcnemars() -> None:
    random = np.random.default_rng(4)
    a, b = random.random((1, 80)) < 0.8, random.random((1, 80)) < 0.6
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    found = contrast([term(1.0, a, name="A"), term(-1.0, b, name="B")])
    assert found.value == pytest.approx((only_a - only_b) / 80)
    assert found.p_value == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert found.standard_error == pytest.approx(math.sqrt(((only_a + only_b) / 80 - found.value**2) / 79))
    assert f"({only_a} to {only_b} discordant galaxies)" in found.test
    assert found.notes == (f"A, B: {ONE_SEED}",)


def test_without_predictions_or_on_other_galaxies_nothing_is_paired() -> None:
    random = np.random.default_rng(5)
    a, b = draw(random, 3, 100, seed_sd=0.0), draw(random, 3, 100, seed_sd=0.0)
    unpaired = contrast([term(1.0, a), term(-1.0, b, paired=False)])
    assert unpaired.notes == (NOT_PAIRED,)
    other = term(-1.0, b)
    assert other.outcomes is not None
    moved = dataclasses.replace(other.outcomes, ids_N=np.char.add("h", other.outcomes.ids_N))
    assert contrast([term(1.0, a), Term(-1.0, other.estimate, moved)]) == unpaired
    variances = [one.standard_error**2 for one in (from_outcomes(a), from_outcomes(b)) if one.standard_error is not None]
    assert unpaired.standard_error**2 == pytest.approx(sum(variances))


def test_a_model_against_itself() -> None:
    a = draw(np.random.default_rng(6), 1, 60, seed_sd=0.0)
    found = contrast([term(1.0, a), term(-1.0, a)])
    assert (found.value, found.standard_error, found.p_value) == (0.0, 0.0, 1.0)


def test_a_difference_of_differences() -> None:
    random = np.random.default_rng(7)
    runs = [draw(random, 2, 150, seed_sd=0.0) for _ in range(4)]
    weights = [1.0, -1.0, -1.0, 1.0]
    found = contrast([term(weight, run) for weight, run in zip(weights, runs, strict=True)])
    rates = np.array([run.mean(axis=1).mean() for run in runs])
    assert found.value == pytest.approx(np.dot(weights, rates))
    assert found.test.startswith("paired t test")
