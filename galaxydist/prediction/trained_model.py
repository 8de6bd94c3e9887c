"""A trained model with everything that its predictions need, opened from a run folder alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.devices import Precision, autocast, resolve_precision
from galaxydist.errors import UserError
from galaxydist.evaluation.calibration import fit_temperature
from galaxydist.evaluation.evaluator import stored_validation
from galaxydist.evaluation.inference import TTA, ForwardPass
from galaxydist.evaluation.leakage import open_training_shards
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.evaluation.run_model import MODEL_GROUPS, find_checkpoint, load_model, read_run_recipe
from galaxydist.loading.training_data import StoredImages, TrainingData, build_augment, find_cache, find_manifest
from galaxydist.models.own_function import trusts_code
from galaxydist.models.performance import choose_memory_format, set_memory_format, set_tf32
from galaxydist.models.registry import ModelRecord
from galaxydist.paths import data_root
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.version import __version__

logger = logging.getLogger(__name__)

WhichCheckpoint = Literal["best", "last"]


@dataclass(frozen=True)
class ModelChoice:
    """A user's choice of a model.

    Args:
        checkpoint: ``best`` or ``last``; None: the recipe's (``eval.checkpoint``).
        tta: test-time augmentation; None: the recipe's (``eval.tta``).
        trained_on: path or URL of the shards that the run was trained on; needed only for runs of earlier versions whose shards
            were moved.
        trust_code: run the function of a module that the run's ``model.name`` names.

    Raises:
        UserError: another checkpoint or test-time augmentation.
    """

    checkpoint: WhichCheckpoint | None = None
    tta: TTA | None = None
    trained_on: str | Path | None = None
    trust_code: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("checkpoint", self.checkpoint, WhichCheckpoint), ("tta", self.tta, TTA)):
            if value is not None and value not in get_args(choices):
                raise UserError(f"{name}={value!r} is not one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on the CPU, and how its run prepares and evaluates images.

    Args:
        path: the run folder.
        recipe: of the run; ``recipe.eval`` has the chosen checkpoint and test-time augmentation.
        model: with the weights that the run evaluates.
        checkpoint, step: name of the checkpoint, and the number of optimizer steps done.
        trained_on: classes and normalisation.
        stored: form of the stored images.
        temperature: by which logits are divided, fitted on the run's validation split; None: not calibrated.
        started_from: source and licence of the published weights that the run started from, if any.
        notes: sentences for the user, for example that the run has not finished.
    """

    path: Path
    recipe: Recipe
    model: nn.Module
    checkpoint: str
    step: int
    trained_on: TrainingData
    stored: StoredImages
    temperature: float | None
    started_from: ModelRecord = field(default_factory=ModelRecord)
    notes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.trained_on.class_names

    def open_shards(self, environ: Mapping[str, str], given: str | Path | None = None) -> Manifest:
        """Open the shards of the training.

        Args:
            environ: names the data root.
            given: path or URL from the user, if they have moved.

        Raises:
            UserError: as ``open_training_shards``.
        """
        return _open_shards(self.recipe, self.trained_on, environ, given)

    def describe(self) -> dict[str, Any]:
        """Return plain values that identify the model, for the files of its predictions."""
        return {
            "galaxydist": __version__,
            "run": str(self.path.absolute()),
            "recipe": self.recipe.name,
            "model": self.recipe.model.name,
            "seed": self.recipe.seed,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "tta": self.recipe.eval.tta,
            "temperature": self.temperature,
            "classes": list(self.class_names),
            "weights": {"source": self.started_from.source, "licence": self.started_from.licence},
            "trained_on": {
                "dataset": self.stored.dataset,
                "manifest_hash": self.trained_on.manifest_hash,
                "image_size": self.stored.image_size,
                "origin": None if self.stored.origin is None else self.stored.origin.to_dict(),
            },
        }

    def forward_on(self, device: torch.device, precision: Precision, *, threads: int) -> ForwardPass:
        """Move the model to a device and return its forward pass, which computes as the run's evaluation does.

        Args:
            device: also of the images.
            precision: of the forward pass, as in ``World.precision``.
            threads: threads that share the preparation of a batch on a CPU.
        """
        dtype = torch.float64 if precision == "fp64" else torch.float32
        set_tf32(self.recipe.train.tf32, device)
        layout = choose_memory_format(self.recipe.train.channels_last, self.model, device, dtype)
        model = self.model.eval().to(device=device, dtype=dtype)
        set_memory_format(model, layout)
        return ForwardPass(
            model,
            build_augment(self.recipe, self.trained_on, threads=threads).normalise,
            dtype,
            lambda: autocast(device, precision),
            layout,
            self.recipe.eval.tta,
        )


