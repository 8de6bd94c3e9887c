"""Parts of a report that look alike on the page, in Markdown and in LaTeX: heads and rows of tables, and sentences."""

from dataclasses import dataclass

import numpy as np

from galaxydist.evaluation.matrix import Cell, Row, Table
from galaxydist.evaluation.published import Setting
from galaxydist.evaluation.results.gather import Findings, Results
from galaxydist.evaluation.results.words import NOTHING, hours_text, number, percent, points, score_text
from galaxydist.evaluation.sampling import ALPHA
from galaxydist.evaluation.trial import Trial
from galaxydist.evaluation.trials import COLUMNS, SCORES
from galaxydist.recipe.fields import recipe_fields
from galaxydist.surveys.official_split import NAME as REAL_DATASET

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
    """Accuracies of the classes of a model in a setting: means over seeds.

    Args:
        label: the model.
        values: by class; None for a class without galaxies.
        worst: number of the class with the least; None where there is none.
    """

    label: str
    values: tuple[float | None, ...]
    worst: int | None


def caption_of(table: Table) -> str:
    """Return the sentences that explain the numbers of the matrix."""
    return _CAPTIONS[table.is_real] if table.is_galaxy10 else _ERRORS


def about(results: Results) -> str:
    """What is reported, in a sentence or two."""
    names = ", ".join(found.table.dataset for found in results.findings)
    text = f"{_some(results.num_runs, 'run')} on {names}"
    if left := results.num_asked - results.num_runs:
        text += f"; {left} more could not be reported, see the notes"
    tables = [found.table for found in results.findings]
    is_missed = any(table.is_galaxy10 for table in tables) and not any(table.is_real for table in tables)
    return f"{text}. {NO_REAL}" if is_missed else f"{text}."


def score_rows(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Head and rows of each run's numbers, with their intervals."""
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


def class_rows(table: Table) -> dict[Setting, tuple[tuple[str, ...], list[ClassRow]]]:
    """By setting that was run: the classes' names, and a row a model."""
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


def ranking_rows(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the ranking: the runs of each variant, best validation first. The test column takes no part in it."""
    head = ["rank", "model", "value", "validation", "trained on", "seed", "step", "test", "run"]
    rows = []
    for ranking in found.rankings:
        for place, trial in enumerate((*ranking.ranked, *ranking.unranked), 1):
            is_ranked = place <= len(ranking.ranked)
            rows.append([str(place) if is_ranked else NOTHING, *_ranked(found, trial)])
    return head, rows


def _ranked(found: Findings, trial: Trial) -> list[str]:
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


def cost_rows(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Head and rows of speed and cost."""
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


def ensemble_rows(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the ensembles of seeds."""
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


def settings_of(found: Findings) -> dict[str, str]:
    """Return what tells lines of one model and recipe apart: label -> the result keys that differ."""
    fields = recipe_fields()
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
