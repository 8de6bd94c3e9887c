"""Report of many runs as a self-contained HTML page, and its tables as Markdown and LaTeX."""

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError
from galaxydist.evaluation.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, styled, tidy
from galaxydist.evaluation.text_table import NOTHING, escape_markdown, readable
from galaxydist.galaxy import VARIANTS
from galaxydist.gallery.gallery import gallery_sections
from galaxydist.pages.html import TEMPLATES, figure_svg, render
from galaxydist.report.claims import ClaimAnswer
from galaxydist.report.collect import REGIMES, DatasetResults, Pairs, ReportData, RunFacts
from galaxydist.report.finished_runs import SplitResult
from galaxydist.report.matrix import Table
from galaxydist.report.statistics import ALPHA
from galaxydist.report.tables import (
    QUANTITIES,
    SCORES_CAPTION,
    about,
    caption_of,
    cost_rows,
    describe_table,
    ensemble_rows,
    escape_latex,
    number,
    p_text,
    percent,
    points,
    ranking_rows,
    score_rows,
    settings_of,
    signed,
    time_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Figures: narrow enough for a phone; black becomes the page's text colour, the background is transparent.

VARIANT_COLOURS = {"original": BLUE, "balanced": VERMILLION}
_WIDTH = 4.4
# Largest number of points per curve: a page holds many runs.
_MOST_POINTS = 200
_PANELS = (("accuracy", "val/accuracy", "train/accuracy"), ("loss", "val/loss", "train/loss"))


@styled()
def draw_curves(runs: Sequence[RunFacts]) -> "Figure":
    """Draw accuracy and loss of the runs of one model: solid lines for validation, dotted lines for training.

    Args:
        runs: with their metrics.
    """
    over = "epoch" if all("epoch" in line for facts in runs for line in facts.lines) else "step"
    figure = new_figure(_WIDTH, 2.3)
    named: dict[str, Any] = {}
    for axes, (label, validation, training) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for facts in runs:
            colour = VARIANT_COLOURS.get(facts.run.variant, GREEN)
            _draw(axes, facts.lines, over, training, color=colour, linewidth=1.1, linestyle=":")
            drawn = _draw(axes, facts.lines, over, validation, color=colour, linewidth=1.2, marker="o", markersize=2)
            named |= {f"trained on {facts.run.variant}": drawn} if drawn is not None else {}
        axes.set(xlabel=over, title=label)
        axes.set_ylim(bottom=0, top=1 if label == "accuracy" else None)
        axes.locator_params(axis="x", nbins=5, integer=True)
        tidy(axes)
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw(axes: "Axes", lines: Sequence[Mapping[str, Any]], over: str, name: str, **style: Any) -> Any:
    """Draw a curve of at most ``_MOST_POINTS`` points, with its last one; return its line, None without points."""
    found = [(line[over], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    if not found:
        return None
    points = np.array([*found[: -1 : math.ceil(len(found) / _MOST_POINTS)], found[-1]], dtype=np.float64)
    return axes.plot(points[:, 0], points[:, 1], **style)[0]


@styled()
def draw_reliability(calibrations: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw reliability diagrams, as trained and after temperature scaling, with a panel per training variant.

    Args:
        calibrations: by variant, in the format of ``summarise``.
    """
    figure = new_figure(_WIDTH, 3.0)
    named: dict[str, Any] = {}
    panels = figure.subplots(1, max(2, len(calibrations)), sharey=True, squeeze=False)[0]
    for axes, (variant, calibration) in zip(panels, calibrations.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        named["as trained"] = _draw_bins(axes, calibration["reliability"], BLUE, "o")
        if scaled := calibration.get("scaled"):
            named["after temperature scaling"] = _draw_bins(axes, scaled["reliability"], ORANGE, "s")
        axes.set(title=f"trained on {variant}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        tidy(axes)
    for axes in panels[len(calibrations) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("accuracy")
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_bins(axes: "Axes", bins: Sequence[Mapping[str, Any]], colour: str, marker: str) -> Any:
    filled = [found for found in bins if found["count"]]
    most = max((found["count"] for found in filled), default=1)
    x, y = [found["confidence"] for found in filled], [found["accuracy"] for found in filled]
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.7)
    sizes = [4 + 26 * found["count"] / most for found in filled]
    return axes.scatter(x, y, s=sizes, color=colour, marker=marker, linewidths=0)


# Heat maps of the recalls and confusion matrices, made as HTML tables so that the numbers are readable on a phone.


def class_maps(table: Table) -> list[dict[str, Any]]:
    """Return a heat map of the recalls, averaged over seeds, for each setting with runs: a row per model, a column per class."""
    maps = []
    for setting in table.settings:
        cells = {row: cell for row in table.rows if (cell := table.cells[row, setting]).runs}
        lines = []
        for row, cell in cells.items():
            recalls_K = np.array([result.recall for result in cell.results], np.float64).mean(axis=0)  # nan: no galaxy
            worst = int(np.nanargmin(recalls_K))
            known = [None if np.isnan(recall) else recall for recall in recalls_K.tolist()]
            shares = [_share(recall, is_marked=label == worst) for label, recall in enumerate(known)]
            lines.append({"label": row.label, "cells": shares})
        if cells:
            counts = next(iter(cells.values())).results[0].support
            names = [readable(name) for name in table.class_names]
            heads = [f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)]
            maps.append({"setting": setting, "names": names, "heads": heads, "lines": lines})
    return maps


def _share(value: float | None, *, is_marked: bool = False, title: str = "") -> dict[str, Any]:
    text = NOTHING if value is None else f"{100 * value:.0f}"
    share = round(100 * (value or 0.0))
    return {"text": text, "share": share, "marked": is_marked, "title": title, "number": number(value, 2)}


def confusion_maps(found: DatasetResults) -> list[dict[str, Any]]:
    """Return the confusion matrices of the best run by validation of each row and training variant, on its own test set."""
    names, maps = [readable(name) for name in found.table.class_names], []
    for row, facts, result in found.best_on_own():
        lines = []
        for name, counts_K in zip(names, result.confusion, strict=True):
            cells = [_share(count / max(1, sum(counts_K)), title=f"{count:,} galaxies") for count in counts_K]
            cells = [{**cell, "text": cell["text"] if count else ""} for cell, count in zip(cells, counts_K, strict=True)]
            lines.append({"label": name, "cells": cells})
        maps.append({"label": row.label, "description": describe_own_test(facts, result), "heads": names, "lines": lines})
    return maps


def describe_own_test(facts: RunFacts, result: SplitResult) -> str:
    """Describe a run and its evaluation on its own test set."""
    return f"trained and tested on {result.variant}, seed {facts.run.seed}, {result.count:,} galaxies"


# Galleries of the best run of each model and variant: confident mistakes and uncertain galaxies, with saliency.


def galleries(found: DatasetResults) -> dict[str, Any]:
    """Return the galleries of the best run by validation of each row and variant, and the commands for missing ones."""
    missing = [shlex.join(["galaxydist", "gallery", str(facts.run.run_dir)]) for facts in without_gallery(found)]
    shown = [
        {"label": row.label, "description": f"{facts.run.name}, {describe_own_test(facts, result)}", "sheets": sheets}
        for row, facts, result in found.best_on_own()
        if result.predictions_path is not None and (sheets := gallery_sections(result.predictions_path))
    ]
    return {"shown": shown, "missing": missing}


def without_gallery(found: DatasetResults) -> list[RunFacts]:
    """Return the best runs by validation that kept predictions but have no gallery."""
    return [
        facts
        for _, facts, result in found.best_on_own()
        if result.predictions_path is not None and not gallery_sections(result.predictions_path)
    ]


# The page and its tables.


# Sections of the page: id -> name in the navigation.
_SECTIONS = {
    "matrix": "Matrix",
    "claims": "Claims",
    "ranking": "Ranking",
    "curves": "Curves",
    "classes": "Classes",
    "confusion": "Confusion",
    "calibration": "Calibration",
    "gallery": "Gallery",
    "pairs": "Paired tests",
    "ensembles": "Ensembles",
    "cost": "Cost",
    "runs": "Runs",
    "notes": "Notes",
    "provenance": "Provenance",
}


def render_report(results: ReportData, provenance: Mapping[str, str]) -> dict[str, str]:
    """Render the report as ``.html``, ``.md`` and ``.tex``; ``provenance`` holds ``command``, ``version`` and ``versions``."""
    context = {
        "about": about(results),
        "sections": [(key, name) for key, name in _SECTIONS.items() if key != "claims" or results.published],
        "datasets": [_data_set(found, number) for number, found in enumerate(results.datasets)],
        "published": results.published,
        "answers": _answers(results),
        "notes": results.notes,
        "num_runs": results.num_runs,
        "num_given": results.num_given,
        "provenance": provenance,
        "alpha": f"{ALPHA:g}",
        "scores_caption": SCORES_CAPTION,
    }
    return {
        ".html": render("report.html", context),
        ".md": _render_text("report.md", context, escape_markdown),
        ".tex": _render_text("report.tex", context, escape_latex),
    }


def _render_text(template: str, context: Mapping[str, Any], escape: Callable[[str], str]) -> str:
    """Render a template of Markdown or LaTeX, whose own braces and percent signs need other delimiters than HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters["text"] = lambda value: escape(str(value))
    return environment.get_template(template).render(context)


def _data_set(found: DatasetResults, index: int) -> dict[str, Any]:
    table = found.table
    sizes = {result.variant: result.count for cell in table.cells.values() for result in cell.results}
    return {
        "name": table.dataset,
        "key": re.sub(r"[^a-z0-9]+", "-", table.dataset.lower()).strip("-") or f"d{index}",
        "is_real": table.is_real,
        "is_galaxy10": table.is_galaxy10,
        "caption": caption_of(table),
        "origin": found.origin,
        "scores": score_rows(found),
        "sizes": ", ".join(f"{variant} {count:,}" for variant, count in sorted(sizes.items(), reverse=True)),
        "settings_of": settings_of(found),
        "settings": table.settings,
        "quantities": QUANTITIES,
        "lines": _matrix(table),
        "tests": _tests(table),
        "claims": found.claims,
        "regimes": REGIMES,
        "ranking": ranking_rows(found),
        "curves": _curves(found),
        "classes": class_maps(table),
        "confusions": confusion_maps(found),
        "calibration": _calibration(found),
        "without_validation": _without_validation(found),
        "galleries": galleries(found),
        "pairs": [_pairs(pairs) for pairs in found.pairs],
        "ensembles": ensemble_rows(found),
        "cost": cost_rows(found),
        "hours": time_rows(found),
        "runs": [_run(facts, found) for facts in found.facts],
    }


def _matrix(table: Table) -> list[dict[str, Any]]:
    """Return a line per row of the matrix; its cells by setting, each with its number of seeds and its formatted numbers."""
    numbers, lines = describe_table(table), []
    for row in table.rows:
        cells = {setting: table.cells[row, setting] for setting in table.settings}
        shown = {
            setting: {"seeds": cell.num_seeds, **{name: numbers[row, setting, name] for name in QUANTITIES}}
            for setting, cell in cells.items()
        }
        # A row without runs and published values shows one note instead of its cells.
        has_any = any(cell.runs or cell.published for cell in cells.values())
        lines.append({"label": row.label, "has_any": has_any, "cells": shown})
    return lines


def _tests(table: Table) -> list[dict[str, Any]]:
    """Return a row for every known quantity of every cell, with the results of its test."""
    numbers, lines = describe_table(table), []
    for (row, setting), cell in table.cells.items():
        for name, estimate, test in zip(
            QUANTITIES, (cell.accuracy, cell.loss), (cell.accuracy_test, cell.loss_test), strict=True
        ):
            if estimate is None:
                continue
            shown = numbers[row, setting, name]
            line = [row.label, str(setting), name, str(cell.num_seeds), f"{estimate.num_galaxies:,}", number(estimate.mean, 4)]
            line += [number(estimate.seed_error, 4), number(estimate.standard_error, 4)]
            if table.is_real:
                tested = [NOTHING] * 4
                if test is not None:
                    low, high = test.interval
                    tested = [signed(test.value, 4), f"{signed(low)} to {signed(high)}", p_text(test.p_value), shown.p]
                line += [shown.published or NOTHING, *tested]
            notes = [*cell.notes, *(test.notes if test is not None else ())] if name == "accuracy" or test is not None else []
            lines.append({"cells": line, "notes": "; ".join(dict.fromkeys(notes))})
    return lines


def _without_validation(found: DatasetResults) -> list[list[str]]:
    """Return a row for every evaluation whose test set contains galaxies of the run's validation split."""
    return [
        [
            found.model_of(facts.run),
            f"{facts.run.variant} on {variant}",
            str(facts.run.seed),
            f"{result.count - others.count:,} of {result.count:,}",
            *(percent(result.accuracy, 2), percent(others.accuracy, 2), number(result.loss, 4), number(others.loss, 4)),
        ]
        for facts in found.facts
        for variant, result in facts.run.results.items()
        if (others := result.without_validation) is not None
    ]


def _answers(results: ReportData) -> list[dict[str, Any]]:
    """Return the answers to the claims: ours by regime, then those of the published numbers."""
    answers = [
        (found.table.dataset, REGIMES[regime], found.claims[regime]) for found in results.datasets for regime in found.claims
    ]
    if results.published:
        answers.append(("published", "the numbers alone, as one run of each model", list(results.published)))
    return [
        {"source": source, "regime": regime, "claims": [{"answer": one, "comparisons": _comparisons(one)} for one in claims]}
        for source, regime, claims in answers
    ]


def _comparisons(answer: ClaimAnswer) -> list[dict[str, str]]:
    rows = []
    for comparison, outcome in answer.comparisons:
        low, high = (signed(100 * limit, 2) for limit in comparison.interval())
        p_note = "" if comparison.p_value is None else f", {p_text(comparison.p_value)}"
        rows.append(
            {
                "text": comparison.text,
                "value": f"{signed(100 * comparison.value, 2)} ± {100 * comparison.error:.2f} points",
                "interval": f"{low} to {high}",
                "outcome": outcome,
                "standing": {"holds": "good", "refuted": "warn", "open": ""}[outcome],
                "test": comparison.test + p_note,
                "notes": "; ".join(comparison.notes),
            }
        )
    return rows


def _curves(found: DatasetResults) -> list[dict[str, Any]]:
    """Return a figure of learning curves per row."""
    drawn = []
    for row in found.table.rows:
        runs = [facts for facts in found.runs_of(row) if facts.lines]
        if runs:
            figure = draw_curves(runs)
            drawn.append({"label": row.label, "svg": figure_svg(figure, f"learning curves of {row.label}"), "runs": len(runs)})
    return drawn


def _calibration(found: DatasetResults) -> dict[str, Any]:
    """Return the calibration of each run, and a reliability diagram per row."""
    rows, figures = [], []
    for facts in found.facts:
        if known := facts.calibration:
            temperature, scaled = known.get("temperature") or {}, known.get("scaled") or {}
            run, loss = facts.run, facts.evaluation.get("loss")
            values = known.get("ece"), scaled.get("ece"), temperature.get("value"), loss, scaled.get("loss")
            rows.append([run.name, found.model_of(run), run.variant, str(run.seed), *map(number, values)])
    for matrix_row in found.table.rows:
        best = {variant: found.best(matrix_row, variant) for variant in VARIANTS}
        calibrations: dict[str, Any] = {name: one.calibration for name, one in best.items() if one and one.calibration}
        if calibrations:
            svg = figure_svg(draw_reliability(calibrations), f"reliability of {matrix_row.label}")
            figures.append({"label": matrix_row.label, "svg": svg})
    return {"rows": rows, "figures": figures}


def _pairs(pairs: Pairs) -> dict[str, Any]:
    """Return a square table of tests: accuracy of the row's model minus that of the column's."""
    lines = []
    for first, run in pairs.runs.items():
        cells = []
        for second in pairs.runs:
            key, sign = ((first, second), 1) if (first, second) in pairs.tests else ((second, first), -1)
            test = pairs.tests.get(key)
            if test is None:
                cells.append({"text": "", "p": "", "standing": "", "title": ""})
                continue
            p = pairs.adjusted[key]
            standing = "" if p >= ALPHA else "better" if sign * test.difference > 0 else "worse"
            title = f"N = {test.count:,}: {test}, p = {test.p_value:.3g} before the adjustment"
            cells.append({"text": points(sign * test.difference), "p": p_text(p), "standing": standing, "title": title})
        lines.append({"label": first.label, "run": run.name, "cells": cells})
    return {"setting": str(pairs.setting), "heads": [row.label for row in pairs.runs], "lines": lines, "num": len(pairs.tests)}


def _run(facts: RunFacts, found: DatasetResults) -> dict[str, Any]:
    results = [
        {
            "test_set": f"{result.dataset} ({variant})",
            "accuracy": percent(result.accuracy),
            "count": result.count,
            "loss": number(result.loss),
            "hash": result.manifest_hash[:12],
            "kept": result.predictions_path is not None,
        }
        for variant, result in facts.run.results.items()
    ]
    return {"facts": facts, "label": found.model_of(facts.run), "results": results}


def write_report(results: ReportData, page: Path, *, provenance: Mapping[str, str]) -> list[Path]:
    """Write a report: the HTML page, and its tables as Markdown and LaTeX.

    All content is rendered before the first file is written, and each file is written atomically.

    Args:
        page: path of the HTML page, whose folder is created if needed; ``.md`` and ``.tex`` are written beside it.
        provenance: ``command`` and ``version``.

    Returns:
        The paths of the files, the page last.

    Raises:
        UserError: the folder cannot be created, or the disk is full.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "pyarrow", "matplotlib"))
    texts = render_report(results, {**provenance, "versions": versions})
    paths = {page.with_suffix(".md"): texts[".md"], page.with_suffix(".tex"): texts[".tex"], page: texts[".html"]}
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{page.parent} cannot be created: {error.strerror}. Give another file with -o FILE.") from error
    for path, text in paths.items():
        replace_bytes(path, text.encode())
    return list(paths)
