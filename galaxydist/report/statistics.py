"""A mean over seeds and test galaxies, the error that both bring to it, and tests between such means.

The same N galaxies are judged under all n seeds: outcome y_si = mean + seed_s + galaxy_i + rest_si, a two-way random-effects
layout without replication (Cornfield & Tukey 1956, Ann. Math. Stat. 27, 907; Searle, Casella & McCulloch 1992, "Variance
Components", section 4.7). The variance of the mean of all n N outcomes is

    V = seed / n + galaxy / N + rest / (n N),

so the error that the choice of galaxies brings does not shrink with more seeds, nor the other with more galaxies: both have to be
in a test between two trainings (Dror et al. 2018, ACL, P18-1128; Bouthillier et al. 2021, MLSys, arXiv:2103.03098). It is
estimated without bias from the mean squares of the rows (seeds), columns (galaxies) and the rest,

    V = (MS_seeds + MS_galaxies - MS_rest) / (n N);   MS_seeds / (n N) = s^2 / n, where s is the deviation between seeds' means.

Where only each seed's mean is known, galaxy / N is replaced by its upper bound, the whole variance between outcomes over N
(p (1 - p) / N for an accuracy p): too large by rest / N, so tests err to the side of no difference.

Differences are judged by Student's t with the degrees of freedom of Welch (1938, 1947) and Satterthwaite (1946):
nu = (sum V_j)^2 / sum (V_j^2 / nu_j) over the independent parts V_j of the variance. Simulated, a test at 5 % between our mean
and the number of one training rejects what is equal in 4 to 6 % of cases where the seeds' variance is below a quarter of the
galaxies'; where it is half of theirs in 8, 6 and 6 % with 2, 3 and 5 seeds, where it is as large in 10, 7 and 6 %. Two seeds are
too few for anything but a first look.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.errors import UserError
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
        galaxy_variance: what the choice of galaxies adds to the variance of ``mean``; None where nothing is known of it.
        seed_variance: s^2 / n, what the seeds add to it (and the rest); None with a single seed.
        rest_variance: rest / N, the part of s^2 that is no property of a seed as a whole; 0 where it is not known.
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
        """Standard error over galaxies and seeds; over galaxies alone with a single seed; None where those are not known."""
        return None if self.galaxy_variance is None else math.sqrt(self.galaxy_variance + (self.seed_variance or 0.0))

    @property
    def between_seeds(self) -> float | None:
        """Variance of the seeds' true means about their own: s^2 less the rest, at least 0; None with a single seed."""
        return None if self.seed_variance is None else max(0.0, self.seed_variance * self.num_seeds - self.rest_variance)

    @property
    def parts(self) -> list[tuple[float, float]]:
        """The known independent parts of the variance, each with its degrees of freedom."""
        parts = [] if self.galaxy_variance is None else [(self.galaxy_variance, self.num_galaxies - 1.0)]
        return parts if self.seed_variance is None else [*parts, (self.seed_variance, self.num_seeds - 1.0)]


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two means, with its test.

    Args:
        value: the difference.
        standard_error: of the value.
        degrees_of_freedom: of Student's t; inf where the error counts as known.
        p_value: two-sided; of Student's t, unless ``test`` says otherwise.
        test: how it was tested, in words.
        notes: what the test could not take into account.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float
    p_value: float
    test: str
    notes: tuple[str, ...] = ()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the value by Student's t."""
        half = t_quantile(0.5 + level / 2, self.degrees_of_freedom) * self.standard_error
        return self.value - half, self.value + half

    def p_above(self, bound: float) -> float:
        """One-sided p value of "not above the bound": small where the value lies significantly above it."""
        return t_tail(self.value - bound, self.standard_error, self.degrees_of_freedom)

    def p_below(self, bound: float) -> float:
        """One-sided p value of "not below the bound": small where the value lies significantly below it."""
        return t_tail(bound - self.value, self.standard_error, self.degrees_of_freedom)


