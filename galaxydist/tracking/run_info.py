"""Facts of a run for trackers, beside its rows: name, group, recipe, data set; at its end results, figures and the model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galaxydist.atomic_files import read_json
from galaxydist.errors import UserError
from galaxydist.prediction.card_sections import card_text
from galaxydist.recipe.resolve import nest
from galaxydist.recipe.schema import TrackerConfig
from galaxydist.runs.events import Event
from galaxydist.runs.folder import BEST, FOLDER_NAME, LATEST, ORIGIN_KEY, RunFolder, read_newest_state, read_state
from galaxydist.runs.listing import JOBS_FILE, group_of, label_of
from galaxydist.runs.metrics_file import read_tail_records
from galaxydist.shards.manifest import Manifest
from galaxydist.tracking.sink import RunEnd, RunInfo

_URL = re.compile(r"([a-z][a-z0-9+]*://)(?:[^/@\s]*@)?([^?#\s]*)[^\s]*", re.IGNORECASE)
# What a start says of itself, of which the last one counts.
_START_FACTS = ("world_size", "device", "devices", "cores", "hosts", "precision")
# Key of the recipe's plain values that holds what is known of the run itself.
FACTS_KEY = "run"


def build_info(folder: RunFolder, config: TrackerConfig, run_id: str, dataset: Mapping[str, Any] | None = None) -> RunInfo:
    """Return what a tracker is told when it is opened.

    Args:
        folder: a run folder with a recipe.
        config: the tracker's settings.
        run_id: the tracker's id of the run.
        dataset: from ``describe_dataset``; None: what the run folder says.

    Raises:
        UserError: recipe.json is damaged.
    """
    recipe = folder.read_recipe().recipe
    values = nested(recipe)
    values[FACTS_KEY] = {**values.get(FACTS_KEY, {}), **read_facts(folder, [])}
    group = group_of(folder.path)
    return RunInfo(
        run_id=run_id,
        name=(label_of(folder.path) if group else "") or folder.path.absolute().name,
        group=group,
        job_type=str(recipe.get("name", "")),
        project=config.project,
        entity=config.entity,
        tags=tuple(config.tags),
        config=values,
        dataset=without_secrets(dataset or stored_dataset(folder)),
        folder=folder.path,
    )


def nested(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of dotted keys as nested ones, without the secrets that a URL may hold."""
    return nest({key: without_secrets(value) for key, value in recipe.items() if key != "tracker.webhook"})


