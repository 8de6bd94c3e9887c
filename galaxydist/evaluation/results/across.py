"""Statistics across the runs of a table: models paired on the same galaxies, ensembles of seeds, ranks by validation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.evaluation.matrix import Row, Table
from galaxydist.evaluation.outcomes import Outcomes
from galaxydist.evaluation.paired import McNemar, build_ensemble, compare_runs, rank_trials
from galaxydist.evaluation.published import SETTINGS, Setting
from galaxydist.evaluation.sampling import holm
from galaxydist.evaluation.trial import Trial
from galaxydist.galaxy import Variant

ReadOutcomes = Callable[[Path], Outcomes]


@dataclass(frozen=True)
class Pairs:
    """McNemar's tests between the models of a setting.

    Args:
        setting: trained and tested on what.
        rows: the models, in the table's order.
        runs: the run that stands for each: its best by validation.
        tests: of the first of two rows against the second.
        adjusted: their p values, adjusted for their number (Holm).
        notes: what was left out.
    """

    setting: Setting
    rows: tuple[Row, ...]
    runs: Mapping[Row, Trial]
    tests: Mapping[tuple[Row, Row], McNemar]
    adjusted: Mapping[tuple[Row, Row], float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ensemble:
    """The seeds of a cell as one model: the mean of their probabilities.

    Args:
        row, setting: of the cell.
        num_runs: seeds.
        num_galaxies: that all of them judged.
        mean_accuracy, mean_loss: of its runs.
        accuracy, loss: of the ensemble.
    """

    row: Row
    setting: Setting
    num_runs: int
    num_galaxies: int
    mean_accuracy: float
    mean_loss: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Ranking:
    """Runs by validation.

    Args:
        variant: that they were trained on: another has another validation split.
        metric: that chose their checkpoints.
        ranked: best first.
        unranked: without a validation, or chosen by another metric.
    """

    variant: Variant
    metric: str
    ranked: tuple[Trial, ...]
    unranked: tuple[Trial, ...]


def compare_models(table: Table, read: ReadOutcomes) -> list[Pairs]:
    """The models of each setting against each other; a setting with fewer than two of them is left out."""
    found = (_compare(table, setting, read) for setting in SETTINGS)
    return [pairs for pairs in found if len(pairs.rows) > 1]


def _compare(table: Table, setting: Setting, read: ReadOutcomes) -> Pairs:
    runs: dict[Row, Trial] = {}
    outcomes: dict[Row, Outcomes] = {}
    notes: list[str] = []
    for row in table.rows:
        trial = best_of(table.cells[row, setting].trials)
        judged = trial.judged(setting) if trial is not None else None
        if trial is None or judged is None or judged.predictions_path is None:
            continue
        try:
            outcomes[row], runs[row] = read(judged.predictions_path), trial
        except UserError as error:
            notes.append(str(error))
    tests: dict[tuple[Row, Row], McNemar] = {}
    for first, second in combinations(outcomes, 2):
        try:
            tests[first, second] = compare_runs(outcomes[first], outcomes[second])
        except UserError as error:
            notes.append(f"{first.label} and {second.label}: {error}")
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    return Pairs(setting, tuple(outcomes), runs, tests, adjusted, tuple(notes))


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The best run by validation; the first where none has one, None where there is no run."""
    ranked, unranked = rank_trials(trials)
    return next(iter([*ranked, *unranked]), None)


def build_ensembles(table: Table, read: ReadOutcomes) -> list[Ensemble]:
    """Of every cell with predictions of two seeds or more."""
    found = []
    for setting in SETTINGS:
        for row in table.rows:
            cell = table.cells[row, setting]
            paths = [judged.predictions_path for judged in cell.judgements if judged.predictions_path is not None]
            if cell.outcomes is None or len(paths) < 2:
                continue
            together = build_ensemble([read(path) for path in paths])
            found.append(
                Ensemble(
                    row,
                    setting,
                    num_runs=len(paths),
                    num_galaxies=len(together.ids_N),
                    mean_accuracy=float(cell.outcomes.correct_SN.mean()),
                    mean_loss=float(cell.outcomes.losses_SN.mean()),
                    accuracy=float(together.correct_N.mean()),
                    loss=float(together.losses_N.mean()),
                )
            )
    return found


def rank_runs(trials: Sequence[Trial]) -> list[Ranking]:
    """The runs of a data set, by the variant that they were trained on."""
    found = []
    for variant in dict.fromkeys(trial.variant for trial in sorted(trials, key=lambda trial: trial.variant != "original")):
        ranked, unranked = rank_trials([trial for trial in trials if trial.variant == variant])
        metric = ranked[0].validation.metric if ranked and ranked[0].validation is not None else ""
        found.append(Ranking(variant, metric, tuple(ranked), tuple(unranked)))
    return found
