"""Results of a report, collected from run folders, independent of the output format."""

import functools
import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from galaxydist.errors import UserError
from galaxydist.evaluation.leakage import ZOOBOT_NOTE
from galaxydist.evaluation.results_files import read_evaluation
from galaxydist.galaxy import VARIANTS, Variant
from galaxydist.recipe.resolve import COMMAND_LINE, SCHEMA_DEFAULT
from galaxydist.recipe.scalars import to_text
from galaxydist.report.claims import ClaimAnswer, answer_claims, choose_rows, evidence_of_table, published_evidence
from galaxydist.report.cost import RunHours, read_run_hours
from galaxydist.report.finished_runs import REFERENCE, FinishedRun, SplitResult, read_finished_runs
from galaxydist.report.matrix import Table, TableRow, build_tables
from galaxydist.report.published_results import SETTINGS, TrainTest
from galaxydist.report.statistics import (
    CellOutcomes,
    McNemar,
    Outcomes,
    build_ensemble,
    compare_runs,
    holm,
    rank_by_validation,
    read_outcomes,
)
from galaxydist.runs.folder import ORIGIN_KEY, RunFolder, StoredRecipe
from galaxydist.runs.metrics_file import MetricsFile
from galaxydist.surveys.data_origin import DataOrigin, known_origin

# Regimes: the sets of recipes that are compared with the published models.
REGIMES = {REFERENCE: "recipes that follow the published work", "own": "our own recipes"}
_NUM_NAMED = 10  # notes listed in an error
# Number of prediction files kept in memory; others are read again.
_NUM_KEPT = 16
# Keys that belong to one start of a run and not to its recipe.
_ONE_START = ("resume.",)

ReadOutcomes = Callable[[Path], Outcomes]


