"""Statistics across runs: two models on the same galaxies, several runs as one, and which run is best by its validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.outcomes import Outcomes, match
from galaxydist.evaluation.trial import Trial


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


def rank_trials(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
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
