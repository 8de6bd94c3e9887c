"""Tables of a report as text, Markdown and LaTeX.

Numbers are formatted once, in Unicode; ``escape`` translates them for LaTeX.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from galaxydist.evaluation.text_table import readable
from galaxydist.recipe.fields import RECIPE
from galaxydist.report.claims import ClaimAnswer
from galaxydist.report.collect import REGIMES, DatasetResults, ReportData
from galaxydist.report.finished_runs import COLUMNS, SCORES, FinishedRun, Score
from galaxydist.report.matrix import NOT_RUN, Cell, Row, Table, holm_adjusted
from galaxydist.report.published_results import TrainTest
from galaxydist.report.statistics import ALPHA, Difference, Estimate
from galaxydist.surveys.official_split import NAME as REAL_DATASET

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
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


def describe_table(table: Table) -> dict[tuple[Row, TrainTest, Quantity], Numbers]:
    """Format all numbers of a table; accuracies and losses are separate families of tests."""
    found: dict[tuple[Row, TrainTest, Quantity], Numbers] = {}
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
    if not cell.trials:
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


def interval_text(found: Difference) -> str:
    low, high = found.interval()
    return f"{signed(low)} to {signed(high)}"


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


def hours_text(hours: float | None) -> str:
    """Format a duration, as ``3.2 h``, ``12.1 min`` or ``8 s``; None becomes a dash."""
    if hours is None:
        return NOTHING
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


# Text, table heads and rows that the HTML page, Markdown and LaTeX share.

_ERRORS = "Mean over seeds ± its standard error over seeds; a number without one is of a single seed."
_CAPTIONS = {
    True: f"{_ERRORS} Below it the published value and ours minus published, with the standard error of that difference from "
    "galaxies and seeds on both sides (the published number has sampling error too, and is of another split); p is adjusted for "
    f"the number of cells (Holm), significant below {ALPHA:g}.",
    False: f"{_ERRORS} These are not the real Galaxy10 DECaLS galaxies, so that nothing published stands beside them.",
}
SCORES_CAPTION = (
    "Each run on each test set it was judged on; in brackets the 95 % interval over galaxies (percentile bootstrap), without the "
    "error between trainings."
)
NO_REAL = f"No run on the real Galaxy10 DECaLS ({REAL_DATASET}) is among these: the published comparison is not run."


@dataclass(frozen=True)
class ClassRow:
    """Recalls of the classes of a model in a setting, averaged over seeds.

    Args:
        label: of the model's row.
        values: by class; None for a class without galaxies.
        worst: index of the class with the smallest recall; None if no class has galaxies.
    """

    label: str
    values: tuple[float | None, ...]
    worst: int | None


def caption_of(table: Table) -> str:
    """Return the sentences that explain the numbers of the matrix."""
    return _CAPTIONS[table.is_real] if table.is_galaxy10 else _ERRORS


def about(results: ReportData) -> str:
    """Return one or two sentences on the content of the report."""
    names = ", ".join(found.table.dataset for found in results.findings)
    text = f"{_some(results.num_runs, 'run')} on {names}"
    if left := results.num_asked - results.num_runs:
        text += f"; {left} more could not be reported, see the notes"
    tables = [found.table for found in results.findings]
    is_missed = any(table.is_galaxy10 for table in tables) and not any(table.is_real for table in tables)
    return f"{text}. {NO_REAL}" if is_missed else f"{text}."


def score_rows(found: DatasetResults) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the metrics of each run, with their intervals."""
    head = ["run", "model", "trained on", "tested on", "seed", "galaxies", "accuracy", "balanced accuracy", "macro F1", "loss"]
    rows = []
    for facts in found.facts:
        trial = facts.trial
        for variant, judged in trial.judgements.items():
            scores = [score_text(judged.scores.get(name)) for name in SCORES]
            rows.append(
                [trial.name, found.model_of(trial), trial.variant, variant, str(trial.seed), f"{judged.count:,}", *scores]
            )
    return head, rows


