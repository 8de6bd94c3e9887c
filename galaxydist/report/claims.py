"""Tests of the six published claims on our results, and their verdicts.

Each claim is a set of comparisons that must all hold; its function defines them. Accuracies are compared on the same galaxies
where predictions were kept (``statistics.py``). The recalls of the classes have no closed form and are compared by random draws
(``draw_recalls``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.counter_rng import uniform
from galaxydist.report.finished_runs import Validation
from galaxydist.report.matrix import Row, Table
from galaxydist.report.published_results import (
    BALANCED_TO_ORIGINAL,
    CNNS,
    MODELS,
    ON_ORIGINAL,
    PUBLISHED,
    PUBLISHED_SETTINGS,
    RESNETS,
    SETTINGS,
    VGGS,
    DisplayName,
    TrainTest,
)
from galaxydist.report.statistics import (
    ALPHA,
    NOT_PAIRED,
    CellOutcomes,
    Difference,
    Estimate,
    Term,
    contrast,
    from_accuracies,
    from_outcomes,
    holm,
)
from galaxydist.surveys.official_split import NAME as REAL_DATASET

# Verdicts.

PUBLISHED_ALONE = "published"
NUM_NAMED = 3  # missing results listed in a reason
Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True, slots=True)
class ClaimTest:
    """One test of a claim.

    Args:
        claim: the tested statement.
        value: the measured number.
        error: its standard error; None where it has none.
        unit: of value and error: ``points`` (of accuracy, per cent) or empty.
        p_for: p value of the evidence for the claim; small: significant.
        p_against: p value of the evidence against the claim; small: significant.
        test: name of the statistical test.
        notes: limitations of the test.
    """

    claim: str
    value: float
    error: float | None
    unit: str
    p_for: float
    p_against: float
    test: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        sign = "+" if self.unit else ""
        return f"{self.claim}: {self.value:{sign}.2f}{error} {self.unit}".rstrip()


@dataclass(frozen=True)
class ClaimAnswer:
    """Verdict on one published claim, with its tests.

    Args:
        number: 1 to 6.
        statement: the claim.
        source: name of the data set, or ``published``.
        reason: one or two sentences that name the data set.
        p_for, p_against: of each test, adjusted for multiple testing (Holm).
        missing: results that were needed and are missing, without repeats.
    """

    number: int
    statement: str
    source: str
    verdict: Verdict
    reason: str
    checks: tuple[ClaimTest, ...]
    p_for: tuple[float, ...]
    p_against: tuple[float, ...]
    missing: tuple[str, ...]


def check_above(claim: str, found: Difference) -> ClaimTest:
    """Test that a difference is above 0: its two-sided p value counts for or against the claim by its sign; the other is 1."""
    p_for = found.p_value if found.value > 0 else 1.0
    p_against = found.p_value if found.value < 0 else 1.0
    return _of_accuracy(claim, found, p_for, p_against, found.test)


def check_within(claim: str, found: Difference, margin: float) -> ClaimTest:
    """Test that a difference lies within a margin of 0: two one-sided tests (Schuirmann 1987, J. Pharmacokinet. 15, 657)."""
    p_for = max(found.p_above(-margin), found.p_below(margin))
    p_against = min(1.0, 2 * min(found.p_above(margin), found.p_below(-margin)))
    return _of_accuracy(claim, found, p_for, p_against, f"two one-sided t tests within {100 * margin:g} points")


def check_no_gain(claim: str, found: Difference, margin: float) -> ClaimTest:
    """Test that there is no gain: supported if a gain of ``margin`` is excluded, contradicted if the gain is significant."""
    p_against = found.p_value if found.value > 0 else 1.0
    test = f"one-sided t test against a gain of {100 * margin:g} points; against the claim: {found.test}"
    return _of_accuracy(claim, found, found.p_below(margin), p_against, test)


def decide(
    number: int,
    statement: str,
    source: str,
    checks: Sequence[ClaimTest],
    *,
    num_planned: int,
    missing: Sequence[str] = (),
    alpha: float = ALPHA,
) -> ClaimAnswer:
    """Return the verdict on a claim that holds only if all its tests hold.

    The claim is contradicted if any test is refuted, supported if every planned test was made and confirmed, else undecided.
    The p values for and against are adjusted separately for multiple testing (Holm).

    Args:
        source: name of the data set, or ``published``.
        checks: the tests that could be made.
        num_planned: number of tests if no result is missing.
        missing: results that the other tests need.
        alpha: level of significance.
    """
    p_for, p_against = holm([check.p_for for check in checks]), holm([check.p_against for check in checks])
    refuted = [index for index, p in enumerate(p_against) if p < alpha]
    confirmed = [index for index, p in enumerate(p_for) if p < alpha]
    number_of = f"{num_planned} comparisons"
    if refuted:
        verdict: Verdict = "contradicted"
        strongest = min(refuted, key=lambda index: p_against[index])
        said = f"{len(refuted)} of {number_of} speak significantly against it"
        details = [f"The clearest: {_shown(checks[strongest], p_against[strongest])}"]
    else:
        is_complete = bool(checks) and len(confirmed) == num_planned
        verdict = "supported" if is_complete else "undecided"
        said = f"{len(confirmed)} of {number_of} bear it out significantly, none speaks significantly against it"
        weakest = max(range(len(checks)), key=lambda index: p_for[index], default=None)
        details = [] if weakest is None else [f"The weakest: {_shown(checks[weakest], p_for[weakest])}"]
    if missing:
        more = f"; and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        details.append(f"Not there: {'; '.join(missing[:NUM_NAMED])}{more}.")
    reason = " ".join([f"{where_of(source)} it is {verdict}: {said}.", *details])
    return ClaimAnswer(number, statement, source, verdict, reason, tuple(checks), tuple(p_for), tuple(p_against), tuple(missing))


def where_of(source: str) -> str:
    """Return the opening words of a verdict: they name the data set and mark all but the real Galaxy10 as not real."""
    if source == PUBLISHED_ALONE:
        return "By the published numbers alone"
    return "On the real Galaxy10 DECaLS" if source == REAL_DATASET else f"On {source}, which is not the real Galaxy10 DECaLS,"


def _shown(check: ClaimTest, p: float) -> str:
    return f"{check} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})."


def _of_accuracy(claim: str, found: Difference, p_for: float, p_against: float, test: str) -> ClaimTest:
    return ClaimTest(claim, 100 * found.value, 100 * found.standard_error, "points", p_for, p_against, test, found.notes)


# Uncertainty of the recalls: the worst class and the spread of the recalls have no closed form, so they are tested by draws.
#
# A draw resamples the n seeds with replacement, averages their recalls, and widens the distance to the mean of all seeds by
# sqrt(n / (n - 1)), so that few seeds give their full variance (Rao & Wu 1988, JASA 83, 231). It then draws each class's recall p
# from Beta(p M + 1/2, (1 - p) M + 1/2) (Jeffreys' prior: Brown, Cai & DasGupta 2001, Stat. Sci. 16, 101; a plain bootstrap of a
# class without a mistake would never draw one). All seeds share one test set, so the galaxies' error is drawn once for all seeds.
#
# M is the number of galaxies in the class. Where the outcomes of several seeds are known, M is instead chosen to match the
# variance over galaxies of the share of correct seeds. This variance already contains the residual variance of ``statistics.py``,
# so the seeds' deviations are scaled down by it. Two models on the same galaxies are drawn jointly by a normal copula (Nelsen
# 2006, "An Introduction to Copulas", section 2.3) with the correlation of these shares in each class.

NUM_DRAWS = 4000
Floats = NDArray[np.float64]


def draw_recalls(
    confusions_SKK: Sequence[ArrayLike],
    *,
    stream: int,
    num_draws: int = NUM_DRAWS,
    outcomes: CellOutcomes | None = None,
    places_DK: Floats | None = None,
) -> Floats:
    """Draw the recalls of the classes from their sampling distribution, D draws x K; nan for a class without galaxies.

    Args:
        confusions_SKK: S seeds x K x K counts on one test set; row: true class.
        stream: RNG stream; different streams are independent, equal streams give equal draws.
        num_draws: D.
        outcomes: of the single galaxies, where they are known.
        places_DK: quantile of each draw over the galaxies, 0 to 1; None: drawn from the stream.
    """
    from scipy.special import betaincinv

    counts_SKK = np.asarray(confusions_SKK, np.int64)
    support_K, num_seeds = counts_SKK[0].sum(axis=1), len(counts_SKK)
    with np.errstate(invalid="ignore"):
        recalls_SK = np.diagonal(counts_SKK, axis1=1, axis2=2) / support_K
    galaxies_K, lessened_K = _parts(support_K, num_seeds, outcomes)
    draws_D = np.arange(num_draws)[:, None]
    mean_DK = np.broadcast_to(recalls_SK.mean(axis=0), (num_draws, len(support_K)))
    if num_seeds > 1:
        chosen_DS = (uniform(stream, 0, draws_D, np.arange(num_seeds)) * num_seeds).astype(int)
        widened_K = lessened_K * (num_seeds / (num_seeds - 1)) ** 0.5
        mean_DK = np.clip(mean_DK + widened_K * (recalls_SK[chosen_DS].mean(axis=1) - mean_DK), 0.0, 1.0)
    if places_DK is None:
        places_DK = uniform(stream, 1, draws_D, np.arange(len(support_K)))
    drawn_DK: Floats = betaincinv(mean_DK * galaxies_K + 0.5, (1 - mean_DK) * galaxies_K + 0.5, places_DK)
    return np.where(support_K > 0, drawn_DK, np.nan)


def linked_places(correlation_K: ArrayLike, *, stream: int, num_draws: int = NUM_DRAWS) -> tuple[Floats, Floats]:
    """Return quantiles for joint draws of two models on the same galaxies, D x K each, by a normal copula."""
    from scipy.special import ndtr, ndtri

    shared_K = np.asarray(correlation_K, np.float64)
    draws_D, classes_K = np.arange(num_draws)[:, None], np.arange(len(shared_K))
    first_DK, own_DK = uniform(stream, 1, draws_D, classes_K), uniform(stream, 2, draws_D, classes_K)
    second_DK = ndtr(shared_K * ndtri(first_DK) + np.sqrt(1 - shared_K**2) * ndtri(own_DK))
    return first_DK, second_DK


def outcome_correlation(first: CellOutcomes, second: CellOutcomes, num_classes: int) -> Floats:
    """Return the correlation of two models' shares of correct seeds over the galaxies of each class, K; 0 where undefined."""
    found_K = np.zeros(num_classes)
    for label in range(num_classes):
        shares = [one.correct_SN[:, one.labels_N == label].mean(axis=0) for one in (first, second)]
        if len(shares[0]) > 1 and all(np.ptp(share_N) > 0 for share_N in shares):
            found_K[label] = np.corrcoef(*shares)[0, 1]
    return np.clip(found_K, -0.99, 0.99)


