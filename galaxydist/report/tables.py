"""Formatted numbers and table rows of a report, shared by its HTML page, Markdown and LaTeX."""

from dataclasses import dataclass
from typing import Literal

from galaxydist.evaluation.text_table import NOTHING, hours_text
from galaxydist.recipe.fields import RECIPE
from galaxydist.report.collect import DatasetResults, ReportData
from galaxydist.report.cost import hours_rows
from galaxydist.report.finished_runs import FREE_KEYS, SCORES, Score
from galaxydist.report.matrix import NOT_RUN, Cell, Table, TableRow, holm_adjusted
from galaxydist.report.published_results import TrainTest
from galaxydist.report.statistics import ALPHA, Estimate
from galaxydist.surveys.official_split import NAME as REAL_DATASET

MINUS = "\N{MINUS SIGN}"
Quantity = Literal["accuracy", "loss"]
QUANTITIES: tuple[Quantity, ...] = ("accuracy", "loss")
Standing = Literal["", "better", "worse", "same"]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Formatted numbers of one quantity of a cell; missing ones are empty.

    Args:
        ours: the mean, with its standard error over seeds; ``not run`` if there is no run.
        published: the published value.
        difference: ours minus published, with its standard error.
        p: p value of the difference, adjusted for the number of cells.
        standing: ``better`` or ``worse`` if ours differs significantly from the published value, else ``same``.
    """

    ours: str
    published: str = ""
    difference: str = ""
    p: str = ""
    standing: Standing = ""


def describe_table(table: Table) -> dict[tuple[TableRow, TrainTest, Quantity], Numbers]:
    """Format all numbers of a table; accuracies and losses are separate families of tests."""
    found: dict[tuple[TableRow, TrainTest, Quantity], Numbers] = {}
    for quantity in QUANTITIES:
        adjusted = holm_adjusted(table, quantity)
        for (row, setting), cell in table.cells.items():
            found[row, setting, quantity] = describe(cell, quantity, adjusted.get((row, setting)), is_galaxy10=table.is_galaxy10)
    return found


def describe(cell: Cell, quantity: Quantity, adjusted_p: float | None, *, is_galaxy10: bool = True) -> Numbers:
    """Format one quantity of a cell.

    Args:
        cell: of the matrix.
        quantity: ``accuracy`` or ``loss``.
        adjusted_p: from ``holm_adjusted``; None if there is no test.
        is_galaxy10: shows a cell without runs as ``not run``, else as a dash.
    """
    estimate = cell.accuracy if quantity == "accuracy" else cell.loss
    test = cell.accuracy_test if quantity == "accuracy" else cell.loss_test
    value = "" if cell.published is None else f"{getattr(cell.published, quantity):.4f}"
    if not cell.runs:
        return Numbers(NOT_RUN if is_galaxy10 else NOTHING, value)
    if estimate is None:
        return Numbers("not finite", value)
    if test is None or adjusted_p is None:
        return Numbers(mean_text(estimate), value)
    standing: Standing = "same"
    if adjusted_p < ALPHA:
        standing = "better" if (test.value > 0) == (quantity == "accuracy") else "worse"
    difference = f"{signed(test.value)} ± {test.standard_error:.3f}"
    return Numbers(mean_text(estimate), value, difference, p_text(adjusted_p), standing)


def mean_text(estimate: Estimate) -> str:
    """Format a mean with its standard error over seeds, as ``0.632 ± 0.004``; a single seed has no error."""
    error = estimate.seed_error
    return number(estimate.mean) if error is None else f"{number(estimate.mean)} ± {error:.3f}"


def score_text(score: Score | None) -> str:
    """Format a score and its interval, as ``0.632 [0.601, 0.660]``."""
    if score is None or score.interval is None:
        return number(score.value if score is not None else None)
    low, high = score.interval
    return f"{number(score.value)} [{number(low)}, {number(high)}]"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number, as ``0.632``; None becomes a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """Format a number with its sign, as ``+0.012`` or ``−0.012``; no sign if all digits are 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def points(share: float) -> str:
    """Format a difference of accuracies in points (per cent), as ``+1.2``."""
    return signed(100 * share, 1)


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share, as ``63.2 %``; None becomes a dash."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def p_text(p: float) -> str:
    """Format a p value, as ``p < 0.001`` or ``p = 0.016``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


# Texts, and table heads with their rows.

_ERRORS = "Mean over seeds ± its standard error over seeds; a number without an error is of a single seed."
_CAPTIONS = {
    True: f"{_ERRORS} Below it: the published value, and ours minus published with the standard error of that difference. The "
    "error contains the galaxies and the seeds of both sides, since the published number has a sampling error too and is of "
    f"another split. p is adjusted for the number of cells (Holm); a difference is significant below {ALPHA:g}.",
    False: f"{_ERRORS} These galaxies are not the real Galaxy10 DECaLS, so they are not compared with published values.",
}
SCORES_CAPTION = (
    "Each run on each test set that it was evaluated on; in brackets the 95 % interval over galaxies (percentile bootstrap), "
    "without the error between trainings."
)
_NO_REAL = f"No run is on the real Galaxy10 DECaLS ({REAL_DATASET}), so nothing is compared with published values."

Rows = tuple[list[str], list[list[str]]]


def caption_of(table: Table) -> str:
    """Return the sentences that explain the numbers of the matrix."""
    return _CAPTIONS[table.is_real] if table.is_galaxy10 else _ERRORS


def about(results: ReportData) -> str:
    """Return one or two sentences on the content of the report."""
    tables = [found.table for found in results.datasets]
    runs = f"{results.num_runs:,} run{'' if results.num_runs == 1 else 's'}"
    text = f"{runs} on {', '.join(table.dataset for table in tables)}"
    if left_out := results.num_given - results.num_runs:
        text += f"; {left_out} more could not be reported, see the notes"
    is_missed = any(table.is_galaxy10 for table in tables) and not any(table.is_real for table in tables)
    return f"{text}. {_NO_REAL}" if is_missed else f"{text}."


def score_rows(found: DatasetResults) -> Rows:
    """Return head and rows of the metrics of each run, with their intervals."""
    head = ["run", "model", "trained on", "tested on", "seed", "galaxies", "accuracy", "balanced accuracy", "macro F1", "loss"]
    rows = []
    for run, variant, result in ((facts.run, *item) for facts in found.facts for item in facts.run.results.items()):
        scores = [score_text(result.scores.get(name)) for name in SCORES]
        rows.append([run.name, found.model_of(run), run.variant, variant, str(run.seed), f"{result.count:,}", *scores])
    return head, rows


def ranking_rows(found: DatasetResults) -> Rows:
    """Return head and rows of the ranking by validation, per training variant; the test results have no influence."""
    head = ["rank", "model", "value", "validation", "trained on", "seed", "step", "test", "run"]
    rows = []
    for ranked, unranked in found.rankings:
        ranks = [*map(str, range(1, len(ranked) + 1)), *[NOTHING] * len(unranked)]
        for rank, run in zip(ranks, [*ranked, *unranked], strict=True):
            own, chosen = run.results.get(run.variant), run.validation
            values = [NOTHING] * 3
            if chosen is not None:
                values = [number(chosen.value, 4), chosen.metric.replace("_", " "), f"{chosen.step:,}"]
            test = percent(own.accuracy if own is not None else None)
            rows.append([rank, found.model_of(run), *values[:2], run.variant, str(run.seed), values[2], test, run.name])
    return head, rows


def cost_rows(found: DatasetResults) -> Rows:
    """Return head and rows of the speed and cost of each run."""
    head = ["run", "model", "devices", "img/s", "img/s per device", "training time", "device-hours", "data wait", "memory", "MFU"]
    rows = []
    for facts in found.facts:
        cost, values = facts.cost, [NOTHING] * 8
        if cost is not None:
            values = [
                f"{cost.devices} {cost.kind}{'s' if cost.devices > 1 else ''}",
                f"{cost.img_s:,.0f}",
                f"{cost.img_s / cost.devices:,.0f}",
                hours_text(cost.hours),
                f"{cost.device_hours:,.3g}",
                percent(cost.data_wait),
                NOTHING if cost.memory_gb is None else f"{cost.memory_gb:.1f} GB",
                percent(cost.mfu),
            ]
        rows.append([facts.run.name, found.model_of(facts.run), *values])
    return head, rows


def time_rows(found: DatasetResults) -> Rows:
    """Return head and rows of the device hours of the runs, and of what of them was lost."""
    return hours_rows([facts.hours for facts in found.facts if facts.hours is not None])


def ensemble_rows(found: DatasetResults) -> Rows:
    """Return head and rows of the ensembles of seeds."""
    head = ["model", "setting", "runs", "galaxies", "mean accuracy", "ensemble", "gain (points)", "mean loss", "ensemble loss"]
    rows = []
    for one in found.ensembles:
        accuracy, mean_accuracy = float(one.outcomes.correct_N.mean()), float(one.seeds.correct_SN.mean())
        line = [one.row.label, str(one.setting), str(len(one.seeds.correct_SN)), f"{len(one.outcomes.ids_N):,}"]
        line += [number(mean_accuracy), number(accuracy), points(accuracy - mean_accuracy)]
        rows.append([*line, number(float(one.seeds.losses_SN.mean())), number(float(one.outcomes.losses_N.mean()))])
    return head, rows


def settings_of(found: DatasetResults) -> dict[str, str]:
    """Return label -> the recipe keys with their values that distinguish rows of the same model and recipe."""
    shown = {key for key, field in RECIPE.fields.items() if field.kind == "result"} - FREE_KEYS
    groups: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in found.table.rows:
        if row.settings and (runs := found.runs_of(row)):
            recipe = {key: value for key, (value, _) in runs[0].recipe.items() if key in shown}
            groups.setdefault((row.model, row.recipe, row.regime), {})[row.label] = recipe
    texts = {}
    for recipes in groups.values():
        keys = sorted({key for recipe in recipes.values() for key in recipe})
        differ = [key for key in keys if len({recipe.get(key) for recipe in recipes.values()}) > 1]
        for label, recipe in recipes.items():
            texts[label] = ", ".join(f"{key}={recipe[key]}" if key in recipe else f"{key} by default" for key in differ)
    return texts


# Text that is safe in LaTeX.

_LATEX_ESCAPES: dict[str, str | int | None] = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    MINUS: "$-$",
    NOTHING: "--",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
}


def escape_latex(text: str) -> str:
    return text.translate(str.maketrans(_LATEX_ESCAPES))
