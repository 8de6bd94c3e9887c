"""From run folders to all that a report says of them: nothing here knows of HTML, Markdown or LaTeX."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.evaluation.matrix import Row, Table, build_tables
from galaxydist.evaluation.observations import case_of, choose_rows, observe, published_case
from galaxydist.evaluation.outcomes import read_outcomes
from galaxydist.evaluation.results.across import (
    Ensemble,
    Pairs,
    Ranking,
    ReadOutcomes,
    best_of,
    build_ensembles,
    compare_models,
    rank_runs,
)
from galaxydist.evaluation.results.run_facts import RunFacts, read_facts
from galaxydist.evaluation.trial import REFERENCE, Judgement, Note, Trial
from galaxydist.evaluation.trials import read_trials
from galaxydist.evaluation.verdicts import Observation
from galaxydist.galaxy import VARIANTS, Variant

# Which lines of a table stand for the published models.
REGIMES = {REFERENCE: "recipes that follow the published work", "own": "our own recipes"}
_NUM_NAMED = 10
# Files of predictions that stay in memory; others are read again.
_NUM_KEPT = 16


@dataclass(frozen=True)
class Findings:
    """The results on one data set.

    Args:
        table: the matrix.
        facts: its runs, in the order of the table's lines.
        row_of: the line of a run, by its folder.
        observations: the six, by regime.
        pairs: models against each other, by setting.
        ensembles: of seeds.
        rankings: by the variant that was trained on.
    """

    table: Table
    facts: tuple[RunFacts, ...]
    row_of: dict[Path, Row]
    observations: dict[str, list[Observation]]
    pairs: tuple[Pairs, ...]
    ensembles: tuple[Ensemble, ...]
    rankings: tuple[Ranking, ...]

    def runs_of(self, row: Row) -> list[RunFacts]:
        """The runs of a line."""
        return [facts for facts in self.facts if self.row_of.get(facts.trial.run_dir) == row]

    def model_of(self, trial: Trial) -> str:
        """The model of a run, as its line calls it; ``model.name`` where the line has the run's own name."""
        row = self.row_of.get(trial.run_dir)
        return trial.model if row is None or row.name else row.label

    def best(self, row: Row, variant: Variant) -> RunFacts | None:
        """The best run by validation of a line among those trained on a variant; None where there is none."""
        runs = {id(facts.trial): facts for facts in self.runs_of(row) if facts.trial.variant == variant}
        best = best_of([facts.trial for facts in runs.values()])
        return runs[id(best)] if best is not None else None

    def best_on_own(self) -> Iterator[tuple[Row, RunFacts, Judgement]]:
        """Of each line and training variant the best run by validation, judged on its own test set."""
        for row, variant in itertools.product(self.table.rows, VARIANTS):
            facts = self.best(row, variant)
            judged = facts.trial.judgements.get(variant) if facts is not None else None
            if facts is not None and judged is not None:
                yield row, facts, judged


@dataclass(frozen=True)
class Results:
    """Everything.

    Args:
        findings: by data set, the real Galaxy10 first.
        published: what the published numbers alone support; empty where no run is on the real Galaxy10.
        notes: what was left out, and why.
        num_asked: run folders that were given.
    """

    findings: tuple[Findings, ...]
    published: tuple[Observation, ...]
    notes: tuple[str, ...]
    num_asked: int

    @property
    def num_runs(self) -> int:
        return sum(len(found.facts) for found in self.findings)


def gather(run_dirs: Iterable[Path], notes: Sequence[Note] = ()) -> Results:
    """Read runs and draw all conclusions.

    Args:
        run_dirs: run folders; what cannot be used becomes a note.
        notes: what is known to be missing already.

    Raises:
        UserError: not one of them can be reported.
    """
    asked = list({path.resolve(): path for path in run_dirs}.values())
    trials, left_out = read_trials(asked)
    said = [str(note) for note in (*notes, *left_out)]
    if not trials:
        more = [f"and {len(said) - _NUM_NAMED} more"] if len(said) > _NUM_NAMED else []
        lines = "".join(f"\n  {text}" for text in [*said[:_NUM_NAMED], *more])
        raise UserError(f"none of these {len(asked) + len(notes)} runs can be reported:{lines}")
    read = functools.lru_cache(_NUM_KEPT)(read_outcomes)
    findings = tuple(_find(table, trials, read) for table in build_tables(trials, read=read))
    for found in findings:
        said += [f"{found.table.dataset}: {text}" for text in found.table.notes]
        said += [text for pairs in found.pairs for text in pairs.notes]
        said += [f"{facts.trial.run_dir}: {text}" for facts in found.facts for text in (*facts.notes, *_without(facts.trial))]
    real = next((found.table for found in findings if found.table.is_real), None)
    published = tuple(observe(published_case(real.class_names))) if real is not None else ()
    return Results(findings, published, tuple(dict.fromkeys(said)), len(asked) + len(notes))


def _without(trial: Trial) -> list[str]:
    """What a run cannot take part in, for want of predictions."""
    missing = [variant for variant, judged in trial.judgements.items() if judged.predictions_path is None]
    return [
        f"kept no predictions on {variant}: it stands in the matrix, but not in paired tests, ensembles and calibration. "
        f"Make them: galaxydist evaluate {trial.run_dir}{'' if variant == trial.variant else f' data.variant={variant}'}"
        for variant in missing
    ]


def _find(table: Table, trials: Sequence[Trial], read: ReadOutcomes) -> Findings:
    own = [trial for trial in trials if trial.dataset == table.dataset]
    row_of = {trial.run_dir: row for (row, _), cell in table.cells.items() for trial in cell.trials}
    order = {row: number for number, row in enumerate(table.rows)}

    def place(trial: Trial) -> tuple[int, bool, int]:
        row = row_of.get(trial.run_dir)
        return order[row] if row is not None else len(order), trial.variant != "original", trial.seed

    observations = {}
    for regime in REGIMES if table.is_galaxy10 else ():
        if rows := choose_rows(table, regime):
            observations[regime] = observe(case_of(table, rows))
    return Findings(
        table=table,
        facts=tuple(read_facts(trial) for trial in sorted(own, key=place)),
        row_of=row_of,
        observations=observations,
        pairs=tuple(compare_models(table, read)),
        ensembles=tuple(build_ensembles(table, read)),
        rankings=tuple(rank_runs(own)),
    )