def _parts(support_K: NDArray[np.int64], num_seeds: int, outcomes: CellOutcomes | None) -> tuple[Floats, Floats]:
    """Return M (see the comment above; N to n N) and the scale of the seeds' deviations (0 to 1), K each."""
    galaxies_K, lessened_K = support_K.astype(np.float64), np.ones(len(support_K))
    if outcomes is None or num_seeds == 1:
        return galaxies_K, lessened_K
    for label, count in enumerate(support_K.tolist()):
        correct_SN = outcomes.correct_SN[:, outcomes.labels_N == label]
        if correct_SN.shape[1] < 2 or correct_SN.min() == correct_SN.max():
            continue
        mean, shares_N = float(correct_SN.mean()), correct_SN.mean(axis=0)
        galaxies_K[label] = min(mean * (1 - mean) / max(float(shares_N.var()), 1e-12), num_seeds) * count
        of_seeds = float(correct_SN.mean(axis=1).var(ddof=1))
        between = from_outcomes(correct_SN).between_seeds or 0.0
        lessened_K[label] = math.sqrt(between / of_seeds) if of_seeds > 0 else 0.0
    return galaxies_K, lessened_K


def probability_worst(recalls_DK: Floats, label: int) -> float:
    """Return the share of draws in which a class has the smallest recall; 0 for a class without galaxies."""
    filled_DK = np.where(np.isnan(recalls_DK), np.inf, recalls_DK)
    return float((filled_DK.argmin(axis=1) == label).mean()) if not np.isnan(recalls_DK[0, label]) else 0.0


