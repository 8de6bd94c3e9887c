"""The six observations of the published work, each put to the test on our results.

Every observation is a claim about many comparisons that all have to hold. What each means exactly is said in its function;
``verdicts.py`` has the rule by which tests become a verdict. Accuracies are compared on the same galaxies where predictions were
kept (``comparisons.py``), classes by draws of their recalls (``recalls.py``).
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

# From tests to a verdict: supported, contradicted or undecided, in words that never say more than the tests.

PUBLISHED_ALONE = "published"
NUM_NAMED = 3  # missing results that a reason names
Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True, slots=True)
class ClaimTest:
    """One testable part of an observation.

    Args:
        claim: what it says.
        value: the number that it is about.
        error: its standard error; None where it has none.
        unit: of both: ``points`` (of accuracy, per cent) or empty.
        p_for: small where the data speak for the claim.
        p_against: small where they speak against it.
        test: how it was tested.
        notes: what the test could not take into account.
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
    """An observation of the published work, put to the test.

    Args:
        number: 1 to 6.
        statement: the observation.
        source: whose results these are: the data set's name, or ``published``.
        verdict: what the tests say.
        reason: why, in a sentence or two that name the data set.
        checks: the tests.
        p_for, p_against: of each check, adjusted for their number (Holm).
        missing: the results that were not there, each once.
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
    """A check that a difference of accuracies lies above 0: two-sided p values, counted on the side where it fell."""
    p_for = found.p_value if found.value > 0 else 1.0
    p_against = found.p_value if found.value < 0 else 1.0
    return _of_accuracy(claim, found, p_for, p_against, found.test)


def check_within(claim: str, found: Difference, margin: float) -> ClaimTest:
    """A check that a difference lies within a margin of 0: two one-sided tests (Schuirmann 1987, J. Pharmacokinet. 15, 657)."""
    p_for = max(found.p_above(-margin), found.p_below(margin))
    p_against = min(1.0, 2 * min(found.p_above(margin), found.p_below(-margin)))
    return _of_accuracy(claim, found, p_for, p_against, f"two one-sided t tests within {100 * margin:g} points")


def check_no_gain(claim: str, found: Difference, margin: float) -> ClaimTest:
    """A check that a difference is no gain: for it, that a gain of the margin is excluded; against it, a significant gain."""
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
    """The verdict on an observation all of whose checks have to hold.

    Contradicted where any check is refuted, supported where every check is there and confirmed, else undecided; p values are
    adjusted for the number of checks (Holm), for and against separately.

    Args:
        number: 1 to 6.
        statement: the observation.
        source: the data set's name, or ``published``.
        checks: those that could be made.
        num_planned: how many there are with all results.
        missing: what was not there for the others.
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
    """What a verdict is about; one about other galaxies says that these are not the real Galaxy10."""
    if source == PUBLISHED_ALONE:
        return "By the published numbers alone"
    return "On the real Galaxy10 DECaLS" if source == REAL_DATASET else f"On {source}, which is not the real Galaxy10 DECaLS,"


def _shown(check: ClaimTest, p: float) -> str:
    return f"{check} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})."


def _of_accuracy(claim: str, found: Difference, p_for: float, p_against: float, test: str) -> ClaimTest:
    return ClaimTest(claim, 100 * found.value, 100 * found.standard_error, "points", p_for, p_against, test, found.notes)