def from_outcomes(outcomes_SN: ArrayLike) -> Estimate:
    """The estimate from each galaxy's outcome under each seed.

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
    """The estimate from the seeds' accuracies alone: the galaxies' part is binomial, p (1 - p) / N (an upper bound)."""
    mean = math.fsum(accuracies_S) / len(accuracies_S)
    return from_means(accuracies_S, num_galaxies, mean * (1 - mean))


def from_means(means_S: Sequence[float], num_galaxies: int, variance: float | None) -> Estimate:
    """The estimate from the seeds' means.

    Args:
        means_S: one mean a seed.
        num_galaxies: N.
        variance: between the outcomes of single galaxies under one seed, where it is known.
    """
    num_seeds = len(means_S)
    mean = math.fsum(means_S) / num_seeds
    seed_variance = math.fsum((value - mean) ** 2 for value in means_S) / (num_seeds - 1) / num_seeds if num_seeds > 1 else None
    return Estimate(mean, num_seeds, num_galaxies, None if variance is None else variance / num_galaxies, seed_variance)


def difference(value: float, parts: Sequence[tuple[float, float]], test: str, notes: Sequence[str] = ()) -> Difference:
    """A difference judged by Student's t.

    Args:
        value: the difference.
        parts: the independent parts of its variance, each with its degrees of freedom.
        test: what is tested how.
        notes: what the variance lacks.
    """
    variance = math.fsum(part for part, _ in parts)
    spread = math.fsum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / spread if spread > 0 else math.inf
    error = math.sqrt(variance)
    return Difference(value, error, freedom, min(1.0, 2 * t_tail(abs(value), error, freedom)), test, tuple(notes))


def t_tail(value: float, standard_error: float, degrees_of_freedom: float) -> float:
    """Probability that Student's t exceeds value / standard error. Without any error: 0, 1/2 or 1 by the value's sign."""
    from scipy.special import ndtr, stdtr

    if standard_error == 0:
        return 0.5 if value == 0 else float(value < 0)
    ratio = value / standard_error
    return float(ndtr(-ratio) if math.isinf(degrees_of_freedom) else stdtr(degrees_of_freedom, -ratio))


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Quantile of Student's t."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(probability) if math.isinf(degrees_of_freedom) else stdtrit(degrees_of_freedom, probability))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, so that the chance of any false rejection stays below the level.

    Holm (1979), Scand. J. Stat. 6, 65: the i-th smallest of m times (m - i + 1), made monotone, at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# What a run predicted for each galaxy, matched by the galaxies' ids between runs.

COLUMNS = ("id", "label", "logits")


@dataclass(frozen=True)
class Outcomes:
    """One run's predictions on a test set, ordered by id.

    Args:
        ids_N: str, unique, ascending.
        labels_N: int64.
        log_probabilities_NK: float64.
        source: where they were read, for messages.
    """

    ids_N: NDArray[np.str_]
    labels_N: NDArray[np.int64]
    log_probabilities_NK: NDArray[np.float64]
    source: str = "predictions"

    @cached_property
    def predicted_N(self) -> NDArray[np.int64]:
        """The most probable class, the first of equals."""
        predicted_N: NDArray[np.int64] = self.log_probabilities_NK.argmax(axis=1)
        return predicted_N

    @cached_property
    def correct_N(self) -> NDArray[np.bool_]:
        """Whether the most probable class is the galaxy's."""
        correct_N: NDArray[np.bool_] = self.predicted_N == self.labels_N
        return correct_N

    @cached_property
    def losses_N(self) -> NDArray[np.float64]:
        """Plain cross-entropy in nats."""
        losses_N: NDArray[np.float64] = -self.log_probabilities_NK[np.arange(len(self.labels_N)), self.labels_N]
        return losses_N

    def take(self, ids_M: NDArray[np.str_]) -> "Outcomes":
        """Those of some of its galaxies (ids ascending)."""
        if len(ids_M) == len(self.ids_N):
            return self
        rows_M = np.searchsorted(self.ids_N, ids_M)
        return Outcomes(ids_M, self.labels_N[rows_M], self.log_probabilities_NK[rows_M], self.source)


def build_outcomes(ids: Sequence[str], labels: Sequence[int], logits: Any, *, source: str = "predictions") -> Outcomes:
    """Outcomes from columns in any order.

    Args:
        ids: N names.
        labels: N class numbers.
        logits: N x K, any float type; their softmax are the probabilities.
        source: where they come from, for messages.

    Raises:
        UserError: a galaxy stands there twice, a label has no column, or a number is not finite.
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
    """The outcomes in a file of predictions (Parquet with columns id, label and logits).

    Raises:
        UserError: it is missing, damaged or has other columns.
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
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as predictions ({reason}). Make it again with `galaxydist evaluate RUN`."
        ) from error
    return build_outcomes(ids, labels, logits_NK, source=str(path))