def p_not_worst(recalls_DK: Floats, label: int) -> float:
    """Return the p value of "no class has a smaller recall", with a Bonferroni correction for the number of other classes.

    The probability of being the worst is no substitute: among ten equal classes it is often below 5 % for a given class.
    """
    others = [other for other in range(recalls_DK.shape[1]) if other != label and not np.isnan(recalls_DK[0, other])]
    if np.isnan(recalls_DK[0, label]) or not others:
        return 1.0
    return min(1.0, len(others) * min(p_value(recalls_DK[:, other] >= recalls_DK[:, label]) for other in others))


def spread(recalls_DK: Floats) -> Floats:
    """Return the standard deviation of the recalls over the classes that have galaxies, by draw."""
    spread_D: Floats = np.nanstd(recalls_DK, axis=1)
    return spread_D


def p_value(is_against_D: NDArray[np.bool_]) -> float:
    """Return the one-sided p value from a mask of the draws against a claim; never 0 (Davison & Hinkley 1997, eq. 4.11)."""
    return (int(is_against_D.sum()) + 1) / (len(is_against_D) + 1)


# Largest difference of accuracies that counts as close: over twice the published 1.24 points of custom CNN and ViT on original.
MARGIN = 0.03
WEAKEST_CLASS = "disturbed"
VIT: DisplayName = "ViT"
CNN: DisplayName = "Custom CNN"


