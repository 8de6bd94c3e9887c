"""Statistics of runs: means and their errors, tests, bootstrap draws, outcomes of single galaxies.

All n seeds of a model are evaluated on the same N galaxies. The variance of the mean of all n N outcomes has two parts: more
seeds do not reduce the error from the choice of galaxies, and more galaxies do not reduce the error between trainings, so a
test between two trainings must contain both (Dror et al. 2018, ACL, P18-1128; Bouthillier et al. 2021, MLSys, arXiv:2103.03098).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation.bootstrap import RESAMPLES, GalaxyBootstrap
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.report.finished_runs import FinishedRun
from galaxydist.report.published_results import PublishedResult

ALPHA = 0.05
ONE_SEED = "one seed: the error between trainings is not in the test"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and galaxies.

    Args:
        mean: over all seeds and galaxies.
        num_seeds: n.
        num_galaxies: N, the same galaxies under all seeds.
        galaxy_error: standard error from the choice of galaxies; None where unknown.
        seed_error: standard error between trainings, s / sqrt(n) for the deviation s of the seeds' means; None with one seed.
    """

    mean: float
    num_seeds: int
    num_galaxies: int
    galaxy_error: float | None
    seed_error: float | None

    @property
    def standard_error(self) -> float | None:
        """Standard error over galaxies and seeds (with one seed, over galaxies alone); None if ``galaxy_error`` is None."""
        return None if self.galaxy_error is None else math.hypot(self.galaxy_error, self.seed_error or 0.0)


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference between our mean and a published value, with its test.

    Args:
        value: ours minus published.
        standard_error: of the value.
        p_value: two-sided.
        interval: 95 % confidence interval of the value.
        notes: limitations of the test.
    """

    value: float
    standard_error: float
    p_value: float
    interval: tuple[float, float]
    notes: tuple[str, ...] = ()


def estimate_mean(means_S: Sequence[float], num_galaxies: int, variance: float | None) -> Estimate:
    """Return the estimate from the seeds' means.

    Args:
        means_S: one mean per seed.
        num_galaxies: N.
        variance: between the outcomes of single galaxies; None where unknown.
    """
    galaxy_error = None if variance is None else math.sqrt(variance / num_galaxies)
    seed_error = stdev(means_S) / math.sqrt(len(means_S)) if len(means_S) > 1 else None
    return Estimate(fmean(means_S), len(means_S), num_galaxies, galaxy_error, seed_error)


def estimate_accuracy(accuracies_S: Sequence[float], num_galaxies: int) -> Estimate:
    """Return the estimate from the seeds' accuracies alone, with the binomial variance p (1 - p) of the galaxies' outcomes.

    The variance of the mean over several seeds is smaller, so tests with this estimate are conservative.
    """
    mean = fmean(accuracies_S)
    return estimate_mean(accuracies_S, num_galaxies, mean * (1 - mean))


def estimate_outcomes(outcomes_SN: ArrayLike) -> Estimate:
    """Return the estimate from each galaxy's outcome under each seed.

    The variance between galaxies is that of their means over seeds. It contains the chance of single outcomes, as the deviation
    between seeds does, so that the standard error is slightly too large.

    Args:
        outcomes_SN: S seeds x N galaxies (the same in each row): 0 or 1 for an accuracy, nats for a loss; S >= 1, N >= 2.
    """
    values_SN = np.asarray(outcomes_SN, np.float64)
    return estimate_mean(values_SN.mean(axis=1).tolist(), values_SN.shape[1], float(values_SN.mean(axis=0).var(ddof=1)))


def compare_with_published(ours: Estimate, published: PublishedResult, quantity: str) -> Difference | None:
    """Test ours minus a published value: Student's t with the variances of both samples (Welch 1947, Biometrika 34, 28).

    A published accuracy p on N galaxies has the binomial variance p (1 - p) / N. The variance of a published loss between
    galaxies is not known: ours is used in its place, divided by the published N. The published number is that of one training,
    whose variance between trainings is taken to be ours, s^2. The degrees of freedom are those of Welch and Satterthwaite (1946,
    Biometrics Bulletin 2, 110), V^2 / sum(V_j^2 / nu_j) over the parts V_j of the variance V.

    The published test set is of another split of the same 17,736 galaxies, so a tenth (balanced: a fifth) of its galaxies is
    expected in ours. The small correlation of the two errors is neglected, which makes the test conservative.

    Args:
        ours: estimate of the accuracy or the loss.
        published: the published values.
        quantity: ``accuracy`` or ``loss``.

    Returns:
        The difference; None if its error is not known (a loss without predictions) or 0.
    """
    from scipy.stats import t

    if ours.galaxy_error is None:
        return None
    galaxy_variance, notes = ours.galaxy_error**2, []
    if quantity == "accuracy":
        reference = published.accuracy
        published_variance = reference * (1 - reference) / published.count
    else:
        reference = published.loss
        published_variance = galaxy_variance * ours.num_galaxies / published.count
        notes.append("the published loss's variance between galaxies is not known: ours is used in its place")
    parts = [(galaxy_variance, ours.num_galaxies - 1), (published_variance, published.count - 1)]
    if ours.seed_error is None:
        notes.append(ONE_SEED)
    else:  # s^2 / n of ours, and s^2 of the one published training
        parts.append((ours.seed_error**2 * (1 + ours.num_seeds), ours.num_seeds - 1))
    variance = math.fsum(part for part, _ in parts)
    if variance == 0:
        return None
    freedom = variance**2 / math.fsum(part**2 / degrees for part, degrees in parts)
    value, error = ours.mean - reference, math.sqrt(variance)
    half = float(t.ppf(1 - ALPHA / 2, freedom)) * error
    return Difference(value, error, float(2 * t.sf(abs(value) / error, freedom)), (value - half, value + half), tuple(notes))


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
    def correct_N(self) -> NDArray[np.bool_]:
        """True for each galaxy whose most probable class, the first one of ties, is its label."""
        correct_N: NDArray[np.bool_] = self.log_probabilities_NK.argmax(axis=1) == self.labels_N
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
    """Read the outcomes from a file of predictions.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    file = read_predictions(path)
    ids, labels, logits = (file.column(name) for name in ("id", "label", "logits"))
    return build_outcomes(ids.tolist(), labels.tolist(), logits, source=str(path))


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
        count: number of galaxies.
        only_first: number that only the first classifies correctly.
        only_second: number that only the second classifies correctly.
        p_value: two-sided; null hypothesis: the discordant galaxies are evenly distributed over the two.
    """

    count: int
    only_first: int
    only_second: int
    p_value: float

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

    only_first, only_second = int((first_N & ~second_N).sum()), int((~first_N & second_N).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(len(first_N), only_first, only_second, p_value)


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


def rank_by_validation(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Rank runs from best to worst by the validation metric that selected their checkpoints, never by test results.

    Returns:
        The ranked runs, and those that cannot be ranked: without a validation, or with another metric than most.
    """
    metrics = [run.validation.metric for run in runs if run.validation is not None]
    usual = max(metrics, key=metrics.count, default=None)
    values = {
        index: run.validation.value
        for index, run in enumerate(runs)
        if run.validation is not None and run.validation.metric == usual
    }
    ordered = sorted(values, key=lambda index: values[index], reverse=usual != "loss")
    return [runs[index] for index in ordered], [run for index, run in enumerate(runs) if index not in values]


