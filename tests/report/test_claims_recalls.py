"""Draws of the classes' recalls: their spread by closed forms, and what derives from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.report.claims import (
    draw_recalls,
    linked_places,
    outcome_correlation,
    p_not_worst,
    p_value,
    probability_worst,
    spread,
)
from galaxydist.report.statistics import CellOutcomes


def confusion(correct: list[int], support: list[int]) -> list[list[int]]:
    size = len(support)
    matrix = np.diag(correct)
    for label in range(size):
        matrix[label, (label + 1) % size] += support[label] - correct[label]
    found: list[list[int]] = matrix.tolist()
    return found


def test_one_seed_draws_jeffreys_beta() -> None:
    drawn_DK = draw_recalls([confusion([20, 90, 0], [40, 100, 30])], stream=1, num_draws=20_000)
    for label, (correct, support) in enumerate([(20, 40), (90, 100), (0, 30)]):
        a, b = correct + 0.5, support - correct + 0.5
        assert drawn_DK[:, label].mean() == pytest.approx(a / (a + b), abs=0.003)
        assert drawn_DK[:, label].var() == pytest.approx(a * b / (a + b) ** 2 / (a + b + 1), rel=0.1)
    assert abs(np.corrcoef(drawn_DK.T) - np.eye(3)).max() < 0.03


def test_seeds_add_their_own_error_and_galaxies_keep_theirs() -> None:
    support = [400, 400]
    alike = draw_recalls([confusion([200, 200], support)] * 3, stream=1, num_draws=20_000)
    single = draw_recalls([confusion([200, 200], support)], stream=1, num_draws=20_000)
    assert alike == pytest.approx(single)
    unlike = draw_recalls([confusion([k, 200], support) for k in (160, 200, 240)], stream=1, num_draws=20_000)
    between = np.var([0.4, 0.5, 0.6], ddof=1) / 3
    assert unlike[:, 0].var() == pytest.approx(between + single[:, 0].var(), rel=0.05)
    assert unlike[:, 1].var() == pytest.approx(single[:, 1].var(), rel=0.05)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=6), st.integers(1, 4))
def test_draws_are_shares_the_same_each_time_and_never_of_an_empty_class(correct: list[int], seeds: int) -> None:
    support = [30 for _ in correct]
    support[0] = correct[0] = 0
    matrices = [confusion(correct, support)] * seeds
    drawn_DK = draw_recalls(matrices, stream=5, num_draws=50)
    assert np.isnan(drawn_DK[:, 0]).all()
    assert ((drawn_DK[:, 1:] >= 0) & (drawn_DK[:, 1:] <= 1)).all()
    assert np.array_equal(drawn_DK, draw_recalls(matrices, stream=5, num_draws=50), equal_nan=True)
    assert not np.array_equal(drawn_DK[:, 1:], draw_recalls(matrices, stream=6, num_draws=50)[:, 1:])
    shares = [probability_worst(drawn_DK, label) for label in range(len(correct))]
    assert shares[0] == 0
    assert sum(shares) == pytest.approx(1)
    assert (spread(drawn_DK) >= 0).all()


def test_the_worst_class_of_equals_is_anyones() -> None:
    drawn_DK = draw_recalls([confusion([50] * 5, [100] * 5)], stream=2)
    shares = [probability_worst(drawn_DK, label) for label in range(5)]
    assert shares == pytest.approx([0.2] * 5, abs=0.04)
    clear = draw_recalls([confusion([20, 60, 60], [100] * 3)], stream=2)
    assert probability_worst(clear, 0) > 0.99


def test_models_on_the_same_galaxies_are_drawn_together() -> None:
    """The difference of two models' recalls varies as it does over galaxies."""
    random = np.random.default_rng(0)
    hard_N = random.normal(size=800)
    labels_N, ids_N = np.repeat([0, 1], 400), np.array([f"{number:03}" for number in range(800)])
    cells = []
    for _ in range(2):
        correct_SN = 0.3 + hard_N + 0.5 * random.normal(size=(1, 800)) > 0
        cells.append(CellOutcomes(ids_N, labels_N, correct_SN, np.zeros((1, 800))))
    support = [400, 400]
    counted = [[int(cell.correct_SN[0, labels_N == label].sum()) for label in (0, 1)] for cell in cells]
    correlation_K = outcome_correlation(*cells, 2)
    for label in (0, 1):
        pair = [cell.correct_SN[0, labels_N == label] for cell in cells]
        assert correlation_K[label] == pytest.approx(np.corrcoef(*pair)[0, 1])
    places = linked_places(correlation_K, stream=9, num_draws=20_000)
    drawn = [
        draw_recalls([confusion(correct, support)], stream=9, num_draws=20_000, places_DK=place_DK)
        for correct, place_DK in zip(counted, places, strict=True)
    ]
    for label in (0, 1):
        of_galaxies_N = np.subtract(*(cell.correct_SN[0, labels_N == label].astype(float) for cell in cells))
        assert (drawn[0] - drawn[1])[:, label].var() == pytest.approx(of_galaxies_N.var() / 400, rel=0.1)
    assert outcome_correlation(cells[0], cells[0], 3).tolist() == [0.99, 0.99, 0.0]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_draws_of_known_outcomes_vary_as_repeated_experiments(seeds: int) -> None:
    """New galaxies and new seeds each time. Counts alone take the rest for the galaxies' and the seeds', and draw too widely."""
    random = np.random.default_rng(1)
    recalls, known, counts_alone = [], [], []
    for number in range(200):
        correct_SN = (
            0.4 + 0.8 * random.normal(size=100) + 0.1 * random.normal(size=(seeds, 1)) + 0.6 * random.normal(size=(seeds, 100))
            > 0
        )
        ids_N = np.arange(100).astype(str)
        outcomes = CellOutcomes(ids_N, np.zeros(100, np.int64), correct_SN, np.zeros(correct_SN.shape))
        matrices = [confusion([int(correct_N.sum()), 1], [100, 1]) for correct_N in correct_SN]
        recalls.append(correct_SN.mean())
        known.append(draw_recalls(matrices, stream=number, num_draws=100, outcomes=outcomes)[:, 0].var())
        counts_alone.append(draw_recalls(matrices, stream=number, num_draws=100)[:, 0].var())
    assert np.mean(known) == pytest.approx(np.var(recalls), rel=0.3)
    assert np.mean(counts_alone) > 1.2 * np.mean(known)


def test_among_equal_classes_none_is_called_worst_or_not_worst() -> None:
    random = np.random.default_rng(3)
    worst, not_worst, rarely = 0, 0, 0
    for number in range(200):
        correct = random.binomial(100, 0.6, 10).tolist()
        drawn_DK = draw_recalls([confusion(correct, [100] * 10)], stream=number, num_draws=400)
        share = probability_worst(drawn_DK, 0)
        worst, rarely = worst + (share > 0.95), rarely + (share < 0.05)
        not_worst += p_not_worst(drawn_DK, 0) < 0.05
    assert worst <= 10
    assert not_worst <= 15
    assert rarely > 60  # why the probability is no p value
    clear = draw_recalls([confusion([60, 20, 60], [100] * 3)], stream=2)
    assert p_not_worst(clear, 0) < 0.01
    assert p_not_worst(clear, 1) == 1
    assert p_not_worst(np.full((5, 2), np.nan), 0) == 1


def test_p_values_of_draws_are_never_zero() -> None:
    assert p_value(np.zeros(99, bool)) == pytest.approx(0.01)
    assert p_value(np.ones(99, bool)) == 1
