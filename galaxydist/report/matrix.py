"""Results matrix: models by train/test setting, averaged over seeds, beside the published values.

A table covers one data set: real and simulated galaxies never share one, and only the real Galaxy10 is compared with published
values. The runs of a row differ only in their seed and their training data (``finished_runs.FREE_KEYS``).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.report.finished_runs import REFERENCE, FinishedRun, SplitResult
from galaxydist.report.published_results import (
    DISPLAY_NAMES,
    MODELS,
    SETTINGS,
    DisplayName,
    PublishedResult,
    TrainTest,
    published_result,
)
from galaxydist.report.statistics import (
    CellOutcomes,
    Difference,
    Estimate,
    Outcomes,
    compare_with_published,
    estimate_accuracy,
    estimate_mean,
    estimate_outcomes,
    holm,
    read_outcomes,
    stack_outcomes,
)
from galaxydist.surveys.official_split import NAME as REAL_DATASET

NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class TableRow:
    """Row of a table: a model with its recipe and settings.

    Args:
        model, recipe: ``model.name`` and name of the recipe; empty for a published model without runs.
        regime: ``reference`` or ``own``; empty for a published model without runs.
        settings: hash of the settings if two rows share model and recipe; else empty.
        display: the corresponding published model; None if there is none.
        name: of the row's only run, on a user's own data; else empty.
    """

    model: str
    recipe: str
    regime: str
    settings: str
    display: DisplayName | None
    name: str = ""

    @property
    def label(self) -> str:
        """Name of the run, or the published model or ``model.name`` with recipe, regime and settings where needed."""
        if self.name:
            return self.name
        name = self.display or self.model
        own = self.recipe.removeprefix(f"{REFERENCE}-")  # the regime already contains it
        recipe = own if own != name.lower().replace(" ", "_") else ""
        regime = self.regime if self.regime == REFERENCE else ""
        extra = ", ".join(part for part in (recipe, regime, self.settings) if part)
        return f"{name} ({extra})" if extra else name


@dataclass(frozen=True)
class Cell:
    """Results of a model in a train/test setting.

    Args:
        setting: the train/test setting.
        runs: its runs, ordered by seed; empty if it was not run.
        accuracy: over seeds and galaxies; None without runs.
        loss: over seeds and galaxies; None without runs or if a loss was not finite.
        published: None if there are no published values.
        accuracy_test: ours minus the published accuracy.
        loss_test: ours minus the published loss.
        outcomes: of the single galaxies; None unless all runs kept their predictions.
        notes: remarks for the reader.
    """

    setting: TrainTest
    runs: tuple[FinishedRun, ...] = ()
    accuracy: Estimate | None = None
    loss: Estimate | None = None
    published: PublishedResult | None = None
    accuracy_test: Difference | None = None
    loss_test: Difference | None = None
    outcomes: CellOutcomes | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_seeds(self) -> int:
        return len(self.runs)

    @property
    def results(self) -> tuple[SplitResult, ...]:
        found = (run.result_in(self.setting) for run in self.runs)
        return tuple(result for result in found if result is not None)


@dataclass(frozen=True)
class Table:
    """Results matrix of one data set.

    Args:
        dataset: its name.
        class_names: by label.
        rows: published models first, in the published order, then others.
        cells: one for every row and setting.
        notes: on runs that were left out and on differing test sets.
    """

    dataset: str
    class_names: tuple[str, ...]
    rows: tuple[TableRow, ...]
    cells: Mapping[tuple[TableRow, TrainTest], Cell]
    notes: tuple[str, ...] = ()

    @property
    def is_real(self) -> bool:
        """True for the real Galaxy10 DECaLS."""
        return self.dataset == REAL_DATASET and self.is_galaxy10

    @property
    def is_galaxy10(self) -> bool:
        """True if the classes are those of Galaxy10, as in the published work; False for a user's own data set."""
        return self.class_names == GALAXY10_CLASSES

    @property
    def settings(self) -> tuple[TrainTest, ...]:
        """Settings to show: all for Galaxy10 classes; on a user's own data only those with runs."""
        run = {setting for (_, setting), cell in self.cells.items() if cell.runs}
        return tuple(setting for setting in SETTINGS if self.is_galaxy10 or setting in run)


def build_tables(runs: Sequence[FinishedRun], *, read: Callable[[Path], Outcomes] = read_outcomes) -> list[Table]:
    """Build a table for each data set, the real Galaxy10 first.

    Args:
        runs: finished runs.
        read: reads a file of predictions.
    """
    datasets = sorted({run.dataset for run in runs}, key=lambda name: (name != REAL_DATASET, name))
    return [_build_table([run for run in runs if run.dataset == dataset], read) for dataset in datasets]


