"""Self-contained HTML page of a report."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError
from galaxydist.evaluation.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, styled
from galaxydist.evaluation.text_table import readable
from galaxydist.galaxy import VARIANTS
from galaxydist.gallery.gallery import gallery_sections
from galaxydist.pages.html import figure_svg, render
from galaxydist.report.claims import ClaimAnswer
from galaxydist.report.collect import REGIMES, DatasetResults, Pairs, ReportData, RunFacts
from galaxydist.report.finished_runs import SplitResult
from galaxydist.report.matrix import Table
from galaxydist.report.statistics import ALPHA
from galaxydist.report.tables import (
    NOTHING,
    QUANTITIES,
    SCORES_CAPTION,
    about,
    caption_of,
    class_rows,
    cost_rows,
    describe_table,
    ensemble_rows,
    interval_text,
    number,
    p_text,
    percent,
    points,
    ranking_rows,
    render_latex,
    render_markdown,
    score_rows,
    settings_of,
    signed,
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


@dataclass(frozen=True)
class LearningCurve:
    """Learning curve of a run.

    Args:
        variant: of the training data.
        lines: of metrics.jsonl.
    """

    variant: str
    lines: Sequence[Mapping[str, Any]]


@styled
def draw_curves(curves: Sequence[LearningCurve]) -> "Figure":
    """Draw accuracy and loss of the runs of one model: solid lines for validation, dotted lines for training.

    Args:
        curves: one per run.
    """
    lines = [line for curve in curves for line in curve.lines]
    over = "epoch" if all("epoch" in line for line in lines) else "step"
    figure = new_figure(_WIDTH, 2.3)
    named: dict[str, Any] = {}
    for axes, (label, validation, training) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for curve in curves:
            colour = VARIANT_COLOURS.get(curve.variant, GREEN)
            _draw(axes, curve.lines, over, training, color=colour, linewidth=1.1, linestyle=":")
            drawn = _draw(axes, curve.lines, over, validation, color=colour, linewidth=1.2, marker="o", markersize=2)
            named |= {f"trained on {curve.variant}": drawn} if drawn is not None else {}
        axes.set(xlabel=over, title=label)
        axes.set_ylim(bottom=0, top=1 if label == "accuracy" else None)
        axes.locator_params(axis="x", nbins=5, integer=True)
        _tidy(axes)
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw(axes: "Axes", lines: Sequence[Mapping[str, Any]], over: str, name: str, **style: Any) -> Any:
    found = [(line[over], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    if not found:
        return None
    kept = found[:: -(-len(found) // _MOST_POINTS)]
    points = np.array(kept if kept[-1] == found[-1] else [*kept, found[-1]], dtype=np.float64)
    return axes.plot(points[:, 0], points[:, 1], **style)[0]


@styled
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
        _tidy(axes)
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


def _tidy(axes: "Axes") -> None:
    axes.grid(linewidth=0.3, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, pad=2)


# Heat maps of the recalls and confusion matrices, made as HTML tables so that the numbers are readable on a phone.


def class_maps(table: Table) -> list[dict[str, Any]]:
    """Return a heat map of the recalls for each setting: a row per model, a column per class."""
    maps = []
    for setting, (names, rows) in class_rows(table).items():
        lines = [
            {
                "label": row.label,
                "cells": [_share(value, is_marked=place == row.worst) for place, value in enumerate(row.values)],
            }
            for row in rows
        ]
        counts = next(judged.support for row in table.rows for judged in table.cells[row, setting].judgements)
        heads = [f"{readable(name)} ({count:,})" for name, count in zip(names, counts, strict=True)]
        maps.append({"setting": str(setting), "heads": heads, "lines": lines})
    return maps


def _share(value: float | None, *, is_marked: bool = False, title: str = "") -> dict[str, Any]:
    text = NOTHING if value is None else f"{100 * value:.0f}"
    return {"text": text, "share": round(100 * (value or 0.0)), "marked": is_marked, "title": title}


def confusion_maps(found: DatasetResults) -> list[dict[str, Any]]:
    """Return the confusion matrices of the best run by validation of each row and training variant, on its own test set."""
    names, drawn = [readable(name) for name in found.table.class_names], []
    for row, facts, judged in found.best_on_own():
        counts_KK = np.asarray(judged.confusion)
        support_K1 = counts_KK.sum(axis=1, keepdims=True)
        shares_KK = counts_KK / np.maximum(support_K1, 1)
        lines = [
            {
                "label": name,
                "cells": [
                    {**_share(float(share)), "text": f"{100 * share:.0f}" if count else "", "title": f"{count:,} galaxies"}
                    for share, count in zip(shares_K, counts_K, strict=True)
                ],
            }
            for name, shares_K, counts_K in zip(names, shares_KK, counts_KK, strict=True)
        ]
        drawn.append({"label": row.label, "what": own_test(facts, judged), "heads": names, "lines": lines})
    return drawn


def own_test(facts: RunFacts, judged: SplitResult) -> str:
    """Describe a run and its evaluation on its own test set."""
    return f"trained and tested on {judged.variant}, seed {facts.trial.seed}, {judged.count:,} galaxies"


# Galleries of the best run of each model and variant: confident mistakes and uncertain galaxies, with saliency.


def galleries(found: DatasetResults) -> dict[str, Any]:
    """Return the galleries of the best run by validation of each row and variant, and the commands for missing ones."""
    missing = [shlex.join(["galaxydist", "gallery", str(facts.trial.run_dir)]) for facts in without_gallery(found)]
    shown = [
        {"label": row.label, "what": f"{facts.name}, {own_test(facts, judged)}", "sheets": sheets}
        for row, facts, judged in found.best_on_own()
        if judged.predictions_path is not None and (sheets := gallery_sections(judged.predictions_path))
    ]
    return {"shown": shown, "missing": missing}


def without_gallery(found: DatasetResults) -> list[RunFacts]:
    """Return the best runs by validation that kept predictions but have no gallery."""
    return [
        facts
        for _, facts, judged in found.best_on_own()
        if judged.predictions_path is not None and not gallery_sections(judged.predictions_path)
    ]


def render_page(results: ReportData, provenance: Mapping[str, str]) -> str:
    """Render the page; ``provenance`` holds ``command``, ``version`` and ``versions``."""
    return render(
        "results.html",
        {
            "about": about(results),
            "datasets": [_data_set(found, number) for number, found in enumerate(results.findings)],
            "answers": _answers(results),
            "notes": results.notes,
            "num_runs": results.num_runs,
            "num_asked": results.num_asked,
            "provenance": provenance,
            "alpha": f"{ALPHA:g}",
            "scores_caption": SCORES_CAPTION,
            "has_published": any(found.table.is_galaxy10 for found in results.findings),
        },
    )


def _data_set(found: DatasetResults, place: int) -> dict[str, Any]:
    table = found.table
    return {
        "name": table.dataset,
        "key": f"d{place}",
        "is_real": table.is_real,
        "is_galaxy10": table.is_galaxy10,
        "caption": caption_of(table),
        "scores": score_rows(found),
        "sizes": _sizes(table),
        "settings_of": settings_of(found),
        "settings": table.settings,
        "lines": _matrix(table),
        "tests": _tests(table),
        "regimes": {REGIMES[name]: observations for name, observations in found.observations.items()},
        "ranking": ranking_rows(found),
        "curves": _curves(found),
        "classes": class_maps(table),
        "confusions": confusion_maps(found),
        "calibration": _calibration(found),
        "unseen": _unseen(found),
        "galleries": galleries(found),
        "pairs": [_pairs(pairs) for pairs in found.pairs],
        "ensembles": ensemble_rows(found),
        "cost": cost_rows(found),
        "runs": [_run(facts, found) for facts in found.facts],
    }


def _sizes(table: Table) -> str:
    sizes = {judged.variant: judged.count for cell in table.cells.values() for judged in cell.judgements}
    return ", ".join(f"{variant} {count:,}" for variant, count in sorted(sizes.items(), reverse=True))


def _matrix(table: Table) -> list[dict[str, Any]]:
    numbers = describe_table(table)
    return [
        {
            "label": row.label,
            # A row without runs and published values shows one note instead of its cells.
            "has_any": any(cell.trials or cell.published for cell in (table.cells[row, setting] for setting in table.settings)),
            "cells": [
                {
                    "setting": str(setting),
                    "seeds": table.cells[row, setting].num_seeds,
                    "quantities": [(name, numbers[row, setting, name]) for name in QUANTITIES],
                }
                for setting in table.settings
            ],
        }
        for row in table.rows
    ]


def _tests(table: Table) -> list[dict[str, Any]]:
    """Return a row for every known quantity of every cell, with the results of its test."""
    numbers, found = describe_table(table), []
    for (row, setting), cell in table.cells.items():
        for name, estimate, test in (
            ("accuracy", cell.accuracy, cell.accuracy_test),
            ("loss", cell.loss, cell.loss_test),
        ):
            if estimate is None:
                continue
            said = numbers[row, setting, "accuracy" if name == "accuracy" else "loss"]
            line = [row.label, str(setting), name, str(cell.num_seeds), f"{estimate.num_galaxies:,}", number(estimate.mean, 4)]
            line += [number(estimate.seed_error, 4), number(estimate.standard_error, 4)]
            if table.is_real:
                line += [said.published or NOTHING, NOTHING if test is None else signed(test.value, 4)]
                line += [NOTHING, NOTHING, NOTHING] if test is None else [interval_text(test), p_text(test.p_value), said.p]
            notes = [*cell.notes, *(test.notes if test is not None else ())] if name == "accuracy" or test is not None else []
            found.append({"cells": line, "notes": "; ".join(dict.fromkeys(notes))})
    return found


def _unseen(found: DatasetResults) -> list[list[str]]:
    """Return a row for every evaluation whose test set contains galaxies of the run's validation split."""
    return [
        [
            found.model_of(facts.trial),
            f"{facts.trial.variant} on {variant}",
            str(facts.trial.seed),
            f"{judged.count - others.count:,} of {judged.count:,}",
            *(percent(judged.accuracy, 2), percent(others.accuracy, 2), number(judged.loss, 4), number(others.loss, 4)),
        ]
        for facts in found.facts
        for variant, judged in facts.trial.judgements.items()
        if (others := judged.without_validation) is not None
    ]