@dataclass(frozen=True)
class ModelEvidence:
    """Results of a model in a train/test setting.

    Args:
        accuracy: over seeds and galaxies.
        outcomes: of the single galaxies, where predictions were kept.
        confusions: one per seed; empty where they are not known.
    """

    accuracy: Estimate
    outcomes: CellOutcomes | None = None
    confusions: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Results of the published models on one data set.

    Args:
        source: name of the data set, or ``published``.
        class_names: by label.
        evidence: by model and setting; settings without runs are absent.
    """

    source: str
    class_names: tuple[str, ...]
    evidence: Mapping[tuple[DisplayName, TrainTest], ModelEvidence]


class _Checks:
    """Collects the tests of a claim and the results that others lack."""

    def __init__(self, case: Evidence) -> None:
        self.case = case
        self.checks: list[ClaimTest] = []
        self.num_planned = 0
        self.missing: dict[str, None] = {}

    def add(
        self, claim: str, weights: Mapping[tuple[DisplayName, TrainTest], float], make: Callable[[str, Difference], ClaimTest]
    ) -> None:
        """Add a test of a weighted sum of accuracies on one test set."""
        if self.plan(list(weights)):
            found = [(weight, key, self.case.evidence[key]) for key, weight in weights.items()]
            terms = [Term(weight, known.accuracy, known.outcomes, key[0]) for weight, key, known in found]
            self.checks.append(make(claim, contrast(terms)))

    def plan(self, keys: Sequence[tuple[DisplayName, TrainTest]], *, confusions: bool = False) -> bool:
        """Count one more planned test, record its missing results, and return True if there are none."""
        self.num_planned += 1
        lacks = []
        for model, setting in keys:
            known = self.case.evidence.get((model, setting))
            if known is None:
                lacks.append(f"{model} {setting}")
            elif confusions and not known.confusions:
                lacks.append(f"recalls of {model} {setting}")
        self.missing |= dict.fromkeys(lacks)
        return not lacks

    def judge(self, number: int, statement: str) -> ClaimAnswer:
        return decide(number, statement, self.case.source, self.checks, num_planned=self.num_planned, missing=list(self.missing))


def vit_is_best(case: Evidence) -> ClaimAnswer:
    """Test claim 1: ViT has a higher accuracy than each other model in each of the three published settings."""
    checks = _Checks(case)
    for setting in PUBLISHED_SETTINGS:
        for model in CNNS:
            checks.add(f"ViT above {model}, {setting}", {(VIT, setting): 1.0, (model, setting): -1.0}, check_above)
    return checks.judge(1, "ViT is best in every setting.")


def cnn_is_close_but_drops(case: Evidence) -> ClaimAnswer:
    """Test claim 2: the custom CNN is within ``MARGIN`` of ViT on original data.

    On the original test set, it is less accurate when trained on balanced data.
    """
    checks = _Checks(case)
    checks.add(
        f"ViT less Custom CNN within {100 * MARGIN:g} points, {ON_ORIGINAL}",
        {(VIT, ON_ORIGINAL): 1.0, (CNN, ON_ORIGINAL): -1.0},
        lambda claim, found: check_within(claim, found, MARGIN),
    )
    checks.add(
        "Custom CNN better trained on original than on balanced, tested on original",
        {(CNN, ON_ORIGINAL): 1.0, (CNN, BALANCED_TO_ORIGINAL): -1.0},
        check_above,
    )
    return checks.judge(2, "The custom CNN comes close to ViT on the original data, but drops when trained on balanced data.")


def vggs_beat_resnets(case: Evidence) -> ClaimAnswer:
    """Test claim 3: each VGG has a higher accuracy than each ResNet in each of the three published settings."""
    checks = _Checks(case)
    for setting in PUBLISHED_SETTINGS:
        for vgg in VGGS:
            for resnet in RESNETS:
                checks.add(f"{vgg} above {resnet}, {setting}", {(vgg, setting): 1.0, (resnet, setting): -1.0}, check_above)
    return checks.judge(3, "VGG-16 and VGG-19 beat the ResNets.")


def depth_does_not_help(case: Evidence) -> ClaimAnswer:
    """Test claim 4: no deeper ResNet is more accurate than a shallower one.

    It is supported only if gains of ``MARGIN`` are excluded; a lack of data is no support.
    """
    checks = _Checks(case)
    for setting in PUBLISHED_SETTINGS:
        for shallow, deep in combinations(RESNETS, 2):
            checks.add(
                f"{deep} no gain on {shallow}, {setting}",
                {(deep, setting): 1.0, (shallow, setting): -1.0},
                lambda claim, found: check_no_gain(claim, found, MARGIN),
            )
    return checks.judge(4, "ResNet depth does not help.")


def disturbed_is_worst(case: Evidence) -> ClaimAnswer:
    """Test claim 5: on original data, "disturbed" has the smallest recall of all classes in every CNN, but not in ViT.

    It counts as the worst class if it is so in more than 95 % of the draws, and as not the worst if another class is
    significantly worse.
    """
    checks = _Checks(case)
    for number, model in enumerate(MODELS):
        is_cnn = model != VIT
        claim = f"disturbed is {'the' if is_cnn else 'not the'} worst class of {model}, {ON_ORIGINAL}, probability of worst"
        if checks.plan([(model, ON_ORIGINAL)], confusions=True) and WEAKEST_CLASS in case.class_names:
            known = case.evidence[model, ON_ORIGINAL]
            recalls_DK = draw_recalls(known.confusions, stream=number, outcomes=known.outcomes)
            label = case.class_names.index(WEAKEST_CLASS)
            worst = probability_worst(recalls_DK, label)
            p_worst, p_not = max(1 / (len(recalls_DK) + 1), 1 - worst), p_not_worst(recalls_DK, label)
            p_for, p_against = (p_worst, p_not) if is_cnn else (p_not, p_worst)
            checks.checks.append(ClaimTest(claim, worst, None, "", p_for, p_against, "draws of the recalls"))
    if WEAKEST_CLASS not in case.class_names:
        checks.missing[f"a class {WEAKEST_CLASS}"] = None
    return checks.judge(5, "Disturbed galaxies are the worst class of every CNN, not of ViT.")


def balancing_is_fairer(case: Evidence) -> ClaimAnswer:
    """Test claim 6: training on balanced data makes the recalls more even and costs accuracy, least for ViT.

    On the original test set, the standard deviation of the recalls over the classes is smaller in each model, and each CNN loses
    accuracy, more than ViT does.
    """
    checks = _Checks(case)
    for number, model in enumerate(MODELS):
        claim = f"recalls of {model} more even when trained on balanced, tested on original, loss of spread"
        keys = [(model, ON_ORIGINAL), (model, BALANCED_TO_ORIGINAL)]
        if checks.plan(keys, confusions=True):
            checks.checks.append(_check_spread(claim, *(case.evidence[key] for key in keys), stream=len(MODELS) + 2 * number))
    cost_of_vit = {(VIT, ON_ORIGINAL): -1.0, (VIT, BALANCED_TO_ORIGINAL): 1.0}
    for model in CNNS:
        cost = {(model, ON_ORIGINAL): 1.0, (model, BALANCED_TO_ORIGINAL): -1.0}
        checks.add(f"balancing costs {model} accuracy, tested on original", cost, check_above)
        checks.add(f"balancing costs {model} more than ViT, tested on original", cost | cost_of_vit, check_above)
    return checks.judge(6, "Balancing helps fairness between classes and costs accuracy on the original test set, ViT least.")


QUESTIONS = (vit_is_best, cnn_is_close_but_drops, vggs_beat_resnets, depth_does_not_help, disturbed_is_worst, balancing_is_fairer)


def answer_claims(case: Evidence) -> list[ClaimAnswer]:
    """Test the six claims, in order."""
    return [question(case) for question in QUESTIONS]


def _check_spread(claim: str, before: ModelEvidence, after: ModelEvidence, *, stream: int) -> ClaimTest:
    """Test that the recalls are less spread after than before, on the same test set."""
    places: tuple[Floats | None, Floats | None] = (None, None)
    notes: tuple[str, ...] = (NOT_PAIRED,)
    if before.outcomes is not None and after.outcomes is not None and before.outcomes.is_paired(after.outcomes):
        places = linked_places(outcome_correlation(before.outcomes, after.outcomes, len(before.confusions[0])), stream=stream)
        notes = ()
    spreads = [
        spread(draw_recalls(evidence.confusions, stream=stream + number, outcomes=evidence.outcomes, places_DK=place_DK))
        for number, (evidence, place_DK) in enumerate(zip((before, after), places, strict=True))
    ]
    gains_D = spreads[0] - spreads[1]
    # Two-sided, like the tests of the accuracies.
    p_for, p_against = (min(1.0, 2 * p_value(is_against_D)) for is_against_D in (gains_D <= 0, gains_D >= 0))
    value, error = 100 * float(gains_D.mean()), 100 * float(gains_D.std())
    return ClaimTest(claim, value, error, "points", p_for, p_against, "draws of the recalls", notes)


def choose_rows(table: Table, regime: str) -> dict[DisplayName, Row]:
    """Choose the row for each published model in a regime (``reference`` or ``own``): best by validation, never by test."""
    chosen: dict[DisplayName, Row] = {}
    for name in MODELS:
        rows = [row for row in table.rows if row.display == name and row.regime == regime]
        validations = {row: _validations(table, row) for row in rows}
        metrics = [one.metric for found in validations.values() for one in found]
        usual = max(metrics, key=metrics.count, default="")
        if rows:
            chosen[name] = max(rows, key=lambda row: _mean(validations[row], usual))
    return chosen


def case_of(table: Table, rows: Mapping[DisplayName, Row]) -> Evidence:
    """Return the evidence in the chosen rows of a table."""
    evidence: dict[tuple[DisplayName, TrainTest], ModelEvidence] = {}
    for name, row in rows.items():
        for setting in SETTINGS:
            cell = table.cells[row, setting]
            if cell.accuracy is not None:
                confusions = tuple(judgement.confusion for judgement in cell.judgements)
                evidence[name, setting] = ModelEvidence(cell.accuracy, cell.outcomes, confusions)
    return Evidence(table.dataset, table.class_names, evidence)


def published_case(class_names: tuple[str, ...]) -> Evidence:
    """Return the published numbers as evidence, each as one run, to test the claims under their sampling error alone."""
    evidence = {key: ModelEvidence(from_accuracies([result.accuracy], result.count)) for key, result in PUBLISHED.items()}
    return Evidence(PUBLISHED_ALONE, class_names, evidence)


def _validations(table: Table, row: Row) -> list[Validation]:
    """Return the validations of a row's runs trained on original, or of all its runs if there are none."""
    trials = {id(trial): trial for setting in SETTINGS for trial in table.cells[row, setting].trials}.values()
    own = [trial for trial in trials if trial.variant == "original"] or trials
    return [trial.validation for trial in own if trial.validation is not None]


def _mean(validations: Sequence[Validation], metric: str) -> float:
    """Return the mean of a validation metric, signed so that larger is better; other metrics are skipped."""
    values = [one.value for one in validations if one.metric == metric]
    return (-1.0 if metric == "loss" else 1.0) * math.fsum(values) / len(values) if values else -math.inf
