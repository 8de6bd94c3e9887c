r"""The report's tables as LaTeX, ready to ``\input``: they need the packages booktabs and graphicx (for turned heads)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from galaxydist.evaluation.matrix import Table
from galaxydist.evaluation.results.gather import Findings, Results
from galaxydist.evaluation.results.views import SCORES_CAPTION, caption_of, class_rows, ranking_rows, score_rows
from galaxydist.evaluation.results.words import NOTHING, QUANTITIES, Numbers, Quantity, describe_table, number
from galaxydist.evaluation.text_table import readable
from galaxydist.evaluation.verdicts import Observation

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
# Of a difference that is significant.
_STAR = "$^{*}$"


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    return _SPECIAL.sub(lambda match: _ESCAPES[match.group()], text)


def render_latex(results: Results, provenance: Mapping[str, str]) -> str:
    """The tables, each a float of its own with a caption and a label.

    Args:
        results: to be shown.
        provenance: ``command`` and ``version``.
    """
    command = " ".join(provenance["command"].split())
    lines = [f"% Made by galaxydist {provenance['version']}: {command}", r"% Needs \usepackage{booktabs,graphicx}.", ""]
    for found in results.findings:
        lines += _data_set(found)
    if results.published:
        lines += _observations("the published numbers alone", "published", results.published)
    return "\n".join(lines)


def _data_set(found: Findings) -> Iterator[str]:
    table, key = found.table, _key(found.table.dataset)
    for quantity in QUANTITIES:
        caption = f"Test {quantity} on {table.dataset}. {caption_of(table)}"
        if table.is_real:
            caption += " A star marks a significant difference."
        yield from _float(caption, f"{key}-{quantity}", "l" + "c" * len(table.settings), list(_matrix(table, quantity)))
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
        yield from _observations(f"{table.dataset}, {regime} recipes", f"{key}-{regime}", observations)
    yield from _plain(f"Runs on {table.dataset}, ranked by validation alone.", f"{key}-ranking", *ranking_rows(found))


def _plain(caption: str, label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [rf"{' & '.join(map(escape, words))} \\" for words in (head, *rows)]
    yield from _float(caption, label, "l" * len(head), [lines[0], r"\midrule", *lines[1:]])


def _matrix(table: Table, quantity: Quantity) -> Iterator[str]:
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


def _observations(where: str, key: str, observations: Sequence[Observation]) -> Iterator[str]:
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