# Bootstrap over galaxies and seeds of a cell of the matrix.


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
    losses_SN: Floats

    def is_paired(self, other: "CellOutcomes") -> bool:
        """Return True if both cells have the same galaxies."""
        return np.array_equal(self.ids_N, other.ids_N)


def stack_outcomes(runs: Sequence[Outcomes]) -> CellOutcomes:
    """Stack the outcomes of several seeds on the galaxies that they share.

    Raises:
        UserError: the runs are of different data sets.
    """
    matched = match(runs)
    correct_SN = np.stack([run.correct_N for run in matched])
    return CellOutcomes(matched[0].ids_N, matched[0].labels_N, correct_SN, np.stack([run.losses_N for run in matched]))


def draw_recalls(outcomes: CellOutcomes, num_classes: int, *, stream: int) -> tuple[Floats, Floats]:
    """Draw accuracy and recalls by the bootstrap over galaxies and over seeds (Efron & Tibshirani 1993, chapter 6).

    The errors from galaxies and seeds are independent: a draw adds the deviation of resampled galaxies, with all seeds, to that
    of resampled seeds, on all galaxies. The chance of single outcomes is in both, so that the draws vary slightly too much. Two
    cells with the same galaxies get the same resamples of them, so that their draws are paired.

    Args:
        outcomes: of S seeds on N galaxies.
        num_classes: K.
        stream: number of the random stream for the seeds; different streams are independent.

    Returns:
        Accuracies, R + 1 float64, and recalls, (R + 1) x K float64, nan for a class without galaxies; row 0 holds the observed
        values, the other R rows the draws.
    """
    member_NK = outcomes.labels_N[:, None] == np.arange(num_classes)
    counted = [member_NK, *(member_NK & correct_N[:, None] for correct_N in outcomes.correct_SN)]
    values_NM = np.concatenate(counted, axis=1).astype(np.float64)
    resampled = GalaxyBootstrap(values_NM.shape[1])
    resampled.add(values_NM)
    sums_RSK = np.vstack([values_NM.sum(axis=0), resampled.sums_RM]).reshape(RESAMPLES + 1, len(counted), num_classes)
    support_RK, correct_RSK = sums_RSK[:, 0], sums_RSK[:, 1:]
    deviation_RS = _seed_weights(len(counted) - 1, stream) - 1 / (len(counted) - 1)
    recalls_RSK = np.where(support_RK[0] > 0, correct_RSK / np.maximum(support_RK, 1)[:, None], np.nan)
    accuracy_RS = correct_RSK.sum(axis=2) / support_RK.sum(axis=1)[:, None]
    accuracy_R: Floats = accuracy_RS.mean(axis=1) + deviation_RS @ accuracy_RS[0]
    recalls_RK: Floats = recalls_RSK.mean(axis=1) + deviation_RS @ recalls_RSK[0]
    return accuracy_R, recalls_RK


