"""A published folder opened as a trained model, from its weights and its ``config.json`` alone.

``galaxydist publish`` writes such folders (``serving/publish.py``); ``serving/app/published_model.py`` describes all their files.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file

from galaxydist.atomic_files import file_sha256, read_json
from galaxydist.errors import UserError, first_line
from galaxydist.evaluation.run_model import read_run_recipe, rebuild_model
from galaxydist.loading.training_data import TrainingData
from galaxydist.models.hub_weights import CONFIG_FILE, HUB_FILE
from galaxydist.models.own_function import trusts_code
from galaxydist.models.registry import ModelRecord
from galaxydist.prediction.trained_model import ModelChoice, TrainedModel, open_trained_model
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder

# Version of config.json, and the key of its part that this module reads.
FORMAT, PART = 1, "galaxydist"


@dataclass(frozen=True)
class PublishedRecord:
    """The part ``galaxydist`` of ``config.json``, as plain JSON values.

    Args:
        version: of galaxydist.
        run: name of the run folder.
        recipe: nested values by section.
        seed: of the run.
        data: ``TrainingData.to_dict()`` with the form of the stored images.
        model: ``ModelRecord.to_dict()``.
        checkpoint, step: name of the checkpoint, and the number of optimizer steps done.
        temperature: for the recipe's test-time augmentation; None: not calibrated.
        libraries: versions by name.
        repo: ``OWNER/NAME`` on the Hub, if the user has named one.
        made_from: hash by which `galaxydist app` knows that its run has not changed since; '' for other folders.
        files: SHA-256 of the folder's files in hex, by their paths.
        format: version of ``config.json``.
    """

    version: str
    run: str
    recipe: Mapping[str, Any]
    seed: int
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    checkpoint: str
    step: int
    temperature: float | None
    libraries: Mapping[str, str] = field(default_factory=dict)
    repo: str | None = None
    made_from: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the record of plain values; unknown ones are ignored.

        Raises:
            TypeError: values are missing.
        """
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in plain.items() if name in known})


def is_published(folder: Path) -> bool:
    """Return True if ``galaxydist publish`` wrote this folder, or a part of it was copied with its ``config.json``."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get(PART), dict)


def read_record(folder: Path) -> PublishedRecord:
    """Read what a published folder says of its model.

    Raises:
        UserError: ``config.json`` is missing, damaged, of another program, or of a later version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a published folder: it has no {CONFIG_FILE}")
    content = read_json(path)
    part = content.get(PART) if isinstance(content, dict) else None
    if not isinstance(part, dict):
        raise UserError(f"{path} was not written by `galaxydist publish`: it has no part {PART!r}")
    if part.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {part.get('format')}, and this version of galaxydist reads {FORMAT}: install the version that "
            f"wrote it ({part.get('version', 'unknown')}), or publish the run again"
        )
    try:
        return PublishedRecord.from_dict(part)
    except TypeError as error:
        raise _damaged(path, error) from error


def read_model_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run folder or of a published folder.

    Raises:
        UserError: the folder is neither, or its recipe is damaged.
    """
    if (folder / CONFIG_FILE).is_file() and not RunFolder(folder).is_started:
        return from_dict(read_record(folder).recipe, source=str(folder / CONFIG_FILE))
    return read_run_recipe(RunFolder(folder))


def open_model(folder: Path, environ: Mapping[str, str], choice: ModelChoice | None = None) -> TrainedModel:
    """Open the model of a run folder or of a published folder.

    Args:
        folder: the run folder or published folder.
        environ: as in ``open_trained_model``.
        choice: checkpoint and test-time augmentation; None: the recipe's.

    Raises:
        UserError: the folder is neither; a file is damaged; a checkpoint of a published folder is chosen; code that is not
            trusted.
    """
    choice = choice or ModelChoice()
    if (folder / CONFIG_FILE).is_file() and not RunFolder(folder).is_started:
        return _open_published(folder, read_record(folder), choice, trust_code=choice.trust_code or trusts_code(environ))
    return open_trained_model(folder, environ, choice)


def _open_published(folder: Path, record: PublishedRecord, choice: ModelChoice, *, trust_code: bool) -> TrainedModel:
    if choice.checkpoint is not None:
        raise UserError(f"{folder} is a published model, which has one checkpoint ({record.checkpoint}): leave --checkpoint out")
    path = folder / CONFIG_FILE
    recipe = from_dict(record.recipe, source=str(path))
    temperature, notes = record.temperature, []
    if choice.tta not in (None, recipe.eval.tta):
        if temperature is not None:
            notes.append(f"the probabilities are not calibrated: the temperature of {folder} is for eval.tta={recipe.eval.tta}")
        recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"tta": choice.tta})})
        temperature = None
    elif temperature is None:
        notes.append(f"the probabilities are not calibrated: {folder} was published from a run without predictions of its "
                     "validation split, from which a temperature is fitted")  # fmt: skip
    try:
        trained_on, model_record = TrainingData.from_dict(record.data), ModelRecord.from_dict(record.model)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error
    if trained_on.stored is None:
        raise _damaged(path, "the form of the stored images is missing")
    check_file(folder, HUB_FILE, record)
    model = rebuild_model(recipe, model_record, len(trained_on.class_names), trust_code=trust_code)
    try:
        model.load_state_dict(load_file(folder / HUB_FILE))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / HUB_FILE} does not fit the model {recipe.model.name} of {CONFIG_FILE} ({first_line(error)})"
        ) from error
    return TrainedModel(
        path=folder,
        recipe=recipe,
        model=model,
        started_from=model_record,
        checkpoint=record.checkpoint,
        step=record.step,
        trained_on=trained_on,
        stored=trained_on.stored,
        temperature=temperature,
        notes=tuple(notes),
    )


def check_file(folder: Path, name: str, record: PublishedRecord) -> None:
    """Check that a published file is there and has the SHA-256 that ``config.json`` states.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}: a file of the published model is missing; copy or download the whole folder")
    if (found := file_sha256(path)) != record.files.get(name):
        raise UserError(
            f"{path} is damaged: its SHA-256 is {found}, and {CONFIG_FILE} states {record.files.get(name)}. Copy or download it "
            "again, or publish the run again"
        )


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is damaged or was edited ({reason}): restore it, or publish the run again")