def match(outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """The outcomes of several runs on the galaxies that all of them judged, in the same order.

    Raises:
        UserError: they share no galaxy, know other numbers of classes, or a galaxy has two labels.
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
    if np.array_equal(left, right):  # nearly always, and much quicker
        return left
    return np.intersect1d(left, right, assume_unique=True)


# Statistics across runs: two models on the same galaxies, several runs as one, and which run is best by its validation.


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test of two models on the same galaxies.

    Args:
        both: galaxies that both classify correctly.
        only_first: that the first alone does.
        only_second: that the second alone does.
        neither: that none does.
        p_value: two-sided, that the discordant galaxies fall evenly on the two.
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
        """The first's accuracy minus the second's."""
        return (self.only_first - self.only_second) / self.count

    def __str__(self) -> str:
        return f"McNemar's exact test ({self.only_first} to {self.only_second} discordant galaxies)"


def mcnemar(first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]) -> McNemar:
    """McNemar's test (1947, Psychometrika 12, 153), exact: of d discordant galaxies, Binomial(d, 1/2) are the first's.

    Args:
        first_N: whether the first model classifies each galaxy correctly.
        second_N: the second, the same galaxies in the same order.
    """
    from scipy.stats import binomtest

    if first_N.shape != second_N.shape:
        raise ValueError(f"outcomes of {len(first_N)} and {len(second_N)} galaxies are not paired")
    only_first, only_second = int((first_N & ~second_N).sum()), int((~first_N & second_N).sum())
    both, discordant = int((first_N & second_N).sum()), only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(both, only_first, only_second, len(first_N) - both - discordant, p_value)


def compare_runs(first: Outcomes, second: Outcomes) -> McNemar:
    """McNemar's test between two runs on the galaxies that both judged, matched by id.

    Raises:
        UserError: they are of different data sets.
    """
    one, other = match([first, second])
    return mcnemar(one.correct_N, other.correct_N)


def build_ensemble(runs: Sequence[Outcomes]) -> Outcomes:
    """Several runs as one: the mean of their probabilities, on the galaxies that all judged.

    Raises:
        UserError: no run, or they are of different data sets.
    """
    from scipy.special import logsumexp

    matched = match(runs)
    mean_NK = logsumexp(np.stack([run.log_probabilities_NK for run in matched]), axis=0) - np.log(len(matched))
    return Outcomes(matched[0].ids_N, matched[0].labels_N, mean_NK, f"ensemble of {len(matched)} runs")


def rank_trials(trials: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Runs from best to worst by the validation metric that chose their checkpoints; no number of a test split takes part.

    Returns:
        The ranked runs, and those that cannot be ranked: without a validation, or chosen by another metric than most.
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


# Comparisons of cells of the results matrix: with published values, and with each other on the same galaxies.
#
# The formulas and their sources stand in ``sampling.py``. What they take as independent:
#
# - Published numbers are of another split of the same 17,736 galaxies, so a tenth (balanced: a fifth) of the test galaxies
# is
#   expected in both; that this makes the two errors a little alike is left out, and makes tests err to the side of no
# difference.
# - Training a model anew brings the published number as much error as ours: its variance between seeds is taken to be ours.

ONE_SEED = "one seed: the error between trainings is not in the test"
NOT_PAIRED = "compared as if on different galaxies (no predictions): errs to the side of no difference"


@dataclass(frozen=True)
class CellOutcomes:
    """How each of N galaxies came out under each of S seeds.

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
        """Whether another cell's are of the same galaxies."""
        return np.array_equal(self.ids_N, other.ids_N)


@dataclass(frozen=True)
class Term:
    """A cell's part in a contrast.

    Args:
        weight: its factor.
        estimate: of its accuracy.
        outcomes: single galaxies', where they are known.
        name: for notes.
    """

    weight: float
    estimate: Estimate
    outcomes: CellOutcomes | None = None
    name: str = ""


def stack_outcomes(runs: Sequence[Outcomes]) -> CellOutcomes:
    """The outcomes of several seeds on the galaxies that all of them judged.

    Raises:
        UserError: they do not fit together.
    """
    matched = match(runs)
    correct_SN = np.stack([run.correct_N for run in matched])
    return CellOutcomes(matched[0].ids_N, matched[0].labels_N, correct_SN, np.stack([run.losses_N for run in matched]))


def against_published(
    ours: Estimate, published: PublishedResult, quantity: str, *, num_published_runs: int | None = 1
) -> Difference | None:
    """Two-sample test of ours minus a published value; both have errors of their own.

    Ours varies by galaxies and seeds. A published accuracy p on N galaxies has the binomial variance p (1 - p) / N. Of a
    published loss the variance between galaxies is not known: ours stands in for it, over the published N. The published number
    is that of ``num_published_runs`` trainings, each with our variance between seeds.

    Args:
        ours: of the accuracy or the loss.
        published: the published values.
        quantity: ``accuracy`` or ``loss``.
        num_published_runs: trainings whose mean was published; None: their number is taken as infinite, so that the published
            value has the error of its galaxies alone.

    Returns:
        None where the galaxies' part of our error is not known: without predictions, a loss.
    """
    if ours.galaxy_variance is None:
        return None
    theirs = published.accuracy if quantity == "accuracy" else published.loss
    notes = []
    if quantity == "accuracy":
        variance = theirs * (1 - theirs) / published.count
    else:
        # Of one run: what the galaxies bring, and the rest.
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
    """A weighted sum of accuracies on one test set, tested against 0.

    With predictions the galaxies are paired: d_i = sum_k w_k (mean over seeds of model k on galaxy i) has the variance
    sum_i (d_i - d)^2 / (N - 1), which over N holds all galaxies' shares and, doubly with the seeds' own, the rest's:

        V = var(d_i) / N - sum_k w_k^2 rest_k / (n_k N) + sum_k w_k^2 s_k^2 / n_k.

    Two models with one seed each are judged by McNemar's exact test. Without predictions the models count as judged on different
    galaxies, which for models that find the same galaxies difficult is too large an error.
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
    """Each term's share of correct seeds by galaxy, terms x N; None unless all are known on the same galaxies."""
    known = [term.outcomes for term in terms if term.outcomes is not None]
    if len(known) < len(terms) or not all(one.is_paired(known[0]) for one in known[1:]):
        return None
    return np.stack([one.correct_SN.mean(axis=0) for one in known])