@dataclass(frozen=True)
class Pairs:
    """McNemar's tests between the models of a setting.

    Args:
        setting: the train/test setting.
        runs: the best run by validation of each model that kept predictions, by row, in the table's order.
        tests: of the first of two rows against the second.
        adjusted: their p values, adjusted for multiple testing (Holm).
        notes: reasons for models or tests that were left out.
    """

    setting: TrainTest
    runs: Mapping[TableRow, FinishedRun]
    tests: Mapping[tuple[TableRow, TableRow], McNemar]
    adjusted: Mapping[tuple[TableRow, TableRow], float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ensemble:
    """Ensemble of the seeds of a cell: the mean of their probabilities.

    Args:
        row, setting: of the cell.
        seeds: outcomes of the single seeds.
        outcomes: of the ensemble.
    """

    row: TableRow
    setting: TrainTest
    seeds: CellOutcomes
    outcomes: Outcomes


def compare_models(table: Table, read: ReadOutcomes) -> list[Pairs]:
    """Compare the models of each setting with each other; a setting with fewer than two models is left out."""
    found = (_compare(table, setting, read) for setting in SETTINGS)
    return [pairs for pairs in found if len(pairs.runs) > 1]


def _compare(table: Table, setting: TrainTest, read: ReadOutcomes) -> Pairs:
    runs: dict[TableRow, FinishedRun] = {}
    outcomes: dict[TableRow, Outcomes] = {}
    notes: list[str] = []
    for row in table.rows:
        run = best_of(table.cells[row, setting].runs)
        result = run.result_in(setting) if run is not None else None
        if run is None or result is None or result.predictions_path is None:
            continue
        try:
            outcomes[row], runs[row] = read(result.predictions_path), run
        except UserError as error:
            notes.append(str(error))
    tests: dict[tuple[TableRow, TableRow], McNemar] = {}
    for first, second in combinations(outcomes, 2):
        try:
            tests[first, second] = compare_runs(outcomes[first], outcomes[second])
        except UserError as error:
            notes.append(f"{first.label} and {second.label}: {error}")
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    return Pairs(setting, runs, tests, adjusted, tuple(notes))


def best_of(runs: Sequence[FinishedRun]) -> FinishedRun | None:
    """Return the best run by validation; the first run if none has a validation, None if there is no run."""
    ranked, unranked = rank_by_validation(runs)
    return next(iter([*ranked, *unranked]), None)


def build_ensembles(table: Table, read: ReadOutcomes) -> Iterator[Ensemble]:
    """Build the ensemble of every cell that has predictions of at least two seeds."""
    for setting, row in itertools.product(SETTINGS, table.rows):
        cell = table.cells[row, setting]
        paths = [result.predictions_path for result in cell.results if result.predictions_path is not None]
        if cell.outcomes is not None and len(paths) > 1:
            yield Ensemble(row, setting, cell.outcomes, build_ensemble([read(path) for path in paths]))


# Facts of one run.


@dataclass(frozen=True)
class RunCost:
    """Speed and cost of a run.

    Args:
        img_s: images per second over all devices, median of the logged values, without validations and checkpoints.
        devices: number of ranks, each with its own device.
        kind: ``GPU`` or ``CPU``.
        hours: of training without validations and checkpoints: galaxies over speed, summed over the log's lines; steps
            repeated after a restart count once.
        data_wait: share of the time spent waiting for data.
        memory_gb: largest allocated GPU memory; on a CPU the resident memory.
        mfu: model FLOPs utilisation; None where it is not known.
    """

    img_s: float
    devices: int
    kind: str
    hours: float
    data_wait: float | None
    memory_gb: float | None
    mfu: float | None

    @property
    def device_hours(self) -> float:
        return self.hours * self.devices


@dataclass(frozen=True)
class RunFacts:
    """Facts of one run.

    Args:
        command: repeats the training.
        recipe: every key whose value is not the schema's default -> (value, origin of the value).
        num_keys: of the whole recipe.
        forced: changes made by ``resume.force``.
        lines: of metrics.jsonl.
        cost: None where its timing was not logged.
        evaluation: content of its evaluation file on its own test set; empty where it cannot be read.
        origin: licence and source of its training data; None where nothing is known.
        hours: its device hours, from its folder; None where nothing is known.
        notes: parts of the run that could not be read.
    """

    run: FinishedRun
    command: str
    recipe: Mapping[str, tuple[str, str]]
    num_keys: int
    forced: tuple[str, ...]
    lines: Sequence[Mapping[str, Any]]
    cost: RunCost | None
    evaluation: Mapping[str, Any]
    origin: DataOrigin | None = None
    hours: RunHours | None = None
    notes: tuple[str, ...] = ()

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Calibration on its own test set; empty if there is none."""
        found: Mapping[str, Any] = self.evaluation.get("calibration") or {}
        return found


def read_facts(run: FinishedRun) -> RunFacts:
    """Read the facts of a run from its folder; damaged files are left out, with a note."""
    folder, notes = RunFolder(run.run_dir), list[str]()
    stored = folder.read_recipe()
    lines, timing = (_read_log(log, notes) for log in (folder.metrics, folder.timing))
    evaluation = read_evaluation(folder.evaluation_dir, "test", str(stored.recipe.get("eval.tta", "none")))
    changed = {
        key: (to_text(value), stored.origins.get(key, ""))
        for key, value in stored.recipe.items()
        if stored.origins.get(key, "") != SCHEMA_DEFAULT
    }
    return RunFacts(
        run=run,
        command=command_of(stored),
        recipe=changed,
        num_keys=len(stored.recipe),
        forced=_forced(stored),
        lines=lines,
        cost=cost_of(timing, int(stored.recipe.get("train.batch_size", 0))),
        evaluation=evaluation or {},
        origin=_read_origin(folder, notes) or known_origin(run.dataset),
        hours=_read_hours(run, notes),
        notes=tuple(notes),
    )


def _read_hours(run: FinishedRun, notes: list[str]) -> RunHours | None:
    try:
        hours = read_run_hours(run.run_dir, run.name)
    except UserError as error:
        notes += [str(error)] * (str(error) not in notes)
        return None
    return hours if hours.starts else None


def _read_origin(folder: RunFolder, notes: list[str]) -> DataOrigin | None:
    content = (folder.read_result() or {}).get(ORIGIN_KEY)
    try:
        return None if content is None else DataOrigin.from_dict(content)
    except (TypeError, AttributeError):
        notes.append(f"{folder.result_path}: {ORIGIN_KEY} is not an origin of data")
        return None


def command_of(stored: StoredRecipe) -> str:
    """Return the command of the run, reconstructed from the origin of each recipe value."""
    name = str(stored.recipe.get("name", ""))
    files = {origin.rpartition(":")[0] for origin in map(str, stored.origins.values()) if ":" in origin}
    recipe = next((file for file in sorted(files) if file.endswith((".yaml", ".yml"))), "")
    words = [f"recipe={_short(recipe) or name}"]
    for key, origin in stored.origins.items():
        if origin == COMMAND_LINE and key != "name" and not key.startswith(_ONE_START):
            words.append(f"{key}={to_text(stored.recipe.get(key))}")
    return "accelerate launch launch.py " + shlex.join(words)


def _short(file: str) -> str:
    """Return a recipe's file as given on the command line: its name if it lies in a folder ``recipes``, else its path."""
    _, found, inside = file.rpartition("recipes/")
    return inside.removesuffix(".yaml") if found else file


def cost_of(timing: Sequence[Mapping[str, Any]], batch_size: int) -> RunCost | None:
    """Return speed and cost from the lines of timing.jsonl; None if there are none.

    Args:
        timing: the lines.
        batch_size: global.
    """
    known = [line for line in timing if _is_number(line.get("time/img_s")) and line["time/img_s"] > 0]
    if not known or batch_size < 1:
        return None
    seconds, before = 0.0, 0
    for line in known:
        seconds += max(0, line["step"] - before) * batch_size / line["time/img_s"]
        before = max(before, line["step"])

    def values(*keys: str) -> list[float]:
        return [line[key] for line in known for key in keys if _is_number(line.get(key))]

    data_wait, mfu = values("time/data_wait"), values("gpu/mfu")
    return RunCost(
        img_s=median(line["time/img_s"] for line in known),
        devices=max(1, round(median(line["time/img_s"] / line.get("time/img_s_device", line["time/img_s"]) for line in known))),
        kind="GPU" if any("gpu/memory_gb" in line for line in known) else "CPU",
        hours=seconds / 3600,
        data_wait=median(data_wait) if data_wait else None,
        memory_gb=max(values("gpu/memory_gb", "memory/rss_gb"), default=None),
        mfu=median(mfu) if mfu else None,
    )


def _read_log(log: MetricsFile, notes: list[str]) -> list[dict[str, Any]]:
    """Return the lines of a log; none, and a note, if it is damaged."""
    try:
        return log.read()
    except UserError as error:
        notes.append(str(error))
        return []


def _forced(stored: StoredRecipe) -> tuple[str, ...]:
    return tuple(
        f"{change['key']}: {to_text(change.get('old'))} to {to_text(change.get('new'))} at step {entry.get('step')}"
        for entry in stored.forced
        for change in entry.get("changes", ())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# All results of a report.


@dataclass(frozen=True)
class DatasetResults:
    """Results on one data set.

    Args:
        table: the results matrix.
        facts: of its runs, in the order of the table's rows.
        row_of: row of a run, by run folder.
        claims: answers to the six published claims, by regime; empty unless the data set is the real Galaxy10.
        pairs: one per setting.
        ensembles: one per cell with several seeds.
        rankings: for each training variant, the runs ranked by validation, best first, and those without a comparable
            validation; variants differ in their validation split.
    """

    table: Table
    facts: tuple[RunFacts, ...]
    row_of: Mapping[Path, TableRow]
    claims: Mapping[str, list[ClaimAnswer]]
    pairs: tuple[Pairs, ...]
    ensembles: tuple[Ensemble, ...]
    rankings: tuple[tuple[list[FinishedRun], list[FinishedRun]], ...]

    @property
    def origin(self) -> Mapping[str, str]:
        """Licence, citation, revision and address of the data set, one line of text each; empty where nothing is known.

        Runs on several versions of the data may differ: different texts stand side by side.
        """
        lines: dict[str, dict[str, None]] = {}
        for facts in self.facts:
            for name, text in facts.origin.describe().items() if facts.origin is not None else ():
                lines.setdefault(name, {})[text] = None
        return {name: " | ".join(texts) for name, texts in lines.items()}

    def runs_of(self, row: TableRow) -> list[RunFacts]:
        return [facts for facts in self.facts if self.row_of.get(facts.run.run_dir) == row]

    def model_of(self, run: FinishedRun) -> str:
        """Return the label of the run's row; ``model.name`` if it has no row or a row named after it."""
        row = self.row_of.get(run.run_dir)
        return run.model if row is None or row.name else row.label

    def best(self, row: TableRow, variant: Variant) -> RunFacts | None:
        """Return the best run by validation of a row among those trained on a variant; None if there is none."""
        runs = {id(facts.run): facts for facts in self.runs_of(row) if facts.run.variant == variant}
        best = best_of([facts.run for facts in runs.values()])
        return runs[id(best)] if best is not None else None

    def best_on_own(self) -> Iterator[tuple[TableRow, RunFacts, SplitResult]]:
        """Yield the best run by validation of each row and training variant, with its result on its own test set."""
        for row, variant in itertools.product(self.table.rows, VARIANTS):
            facts = self.best(row, variant)
            result = facts.run.results.get(variant) if facts is not None else None
            if facts is not None and result is not None:
                yield row, facts, result


@dataclass(frozen=True)
class ReportData:
    """All results of a report.

    Args:
        datasets: the real Galaxy10 first.
        published: answers to the claims from the published numbers alone; empty if no run is on the real Galaxy10.
        notes: remarks, and reasons for what was left out.
        num_given: number of run folders that were given.
    """

    datasets: tuple[DatasetResults, ...]
    published: tuple[ClaimAnswer, ...]
    notes: tuple[str, ...]
    num_given: int

    @property
    def num_runs(self) -> int:
        return sum(len(found.facts) for found in self.datasets)


def collect(run_dirs: Iterable[Path], notes: Sequence[str] = ()) -> ReportData:
    """Read runs and compute all results.

    Args:
        run_dirs: run folders; a run that cannot be used becomes a note.
        notes: on runs that are already known to be missing.

    Raises:
        UserError: none of the runs can be reported.
    """
    given = list({path.resolve(): path for path in run_dirs}.values())
    runs, left_out = read_finished_runs(given)
    texts = [*notes, *left_out]
    if not runs:
        more = [f"and {len(texts) - _NUM_NAMED} more"] if len(texts) > _NUM_NAMED else []
        lines = "".join(f"\n  {text}" for text in [*texts[:_NUM_NAMED], *more])
        raise UserError(f"none of these {len(given) + len(notes)} runs can be reported:{lines}")
    read = functools.lru_cache(_NUM_KEPT)(read_outcomes)
    datasets = tuple(_collect_dataset(table, runs, read) for table in build_tables(runs, read=read))
    for found in datasets:
        texts += [f"{found.table.dataset}: {text}" for text in found.table.notes]
        texts += [text for pairs in found.pairs for text in pairs.notes]
        for facts in found.facts:
            texts += [f"{facts.run.run_dir}: {text}" for text in (*facts.notes, *_missing_predictions(facts.run))]
        texts += [ZOOBOT_NOTE] * (found.table.is_real and any("zoobot" in facts.run.model for facts in found.facts))
    real = next((found.table for found in datasets if found.table.is_real), None)
    published = tuple(answer_claims(published_evidence(real.class_names))) if real is not None else ()
    return ReportData(datasets, published, tuple(dict.fromkeys(texts)), len(given) + len(notes))


def _missing_predictions(run: FinishedRun) -> list[str]:
    """Return a note for each evaluation of a run without predictions."""
    missing = [variant for variant, result in run.results.items() if result.predictions_path is None]
    return [
        f"kept no predictions on {variant}: it is in the matrix, but not in paired tests, ensembles and calibration. "
        f"Make them: galaxydist evaluate {run.run_dir}{'' if variant == run.variant else f' data.variant={variant}'}"
        for variant in missing
    ]


def _collect_dataset(table: Table, runs: Sequence[FinishedRun], read: ReadOutcomes) -> DatasetResults:
    own = [run for run in runs if run.dataset == table.dataset]
    row_of = {run.run_dir: row for (row, _), cell in table.cells.items() for run in cell.runs}
    order = {row: number for number, row in enumerate(table.rows)}

    def position(run: FinishedRun) -> tuple[int, bool, int]:
        row = row_of.get(run.run_dir)
        return order[row] if row is not None else len(order), run.variant != "original", run.seed

    variants = dict.fromkeys(run.variant for run in sorted(own, key=lambda run: run.variant != "original"))
    regimes = {regime: choose_rows(table, regime) for regime in REGIMES} if table.is_real else {}
    return DatasetResults(
        table=table,
        facts=tuple(read_facts(run) for run in sorted(own, key=position)),
        row_of=row_of,
        claims={regime: answer_claims(evidence_of_table(table, rows)) for regime, rows in regimes.items() if rows},
        pairs=tuple(compare_models(table, read)),
        ensembles=tuple(build_ensembles(table, read)),
        rankings=tuple(rank_by_validation([run for run in own if run.variant == variant]) for variant in variants),
    )
