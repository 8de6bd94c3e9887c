"""Comparisons of cells of the results matrix: with published values, and with each other on the same galaxies.

The formulas and their sources stand in ``sampling.py``. What they take as independent:

- Published numbers are of another split of the same 17,736 galaxies, so a tenth (balanced: a fifth) of the test galaxies is
  expected in both; that this makes the two errors a little alike is left out, and makes tests err to the side of no difference.
- Training a model anew brings the published number as much error as ours: its variance between seeds is taken to be ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.outcomes import Outcomes, match
from galaxydist.evaluation.paired import mcnemar
from galaxydist.evaluation.published import PublishedResult
from galaxydist.evaluation.sampling import Difference, Estimate, difference

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
