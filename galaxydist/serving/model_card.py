"""Model card of a published folder, and what was measured of its model.

``collect_results`` reads the run folder; ``model_card`` writes README.md from plain values: the Hub's header in YAML, then the
text of ``prediction/card_sections.py`` with a section on use.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galaxydist.errors import UserError
from galaxydist.evaluation.predictions import predictions_path, read_predictions
from galaxydist.evaluation.results_files import published_values, read_evaluation, stem_of
from galaxydist.loading.training_data import find_manifest
from galaxydist.paths import data_root
from galaxydist.prediction.card_sections import CardFacts, card_text
from galaxydist.prediction.citations import hub_repository
from galaxydist.prediction.trained_model import TrainedModel
from galaxydist.report.cost import RunHours, read_run_hours
from galaxydist.runs.events import read_events
from galaxydist.runs.folder import RunFolder
from galaxydist.serving.card_usage import describe_usage
from galaxydist.shards.manifest import read_manifest
from galaxydist.surveys.data_origin import hub_fields
from galaxydist.tracking.run_info import read_facts
from galaxydist.version import __version__

# Version of results.json.
FORMAT = 1
# Facts of a run that are published; names of machines, jobs and users are not.
_FACTS = ("parameters", "trained_parameters", "galaxydist", "commit", "uncommitted_changes", "world_size", "devices", "precision")
# Metrics of the header: key of the evaluation, identifier on the Hub, name.
_HEADER_METRICS = (
    ("accuracy", "accuracy", "accuracy"),
    ("balanced_accuracy", "balanced_accuracy", "balanced accuracy"),
    ("macro_f1", "f1", "macro F1"),
)
_DATASET_PAGE = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+?)/?")


def collect_results(run: RunFolder, trained: TrainedModel) -> dict[str, Any]:
    """Return what was measured of a run's model, as plain values for ``results.json``.

    ``test`` and ``val`` are evaluations with intervals (None: not measured, with the command that measures it in ``missing``),
    ``other_tta`` the test split with another test-time augmentation, ``others`` evaluations on other data, ``training`` hardware,
    hours and sizes.

    Args:
        run: the run folder.
        trained: its model; evaluations of other checkpoints are left out.
    """
    tta = trained.recipe.eval.tta
    test, val = (_read_split(run.evaluation_dir, split, tta, trained) for split in ("test", "val"))
    other = _read_split(run.evaluation_dir, "test", "none" if tta == "d4" else "d4", trained)
    folders = sorted(path for path in run.evaluation_dir.glob("*/") if path.is_dir())
    others = [found for path in folders if (found := _read_split(path, "test", tta, trained)) is not None]
    option = "" if tta == "none" else f" --tta {tta}"
    missing = [
        f"the {split} split; `galaxydist evaluate RUN{'' if split == 'test' else ' --split val'}{option}` measures it"
        for split, found in (("test", test), ("val", val))
        if found is None
    ]
    notes = [] if run.is_finished else [f"The run has not finished: these are its weights at step {trained.step:,}."]
    return {
        "format": FORMAT,
        "galaxydist": __version__,
        "checkpoint": trained.checkpoint,
        "step": trained.step,
        "test": test,
        "val": val,
        "other_tta": other,
        "others": others,
        "missing": missing,
        "notes": notes,
        "training": _collect_training(run, trained),
    }


def _read_split(folder: Path, split: str, tta: str, trained: TrainedModel) -> dict[str, Any] | None:
    """Return the evaluation of a split by this checkpoint, from its file or from stored predictions; None if there is none."""
    from galaxydist.evaluation.metrics import summarise

    wanted = {"checkpoint": trained.checkpoint, "step": trained.step, "split": split, "tta": tta}
    found = read_evaluation(folder, split, tta)
    if found is not None and _matches(found, wanted):
        return published_values(found)
    try:
        predictions = read_predictions(predictions_path(folder, stem_of(split, tta)))
        if not _matches(predictions.info.context, wanted):
            return None
        return published_values({**predictions.info.context, **summarise(predictions).metrics})
    except (UserError, OSError):
        return None


def _matches(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(values.get(name, "none" if name == "tta" else None) == value for name, value in wanted.items())


def _collect_training(run: RunFolder, trained: TrainedModel) -> dict[str, Any]:
    events = read_events(run.events_path)
    facts = {name: value for name, value in read_facts(run, events).items() if name in _FACTS}
    facts.setdefault("parameters", sum(parameter.numel() for parameter in trained.model.parameters()))
    hours = _read_hours(run)
    if hours is not None:
        facts["hours"] = sum(start.used_s for start in hours.starts) / 3600
        facts["device_hours"] = hours.device_hours()
    splits = _count_galaxies(trained)
    return {**facts, **({"splits": splits} if splits else {})}


def _read_hours(run: RunFolder) -> RunHours | None:
    try:
        hours = read_run_hours(run.path, run.path.name)
    except (UserError, OSError):
        return None
    return hours if hours.starts else None


def _count_galaxies(trained: TrainedModel) -> dict[str, int]:
    """Return the galaxies of each split, if the shards of the training lie on this machine."""
    config = trained.recipe.data
    try:
        path = Path(find_manifest(config, data_root(config.dir, os.environ)))
        manifest = read_manifest(path) if path.is_file() else None
    except (UserError, OSError):
        return {}
    if manifest is None or manifest.hash != trained.trained_on.manifest_hash:
        return {}
    return {name: split.num_samples for name, split in manifest.splits.items() if split.num_samples}


def model_card(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the model card, in Markdown with the Hub's header.

    Args:
        config: content of ``config.json``.
        results: from ``collect_results``, with what was added to it; may be empty.
    """
    facts = CardFacts(config, results)
    return f"---\n{card_header(facts)}\n---\n\n{card_text(config, results, describe_usage(config, results))}"


def card_header(facts: CardFacts) -> str:
    """Return the header in YAML, with the fields of ``huggingface_hub.ModelCardData``."""
    from huggingface_hub import EvalResult, ModelCardData

    page = _DATASET_PAGE.fullmatch(str(facts.origin.get("url") or ""))
    base = hub_repository(facts.weights.get("source"))
    fields: dict[str, Any] = dict(hub_fields(facts.licence, None if page is None else page[0]))
    if page is not None:
        fields["datasets"] = [page[1]]
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    results = [EvalResult(**values) for values in _header_results(facts)]
    if results:
        fields |= {"metrics": ["accuracy", "f1"], "model_name": facts.title, "eval_results": results}
    data = ModelCardData(
        library_name="timm" if facts.architecture else "galaxydist",
        pipeline_tag="image-classification",
        tags=["galaxydist", "astronomy", "galaxies", "galaxy-morphology", "image-classification"],
        **fields,
    )
    return data.to_yaml()


def _header_results(facts: CardFacts) -> list[dict[str, Any]]:
    test = facts.test
    intervals = test.get("intervals") or {}
    found = []
    for key, kind, name in _HEADER_METRICS:
        if test.get(key) is None:
            continue
        between = intervals.get(key)
        found.append(
            {
                "task_type": "image-classification",
                "dataset_type": facts.dataset,
                "dataset_name": f"{facts.dataset} ({test['variant']})",
                "dataset_split": "test",
                "dataset_revision": test.get("manifest_hash"),
                "metric_type": kind,
                "metric_value": round(test[key], 4),
                "metric_name": f"{name} (95 % interval {between[0]:.3f} to {between[1]:.3f})" if between else name,
            }
        )
    return found