def _answers(results: ReportData) -> list[dict[str, Any]]:
    """Return the answers to the claims: ours by data set and regime, then those of the published numbers."""
    found = [
        (findings.table.dataset, REGIMES[regime], observations)
        for findings in results.findings
        for regime, observations in findings.observations.items()
    ]
    if results.published:
        found.append(("published", "the numbers alone, as one run of each model", list(results.published)))
    return [
        {"where": where, "which": which, "observations": [_observation(one) for one in observations]}
        for where, which, observations in found
    ]


def _observation(one: ClaimAnswer) -> dict[str, Any]:
    checks = [
        {
            "claim": check.claim,
            "value": f"{signed(check.value, 2) if check.unit else number(check.value, 2)}"
            + ("" if check.error is None else f" ± {check.error:.2f}")
            + (f" {check.unit}" if check.unit else ""),
            "p_for": p_text(p_for).removeprefix("p ").removeprefix("= "),
            "p_against": p_text(p_against).removeprefix("p ").removeprefix("= "),
            "test": check.test,
            "notes": "; ".join(check.notes),
            "standing": "good" if p_for < ALPHA else "warn" if p_against < ALPHA else "",
        }
        for check, p_for, p_against in zip(one.checks, one.p_for, one.p_against, strict=True)
    ]
    return {"number": one.number, "statement": one.statement, "verdict": one.verdict, "reason": one.reason, "checks": checks}