# How sure the recalls of the classes are, and what derives from them: which class is worst, how even the classes are.
#
# Neither has a closed form, so they are judged by draws. A draw takes as many seeds as there are, with replacement,
# averages their
# recalls, widens the distance to the mean of all seeds by sqrt(n / (n - 1)) (so that few seeds give their full variance:
# Rao & Wu
# 1988, JASA 83, 231), and then draws each class's recall p from Beta(p M + 1/2, (1 - p) M + 1/2) (Jeffreys' prior: Brown,
# Cai &
# DasGupta 2001, Stat. Sci. 16, 101; a plain bootstrap of a class without a mistake would never show one). The galaxies are
# those of
# one test set, so their error is drawn once, whatever the number of seeds.
#
# M is the number of galaxies in the class. Where the outcomes of several seeds are known, it is the number that gives the
# variance
# over the galaxies of their shares of correct seeds, and the seeds' deviations are lessened by what of them is no property
# of a
# seed (the rest of ``sampling.py``), which that variance holds already. Two models on the same galaxies are drawn together,
# linked
# by a normal copula (Nelsen 2006, "An Introduction to Copulas", section 2.3) with the correlation of those shares in each
# class.

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
    """Recalls of the classes as they might have come out, D draws x K; nan for a class without galaxies.

    Args:
        confusions_SKK: S seeds x K x K counts on one test set; row: true class.
        stream: draws of different streams are independent; those of one are equal.
        num_draws: D.
        outcomes: of the single galaxies, where they are known.
        places_DK: where in its distribution each draw of the galaxies falls, 0 to 1, instead of the stream's own.
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
    """Places for the draws of two models on the same galaxies, D x K each, with this correlation of their normal scores."""
    from scipy.special import ndtr, ndtri

    shared_K = np.asarray(correlation_K, np.float64)
    draws_D, classes_K = np.arange(num_draws)[:, None], np.arange(len(shared_K))
    first_DK, own_DK = uniform(stream, 1, draws_D, classes_K), uniform(stream, 2, draws_D, classes_K)
    second_DK = ndtr(shared_K * ndtri(first_DK) + np.sqrt(1 - shared_K**2) * ndtri(own_DK))
    return first_DK, second_DK


def outcome_correlation(first: CellOutcomes, second: CellOutcomes, num_classes: int) -> Floats:
    """Correlation of two models' shares of correct seeds over the galaxies of each class, K; 0 where it is not defined."""
    found_K = np.zeros(num_classes)
    for label in range(num_classes):
        shares = [one.correct_SN[:, one.labels_N == label].mean(axis=0) for one in (first, second)]
        if len(shares[0]) > 1 and all(np.ptp(share_N) > 0 for share_N in shares):
            found_K[label] = np.corrcoef(*shares)[0, 1]
    return np.clip(found_K, -0.99, 0.99)


def _parts(support_K: NDArray[np.int64], num_seeds: int, outcomes: CellOutcomes | None) -> tuple[Floats, Floats]:
    """M of the module's text, from N to n N, and the factor of the seeds' deviations, 0 to 1."""
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
    """Share of the draws in which a class has the smallest recall; 0 for a class without galaxies."""
    filled_DK = np.where(np.isnan(recalls_DK), np.inf, recalls_DK)
    return float((filled_DK.argmin(axis=1) == label).mean()) if not np.isnan(recalls_DK[0, label]) else 0.0


def p_not_worst(recalls_DK: Floats, label: int) -> float:
    """p value of "no class has a smaller recall": small where one has significantly, whichever (Bonferroni over the others).

    The probability of being the worst will not do: among ten equal classes it is often below 5 % for any given one.
    """
    others = [other for other in range(recalls_DK.shape[1]) if other != label and not np.isnan(recalls_DK[0, other])]
    if np.isnan(recalls_DK[0, label]) or not others:
        return 1.0
    return min(1.0, len(others) * min(p_value(recalls_DK[:, other] >= recalls_DK[:, label]) for other in others))


def spread(recalls_DK: Floats) -> Floats:
    """How uneven the classes are, by draw: the standard deviation of the recalls over the classes that have galaxies."""
    spread_D: Floats = np.nanstd(recalls_DK, axis=1)
    return spread_D


def p_value(is_against_D: NDArray[np.bool_]) -> float:
    """One-sided p value of draws, of which these speak against the claim; never 0 (Davison & Hinkley 1997, eq. 4.11)."""
    return (int(is_against_D.sum()) + 1) / (len(is_against_D) + 1)


# Accuracies this close count as close: a good twice the published distance of custom CNN and ViT on original data, 1.24 points.
MARGIN = 0.03
WEAKEST_CLASS = "disturbed"
VIT: DisplayName = "ViT"
CNN: DisplayName = "Custom CNN"


