"""The six observations: each verdict from results that call for it, the published numbers themselves, and the words."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.report import claims
from galaxydist.report.claims import (
    QUESTIONS,
    ClaimTest,
    Evidence,
    ModelEvidence,
    answer_claims,
    balancing_is_fairer,
    case_of,
    check_above,
    check_no_gain,
    check_within,
    choose_rows,
    decide,
    disturbed_is_worst,
    published_case,
    vit_is_best,
)
from galaxydist.report.finished_runs import read_trials
from galaxydist.report.matrix import build_tables
from galaxydist.report.published_results import MODELS, PUBLISHED_SETTINGS, SETTINGS, DisplayName, TrainTest
from galaxydist.report.statistics import NOT_PAIRED, ONE_SEED, CellOutcomes, difference, from_outcomes
from tests.helpers.trial_folders import write_trial

COUNT, SEEDS = 2000, 3
# Test accuracies that bear out every observation: trained and tested on original / on balanced / on balanced and original.
AS_OBSERVED: Mapping[DisplayName, tuple[float, float, float]] = {
    "ResNet50": (0.48, 0.42, 0.38),
    "ResNet26": (0.50, 0.43, 0.40),
    "ResNet18": (0.52, 0.44, 0.42),
    "VGG16": (0.65, 0.58, 0.55),
    "VGG19": (0.62, 0.56, 0.53),
    "Custom CNN": (0.755, 0.62, 0.62),
    "ViT": (0.77, 0.75, 0.76),
}
WORST = 0.15  # recall of the worst class, less than the model's accuracy


def make_case(
    accuracies: Mapping[DisplayName, tuple[float, float, float]] = AS_OBSERVED,
    *,
    source: str = "galaxy10_decals",
    vit_worst: str = "merging",
    even_when_balanced: bool = True,
) -> Evidence:
    """Outcomes on the same galaxies: the hardest are missed, in most seeds alike; one class is worse than the others."""
    random = np.random.default_rng(0)
    hard_N = random.permutation(COUNT // 10)[None, :].repeat(10, axis=0).T.ravel() / (COUNT / 10)  # alike in each class
    ids_N = np.array([f"g{number:05}" for number in range(COUNT)])
    labels_N = np.arange(COUNT) % 10
    evidence: dict[tuple[DisplayName, TrainTest], ModelEvidence] = {}
    for model, levels in accuracies.items():
        for setting, level in zip(PUBLISHED_SETTINGS, levels, strict=True):
            worst = GALAXY10_CLASSES.index(vit_worst if model == "ViT" else "disturbed")
            uneven = setting.train == "original" or not even_when_balanced
            gap = WORST if uneven else 0.05
            level_N = np.where(labels_N == worst, level - gap, level + gap / 9)
            correct_SN = hard_N + 0.03 * random.normal(size=(SEEDS, COUNT)) < level_N
            confusions = []
            for correct_N in correct_SN:
                confusion_KK = np.zeros((10, 10), int)
                np.add.at(confusion_KK, (labels_N, np.where(correct_N, labels_N, (labels_N + 1) % 10)), 1)
                confusions.append(tuple(tuple(row) for row in confusion_KK.tolist()))
            outcomes = CellOutcomes(ids_N, labels_N, correct_SN, np.where(correct_SN, 0.1, 2.0))
            evidence[model, setting] = ModelEvidence(from_outcomes(correct_SN), outcomes, tuple(confusions))
    return Evidence(source, GALAXY10_CLASSES, evidence)


def verdicts(case: Evidence) -> list[str]:
    return [observation.verdict for observation in answer_claims(case)]


def changed(**levels: tuple[float, float, float]) -> dict[DisplayName, tuple[float, float, float]]:
    names = {name.replace(" ", ""): name for name in MODELS}
    return {**AS_OBSERVED, **{names[key]: level for key, level in levels.items()}}


def test_results_that_bear_out_everything() -> None:
    found = answer_claims(make_case())
    assert [observation.number for observation in found] == [1, 2, 3, 4, 5, 6]
    assert {observation.verdict for observation in found} == {"supported"}, [observation.reason for observation in found]
    assert [len(observation.checks) for observation in found] == [18, 2, 18, 9, 7, 19]
    assert all(observation.missing == () for observation in found)
    assert all("real Galaxy10 DECaLS it is supported" in observation.reason for observation in found)
    assert all(NOT_PAIRED not in check.notes for observation in found for check in observation.checks)


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
def test_one_clear_exception_contradicts(number: int, accuracies: Mapping[DisplayName, tuple[float, float, float]]) -> None:
    found = QUESTIONS[number - 1](make_case(accuracies))
    assert found.verdict == "contradicted", found.reason
    assert "speak significantly against it. The clearest: " in found.reason


@pytest.mark.parametrize(
    ("number", "accuracies"),
    [
        (1, changed(CustomCNN=(0.77, 0.62, 0.62))),
        (3, changed(VGG19=(0.62, 0.44, 0.53))),
        (6, changed(VGG19=(0.62, 0.56, 0.609))),
    ],
)
def test_what_is_too_close_stays_undecided(number: int, accuracies: Mapping[DisplayName, tuple[float, float, float]]) -> None:
    found = QUESTIONS[number - 1](make_case(accuracies))
    assert found.verdict == "undecided", found.reason
    assert "none speaks significantly against it. The weakest: " in found.reason


def test_the_worst_class() -> None:
    assert disturbed_is_worst(make_case(vit_worst="disturbed")).verdict == "contradicted"
    found = disturbed_is_worst(make_case())
    assert [round(check.value) for check in found.checks] == [1, 1, 1, 1, 1, 1, 0]
    case = make_case()
    other = Evidence(case.source, tuple(f"class{number}" for number in range(10)), case.evidence)
    assert disturbed_is_worst(other).verdict == "undecided"
    assert disturbed_is_worst(other).missing == ("a class disturbed",)


def test_classes_that_stay_uneven() -> None:
    assert balancing_is_fairer(make_case(even_when_balanced=False)).verdict == "undecided"


def test_a_missing_cell_leaves_undecided_and_is_named() -> None:
    case = make_case()
    without = Evidence(case.source, case.class_names, {key: one for key, one in case.evidence.items() if key[0] != "VGG16"})
    found = answer_claims(without)
    assert [observation.verdict for observation in found] == [
        "undecided",
        "supported",
        "undecided",
        "supported",
        *2 * ["undecided"],
    ]
    assert found[0].missing == tuple(f"VGG16 {setting}" for setting in PUBLISHED_SETTINGS)
    assert "Not there: VGG16 trained on original, tested on original; " in found[0].reason
    assert "15 of 18 comparisons" in found[0].reason
    assert verdicts(Evidence("galaxy10_decals", GALAXY10_CLASSES, {})) == ["undecided"] * 6
    # What is there can still speak against it.
    against = make_case(changed(CustomCNN=(0.755, 0.62, 0.84)))
    partly = Evidence(
        against.source, against.class_names, {key: one for key, one in against.evidence.items() if key[0] != "VGG16"}
    )
    assert vit_is_best(partly).verdict == "contradicted"


@pytest.mark.parametrize("source", ["simulated"])
def test_other_galaxies_are_never_spoken_of_as_the_real_ones(source: str) -> None:
    for observation in answer_claims(make_case(source=source)):
        assert observation.reason.startswith(f"On {source}, which is not the real Galaxy10 DECaLS, it is supported")
        assert "On the real" not in observation.reason


def test_what_the_published_numbers_support_themselves() -> None:
    """One run each and no predictions: only the errors of the test sets are known, and pairs are not."""
    found = answer_claims(published_case(GALAXY10_CLASSES))
    expected = ["undecided", "undecided", "undecided", "contradicted", "undecided", "undecided"]
    assert [observation.verdict for observation in found] == expected
    assert [sum(p < 0.05 for p in observation.p_for) for observation in found] == [17, 1, 8, 1, 0, 7]
    assert "ViT above Custom CNN, trained on original, tested on original: +1.24 ± 1.44 points" in found[0].reason
    assert "ResNet50 no gain on ResNet18, trained on original, tested on original: +5.52 ± 1.68 points" in found[3].reason
    assert all(observation.reason.startswith("By the published numbers alone") for observation in found)
    for check in itertools.chain.from_iterable(observation.checks for observation in found):
        assert NOT_PAIRED in check.notes
        assert any(ONE_SEED in note for note in check.notes)


def test_from_run_folders_to_verdicts(tmp_path: Path) -> None:
    recipes = ("resnet50", "resnet26", "resnet18", "vgg16", "vgg19", "custom_cnn", "vit")
    for recipe, levels in zip(recipes, AS_OBSERVED.values(), strict=True):
        for seed in range(2):
            own = {"original": levels[0], "balanced": levels[1]}
            write_trial(tmp_path / f"{recipe}-o{seed}", [f"recipe={recipe}", f"seed={seed}"], accuracy=own, dataset="simulated")
            command = [f"recipe={recipe}", f"seed={seed}", "data.variant=balanced"]
            other = {"original": levels[2], "balanced": levels[1]}
            write_trial(tmp_path / f"{recipe}-b{seed}", command, accuracy=other, dataset="simulated")
    trials, notes = read_trials(sorted(tmp_path.iterdir()))
    assert notes == []
    (table,) = build_tables(trials)
    rows = choose_rows(table, "own")
    assert list(rows) == list(MODELS)
    case = case_of(table, rows)
    assert len(case.evidence) == len(MODELS) * len(SETTINGS)
    found = answer_claims(case)
    assert all(observation.missing == () for observation in found)
    assert [check.notes for check in found[0].checks] == [()] * 18
    # Every class is as hard as another here.
    assert found[4].verdict == "undecided"
    assert found[2].checks[0].value == pytest.approx(
        100
        * (
            case.evidence["VGG16", PUBLISHED_SETTINGS[0]].accuracy.mean
            - case.evidence["ResNet18", PUBLISHED_SETTINGS[0]].accuracy.mean
        )
    )


PROBABILITIES = st.floats(0, 1)


def check(p_for: float, p_against: float) -> ClaimTest:
    return ClaimTest("claim", 1.0, 0.5, "points", p_for, p_against, "t")


@given(st.lists(st.tuples(PROBABILITIES, PROBABILITIES), max_size=12), st.integers(0, 3))
def test_the_rule(p_values: list[tuple[float, float]], num_missing: int) -> None:
    checks = [check(*pair) for pair in p_values]
    found = decide(1, "s", "simulated", checks, num_planned=len(checks) + num_missing, missing=["x"] * num_missing)
    assert len(found.p_for) == len(found.p_against) == len(checks)
    if any(p < 0.05 / len(checks) for _, p in p_values):
        assert found.verdict == "contradicted"
    if all(p >= 0.05 for _, p in p_values):
        assert found.verdict != "contradicted"
    if found.verdict == "supported":
        assert num_missing == 0
        assert all(p < 0.05 for p, _ in p_values)
    if not p_values:
        assert found.verdict == "undecided"
    # One more comparison never makes an observation easier to support.
    if found.verdict != "supported":
        more = decide(1, "s", "simulated", [*checks, check(0.5, 1.0)], num_planned=len(checks) + num_missing + 1)
        assert more.verdict != "supported"


@given(st.floats(-0.2, 0.2), st.floats(0.001, 0.05), st.floats(0.01, 0.1))
def test_checks_and_intervals_agree(value: float, error: float, margin: float) -> None:
    found = difference(value, [(error**2, 50.0)], "t")
    low, high = found.interval(0.9)
    within, above, gain = check_within("c", found, margin), check_above("c", found), check_no_gain("c", found, margin)
    assert (within.p_for < 0.05) == (-margin < low and high < margin)
    assert not (within.p_for < 0.05 and within.p_against < 0.05)
    assert (above.p_for < 0.05) == (found.interval()[0] > 0)
    assert (above.p_against < 0.05) == (found.interval()[1] < 0)
    assert (gain.p_for < 0.05) == (high < margin)
    assert (gain.p_against < 0.05) == (found.interval()[0] > 0)
    assert above.value == pytest.approx(100 * value)


def test_statements_name_what_is_claimed() -> None:
    statements = [observation.statement for observation in answer_claims(Evidence("simulated", (), {}))]
    assert all(
        word in text for word, text in zip(["ViT", "close", "VGG", "depth", "Disturbed", "fairness"], statements, strict=True)
    )
    assert claims.MARGIN == 0.03