def class_rows(table: Table) -> dict[TrainTest, tuple[tuple[str, ...], list[ClassRow]]]:
    """Return the class names and a row per model, for each setting with runs."""
    found = {}
    for setting in table.settings:
        rows = [_class_row(row, table.cells[row, setting]) for row in table.rows if table.cells[row, setting].trials]
        if rows:
            found[setting] = (table.class_names, rows)
    return found


def _class_row(row: Row, cell: Cell) -> ClassRow:
    recalls_SK = np.array([[np.nan if value is None else value for value in one.recall] for one in cell.judgements])
    values_K = recalls_SK.mean(axis=0)
    worst = None if np.isnan(values_K).all() else int(np.nanargmin(values_K))
    return ClassRow(row.label, tuple(None if np.isnan(value) else float(value) for value in values_K), worst)


def ranking_rows(found: DatasetResults) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the ranking by validation, per training variant; the test results have no influence."""
    head = ["rank", "model", "value", "validation", "trained on", "seed", "step", "test", "run"]
    rows = []
    for ranking in found.rankings:
        for place, trial in enumerate((*ranking.ranked, *ranking.unranked), 1):
            is_ranked = place <= len(ranking.ranked)
            rows.append([str(place) if is_ranked else NOTHING, *_ranked(found, trial)])
    return head, rows


def _ranked(found: DatasetResults, trial: FinishedRun) -> list[str]:
    validation, own = trial.validation, trial.judgements.get(trial.variant)
    return [
        found.model_of(trial),
        number(validation.value if validation is not None else None, 4),
        validation.metric.replace("_", " ") if validation is not None else NOTHING,
        trial.variant,
        str(trial.seed),
        f"{validation.step:,}" if validation is not None else NOTHING,
        percent(own.accuracy if own is not None else None),
        trial.name,
    ]


def cost_rows(found: DatasetResults) -> tuple[list[str], list[list[str]]]:
    head = [
        "run",
        "model",
        "devices",
        "img/s",
        "img/s a device",
        "training time",
        "device-hours",
        "waits for data",
        "memory",
        "MFU",
    ]
    rows = []
    for facts in found.facts:
        cost, label = facts.cost, found.model_of(facts.trial)
        if cost is None:
            rows.append([facts.name, label, *[NOTHING] * 8])
            continue
        rows.append(
            [
                facts.name,
                label,
                f"{cost.devices} {cost.kind}{'s' if cost.devices > 1 else ''}",
                f"{cost.img_s:,.0f}",
                f"{cost.img_s / cost.devices:,.0f}",
                hours_text(cost.hours),
                f"{cost.device_hours:,.3g}",
                percent(cost.data_wait),
                NOTHING if cost.memory_gb is None else f"{cost.memory_gb:.1f} GB",
                percent(cost.mfu),
            ]
        )
    return head, rows


def ensemble_rows(found: DatasetResults) -> tuple[list[str], list[list[str]]]:
    head = ["model", "setting", "runs", "galaxies", "mean accuracy", "ensemble", "gain (points)", "mean loss", "ensemble loss"]
    rows = [
        [
            one.row.label,
            str(one.setting),
            str(one.num_runs),
            f"{one.num_galaxies:,}",
            number(one.mean_accuracy),
            number(one.accuracy),
            points(one.accuracy - one.mean_accuracy),
            number(one.mean_loss),
            number(one.loss),
        ]
        for one in found.ensembles
    ]
    return head, rows


def settings_of(found: DatasetResults) -> dict[str, str]:
    """Return label -> the recipe keys with their values that distinguish rows of the same model and recipe."""
    fields = RECIPE.fields
    groups: dict[tuple[str, str, str], dict[Row, dict[str, str]]] = {}
    for row in found.table.rows:
        if row.settings and (runs := found.runs_of(row)):
            recipe = {
                key: value
                for key, (value, _) in runs[0].recipe.items()
                if key not in COLUMNS and key in fields and fields[key].kind == "result"
            }
            groups.setdefault((row.model, row.recipe, row.regime), {})[row] = recipe
    said = {}
    for recipes in groups.values():
        keys = sorted({key for recipe in recipes.values() for key in recipe})
        differ = [key for key in keys if len({recipe.get(key) for recipe in recipes.values()}) > 1]
        for row, recipe in recipes.items():
            said[row.label] = ", ".join(f"{key}={recipe[key]}" if key in recipe else f"{key} by default" for key in differ)
    return said


def _some(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


# Tables in GitHub's Markdown.

_MARKS = {"better": " (better)", "worse": " (worse)", "same": " (not significant)", "": ""}


def render_markdown(results: ReportData, provenance: Mapping[str, str]) -> str:
    """Render the tables as Markdown; ``provenance`` holds ``command`` and ``version``."""
    lines = ["# Results", "", about(results), "", f"Made by galaxydist {provenance['version']}: `{provenance['command']}`", ""]
    for found in results.findings:
        lines += _data_set_markdown(found)
    if results.published:
        lines += ["## The published numbers alone", "", *_observations_markdown(results.published), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {_text(note)}" for note in results.notes), ""]
    return "\n".join(lines)


def _data_set_markdown(found: DatasetResults) -> Iterator[str]:
    table = found.table
    yield from [f"## {_text(table.dataset)}", ""]
    for quantity in QUANTITIES:
        yield from [f"### Test {quantity}", "", *_matrix_markdown(table, quantity), ""]
    yield from [caption_of(table), "", "### Every run", "", *_table(*score_rows(found)), "", SCORES_CAPTION, ""]
    if said := settings_of(found):
        yield from [
            "Lines of one recipe with other settings:",
            "",
            *(f"- {_text(label)}: {_text(keys)}" for label, keys in said.items()),
            "",
        ]
    for regime, observations in found.observations.items():
        yield from [f"### Observations, {REGIMES[regime]}", "", *_observations_markdown(observations), ""]
    yield from ["### Ranking by validation", "", *_table(*ranking_rows(found)), ""]
    for setting, (names, rows) in class_rows(table).items():
        cells = [[row.label, *(number(value, 2) for value in row.values)] for row in rows]
        yield from [f"### Accuracy of each class, {setting}", "", *_table(["model", *map(readable, names)], cells), ""]
    if found.ensembles:
        yield from ["### Ensembles of seeds", "", *_table(*ensemble_rows(found)), ""]
    yield from ["### Speed and cost", "", *_table(*cost_rows(found)), ""]


def _matrix_markdown(table: Table, quantity: Quantity) -> Iterator[str]:
    numbers = describe_table(table)
    rows = [[row.label, *(_cell(numbers[row, setting, quantity]) for setting in table.settings)] for row in table.rows]
    return _table(["model", *map(str, table.settings)], rows)


def _cell(numbers: Numbers) -> str:
    lines = [numbers.ours]
    if numbers.published:
        lines.append(f"published {numbers.published}")
    if numbers.difference:
        lines.append(f"{numbers.difference}, {numbers.p}{_MARKS[numbers.standing]}")
    return "<br>".join(lines)


def _observations_markdown(observations: Iterable[ClaimAnswer]) -> Iterator[str]:
    for one in observations:
        yield f"{one.number}. {one.statement} **{one.verdict}**. {_text(one.reason)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_text, head)) + " |"
    yield "|:--" + "|--:" * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(map(_text, row)) + " |"


def _text(text: str) -> str:
    return text.replace("|", r"\|").replace("_", r"\_").replace("*", r"\*").replace("\n", " ")


# Tables in LaTeX for ``\input``; they need the packages booktabs and graphicx (for rotated heads).

_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
}
_SPECIAL = re.compile("|".join(map(re.escape, _ESCAPES)))
# Marks a significant difference.
_STAR = "$^{*}$"


def escape(text: str) -> str:
    return _SPECIAL.sub(lambda match: _ESCAPES[match.group()], text)


def render_latex(results: ReportData, provenance: Mapping[str, str]) -> str:
    """Render the tables as LaTeX, each in its own float; ``provenance`` holds ``command`` and ``version``."""
    command = " ".join(provenance["command"].split())
    lines = [f"% Made by galaxydist {provenance['version']}: {command}", r"% Needs \usepackage{booktabs,graphicx}.", ""]
    for found in results.findings:
        lines += _data_set_latex(found)
    if results.published:
        lines += _observations_latex("the published numbers alone", "published", results.published)
    return "\n".join(lines)


def _data_set_latex(found: DatasetResults) -> Iterator[str]:
    table, key = found.table, _key(found.table.dataset)
    for quantity in QUANTITIES:
        caption = f"Test {quantity} on {table.dataset}. {caption_of(table)}"
        if table.is_real:
            caption += " A star marks a significant difference."
        yield from _float(caption, f"{key}-{quantity}", "l" + "c" * len(table.settings), list(_matrix_latex(table, quantity)))
    yield from _plain(f"Every run on {table.dataset}. {SCORES_CAPTION}", f"{key}-runs", *score_rows(found))
    for setting, (names, rows) in class_rows(table).items():
        caption = f"Accuracy of each class on {table.dataset}, {setting}: mean over seeds; each model's worst class is in bold."
        head = " & ".join(["", *(rf"\rotatebox{{90}}{{{escape(readable(name))}}}" for name in names)])
        body = [
            " & ".join(
                [escape(row.label), *(_bold(number(value, 2), place == row.worst) for place, value in enumerate(row.values))]
            )
            for row in rows
        ]
        label = f"{key}-classes-{setting.train}-{setting.test}"
        yield from _float(caption, label, "l" + "c" * len(names), [rf"{head} \\", r"\midrule", *(rf"{line} \\" for line in body)])
    for regime, observations in found.observations.items():
        yield from _observations_latex(f"{table.dataset}, {regime} recipes", f"{key}-{regime}", observations)
    yield from _plain(f"Runs on {table.dataset}, ranked by validation alone.", f"{key}-ranking", *ranking_rows(found))


def _plain(caption: str, label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [rf"{' & '.join(map(escape, words))} \\" for words in (head, *rows)]
    yield from _float(caption, label, "l" * len(head), [lines[0], r"\midrule", *lines[1:]])


def _matrix_latex(table: Table, quantity: Quantity) -> Iterator[str]:
    numbers = describe_table(table)
    order = sorted(table.settings, key=lambda setting: (setting.train != "original", setting.test != "original"))
    first = 2
    spans, rules = [], []
    for train, group in groupby(order, key=lambda setting: setting.train):
        width = len(list(group))
        spans.append(rf"\multicolumn{{{width}}}{{c}}{{trained on {train}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    yield rf"& {' & '.join(spans)} \\"
    yield "".join(rules)
    yield " & ".join(["model", *(f"tested on {setting.test}" for setting in order)]) + r" \\"
    yield r"\midrule"
    for number_, row in enumerate(table.rows):
        cells = [numbers[row, setting, quantity] for setting in order]
        if number_ and table.is_real:
            yield r"\addlinespace"
        yield " & ".join([escape(row.label), *(escape(cell.ours) for cell in cells)]) + r" \\"
        if any(cell.published for cell in cells):
            yield " & ".join([r"\quad published", *map(_published, cells)]) + r" \\"


def _published(cell: Numbers) -> str:
    if not cell.published:
        return NOTHING.replace("\N{EN DASH}", "--")
    star = _STAR if cell.standing in ("better", "worse") else ""
    difference = cell.difference.partition(" ")[0]
    return cell.published + (f" ({escape(difference)}{star})" if difference else "")


def _observations_latex(where: str, key: str, observations: Sequence[ClaimAnswer]) -> Iterator[str]:
    lines = [r" & observation & verdict \\", r"\midrule"]
    lines += [rf"{one.number} & {escape(one.statement)} & {one.verdict} \\" for one in observations]
    yield from _float(
        f"The published observations, put to the test on {where}.", f"{key}-observations", "rp{0.7\\linewidth}l", lines
    )


def _float(caption: str, label: str, columns: str, lines: Sequence[str]) -> Iterator[str]:
    yield r"\begin{table*}"
    yield rf"\caption{{{escape(caption)}}}"
    yield rf"\label{{tab:{label}}}"
    yield r"\centering\small"
    yield rf"\begin{{tabular}}{{{columns}}}"
    yield r"\toprule"
    yield from lines
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table*}"
    yield ""


def _bold(text: str, is_bold: bool) -> str:
    return rf"\textbf{{{escape(text)}}}" if is_bold else escape(text)


def _key(dataset: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")