def draw_accuracy(accuracies_S: Sequence[float], num_galaxies: int, *, stream: int) -> Floats:
    """Draw an accuracy from the seeds' accuracies alone: resampled seeds, and a binomial number of correct galaxies.

    Returns:
        R + 1 float64: row 0 holds the mean of the seeds, the other rows the draws.
    """
    random, mean = np.random.default_rng([stream, 1]), fmean(accuracies_S)
    galaxies_R = random.binomial(num_galaxies, mean, RESAMPLES) / num_galaxies - mean
    accuracy_R: Floats = _seed_weights(len(accuracies_S), stream) @ np.asarray(accuracies_S) + np.append(0.0, galaxies_R)
    return accuracy_R


def _seed_weights(num_seeds: int, stream: int) -> Floats:
    """Return the weights of the seeds in each draw, (R + 1) x S; those of row 0 are equal.

    The deviations of a resample from equal weights are widened by sqrt(n / (n - 1)), so that few seeds give their full variance
    (Rao & Wu 1988, JASA 83, 231).
    """
    equal_S = np.full(num_seeds, 1 / num_seeds)
    chosen_RS = np.random.default_rng(stream).multinomial(num_seeds, equal_S, RESAMPLES) / num_seeds
    widened_RS = equal_S + math.sqrt(num_seeds / max(1, num_seeds - 1)) * (chosen_RS - equal_S)
    weights_RS: Floats = np.vstack([equal_S, widened_RS])
    return weights_RS
