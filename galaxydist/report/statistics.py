"""Statistics of runs: means over seeds and galaxies with their errors, and tests between them.

All n seeds are evaluated on the same N galaxies: outcome y_si = mean + seed_s + galaxy_i + rest_si, a two-way random-effects
layout without replication (Cornfield & Tukey 1956, Ann. Math. Stat. 27, 907; Searle, Casella & McCulloch 1992, "Variance
Components", section 4.7). The variance of the mean of all n N outcomes is

    V = seed / n + galaxy / N + rest / (n N).

More seeds do not reduce the error from the choice of galaxies, and more galaxies do not reduce the error from the seeds, so a
test between two trainings must contain both (Dror et al. 2018, ACL, P18-1128; Bouthillier et al. 2021, MLSys, arXiv:2103.03098).
An unbiased estimate uses the mean squares of the rows (seeds), columns (galaxies) and the rest,

    V = (MS_seeds + MS_galaxies - MS_rest) / (n N);   MS_seeds / (n N) = s^2 / n, where s is the deviation between seeds' means.

If only each seed's mean is known, galaxy / N is replaced by an upper bound, the total variance between outcomes over N
(p (1 - p) / N for an accuracy p). This is too large by rest / N, so the tests are conservative.

Differences are tested by Student's t with the degrees of freedom of Welch (1938, 1947) and Satterthwaite (1946):
nu = (sum V_j)^2 / sum (V_j^2 / nu_j) over the independent parts V_j of the variance. In simulations, a test at the 5 % level
between our mean and the number of one training rejects equality in 4 to 6 % of cases if the seeds' variance is below a quarter
of the galaxies'; in 8, 6 and 6 % with 2, 3 and 5 seeds if it is half of it; and in 10, 7 and 6 % if it is as large. Two seeds
are too few for more than a first impression.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.errors import UserError, first_line
from galaxydist.report.finished_runs import FinishedRun
from galaxydist.report.published_results import PublishedResult

ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and galaxies.

    Args:
        mean: over all seeds and galaxies.
        num_seeds: n.
        num_galaxies: N, the same galaxies under all seeds.
        galaxy_variance: part of the variance of ``mean`` due to the choice of galaxies; None where unknown.
        seed_variance: s^2 / n, the part due to the seeds and the rest; None with a single seed.
        rest_variance: rest / N, the part of s^2 that is not due to the seed itself; 0 where unknown.
    """

    mean: float
    num_seeds: int
    num_galaxies: int
    galaxy_variance: float | None
    seed_variance: float | None
    rest_variance: float = 0.0

    @property
    def seed_error(self) -> float | None:
        """Standard error over seeds alone, s / sqrt(n)."""
        return None if self.seed_variance is None else math.sqrt(self.seed_variance)

    @property
    def standard_error(self) -> float | None:
        """Standard error over galaxies and seeds (with one seed, over galaxies alone); None if ``galaxy_variance`` is None."""
        return None if self.galaxy_variance is None else math.sqrt(self.galaxy_variance + (self.seed_variance or 0.0))

    @property
    def between_seeds(self) -> float | None:
        """Variance between the true means of the seeds: s^2 minus the rest, at least 0; None with a single seed."""
        return None if self.seed_variance is None else max(0.0, self.seed_variance * self.num_seeds - self.rest_variance)

    @property
    def parts(self) -> list[tuple[float, float]]:
        """Known independent parts of the variance, each with its degrees of freedom."""
        parts = [] if self.galaxy_variance is None else [(self.galaxy_variance, self.num_galaxies - 1.0)]
        return parts if self.seed_variance is None else [*parts, (self.seed_variance, self.num_seeds - 1.0)]


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of two means, with its test.

    Args:
        value: the difference.
        standard_error: of the value.
        degrees_of_freedom: of Student's t; inf if the error is taken as known.
        p_value: two-sided; of Student's t, unless ``test`` names another test.
        test: name of the test.
        notes: limitations of the test.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float
    p_value: float
    test: str
    notes: tuple[str, ...] = ()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the value by Student's t."""
        half = t_quantile(0.5 + level / 2, self.degrees_of_freedom) * self.standard_error
        return self.value - half, self.value + half

    def p_above(self, bound: float) -> float:
        """Return the one-sided p value of "not above the bound": small if the value is significantly above it."""
        return t_tail(self.value - bound, self.standard_error, self.degrees_of_freedom)

    def p_below(self, bound: float) -> float:
        """Return the one-sided p value of "not below the bound": small if the value is significantly below it."""
        return t_tail(bound - self.value, self.standard_error, self.degrees_of_freedom)