def without_secrets(value: Any) -> Any:
    """Return a value in which URLs have neither a password nor a query, which may hold a token."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _URL.sub(r"\1\2", value) if isinstance(value, str) else value


def describe_dataset(manifest: Manifest) -> dict[str, Any]:
    """Return what a tracker is told of a data set: its hash, sizes, licence and citation, and no image."""
    return {
        "name": manifest.dataset,
        "variant": manifest.variant,
        "manifest_hash": manifest.hash,
        "manifest": manifest.location,
        "class_names": list(manifest.class_names),
        "encoding": manifest.encoding,
        "image_size": manifest.image_size,
        "splits": {
            name: {"galaxies": split.num_samples, "shards": split.num_shards, "bytes": split.num_bytes}
            for name, split in manifest.splits.items()
        },
        **(manifest.origin.to_dict() if manifest.origin is not None else {}),
    }


def stored_dataset(folder: RunFolder) -> dict[str, Any]:
    """Return what a run folder says of its data set, without the shards, which may be gone."""
    recipe = folder.read_recipe().recipe
    trained_on = (read_newest_state(folder.checkpoints_dir) or {}).get("data", {})
    known = {
        "name": recipe.get("data.dataset"),
        "variant": recipe.get("data.variant"),
        "manifest_hash": trained_on.get("manifest_hash"),
        "class_names": trained_on.get("class_names"),
        **_evaluated_data(folder),
        **((folder.read_result() or {}).get(ORIGIN_KEY) or {}),
    }
    return {name: value for name, value in known.items() if value is not None}


def _evaluated_data(folder: RunFolder) -> dict[str, Any]:
    """Return name and variant of the shards as the evaluation knows them: the recipe may name others than data.manifest."""
    content = _read_object(folder.evaluation_dir / "test.json")
    return {
        key: content[name] for key, name in (("name", "dataset"), ("variant", "variant")) if isinstance(content.get(name), str)
    }


def read_facts(folder: RunFolder, events: Sequence[Event]) -> dict[str, Any]:
    """Return facts of a run that its recipe does not hold: parameters, world size, devices, jobs, restarts, commit.

    Args:
        folder: the run folder.
        events: of the run, oldest first.
    """
    starts = [event for event in events if event.kind == "start"]
    details = starts[-1].details if starts else {}
    facts = {**_read_object(folder.facts_path), **{name: details[name] for name in _START_FACTS if details.get(name) is not None}}
    jobs = [str(job["job_id"]) for job in read_tail_records(folder.path / JOBS_FILE) if "job_id" in job]
    if jobs:
        facts["jobs"] = list(dict.fromkeys(jobs))
    if starts:
        facts["restarts"] = len(starts) - 1
    return facts


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path) if path.exists() else {}
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def build_end(folder: RunFolder, info: RunInfo, exit_code: int, events: Sequence[Event]) -> RunEnd:
    """Return what a tracker is told at the end of a run, or of a start of it.

    Args:
        folder: the run folder.
        info: that the tracker was opened with.
        exit_code: 0 if nothing more comes: the run has its result, or a search has ended it; else 1.
        events: of the run, oldest first.
    """
    facts = read_facts(folder, events)
    result = folder.read_result() or {}
    if exit_code != 0 or not result:  # a run that a search has ended has no result either
        return RunEnd(exit_code, {}, events=events, facts=facts)
    summary = {name: value for name, value in result.items() if name != "step" and isinstance(value, int | float)}
    is_sent = info.config.get("tracker", {}).get("log_model", True)  # recipes of earlier versions do not have it
    model = _evaluated_checkpoint(folder) if is_sent else None
    return RunEnd(
        exit_code,
        summary,
        figures={_name_of(path): path for path in sorted(folder.evaluation_dir.rglob("*.png"))},
        pages={_name_of(path): path for path in sorted(folder.evaluation_dir.rglob("*-gallery.html"))},
        model=model,
        model_card=describe_model(info, folder, model, facts) if model is not None else "",
        events=events,
        facts=facts,
    )


def _name_of(path: Path) -> str:
    """Return a name such as ``test/confusion`` for ``test-confusion.png``."""
    return path.stem.replace("-", "/", 1)


def _evaluated_checkpoint(folder: RunFolder) -> Path | None:
    for pointer in (BEST, LATEST):
        try:
            path = folder.checkpoints_dir / (folder.checkpoints_dir / pointer).read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        if path.is_dir():
            return path
    return None


def describe_model(info: RunInfo, folder: RunFolder, checkpoint: Path, facts: Mapping[str, Any]) -> str:
    """Return the text of the model card of a run's checkpoint, as a published folder has it, without the hours of the run."""
    from galaxydist.evaluation.results_files import published_values, read_evaluation

    state = read_state(checkpoint) or {}
    data = dict(state.get("data") or {})
    if not data.get("stored"):  # a checkpoint of an earlier version
        origin = {name: info.dataset[name] for name in ("licence", "citation", "revision", "url") if info.dataset.get(name)}
        data["stored"] = {"dataset": info.dataset.get("name"), "origin": origin}
    match = FOLDER_NAME.fullmatch(checkpoint.name)
    config = {
        "galaxydist": {
            "version": facts.get("galaxydist"),
            "recipe": info.config,
            "data": data,
            "model": state.get("model"),
            "step": int(match[1]) if match else None,
        },
        "app": {"title": info.name},
    }
    tta = info.config.get("eval", {}).get("tta", "none")
    test = read_evaluation(folder.evaluation_dir, "test", tta)
    is_of_it = test is not None and test.get("checkpoint") == checkpoint.name
    return card_text(config, {"test": published_values(test) if test is not None and is_of_it else None, "training": facts})
