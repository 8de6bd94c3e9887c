"""Model of a run: its recipe, its best or last checkpoint, and the network with the weights that are evaluated."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.checkpoints.tensor_files import unflatten_state
from galaxydist.errors import UserError
from galaxydist.loading.training_data import TrainingData
from galaxydist.models.build import build_model
from galaxydist.models.own_function import source_hash
from galaxydist.models.registry import ModelRecord
from galaxydist.models.weights import write_weights
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder

logger = logging.getLogger(__name__)

# Groups of a checkpoint's tensors that its evaluation needs.
MODEL_GROUPS = ("model", "ema")


def read_run_recipe(folder: RunFolder) -> Recipe:
    """Read the recipe of a run.

    Raises:
        UserError: the folder holds no run, or its recipe is damaged.
    """
    return from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))


def find_checkpoint(folder: RunFolder, which: str) -> Path:
    """Return the path of a run's checkpoint.

    Args:
        folder: of the run.
        which: ``best`` or ``last``; the last one also if there is no best.

    Raises:
        UserError: there is none.
    """
    path = store.best_path(folder.checkpoints_dir) if which == "best" else None
    if path is None:
        newest = store.load(folder.checkpoints_dir, groups=())
        path = newest.path if newest is not None else None
    if path is None:
        raise UserError(
            f"{folder} has no checkpoint yet: it was stopped before its first one. Continue it with the command that started it."
        )
    return path


def load_model(recipe: Recipe, checkpoint: Checkpoint, *, trust_code: bool = False) -> nn.Module:
    """Return the model with the checkpoint's evaluation weights, on the CPU.

    Args:
        recipe: of the run.
        checkpoint: with the tensors of ``MODEL_GROUPS``.
        trust_code: run the function that the recipe names, if it names one.

    Raises:
        UserError: the function is not trusted, or fails.
    """
    num_classes = len(checkpoint.state["data"]["class_names"])
    model = rebuild_model(recipe, ModelRecord.from_dict(checkpoint.state.get("model")), num_classes, trust_code=trust_code)
    model.load_state_dict(evaluation_weights(checkpoint.tensors, checkpoint.state))
    return model


def rebuild_model(recipe: Recipe, record: ModelRecord, num_classes: int, *, trust_code: bool = False) -> nn.Module:
    """Return a run's model with random weights, on the CPU; the run's starting weights are not needed.

    Args:
        recipe: of the run.
        record: of the run's model.
        num_classes: K.
        trust_code: run the function that the recipe names, if it names one.

    Raises:
        UserError: the function is not trusted, or fails.
    """
    config = recipe.model.model_copy(update={"pretrained": False, "weights": None, "freeze_backbone": False})
    model = build_model(config, num_classes, recipe.data.image_size, record=record, trust_code=trust_code)
    if record.code is not None and record.code != source_hash(config.name):
        logger.warning("model.name=%s: its source has changed since the run", config.name)
    return model


def evaluation_weights(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the model state of a checkpoint that is evaluated: the moving average if there is one, else the model's own."""
    described = state["described"]
    weights: dict[str, torch.Tensor] = unflatten_state(described.get("ema", described["model"]), tensors)
    return weights


def save_weights(run_dir: Path, target: Path) -> int:
    """Write a run's evaluation weights as one safetensors file, for ``model.weights=FILE`` of another run.

    The file includes the normalisation that the model was trained with. It is written atomically.

    Args:
        run_dir: the run folder.
        target: the file; an existing one is replaced.

    Returns:
        The step of the weights.

    Raises:
        UserError: there is no run or no checkpoint.
    """
    folder = RunFolder(run_dir)
    recipe = read_run_recipe(folder)
    checkpoint = store.read_sound(find_checkpoint(folder, recipe.eval.checkpoint), groups=MODEL_GROUPS)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = evaluation_weights(checkpoint.tensors, checkpoint.state)
    write_weights(target, weights, trained_on.statistics, recipe.model, recipe.data)
    return checkpoint.step
