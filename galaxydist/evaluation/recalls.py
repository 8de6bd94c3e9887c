"""How sure the recalls of the classes are, and what derives from them: which class is worst, how even the classes are.

Neither has a closed form, so they are judged by draws. A draw takes as many seeds as there are, with replacement, averages their
recalls, widens the distance to the mean of all seeds by sqrt(n / (n - 1)) (so that few seeds give their full variance: Rao & Wu
1988, JASA 83, 231), and then draws each class's recall p from Beta(p M + 1/2, (1 - p) M + 1/2) (Jeffreys' prior: Brown, Cai &
DasGupta 2001, Stat. Sci. 16, 101; a plain bootstrap of a class without a mistake would never show one). The galaxies are those of
one test set, so their error is drawn once, whatever the number of seeds.

M is the number of galaxies in the class. Where the outcomes of several seeds are known, it is the number that gives the variance
over the galaxies of their shares of correct seeds, and the seeds' deviations are lessened by what of them is no property of a
seed (the rest of ``sampling.py``), which that variance holds already. Two models on the same galaxies are drawn together, linked
by a normal copula (Nelsen 2006, "An Introduction to Copulas", section 2.3) with the correlation of those shares in each class.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.counter_rng import uniform
from galaxydist.evaluation.comparisons import CellOutcomes
from galaxydist.evaluation.sampling import from_outcomes

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
