"""Statistics across runs: McNemar's test, ensembles, ranking, and predictions matched by galaxy."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.errors import UserError
from galaxydist.report.finished_runs import FinishedRun, SplitResult, ValidationScore
from galaxydist.report.statistics import (
    build_ensemble,
    build_outcomes,
    compare_runs,
    match,
    mcnemar,
    rank_by_validation,
    read_outcomes,
)
from tests.helpers.trial_folders import draw_logits, write_predictions

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(OUTCOMES)
def test_mcnemar_is_the_sign_test_of_the_discordant_pairs(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    found, swapped = mcnemar(first, second), mcnemar(second, first)
    discordant, fewer = found.only_first + found.only_second, min(found.only_first, found.only_second)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (swapped.p_value, swapped.difference) == pytest.approx((found.p_value, -found.difference))
    assert found.difference == pytest.approx(first.mean() - second.mean())
    assert found.count == len(pairs)


def test_mcnemar_text_counts_the_discordant_galaxies() -> None:
    found = mcnemar(np.array([True, True, False]), np.array([False, True, False]))
    assert str(found) == "McNemar's exact test (1 to 0 discordant galaxies)"


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_match_aligns_runs_by_galaxy_in_any_order(count: int, number: int) -> None:
    random = np.random.default_rng(number)
    labels_N, logits_NK = random.integers(0, 3, count), random.normal(size=(count, 3))
    ids = [f"J{number:03}" for number in range(count)]
    whole = build_outcomes(ids, labels_N.tolist(), logits_NK)
    order = random.permutation(count)
    kept = np.sort(order[: max(1, count // 2)])
    shuffled = build_outcomes([ids[row] for row in order], labels_N[order].tolist(), logits_NK[order])
    part = build_outcomes([ids[row] for row in kept], labels_N[kept].tolist(), logits_NK[kept])
    assert np.array_equal(shuffled.log_probabilities_NK, whole.log_probabilities_NK)
    first, second, third = match([whole, part, shuffled])
    assert first.ids_N.tolist() == second.ids_N.tolist() == third.ids_N.tolist() == [ids[row] for row in kept]
    assert np.array_equal(first.losses_N, second.losses_N)
    assert compare_runs(whole, part).p_value == 1


def test_outcomes_have_the_losses_and_hits_of_the_logits() -> None:
    found = build_outcomes(["b", "a"], [1, 0], [[0.0, 2.0], [0.0, 2.0]])
    assert found.correct_N.tolist() == [False, True]
    assert found.losses_N == pytest.approx([2 + math.log1p(math.exp(-2)), math.log1p(math.exp(-2))])


def test_match_and_build_outcomes_refuse_inconsistent_predictions() -> None:
    first = build_outcomes(["a", "b"], [0, 1], np.eye(2), source="one.parquet")
    with pytest.raises(UserError, match=r"one\.parquet and two\.parquet have no galaxy in common"):
        match([first, build_outcomes(["c"], [0], [[0.0, 1.0]], source="two.parquet")])
    with pytest.raises(UserError, match=r"1 galaxies have other labels .* the first is b"):
        match([first, build_outcomes(["a", "b"], [0, 0], np.eye(2))])
    with pytest.raises(UserError, match="numbers of classes"):
        match([first, build_outcomes(["a", "b"], [0, 1], np.eye(2, 3))])
    with pytest.raises(UserError, match="holds the galaxy a twice"):
        build_outcomes(["a", "a"], [0, 1], np.eye(2))
    with pytest.raises(UserError, match="without a column"):
        build_outcomes(["a", "b"], [0, 2], np.eye(2))
    with pytest.raises(UserError, match="not finite"):
        build_outcomes(["a"], [0], [[math.nan, 0.0]])


def test_read_outcomes_reads_predictions_and_refuses_damaged_files(tmp_path: Path) -> None:
    labels_N = np.arange(50) % 10
    logits_NK = draw_logits(labels_N, 0.7, 1)
    path = tmp_path / "test-predictions.parquet"
    write_predictions(path, labels_N, logits_NK)
    found = read_outcomes(path)
    expected = build_outcomes([f"g-{number}" for number in range(50)], labels_N.tolist(), logits_NK)
    assert np.array_equal(found.ids_N, expected.ids_N)
    assert np.array_equal(found.log_probabilities_NK, expected.log_probabilities_NK)
    assert np.array_equal(found.labels_N, expected.labels_N)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is damaged .*`galaxydist evaluate RUN`"):
        read_outcomes(path)
    with pytest.raises(UserError, match="there are no predictions at"):
        read_outcomes(tmp_path / "missing.parquet")


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "other.parquet"
    parquet.write_table(pa.table({"id": ["a"], "label": [1]}), path)
    with pytest.raises(UserError, match="is not a file of predictions that galaxydist wrote"):
        read_outcomes(path)


def test_ensemble_averages_probabilities() -> None:
    random = np.random.default_rng(3)
    ids, labels = [f"g{number:02}" for number in range(40)], random.integers(0, 4, 40).tolist()
    runs = [build_outcomes(ids, labels, 3 * random.normal(size=(40, 4))) for _ in range(3)]
    found = build_ensemble(runs)
    mean_NK = np.mean([np.exp(run.log_probabilities_NK) for run in runs], axis=0)
    assert np.exp(found.log_probabilities_NK) == pytest.approx(mean_NK)
    assert np.array_equal(found.correct_N, mean_NK.argmax(axis=1) == labels)
    # The logarithm is concave: the loss of the mean is below the mean loss.
    assert found.losses_N.mean() < np.mean([run.losses_N.mean() for run in runs])
    assert build_ensemble(runs[:1]).log_probabilities_NK == pytest.approx(runs[0].log_probabilities_NK)


class Sealed(Mapping[Any, SplitResult]):
    """Test numbers that nobody may look at."""

    def __getitem__(self, key: Any) -> SplitResult:
        raise AssertionError("a test number was read")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a test number was read")

    def __len__(self) -> int:
        raise AssertionError("a test number was read")


def trial(
    name: str, validation: ValidationScore | None, judgements: Mapping[Any, SplitResult] = MappingProxyType({})
) -> FinishedRun:
    return FinishedRun(Path(name), "r", "own", "vit", "simulated", "original", ("a",), 0, "", validation, judgements)


def test_runs_are_ranked_only_by_their_validation_metric() -> None:
    values = {"worst": 0.4, "best": 0.9, "middle": 0.6}
    runs = [trial(name, ValidationScore("accuracy", value, 1), Sealed()) for name, value in values.items()]
    ranked, unranked = rank_by_validation(
        [*runs, trial("none", None, Sealed()), trial("other", ValidationScore("loss", 0.1, 1), Sealed())]
    )
    assert [one.run_dir.name for one in ranked] == ["best", "middle", "worst"]
    assert [one.run_dir.name for one in unranked] == ["none", "other"]
    losses = [trial(name, ValidationScore("loss", value, 1), Sealed()) for name, value in values.items()]
    assert [one.run_dir.name for one in rank_by_validation(losses)[0]] == ["worst", "middle", "best"]
    assert rank_by_validation([]) == ([], [])