def precision_on(recipe: Recipe, *, has_gpu: bool) -> Precision | Literal["auto"]:
    """Return the recipe's precision for predictions: float32 instead of fp16 without a GPU."""
    return "no" if recipe.train.precision == "fp16" and not has_gpu else recipe.train.precision


def resolved_precision(recipe: Recipe, device: torch.device) -> Precision:
    """Return the recipe's precision for predictions on a device, with ``auto`` resolved."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return resolve_precision(precision_on(recipe, has_gpu=capability is not None), [capability])


def open_trained_model(run: Path, environ: Mapping[str, str], choice: ModelChoice | None = None) -> TrainedModel:
    """Open the model of a run folder. Its shards are not needed, except by runs of earlier versions.

    Args:
        run: the run folder.
        environ: names the data root of the run's shards, for runs of earlier versions, and whether code is trusted.
        choice: checkpoint and test-time augmentation; None: the recipe's.

    Raises:
        UserError: there is no run or no sound checkpoint; an earlier version's run without its shards; code that is not trusted.
    """
    choice = choice or ModelChoice()
    folder = RunFolder(run)
    recipe = read_run_recipe(folder)
    chosen = {name: value for name, value in (("checkpoint", choice.checkpoint), ("tta", choice.tta)) if value is not None}
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update=chosen)})
    checkpoint = store.read_sound(find_checkpoint(folder, recipe.eval.checkpoint), groups=MODEL_GROUPS)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    stored = trained_on.stored or _find_stored(recipe, trained_on, environ, choice.trained_on)
    temperature = _read_temperature(folder, checkpoint, recipe.eval.tta)
    notes = []
    if not folder.is_finished:
        notes.append(f"{folder} has not finished: its checkpoint {checkpoint.path.name} of step {checkpoint.step:,} is used")
    if temperature is None:
        notes.append(
            f"the probabilities are not calibrated: {folder} has no predictions of {checkpoint.path.name} on its validation "
            f"split{'' if recipe.eval.tta == 'none' else f' with --tta {recipe.eval.tta}'}, from which a temperature is fitted. "
            f"Make them with `galaxydist evaluate {folder}{'' if choice.tta is None else f' --tta {choice.tta}'}`"
        )
    return TrainedModel(
        path=run,
        recipe=recipe,
        model=load_model(recipe, checkpoint, trust_code=choice.trust_code or trusts_code(environ)),
        started_from=ModelRecord.from_dict(checkpoint.state.get("model")),
        checkpoint=checkpoint.path.name,
        step=checkpoint.step,
        trained_on=trained_on,
        stored=stored,
        temperature=temperature,
        notes=tuple(notes),
    )


def _open_shards(recipe: Recipe, trained_on: TrainingData, environ: Mapping[str, str], given: str | Path | None) -> Manifest:
    root = data_root(recipe.data.dir, environ)
    return open_training_shards(trained_on, find_manifest(recipe.data, root), given, find_cache(recipe.data, root))


def _find_stored(recipe: Recipe, trained_on: TrainingData, environ: Mapping[str, str], given: str | Path | None) -> StoredImages:
    """Return the form of the stored images from the run's shards, for a checkpoint that does not have it."""
    try:
        return StoredImages.of(_open_shards(recipe, trained_on, environ, given))
    except UserError as error:
        raise UserError(
            "the run was trained by an earlier version of galaxydist, which did not record the size of its stored images, and "
            f"its shards are needed for that: {error}"
        ) from error


def _read_temperature(folder: RunFolder, checkpoint: Checkpoint, tta: TTA) -> float | None:
    path = stored_validation(folder, checkpoint, tta)
    found = fit_temperature(read_predictions(path)) if path is not None else None
    return found.value if found is not None else None