def _curves(found: DatasetResults) -> list[dict[str, Any]]:
    """Return a figure of learning curves per row."""
    drawn = []
    for row in found.table.rows:
        runs = [facts for facts in found.runs_of(row) if facts.lines]
        if runs:
            figure = draw_curves([LearningCurve(facts.trial.variant, facts.lines) for facts in runs])
            drawn.append({"label": row.label, "svg": figure_svg(figure, f"learning curves of {row.label}"), "runs": len(runs)})
    return drawn


def _calibration(found: DatasetResults) -> dict[str, Any]:
    """Return the calibration of each run, and a reliability diagram per row."""
    rows = []
    for facts in found.facts:
        known = facts.calibration
        temperature, scaled = known.get("temperature"), known.get("scaled") or {}
        if known:
            label = found.model_of(facts.trial)
            values = [number(known.get("ece")), number(scaled.get("ece"))]
            values += [number(temperature["value"] if temperature else None), number(facts.evaluation.get("loss"))]
            rows.append([facts.name, label, facts.trial.variant, str(facts.trial.seed), *values, number(scaled.get("loss"))])
    drawn = []
    for row in found.table.rows:
        best = {variant: found.best(row, variant) for variant in VARIANTS}
        known_by: dict[str, Mapping[str, Any]] = {
            variant: facts.calibration for variant, facts in best.items() if facts is not None and facts.calibration
        }
        if known_by:
            figure = draw_reliability(known_by)
            drawn.append({"label": row.label, "svg": figure_svg(figure, f"reliability of {row.label}")})
    return {"rows": rows, "figures": drawn}


