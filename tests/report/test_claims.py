"""The six published claims: each verdict from results that call for it, the published numbers themselves, and the rule."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.report.claims import (
    CLAIMS,
    MARGIN,
    NOT_PAIRED,
    Claim,
    Comparison,
    Evidence,
    ModelEvidence,
    answer_claims,
    balancing_is_fairer,
    choose_rows,
    disturbed_is_worst,
    evidence_of_table,
    published_evidence,
    vit_is_best,
)
from galaxydist.report.finished_runs import read_finished_runs
from galaxydist.report.matrix import build_tables
from galaxydist.report.published_results import MODELS, PUBLISHED_SETTINGS, SETTINGS, DisplayName, TrainTest
from galaxydist.report.statistics import ONE_SEED, CellOutcomes, draw_recalls, mcnemar
from tests.helpers.trial_folders import write_trial

COUNT, SEEDS = 2000, 3
# Test accuracies that support every claim: trained and tested on original / on balanced / on balanced and original.
AS_CLAIMED: Mapping[DisplayName, tuple[float, float, float]] = {
    "ResNet50": (0.48, 0.42, 0.38),
    "ResNet26": (0.50, 0.43, 0.40),
    "ResNet18": (0.52, 0.44, 0.42),
    "VGG16": (0.65, 0.58, 0.55),
    "VGG19": (0.62, 0.56, 0.53),
    "Custom CNN": (0.755, 0.62, 0.62),
    "ViT": (0.77, 0.75, 0.76),
}
WORST = 0.15  # recall of the worst class, less than the model's accuracy


def make_evidence(
    accuracies: Mapping[DisplayName, tuple[float, float, float]] = AS_CLAIMED,
    *,
    vit_worst: str = "merging",
    even_when_balanced: bool = True,
    seeds: int = SEEDS,
) -> Evidence:
    """Outcomes on the same galaxies: the hardest are missed, in most seeds alike; one class is worse than the others."""
    random = np.random.default_rng(0)
    hard_N = random.permutation(COUNT // 10)[None, :].repeat(10, axis=0).T.ravel() / (COUNT / 10)  # alike in each class
    ids_N = np.array([f"g{number:05}" for number in range(COUNT)])
    labels_N = np.arange(COUNT) % 10
    models: dict[tuple[DisplayName, TrainTest], ModelEvidence] = {}
    for stream, (model, levels) in enumerate(accuracies.items()):
        for setting, level in zip(PUBLISHED_SETTINGS, levels, strict=True):
            worst = GALAXY10_CLASSES.index(vit_worst if model == "ViT" else "disturbed")
            uneven = setting.train == "original" or not even_when_balanced
            gap = WORST if uneven else 0.05
            level_N = np.where(labels_N == worst, level - gap, level + gap / 9)
            correct_SN = hard_N + 0.03 * random.normal(size=(seeds, COUNT)) < level_N
            outcomes = CellOutcomes(ids_N, labels_N, correct_SN, np.where(correct_SN, 0.1, 2.0))
            drawn = draw_recalls(outcomes, 10, stream=2 * stream + (setting.train == "balanced"))
            models[model, setting] = ModelEvidence(seeds, *drawn, outcomes)
    return Evidence("On the real Galaxy10 DECaLS", GALAXY10_CLASSES, models)


def changed(**levels: tuple[float, float, float]) -> dict[DisplayName, tuple[float, float, float]]:
    names = {name.replace(" ", ""): name for name in MODELS}
    return {**AS_CLAIMED, **{names[key]: level for key, level in levels.items()}}


def test_matching_results_support_all_six_claims() -> None:
    found = answer_claims(make_evidence())
    assert [answer.number for answer in found] == [1, 2, 3, 4, 5, 6]
    assert {answer.verdict for answer in found} == {"supported"}, [answer.reason for answer in found]
    assert [len(answer.comparisons) for answer in found] == [18, 2, 18, 9, 7, 19]
    assert all(answer.missing == () for answer in found)
    assert all("real Galaxy10 DECaLS it is supported" in answer.reason for answer in found)
    assert all(NOT_PAIRED not in comparison.notes for answer in found for comparison, _ in answer.comparisons)


@pytest.mark.parametrize(
    ("number", "accuracies"),
    [
        (1, changed(CustomCNN=(0.755, 0.62, 0.84))),  # in one setting of three
        (2, changed(CustomCNN=(0.68, 0.55, 0.55))),  # not close
        (2, changed(CustomCNN=(0.755, 0.62, 0.80))),  # no drop
        (3, changed(VGG19=(0.62, 0.36, 0.53))),
        (4, changed(ResNet50=(0.60, 0.42, 0.38))),
        (6, changed(VGG16=(0.65, 0.58, 0.72))),  # balancing brings accuracy
        (6, changed(ViT=(0.90, 0.75, 0.66))),  # ViT loses most
    ],
)
def test_one_significant_exception_contradicts_a_claim(
    number: int, accuracies: Mapping[DisplayName, tuple[float, float, float]]
) -> None:
    found = CLAIMS[number - 1](make_evidence(accuracies))
    assert found.verdict == "contradicted", found.reason
    assert "comparisons refute it. The clearest: " in found.reason


@pytest.mark.parametrize(
    ("number", "accuracies"),
    [
        (1, changed(CustomCNN=(0.77, 0.62, 0.62))),
        (3, changed(VGG19=(0.62, 0.44, 0.53))),
        (6, changed(VGG19=(0.62, 0.56, 0.609))),
    ],
)
def test_differences_within_the_error_leave_a_claim_undecided(
    number: int, accuracies: Mapping[DisplayName, tuple[float, float, float]]
) -> None:
    found = CLAIMS[number - 1](make_evidence(accuracies))
    assert found.verdict == "undecided", found.reason
    assert "none refutes it. The weakest: " in found.reason


def test_disturbed_is_worst_is_contradicted_by_another_worst_class() -> None:
    assert disturbed_is_worst(make_evidence(vit_worst="disturbed")).verdict == "contradicted"
    found = disturbed_is_worst(make_evidence())
    assert [outcome for _, outcome in found.comparisons] == ["holds"] * 7
    assert all(f"in {name}, " in comparison.text for name, (comparison, _) in zip(MODELS, found.comparisons, strict=True))
    assert "another class (merging) in ViT" in found.comparisons[-1][0].text
    assert all(0.1 < comparison.value < 0.25 for comparison, _ in found.comparisons)


def test_equal_classes_are_rarely_called_worst_or_not_worst() -> None:
    """With ten classes of one recall, the lowest one is no evidence that "disturbed" is not the worst."""
    random = np.random.default_rng(3)
    ids_N, labels_N = np.arange(1000).astype(str), np.arange(1000) % 10
    counts = {"holds": 0, "refuted": 0, "open": 0}
    for _ in range(100):
        outcomes = CellOutcomes(ids_N, labels_N, random.random((1, 1000)) < 0.6, np.zeros((1, 1000)))
        model = ModelEvidence(1, *draw_recalls(outcomes, 10, stream=0), outcomes)
        evidence = Evidence("here", GALAXY10_CLASSES, {(name, SETTINGS[0]): model for name in ("VGG16", "ViT")})
        for _, outcome in disturbed_is_worst(evidence).comparisons:
            counts[outcome] += 1
    assert counts["holds"] <= 10 and counts["refuted"] <= 4, counts


def test_balancing_is_fairer_is_undecided_if_recalls_stay_uneven() -> None:
    assert balancing_is_fairer(make_evidence(even_when_balanced=False)).verdict == "undecided"


def test_two_runs_with_one_seed_each_are_compared_by_mcnemars_test() -> None:
    evidence = make_evidence(seeds=1)
    comparison = vit_is_best(evidence).comparisons[0][0]
    first, second = (evidence.models[name, PUBLISHED_SETTINGS[0]].outcomes for name in ("ViT", "ResNet50"))
    assert first is not None and second is not None
    exact = mcnemar(first.correct_SN[0], second.correct_SN[0])
    assert (comparison.test, comparison.p_value) == (str(exact), exact.p_value)
    assert comparison.notes == (f"ViT, ResNet50: {ONE_SEED}",)
    assert "McNemar's p < 0.001" in str(comparison)
    assert vit_is_best(make_evidence()).comparisons[0][0].p_value is None


def test_missing_results_leave_claims_undecided_and_are_named() -> None:
    evidence = make_evidence()
    without = Evidence(
        evidence.where, evidence.class_names, {key: one for key, one in evidence.models.items() if key[0] != "VGG16"}
    )
    found = answer_claims(without)
    assert [answer.verdict for answer in found] == ["undecided", "supported", "undecided", "supported", *2 * ["undecided"]]
    assert found[0].missing == tuple(f"VGG16 {setting}" for setting in PUBLISHED_SETTINGS)
    assert "Missing: VGG16 trained on original, tested on original; " in found[0].reason
    assert "15 of 18 comparisons" in found[0].reason
    empty = answer_claims(Evidence("here", GALAXY10_CLASSES, {}))
    assert [answer.verdict for answer in empty] == ["undecided"] * 6
    # The results that exist can still contradict a claim.
    against = make_evidence(changed(CustomCNN=(0.755, 0.62, 0.84)))
    partly = Evidence(against.where, against.class_names, {key: one for key, one in against.models.items() if key[0] != "VGG16"})
    assert vit_is_best(partly).verdict == "contradicted"


def test_published_numbers_contradict_claim_4_and_leave_the_others_undecided() -> None:
    """One run each and no predictions: only the errors of the test sets are known, and pairs are not."""
    found = answer_claims(published_evidence(GALAXY10_CLASSES))
    expected = ["undecided", "undecided", "undecided", "contradicted", "undecided", "undecided"]
    assert [answer.verdict for answer in found] == expected
    assert [sum(outcome == "holds" for _, outcome in answer.comparisons) for answer in found] == [17, 1, 13, 1, 0, 8]
    assert "ViT above Custom CNN, trained on original, tested on original: +1.24 ± 1.4" in found[0].reason
    assert "ResNet50 no gain over ResNet18, trained on original, tested on original: +5.52 ± 1.7" in found[3].reason
    assert "recalls of ResNet50 trained on original, tested on original (no predictions)" in found[4].reason
    assert all(answer.reason.startswith("By the published numbers alone") for answer in found)
    for comparison, _ in itertools.chain.from_iterable(answer.comparisons for answer in found):
        assert NOT_PAIRED in comparison.notes
        assert any(ONE_SEED in note for note in comparison.notes)


def test_claims_are_tested_from_run_folders_with_all_cells(tmp_path: Path) -> None:
    recipes = ("resnet50", "resnet26", "resnet18", "vgg16", "vgg19", "custom_cnn", "vit")
    for recipe, levels in zip(recipes, AS_CLAIMED.values(), strict=True):
        for seed in range(2):
            own = {"original": levels[0], "balanced": levels[1]}
            write_trial(tmp_path / f"{recipe}-o{seed}", [f"recipe={recipe}", f"seed={seed}"], accuracy=own)
            command = [f"recipe={recipe}", f"seed={seed}", "data.variant=balanced"]
            other = {"original": levels[2], "balanced": levels[1]}
            write_trial(tmp_path / f"{recipe}-b{seed}", command, accuracy=other)
    runs, notes = read_finished_runs(sorted(tmp_path.iterdir()))
    assert notes == []
    (table,) = build_tables(runs)
    rows = choose_rows(table, "own")
    assert list(rows) == list(MODELS)
    evidence = evidence_of_table(table, rows)
    assert len(evidence.models) == len(MODELS) * len(SETTINGS)
    found = answer_claims(evidence)
    assert all(answer.missing == () for answer in found)
    assert [comparison.notes for comparison, _ in found[0].comparisons] == [()] * 18
    assert found[4].verdict == "undecided", "every class is as hard as another here"
    vgg, resnet = (evidence.models[name, PUBLISHED_SETTINGS[0]].accuracy_R[0] for name in ("VGG16", "ResNet18"))
    assert found[2].comparisons[0][0].value == pytest.approx(vgg - resnet)
    accuracy = table.cells[rows["VGG16"], PUBLISHED_SETTINGS[0]].accuracy
    assert accuracy is not None and vgg == pytest.approx(accuracy.mean)


VALUES = st.floats(-0.2, 0.2)


@given(st.lists(VALUES, max_size=12), st.integers(0, 3))
def test_claim_verdict_follows_its_rule_for_any_comparisons(values: list[float], num_missing: int) -> None:
    claim = Claim(1, "s", Evidence("Here", GALAXY10_CLASSES, {}))
    claim.comparisons = [Comparison("c", value, 0.05) for value in values]
    claim.num_planned, claim.missing = len(values) + num_missing, dict.fromkeys(["x"] * num_missing)
    found = claim.answer()
    assert len(found.comparisons) == len(values)
    if any(value < -0.05 * 3.1 for value in values):
        assert found.verdict == "contradicted"
    if all(value > -0.05 * 1.95 for value in values):
        assert found.verdict != "contradicted"
    assert (found.verdict == "supported") == (num_missing == 0 and bool(values) and all(value > 0.05 * 1.96 for value in values))


@given(VALUES, st.floats(0.001, 0.05), st.floats(0.01, 0.1), st.integers(1, 20))
def test_comparison_outcomes_agree_with_their_intervals(value: float, error: float, margin: float, number: int) -> None:
    within = Comparison("c", value, error, low=-margin, high=margin)
    low, high = within.interval()
    wide_low, wide_high = within.interval(number)
    assert wide_low <= low < high <= wide_high
    assert (within.outcome(number) == "holds") == (-margin < low and high < margin)
    assert (within.outcome(number) == "refuted") == (wide_high < -margin or wide_low > margin)
    gain = Comparison("c", value, error, low=-math.inf, high=margin, refuted_above=0.0)
    assert (gain.outcome(number) == "holds") == (high < margin and wide_low <= 0)
    assert (gain.outcome(number) == "refuted") == (wide_low > 0)
    exact = Comparison("c", value, error, p_value=0.04)
    assert exact.outcome(1) == ("holds" if value > 0 else "refuted" if value < 0 else "open")
    assert exact.outcome(2) == ("holds" if value > 0 else "open")


def test_claim_statements_name_their_subject() -> None:
    statements = [answer.statement for answer in answer_claims(Evidence("here", GALAXY10_CLASSES, {}))]
    assert all(
        word in text for word, text in zip(["ViT", "close", "VGG", "depth", "Disturbed", "fairness"], statements, strict=True)
    )
    assert MARGIN == 0.03
