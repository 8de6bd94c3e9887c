"""Heat maps of the page, which class fails where and what it is taken for: tables, so that a phone shows their numbers."""

from typing import Any

import numpy as np

from galaxydist.evaluation.matrix import Table
from galaxydist.evaluation.results.gather import Findings
from galaxydist.evaluation.results.run_facts import RunFacts
from galaxydist.evaluation.results.views import class_rows
from galaxydist.evaluation.results.words import NOTHING
from galaxydist.evaluation.text_table import readable
from galaxydist.evaluation.trial import Judgement


def class_maps(table: Table) -> list[dict[str, Any]]:
    """A heat map a setting: models down, classes across."""
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


def confusion_maps(found: Findings) -> list[dict[str, Any]]:
    """Of each line and training variant: its best run by validation, on its own test set."""
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


def own_test(facts: RunFacts, judged: Judgement) -> str:
    """Which run this is, judged on its own test set."""
    return f"trained and tested on {judged.variant}, seed {facts.trial.seed}, {judged.count:,} galaxies"
