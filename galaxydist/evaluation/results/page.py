"""The results as one HTML page that needs nothing else."""

from collections.abc import Mapping
from typing import Any

from galaxydist.evaluation.matrix import Table
from galaxydist.evaluation.results import figures
from galaxydist.evaluation.results.across import Pairs
from galaxydist.evaluation.results.galleries import galleries
from galaxydist.evaluation.results.gather import REGIMES, Findings, Results
from galaxydist.evaluation.results.heat_maps import class_maps, confusion_maps
from galaxydist.evaluation.results.run_facts import RunFacts
from galaxydist.evaluation.results.views import (
    SCORES_CAPTION,
    about,
    caption_of,
    cost_rows,
    ensemble_rows,
    ranking_rows,
    score_rows,
    settings_of,
)
from galaxydist.evaluation.results.words import (
    NOTHING,
    QUANTITIES,
    describe_table,
    interval_text,
    number,
    p_text,
    percent,
    points,
    signed,
)
from galaxydist.evaluation.sampling import ALPHA
from galaxydist.evaluation.verdicts import Observation
from galaxydist.galaxy import VARIANTS
from galaxydist.pages.html import figure_svg, render


def render_page(results: Results, provenance: Mapping[str, str]) -> str:
    """The page.

    Args:
        results: to be shown.
        provenance: ``command``, ``version``, ``versions``: what made the page.
    """
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


def _data_set(found: Findings, place: int) -> dict[str, Any]:
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
            # A line that nobody ran and that has no published values says so once.
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
    """Every cell that was run, with all that its test says."""
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


def _unseen(found: Findings) -> list[list[str]]:
    """A line for every judgement in whose test set there are galaxies that the run was validated on."""
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


def _answers(results: Results) -> list[dict[str, Any]]:
    """The observations by whose results answer them: ours by data set and regime, then the published numbers."""
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


def _observation(one: Observation) -> dict[str, Any]:
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


def _curves(found: Findings) -> list[dict[str, Any]]:
    """A figure a line of the table."""
    drawn = []
    for row in found.table.rows:
        runs = [facts for facts in found.runs_of(row) if facts.lines]
        if runs:
            figure = figures.draw_curves([figures.Curve(facts.trial.variant, facts.lines) for facts in runs])
            drawn.append({"label": row.label, "svg": figure_svg(figure, f"learning curves of {row.label}"), "runs": len(runs)})
    return drawn


def _calibration(found: Findings) -> dict[str, Any]:
    """A line a run, and a reliability diagram a line of the table."""
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
            figure = figures.draw_reliability(known_by)
            drawn.append({"label": row.label, "svg": figure_svg(figure, f"reliability of {row.label}")})
    return {"rows": rows, "figures": drawn}


def _pairs(pairs: Pairs) -> dict[str, Any]:
    """A square of tests: the row's model minus the column's."""
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


def _run(facts: RunFacts, found: Findings) -> dict[str, Any]:
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