def from_outcomes(outcomes_SN: ArrayLike) -> Estimate:
    """Return the estimate from each galaxy's outcome under each seed.

    Args:
        outcomes_SN: S seeds x N galaxies (the same in each row): 0 or 1 for an accuracy, nats for a loss.

    Raises:
        ValueError: fewer than one seed or two galaxies.
    """
    values_SN = np.asarray(outcomes_SN, np.float64)
    num_seeds, num_galaxies = values_SN.shape
    if num_seeds < 1 or num_galaxies < 2:
        raise ValueError(f"an estimate needs a seed and two galaxies, not {num_seeds} and {num_galaxies}")
    seeds_S, galaxies_N = values_SN.mean(axis=1), values_SN.mean(axis=0)
    mean = float(seeds_S.mean())
    between_galaxies = float(galaxies_N.var(ddof=1)) / num_galaxies
    if num_seeds == 1:
        return Estimate(mean, 1, num_galaxies, between_galaxies, None)
    rest_SN = values_SN - seeds_S[:, None] - galaxies_N + mean
    rest = float((rest_SN**2).sum()) / ((num_seeds - 1) * (num_galaxies - 1))  # a mean square
    galaxy_variance = max(0.0, between_galaxies - rest / (num_seeds * num_galaxies))
    seed_variance = float(seeds_S.var(ddof=1)) / num_seeds
    return Estimate(mean, num_seeds, num_galaxies, galaxy_variance, seed_variance, rest / num_galaxies)


def from_accuracies(accuracies_S: Sequence[float], num_galaxies: int) -> Estimate:
    """Return the estimate from the seeds' accuracies alone: the galaxies' part is binomial, p (1 - p) / N (an upper bound)."""
    mean = math.fsum(accuracies_S) / len(accuracies_S)
    return from_means(accuracies_S, num_galaxies, mean * (1 - mean))


def from_means(means_S: Sequence[float], num_galaxies: int, variance: float | None) -> Estimate:
    """Return the estimate from the seeds' means.

    Args:
        means_S: one mean per seed.
        num_galaxies: N.
        variance: between the outcomes of single galaxies under one seed; None where unknown.
    """
    num_seeds = len(means_S)
    mean = math.fsum(means_S) / num_seeds
    seed_variance = math.fsum((value - mean) ** 2 for value in means_S) / (num_seeds - 1) / num_seeds if num_seeds > 1 else None
    return Estimate(mean, num_seeds, num_galaxies, None if variance is None else variance / num_galaxies, seed_variance)


def difference(value: float, parts: Sequence[tuple[float, float]], test: str, notes: Sequence[str] = ()) -> Difference:
    """Test a difference by Student's t.

    Args:
        value: the difference.
        parts: the independent parts of its variance, each with its degrees of freedom.
        test: name of the test.
        notes: sources of error that the variance lacks.
    """
    variance = math.fsum(part for part, _ in parts)
    spread = math.fsum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / spread if spread > 0 else math.inf
    error = math.sqrt(variance)
    return Difference(value, error, freedom, min(1.0, 2 * t_tail(abs(value), error, freedom)), test, tuple(notes))


def t_tail(value: float, standard_error: float, degrees_of_freedom: float) -> float:
    """Return the probability that Student's t exceeds value / standard error.

    Without error it is 0, 1/2 or 1 by the value's sign.
    """
    from scipy.special import ndtr, stdtr

    if standard_error == 0:
        return 0.5 if value == 0 else float(value < 0)
    ratio = value / standard_error
    return float(ndtr(-ratio) if math.isinf(degrees_of_freedom) else stdtr(degrees_of_freedom, -ratio))


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    from scipy.special import ndtri, stdtrit

    return float(ndtri(probability) if math.isinf(degrees_of_freedom) else stdtrit(degrees_of_freedom, probability))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for multiple testing, so that the probability of any false rejection stays below the level.

    Holm (1979), Scand. J. Stat. 6, 65: the i-th smallest of m times (m - i + 1), made monotone, at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# Outcomes of single galaxies, matched between runs by galaxy id.

COLUMNS = ("id", "label", "logits")