def _pairs(pairs: Pairs) -> dict[str, Any]:
    """Return a square table of tests: accuracy of the row's model minus that of the column's."""
    lines = []
    for first in pairs.rows:
        cells = []
        for second in pairs.rows:
            key = (first, second) if (first, second) in pairs.tests else (second, first)
            test = pairs.tests.get(key)
            if test is None:
                cells.append({"text": "", "p": "", "standing": "", "title": ""})
                continue
            sign = 1 if key == (first, second) else -1
            p = pairs.adjusted[key]
            standing = "" if p >= ALPHA else "better" if sign * test.difference > 0 else "worse"
            title = f"N = {test.count:,}: {test}, p = {test.p_value:.3g} before the adjustment"
            cells.append({"text": points(sign * test.difference), "p": p_text(p), "standing": standing, "title": title})
        lines.append({"label": first.label, "run": pairs.runs[first].name, "cells": cells})
    return {"setting": str(pairs.setting), "heads": [row.label for row in pairs.rows], "lines": lines, "num": len(pairs.tests)}


def _run(facts: RunFacts, found: DatasetResults) -> dict[str, Any]:
    trial = facts.trial
    return {
        "name": facts.name,
        "path": str(trial.run_dir),
        "label": found.model_of(trial),
        "variant": trial.variant,
        "seed": trial.seed,
        "command": facts.command,
        "recipe": facts.recipe,
        "num_keys": facts.num_keys,
        "forced": facts.forced,
        "step": facts.evaluation.get("step"),
        "judged": [
            {
                "what": f"{judged.dataset} ({variant})",
                "accuracy": percent(judged.accuracy),
                "count": judged.count,
                "loss": number(judged.loss),
                "hash": judged.manifest_hash[:12],
                "kept": judged.predictions_path is not None,
            }
            for variant, judged in trial.judgements.items()
        ],
        "version": facts.evaluation.get("galaxydist", ""),
    }


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
    known = {**provenance, "versions": _versions()}
    texts = {
        page.with_suffix(".md"): render_markdown(results, known),
        page.with_suffix(".tex"): render_latex(results, known),
        page: render_page(results, known),
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{page.parent} cannot be made: {error.strerror}. Give another place with -o FILE.") from error
    for path, text in texts.items():
        replace_bytes(path, text.encode())
    return list(texts)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "pyarrow", "matplotlib"))
