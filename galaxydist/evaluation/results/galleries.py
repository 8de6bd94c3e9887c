"""The galleries of the runs that stand for their models: confident mistakes and uncertain galaxies, with saliency."""

import shlex
from typing import Any

from galaxydist.evaluation.results.gather import Findings
from galaxydist.evaluation.results.heat_maps import own_test
from galaxydist.evaluation.results.run_facts import RunFacts
from galaxydist.gallery.gallery import gallery_sections


def galleries(found: Findings) -> dict[str, Any]:
    """What was made of the best run by validation of each model and variant, and the commands for what was not."""
    missing = [shlex.join(["galaxydist", "gallery", str(facts.trial.run_dir)]) for facts in without_gallery(found)]
    shown = [
        {"label": row.label, "what": f"{facts.name}, {own_test(facts, judged)}", "sheets": sheets}
        for row, facts, judged in found.best_on_own()
        if judged.predictions_path is not None and (sheets := gallery_sections(judged.predictions_path))
    ]
    return {"shown": shown, "missing": missing}


def without_gallery(found: Findings) -> list[RunFacts]:
    """The best runs by validation that kept predictions and have no gallery of them."""
    return [
        facts
        for _, facts, judged in found.best_on_own()
        if judged.predictions_path is not None and not gallery_sections(judged.predictions_path)
    ]