@dataclass(frozen=True)
class Outcomes:
    """Predictions of one run on a test set, ordered by id.

    Args:
        ids_N: str, unique, ascending.
        labels_N: int64.
        log_probabilities_NK: float64.
        source: origin of the predictions, for messages.
    """

    ids_N: NDArray[np.str_]
    labels_N: NDArray[np.int64]
    log_probabilities_NK: NDArray[np.float64]
    source: str = "predictions"

    @cached_property
    def predicted_N(self) -> NDArray[np.int64]:
        """Most probable class of each galaxy; the first one of ties."""
        predicted_N: NDArray[np.int64] = self.log_probabilities_NK.argmax(axis=1)
        return predicted_N

    @cached_property
    def correct_N(self) -> NDArray[np.bool_]:
        """True for each galaxy whose most probable class is its label."""
        correct_N: NDArray[np.bool_] = self.predicted_N == self.labels_N
        return correct_N

    @cached_property
    def losses_N(self) -> NDArray[np.float64]:
        """Cross-entropy of each galaxy in nats, unweighted."""
        losses_N: NDArray[np.float64] = -self.log_probabilities_NK[np.arange(len(self.labels_N)), self.labels_N]
        return losses_N

    def take(self, ids_M: NDArray[np.str_]) -> "Outcomes":
        """Return the outcomes of some of its galaxies (ids ascending)."""
        if len(ids_M) == len(self.ids_N):
            return self
        rows_M = np.searchsorted(self.ids_N, ids_M)
        return Outcomes(ids_M, self.labels_N[rows_M], self.log_probabilities_NK[rows_M], self.source)


def build_outcomes(ids: Sequence[str], labels: Sequence[int], logits: Any, *, source: str = "predictions") -> Outcomes:
    """Build outcomes from columns in any order.

    Args:
        ids: N galaxy ids.
        labels: N class numbers.
        logits: N x K, any float type; their softmax gives the probabilities.
        source: origin of the columns, for messages.

    Raises:
        UserError: an id occurs twice, a label has no column of logits, or a logit is not finite.
    """
    from scipy.special import log_softmax

    order_N = np.argsort(np.asarray(ids, np.str_), kind="stable")
    ids_N, labels_N = np.asarray(ids, np.str_)[order_N], np.asarray(labels, np.int64)[order_N]
    logits_NK = np.asarray(logits, np.float64)[order_N]
    again = ids_N[1:][ids_N[1:] == ids_N[:-1]]
    if len(again):
        raise UserError(f"{source} holds the galaxy {again[0]} twice. Evaluate the run again.")
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < logits_NK.shape[1]:
        raise UserError(f"{source} holds labels without a column of logits. Evaluate the run again.")
    if not np.isfinite(logits_NK).all():
        raise UserError(f"{source} holds logits that are not finite: the model's weights are broken.")
    return Outcomes(ids_N, labels_N, log_softmax(logits_NK, axis=1), source)


def read_outcomes(path: Path) -> Outcomes:
    """Read the outcomes from a file of predictions (Parquet with columns id, label and logits).

    Raises:
        UserError: the file is missing, damaged or has other columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=list(COLUMNS))
        columns = {name: table.column(name).combine_chunks() for name in COLUMNS}
        scores = columns["logits"].flatten().to_numpy(zero_copy_only=False)
        logits_NK = scores.reshape(table.num_rows, -1) if table.num_rows else np.empty((0, 1))
        ids, labels = columns["id"].to_pylist(), columns["label"].to_numpy(zero_copy_only=False)
    except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path} cannot be read as predictions ({reason}). Make it again with `galaxydist evaluate RUN`."
        ) from error
    return build_outcomes(ids, labels, logits_NK, source=str(path))


def match(outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """Return the outcomes of several runs on the galaxies that they share, in the same order.

    Raises:
        UserError: the runs share no galaxy, differ in the number of classes, or give a galaxy different labels.
    """
    first = outcomes[0]
    shared = reduce(_intersect, (one.ids_N for one in outcomes))
    for other in outcomes[1:]:
        if len(shared) == 0:
            raise UserError(f"{first.source} and {other.source} have no galaxy in common: they are of different test sets.")
        if other.log_probabilities_NK.shape[1] != first.log_probabilities_NK.shape[1]:
            raise UserError(f"{first.source} and {other.source} are about different numbers of classes.")
    matched = [one.take(shared) for one in outcomes]
    for other in matched[1:]:
        if wrong := np.flatnonzero(other.labels_N != matched[0].labels_N).tolist():
            raise UserError(
                f"{len(wrong)} galaxies have other labels in {other.source} than in {first.source}, the first is "
                f"{shared[wrong[0]]}: they are of different data sets."
            )
    return matched


def _intersect(left: NDArray[np.str_], right: NDArray[np.str_]) -> NDArray[np.str_]:
    if np.array_equal(left, right):  # the usual case, and much faster
        return left
    return np.intersect1d(left, right, assume_unique=True)


# Statistics across runs: McNemar's test, ensembles, and the ranking by validation.


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test of two models on the same galaxies.

    Args:
        both: number of galaxies that both classify correctly.
        only_first: number that only the first classifies correctly.
        only_second: number that only the second classifies correctly.
        neither: number that neither classifies correctly.
        p_value: two-sided; null hypothesis: the discordant galaxies are evenly distributed over the two.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float

    @property
    def count(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the first model minus that of the second."""
        return (self.only_first - self.only_second) / self.count

    def __str__(self) -> str:
        return f"McNemar's exact test ({self.only_first} to {self.only_second} discordant galaxies)"


