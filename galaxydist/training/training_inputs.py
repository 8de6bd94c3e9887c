"""Inputs of a training, checked before anything is written: the shards, the recipe against them, and the model."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.distributed import World
from galaxydist.evaluation.evaluator import rehearse_evaluation
from galaxydist.evaluation.leakage import check_before_training
from galaxydist.loading.training_data import (
    StoredImages,
    TrainingData,
    find_cache,
    find_manifest,
    find_variant,
    has_split,
    mirror_warning,
    open_manifest,
)
from galaxydist.models.build import build_model, describe_model
from galaxydist.models.registry import ModelRecord
from galaxydist.paths import weights_dir
from galaxydist.recipe.identity import run_path
from galaxydist.recipe.rules import check_optimizer, check_strategy, check_world, is_mixing
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns
from galaxydist.training.micro_batch import check_deterministic, check_passes
from galaxydist.training.resume import check_same_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """Shards and model of a run.

    Args:
        manifest: the shards.
        other_manifests: the shards of ``eval.variants``.
        model: the bare model.
        model_record: what checkpoints keep of the model.
        trained_on: what checkpoints keep of the data.
    """

    manifest: Manifest
    other_manifests: list[Manifest]
    model: nn.Module
    model_record: ModelRecord
    trained_on: TrainingData


def check_inputs(world: World, recipe: Recipe, root: Path) -> TrainingInputs:
    """Open the shards, build the model, and check the recipe against both. All ranks call it.

    Args:
        world, recipe: of the run.
        root: the data root.

    Raises:
        UserError: the recipe, its shards or its model cannot be used.
    """
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    threads = "1 thread each" if world.threads == 1 else f"{world.threads} threads each"
    logger.info("galaxydist: %s, %s, %s, precision %s", processes, world.device.type, threads, world.precision)
    path, cache = find_manifest(recipe.data, root), find_cache(recipe.data, root)
    manifest = world.run_on_all(lambda: open_manifest(path, cache, recipe, world.size))
    variants = [variant for variant in recipe.eval.variants if variant != manifest.variant]
    other_manifests = world.run_on_all(
        lambda: [open_shards(find_variant(recipe.data, root, variant), cache) for variant in variants]
    )
    check_same_recipe(world, recipe, manifest)
    world.run_on_main(lambda: _check_data(recipe, manifest, other_manifests))
    if warning := mirror_warning(manifest, recipe):
        logger.warning("%s", warning)
    check_optimizer(recipe.optim.name)
    check_strategy(recipe.train, world.precision)
    if is_mixing(recipe.train):
        check_world(recipe.train.batch_size, world.size)
    torch.manual_seed(recipe.seed)
    record = world.run_on_all(lambda: describe_model(recipe.model, weights_dir(root)))
    model = world.run_on_all(
        lambda: build_model(
            recipe.model,
            manifest.num_classes,
            recipe.data.image_size,
            weights_dir=weights_dir(root),
            record=record,
            trust_code=True,  # the user's own command names it
        )
    )
    stored = world.run_on_main(lambda: StoredImages.of(manifest))
    trained_on = world.run_on_all(lambda: TrainingData.of(manifest, recipe, model, stored))
    check_passes(recipe, world, model)
    if recipe.train.deterministic:
        check_deterministic(world, recipe, model.to(device=world.device, dtype=world.dtype))
    return TrainingInputs(manifest, other_manifests, model, record, trained_on)


def _check_data(recipe: Recipe, manifest: Manifest, other_manifests: list[Manifest]) -> None:
    """Find, on rank 0, errors that would otherwise end the run after the training."""
    folder = RunFolder(run_path(recipe))
    is_known = folder.is_started and bool(store.list_checkpoints(folder.checkpoints_dir))
    known = folder.read_recipe().recipe.get("eval.variants", ()) if is_known else ()
    for evaluated in (manifest, *other_manifests):
        check_columns(evaluated)
        if not is_known or (evaluated is not manifest and evaluated.variant not in known):
            check_before_training(manifest, evaluated)
    if not is_known and has_split(manifest, "test"):
        rehearse_evaluation(manifest, recipe)
