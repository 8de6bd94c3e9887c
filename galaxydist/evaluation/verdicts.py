"""From tests to a verdict: supported, contradicted or undecided, in words that never say more than the tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from galaxydist.evaluation.sampling import ALPHA, Difference, holm
from galaxydist.surveys.official_split import NAME as REAL_DATASET

PUBLISHED_ALONE = "published"
NUM_NAMED = 3  # missing results that a reason names
Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True, slots=True)
class Check:
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
class Observation:
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
    checks: tuple[Check, ...]
    p_for: tuple[float, ...]
    p_against: tuple[float, ...]
    missing: tuple[str, ...]


def check_above(claim: str, found: Difference) -> Check:
    """A check that a difference of accuracies lies above 0: two-sided p values, counted on the side where it fell."""
    p_for = found.p_value if found.value > 0 else 1.0
    p_against = found.p_value if found.value < 0 else 1.0
    return _of_accuracy(claim, found, p_for, p_against, found.test)


def check_within(claim: str, found: Difference, margin: float) -> Check:
    """A check that a difference lies within a margin of 0: two one-sided tests (Schuirmann 1987, J. Pharmacokinet. 15, 657)."""
    p_for = max(found.p_above(-margin), found.p_below(margin))
    p_against = min(1.0, 2 * min(found.p_above(margin), found.p_below(-margin)))
    return _of_accuracy(claim, found, p_for, p_against, f"two one-sided t tests within {100 * margin:g} points")


def check_no_gain(claim: str, found: Difference, margin: float) -> Check:
    """A check that a difference is no gain: for it, that a gain of the margin is excluded; against it, a significant gain."""
    p_against = found.p_value if found.value > 0 else 1.0
    test = f"one-sided t test against a gain of {100 * margin:g} points; against the claim: {found.test}"
    return _of_accuracy(claim, found, found.p_below(margin), p_against, test)


def judge(
    number: int,
    statement: str,
    source: str,
    checks: Sequence[Check],
    *,
    num_planned: int,
    missing: Sequence[str] = (),
    alpha: float = ALPHA,
) -> Observation:
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
    return Observation(number, statement, source, verdict, reason, tuple(checks), tuple(p_for), tuple(p_against), tuple(missing))


def where_of(source: str) -> str:
    """What a verdict is about; one about other galaxies says that these are not the real Galaxy10."""
    if source == PUBLISHED_ALONE:
        return "By the published numbers alone"
    return "On the real Galaxy10 DECaLS" if source == REAL_DATASET else f"On {source}, which is not the real Galaxy10 DECaLS,"


def _shown(check: Check, p: float) -> str:
    return f"{check} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})."


def _of_accuracy(claim: str, found: Difference, p_for: float, p_against: float, test: str) -> Check:
    return Check(claim, 100 * found.value, 100 * found.standard_error, "points", p_for, p_against, test, found.notes)