def mcnemar(first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]) -> McNemar:
    """Run McNemar's exact test (1947, Psychometrika 12, 153): of d discordant galaxies, Binomial(d, 1/2) are the first's.

    Args:
        first_N: True for each galaxy that the first model classifies correctly.
        second_N: the same for the second model; the same galaxies in the same order.
    """
    from scipy.stats import binomtest

    if first_N.shape != second_N.shape:
        raise ValueError(f"outcomes of {len(first_N)} and {len(second_N)} galaxies are not paired")
    only_first, only_second = int((first_N & ~second_N).sum()), int((~first_N & second_N).sum())
    both, discordant = int((first_N & second_N).sum()), only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(both, only_first, only_second, len(first_N) - both - discordant, p_value)


def compare_runs(first: Outcomes, second: Outcomes) -> McNemar:
    """Run McNemar's test between two runs on the galaxies that they share, matched by id.

    Raises:
        UserError: the runs are of different data sets.
    """
    one, other = match([first, second])
    return mcnemar(one.correct_N, other.correct_N)


def build_ensemble(runs: Sequence[Outcomes]) -> Outcomes:
    """Return the outcomes of an ensemble: the mean of the runs' probabilities, on the galaxies that they share.
    Raises:
        UserError: the runs are of different data sets.
    """
    from scipy.special import logsumexp

    matched = match(runs)
    mean_NK = logsumexp(np.stack([run.log_probabilities_NK for run in matched]), axis=0) - np.log(len(matched))
    return Outcomes(matched[0].ids_N, matched[0].labels_N, mean_NK, f"ensemble of {len(matched)} runs")