def holm_adjusted(table: Table, quantity: str = "accuracy") -> dict[tuple[TableRow, TrainTest], float]:
    """Return the p values of the differences to the published values, adjusted for the number of tested cells (Holm 1979).

    Args:
        table: the results matrix.
        quantity: ``accuracy`` or ``loss``; each is a separate family of tests.
    """
    tests = {key: cell.accuracy_test if quantity == "accuracy" else cell.loss_test for key, cell in table.cells.items()}
    known = {key: test.p_value for key, test in tests.items() if test is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _build_table(runs: Sequence[FinishedRun], read: Callable[[Path], Outcomes]) -> Table:
    dataset, class_names = runs[0].dataset, runs[0].class_names
    rows = _group_rows(runs, is_galaxy10=class_names == GALAXY10_CLASSES)
    cells: dict[tuple[TableRow, TrainTest], Cell] = {}
    notes: list[str] = []
    for row, members in rows.items():
        for setting in SETTINGS:
            evaluated = sorted((run for run in members if run.result_in(setting)), key=lambda run: run.seed)
            kept, left_out = _same_test_set(evaluated, setting)
            notes += left_out
            cells[row, setting] = _build_cell(setting, kept, published_result(dataset, row.display, setting), read)
    sizes = {(setting.test, result.count) for (_, setting), cell in cells.items() for result in cell.results}
    for variant, number in Counter(variant for variant, _ in sorted(sizes)).items():
        if number > 1:
            counts = ", ".join(str(count) for test, count in sorted(sizes) if test == variant)
            notes.append(f"The rows were evaluated on {variant} test sets of different sizes: {counts} galaxies.")
    return Table(dataset, class_names, tuple(rows), cells, tuple(notes))


def _group_rows(runs: Sequence[FinishedRun], *, is_galaxy10: bool) -> dict[TableRow, list[FinishedRun]]:
    """Group the runs into rows, published models first.

    With Galaxy10 classes, a published model without runs gets an empty row. On a user's own data, a row of one run has its name.
    """
    names = Counter(run.name for run in runs)

    def identity(run: FinishedRun) -> tuple[str, str, str]:
        return run.model, run.regime, run.recipe

    rows: dict[TableRow, list[FinishedRun]] = {}
    for (model, regime, recipe), group in groupby(sorted(runs, key=identity), key=identity):
        members = list(group)
        # Runs on different variants may have different settings; different settings on one variant make separate rows.
        is_one = len({(run.variant, run.settings) for run in members}) == len({run.variant for run in members})
        for settings in [""] if is_one else sorted({run.settings for run in members}):
            chosen = [run for run in members if settings in ("", run.settings)]
            name = ""
            if len(chosen) == 1 and not is_galaxy10:
                name = chosen[0].name if names[chosen[0].name] == 1 else str(chosen[0].run_dir)
            rows[TableRow(model, recipe, regime, settings, DISPLAY_NAMES.get(model), name)] = chosen
    if is_galaxy10:
        displayed = {row.display for row in rows}
        rows |= {TableRow("", "", "", "", name): [] for name in MODELS if name not in displayed}
    order: dict[DisplayName | None, int] = {name: number for number, name in enumerate((*MODELS, None))}
    return dict(sorted(rows.items(), key=lambda item: (order[item[0].display], item[0].regime != REFERENCE)))


def _same_test_set(runs: Sequence[FinishedRun], setting: TrainTest) -> tuple[list[FinishedRun], list[str]]:
    """Return the runs evaluated on the most common test shards, which alone are repeats on the same galaxies, and notes."""
    hashes = {id(run): result.manifest_hash for run in runs if (result := run.result_in(setting)) is not None}
    if not hashes:
        return [], []
    usual = Counter(hashes.values()).most_common(1)[0][0]
    kept = [run for run in runs if hashes[id(run)] == usual]
    text = f"left out of {setting}: it was evaluated on other shards than the other seeds ({usual[:8]})."
    return kept, [f"{run.run_dir}: {text}" for run in runs if hashes[id(run)] != usual]


def _build_cell(
    setting: TrainTest, runs: Sequence[FinishedRun], published: PublishedResult | None, read: Callable[[Path], Outcomes]
) -> Cell:
    cell = Cell(setting, tuple(runs), published=published)
    if not runs:
        return cell
    outcomes, notes = _read_outcomes(cell.results, read)
    loss: Estimate | None
    if outcomes is not None:
        accuracy, loss = estimate_outcomes(outcomes.correct_SN), estimate_outcomes(outcomes.losses_SN)
    else:
        losses, count = [result.loss for result in cell.results if result.loss is not None], cell.results[0].count
        accuracy = estimate_accuracy([result.accuracy for result in cell.results], count)
        loss = estimate_mean(losses, count, None) if len(losses) == len(runs) else None
    if len(runs) == 1:
        notes.append("one seed: the error between trainings is not known")
    if loss is None:
        notes.append("the loss of a run is not finite")
    return replace(
        cell,
        accuracy=accuracy,
        loss=loss,
        accuracy_test=compare_with_published(accuracy, published, "accuracy") if published else None,
        loss_test=compare_with_published(loss, published, "loss") if published and loss else None,
        outcomes=outcomes,
        notes=tuple(notes),
    )


def _read_outcomes(results: Sequence[SplitResult], read: Callable[[Path], Outcomes]) -> tuple[CellOutcomes | None, list[str]]:
    """Return the outcomes of the single galaxies, or None and the reason: predictions are missing or disagree with the counts."""
    paths = [result.predictions_path for result in results if result.predictions_path is not None]
    if len(paths) < len(results):
        missing = "no run" if not paths else f"only {len(paths)} of {len(results)} runs"
        return None, [f"{missing} kept predictions: the error of the test set is binomial, that of the loss not known"]
    try:
        stacked = stack_outcomes([read(path) for path in paths])
    except UserError as error:
        return None, [str(error)]
    for result, correct_N, path in zip(results, stacked.correct_SN, paths, strict=True):
        if len(correct_N) != result.count or int(correct_N.sum()) != result.correct:
            found = f"{int(correct_N.sum())} of {len(correct_N)} galaxies correct"
            counted = f"{result.correct} of {result.count}"
            return None, [f"{path} is not used: it has {found}, the evaluation {counted}. Evaluate the run again."]
    return stacked, []
