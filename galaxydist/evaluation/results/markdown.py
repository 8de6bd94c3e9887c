"""The report's tables as Markdown, as GitHub renders it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from galaxydist.evaluation.matrix import Table
from galaxydist.evaluation.results.gather import REGIMES, Findings, Results
from galaxydist.evaluation.results.views import (
    SCORES_CAPTION,
    about,
    caption_of,
    class_rows,
    cost_rows,
    ensemble_rows,
    ranking_rows,
    score_rows,
    settings_of,
)
from galaxydist.evaluation.results.words import QUANTITIES, Numbers, Quantity, describe_table, number
from galaxydist.evaluation.text_table import readable
from galaxydist.evaluation.verdicts import Observation

_MARKS = {"better": " (better)", "worse": " (worse)", "same": " (not significant)", "": ""}


def render_markdown(results: Results, provenance: Mapping[str, str]) -> str:
    """The tables.

    Args:
        results: to be shown.
        provenance: ``command`` and ``version``.
    """
    lines = ["# Results", "", about(results), "", f"Made by galaxydist {provenance['version']}: `{provenance['command']}`", ""]
    for found in results.findings:
        lines += _data_set(found)
    if results.published:
        lines += ["## The published numbers alone", "", *_observations(results.published), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {_text(note)}" for note in results.notes), ""]
    return "\n".join(lines)


def _data_set(found: Findings) -> Iterator[str]:
    table = found.table
    yield from [f"## {_text(table.dataset)}", ""]
    for quantity in QUANTITIES:
        yield from [f"### Test {quantity}", "", *_matrix(table, quantity), ""]
    yield from [caption_of(table), "", "### Every run", "", *_table(*score_rows(found)), "", SCORES_CAPTION, ""]
    if said := settings_of(found):
        yield from [
            "Lines of one recipe with other settings:",
            "",
            *(f"- {_text(label)}: {_text(keys)}" for label, keys in said.items()),
            "",
        ]
    for regime, observations in found.observations.items():
        yield from [f"### Observations, {REGIMES[regime]}", "", *_observations(observations), ""]
    yield from ["### Ranking by validation", "", *_table(*ranking_rows(found)), ""]
    for setting, (names, rows) in class_rows(table).items():
        cells = [[row.label, *(number(value, 2) for value in row.values)] for row in rows]
        yield from [f"### Accuracy of each class, {setting}", "", *_table(["model", *map(readable, names)], cells), ""]
    if found.ensembles:
        yield from ["### Ensembles of seeds", "", *_table(*ensemble_rows(found)), ""]
    yield from ["### Speed and cost", "", *_table(*cost_rows(found)), ""]


def _matrix(table: Table, quantity: Quantity) -> Iterator[str]:
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


def _observations(observations: Iterable[Observation]) -> Iterator[str]:
    for one in observations:
        yield f"{one.number}. {one.statement} **{one.verdict}**. {_text(one.reason)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_text, head)) + " |"
    yield "|:--" + "|--:" * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(map(_text, row)) + " |"


def _text(text: str) -> str:
    return text.replace("|", r"\|").replace("_", r"\_").replace("*", r"\*").replace("\n", " ")