def rank_trials(trials: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Rank runs from best to worst by the validation metric that selected their checkpoints, never by test results.

    Returns:
        The ranked runs, and those that cannot be ranked: without a validation, or with another metric than most.
    """
    metrics = [trial.validation.metric for trial in trials if trial.validation is not None]
    usual = max(metrics, key=metrics.count, default=None)
    values = {
        index: trial.validation.value
        for index, trial in enumerate(trials)
        if trial.validation is not None and trial.validation.metric == usual
    }
    ordered = sorted(values, key=lambda index: values[index], reverse=usual != "loss")
    return [trials[index] for index in ordered], [trial for index, trial in enumerate(trials) if index not in values]


# Comparisons of cells with published values, and with each other on the same galaxies. Assumptions:
#
# - Published numbers are of another split of the same 17,736 galaxies, so a tenth (balanced: a fifth) of the test galaxies is
#   expected in both. The small correlation of the two errors is neglected, which makes the tests conservative.
# - The published training has the same variance between seeds as ours.

ONE_SEED = "one seed: the error between trainings is not in the test"
NOT_PAIRED = "compared as if on different galaxies (no predictions): errs to the side of no difference"


@dataclass(frozen=True)
class CellOutcomes:
    """Outcomes of N galaxies under each of S seeds.

    Args:
        ids_N: ascending.
        labels_N: int64.
        correct_SN: bool.
        losses_SN: float64, nats.
    """

    ids_N: NDArray[np.str_]
    labels_N: NDArray[np.int64]
    correct_SN: NDArray[np.bool_]
    losses_SN: NDArray[np.float64]

    def is_paired(self, other: "CellOutcomes") -> bool:
        """Return True if both cells have the same galaxies."""
        return np.array_equal(self.ids_N, other.ids_N)


@dataclass(frozen=True)
class Term:
    """Term of a contrast: a cell with its weight.

    Args:
        weight: factor of its accuracy.
        estimate: of its accuracy.
        outcomes: of the single galaxies; None where they are not known.
        name: for notes.
    """

    weight: float
    estimate: Estimate
    outcomes: CellOutcomes | None = None
    name: str = ""


def stack_outcomes(runs: Sequence[Outcomes]) -> CellOutcomes:
    """Stack the outcomes of several seeds on the galaxies that they share.

    Raises:
        UserError: the runs are of different data sets.
    """
    matched = match(runs)
    correct_SN = np.stack([run.correct_N for run in matched])
    return CellOutcomes(matched[0].ids_N, matched[0].labels_N, correct_SN, np.stack([run.losses_N for run in matched]))


def against_published(
    ours: Estimate, published: PublishedResult, quantity: str, *, num_published_runs: int | None = 1
) -> Difference | None:
    """Test ours minus a published value by a two-sample test with the errors of both.

    Ours varies by galaxies and seeds. A published accuracy p on N galaxies has the binomial variance p (1 - p) / N. The variance
    of a published loss between galaxies is not known; ours is used, divided by the published N. The published number is the mean
    of ``num_published_runs`` trainings, each with our variance between seeds.

    Args:
        ours: of the accuracy or the loss.
        published: the published values.
        quantity: ``accuracy`` or ``loss``.
        num_published_runs: number of trainings whose mean was published; None: taken as infinite, so that the published value
            has only the error of its galaxies.

    Returns:
        The difference; None if the galaxies' part of our error is not known (a loss without predictions).
    """
    if ours.galaxy_variance is None:
        return None
    theirs = published.accuracy if quantity == "accuracy" else published.loss
    notes = []
    if quantity == "accuracy":
        variance = theirs * (1 - theirs) / published.count
    else:
        # Variance of one run: the galaxies' part and the rest.
        variance = (ours.galaxy_variance + ours.rest_variance) * ours.num_galaxies / published.count
        notes.append("the published loss's variance between galaxies is not known: ours stands in for it")
    parts = [(ours.galaxy_variance, ours.num_galaxies - 1.0), (variance, published.count - 1.0)]
    if ours.seed_variance is None or ours.between_seeds is None:
        notes.append(ONE_SEED)
    else:
        repeated = ours.between_seeds / num_published_runs if num_published_runs else 0.0
        parts.append((ours.seed_variance + repeated, ours.num_seeds - 1.0))
    return difference(ours.mean - theirs, parts, "two-sample t test (Welch-Satterthwaite)", notes)


def contrast(terms: Sequence[Term]) -> Difference:
    """Test a weighted sum of accuracies on one test set against 0.

    With predictions the galaxies are paired: d_i = sum_k w_k (mean over seeds of model k on galaxy i) has the variance
    var(d_i) = sum_i (d_i - d)^2 / (N - 1). Both var(d_i) / N and the seeds' variances contain the rest, so it is subtracted once:

        V = var(d_i) / N - sum_k w_k^2 rest_k / (n_k N) + sum_k w_k^2 s_k^2 / n_k.

    The p value of two models with one seed each is that of McNemar's exact test. Without predictions the models count as
    evaluated on different galaxies; if both find the same galaxies difficult, this overestimates the error.
    """
    value = math.fsum(term.weight * term.estimate.mean for term in terms)
    single = [term.name for term in terms if term.estimate.num_seeds == 1]
    notes = [f"{', '.join(dict.fromkeys(single))}: {ONE_SEED}" if any(single) else ONE_SEED] if single else []
    seeds = [
        (term.weight**2 * term.estimate.seed_variance, term.estimate.num_seeds - 1.0)
        for term in terms
        if term.estimate.seed_variance is not None
    ]
    paired = _paired_rates(terms)
    if paired is None:
        galaxies = [(term.weight**2 * (term.estimate.galaxy_variance or 0.0), term.estimate.num_galaxies - 1.0) for term in terms]
        return difference(value, [*galaxies, *seeds], "two-sample t test (Welch-Satterthwaite)", [*notes, NOT_PAIRED])
    num_galaxies = paired.shape[1]
    weighted_N = np.array([term.weight for term in terms]) @ paired
    rest = math.fsum(term.weight**2 * term.estimate.rest_variance / term.estimate.num_seeds for term in terms)
    galaxy_variance = max(0.0, float(weighted_N.var(ddof=1)) / num_galaxies - rest)
    parts = [(galaxy_variance, num_galaxies - 1.0), *seeds]
    found = difference(value, parts, "paired t test over galaxies and seeds (Welch-Satterthwaite)", notes)
    if [term.weight for term in terms] != [1.0, -1.0] or len(single) != 2:
        return found
    exact = mcnemar(paired[0] > 0.5, paired[1] > 0.5)
    return Difference(value, found.standard_error, found.degrees_of_freedom, exact.p_value, str(exact), tuple(notes))


def _paired_rates(terms: Sequence[Term]) -> NDArray[np.float64] | None:
    """Return each term's share of correct seeds by galaxy, terms x N; None unless all are known on the same galaxies."""
    known = [term.outcomes for term in terms if term.outcomes is not None]
    if len(known) < len(terms) or not all(one.is_paired(known[0]) for one in known[1:]):
        return None
    return np.stack([one.correct_SN.mean(axis=0) for one in known])