@dataclass(frozen=True)
class ModelEvidence:
    """What is known of a model in a setting.

    Args:
        accuracy: over seeds and galaxies.
        outcomes: of the single galaxies, where predictions were kept.
        confusions: one a seed; empty where they are not known.
    """

    accuracy: Estimate
    outcomes: CellOutcomes | None = None
    confusions: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Results of one data set, a line a model.

    Args:
        source: the data set's name, or ``published``.
        class_names: by label.
        evidence: by model and setting; what was not run is not there.
    """

    source: str
    class_names: tuple[str, ...]
    evidence: Mapping[tuple[DisplayName, TrainTest], ModelEvidence]


class _Checks:
    """Collects the checks of an observation, and what was missing for others."""

    def __init__(self, case: Evidence) -> None:
        self.case = case
        self.checks: list[ClaimTest] = []
        self.num_planned = 0
        self.missing: dict[str, None] = {}

    def add(
        self, claim: str, weights: Mapping[tuple[DisplayName, TrainTest], float], make: Callable[[str, Difference], ClaimTest]
    ) -> None:
        """A check of a weighted sum of accuracies on one test set."""
        if self.plan(list(weights)):
            found = [(weight, key, self.case.evidence[key]) for key, weight in weights.items()]
            terms = [Term(weight, known.accuracy, known.outcomes, key[0]) for weight, key, known in found]
            self.checks.append(make(claim, contrast(terms)))

    def plan(self, keys: Sequence[tuple[DisplayName, TrainTest]], *, confusions: bool = False) -> bool:
        """One more check; whether all that it needs is there. What is not is noted."""
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
    """ViT's accuracy lies above each other model's in each of the three published settings."""
    checks = _Checks(case)
    for setting in PUBLISHED_SETTINGS:
        for model in CNNS:
            checks.add(f"ViT above {model}, {setting}", {(VIT, setting): 1.0, (model, setting): -1.0}, check_above)
    return checks.judge(1, "ViT is best in every setting.")


def cnn_is_close_but_drops(case: Evidence) -> ClaimAnswer:
    """On original data the two lie within ``MARGIN``; on the original test set the CNN is worse when trained on balanced data."""
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
    """Each VGG's accuracy lies above each ResNet's in each of the three published settings."""
    checks = _Checks(case)
    for setting in PUBLISHED_SETTINGS:
        for vgg in VGGS:
            for resnet in RESNETS:
                checks.add(f"{vgg} above {resnet}, {setting}", {(vgg, setting): 1.0, (resnet, setting): -1.0}, check_above)
    return checks.judge(3, "VGG-16 and VGG-19 beat the ResNets.")


def depth_does_not_help(case: Evidence) -> ClaimAnswer:
    """No deeper ResNet gains on a shallower one: supported only where gains of ``MARGIN`` are excluded, not for want of data."""
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
    """Trained and tested on original, disturbed has the smallest recall of all classes in every CNN, and has not in ViT.

    It is the worst where all but 5 % of the draws say so; it is not where another class is significantly worse.
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
    """Balanced against original training, judged on the original test set.

    The classes are more even: the standard deviation of the recalls over the classes is smaller, in each model. It costs accuracy
    in each model but ViT, and costs each of them more than ViT.
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
    """The six observations, in order."""
    return [question(case) for question in QUESTIONS]


def _check_spread(claim: str, before: ModelEvidence, after: ModelEvidence, *, stream: int) -> ClaimTest:
    """A check that the recalls are less spread after than before, on the same test set."""
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
    # Two-sided, like those of the accuracies.
    p_for, p_against = (min(1.0, 2 * p_value(is_against_D)) for is_against_D in (gains_D <= 0, gains_D >= 0))
    value, error = 100 * float(gains_D.mean()), 100 * float(gains_D.std())
    return ClaimTest(claim, value, error, "points", p_for, p_against, "draws of the recalls", notes)


def choose_rows(table: Table, regime: str) -> dict[DisplayName, Row]:
    """The line of each published model that stands for it, among those of a regime: the best by validation, never by a test.

    Args:
        table: of the results.
        regime: ``reference`` or ``own``.
    """
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
    """What a table's lines say of the published models."""
    evidence: dict[tuple[DisplayName, TrainTest], ModelEvidence] = {}
    for name, row in rows.items():
        for setting in SETTINGS:
            cell = table.cells[row, setting]
            if cell.accuracy is not None:
                confusions = tuple(judgement.confusion for judgement in cell.judgements)
                evidence[name, setting] = ModelEvidence(cell.accuracy, cell.outcomes, confusions)
    return Evidence(table.dataset, table.class_names, evidence)


def published_case(class_names: tuple[str, ...]) -> Evidence:
    """The published numbers as if they were a run of each model: what do they themselves support, given their sampling error?"""
    evidence = {key: ModelEvidence(from_accuracies([result.accuracy], result.count)) for key, result in PUBLISHED.items()}
    return Evidence(PUBLISHED_ALONE, class_names, evidence)


def _validations(table: Table, row: Row) -> list[Validation]:
    """Of a line's runs trained on original, else of all."""
    trials = {id(trial): trial for setting in SETTINGS for trial in table.cells[row, setting].trials}.values()
    own = [trial for trial in trials if trial.variant == "original"] or trials
    return [trial.validation for trial in own if trial.validation is not None]


def _mean(validations: Sequence[Validation], metric: str) -> float:
    """Larger is better; those of another metric do not count."""
    values = [one.value for one in validations if one.metric == metric]
    return (-1.0 if metric == "loss" else 1.0) * math.fsum(values) / len(values) if values else -math.inf
