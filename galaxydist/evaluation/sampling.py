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

import numpy as np
from numpy.typing import ArrayLike

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
