"""The exact evaluation of a run: the weights of one of its checkpoints on a split, as JSON, figures and a table."""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import EveryRankError, UserError
from galaxydist.evaluation.report import read_evaluation, render_evaluation, write_evaluation
from galaxydist.evaluation.views import Views
from galaxydist.models.build import build_model
from galaxydist.models.weights import write_weights
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.paths import data_root
from galaxydist.recipe.schema import Recipe
from galaxydist.runs import checkpoints
from galaxydist.runs.checkpoint_folder import Checkpoint
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.check import check_columns
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.open import open_shards
from galaxydist.surveys.sky import CUTOUT_ARCSEC
from galaxydist.training.data import TrainingData, build_augment, find_cache, find_manifest, has_split
from galaxydist.training.speed import set_tf32
from galaxydist.training.state import evaluation_weights
from galaxydist.training.trained_on import JUDGED_SPLIT, FindTrained, find_validation, open_trained
from galaxydist.training.validation import evaluate_split
from galaxydist.training.world import World, enter_world, leave_world

# What of a checkpoint is needed to judge it.
JUDGED = ("model", "ema")


def evaluate_run(
    run_dir: Path,
    split: str,
    environ: MutableMapping[str, str],
    *,
    manifest_path: str | Path | None = None,
    trained_path: str | Path | None = None,
    data_dir: Path | None = None,
    tta: Views | None = None,
) -> dict[str, Any]:
    """Evaluate a run of ``launch.py`` on a split, write it into the run folder and print the table.

    Args:
        run_dir: the run folder.
        split: ``train``, ``val`` or ``test``.
        environ: the process's environment.
        manifest_path: path or URL of the shards to judge it on; None: those that the run was trained on, where it had them.
        trained_path: path or URL of the shards that the run was trained on, where they are no longer where it had them.
        data_dir: the data root, likewise.
        tta: instead of the recipe's ``eval.tta``; evaluations with and without lie side by side.

    Returns:
        The evaluation, as in its JSON file.

    Raises:
        UserError: no run or no checkpoint there, no such split, shards of other classes, test galaxies that the run was trained
            on.
    """
    folder = RunFolder(run_dir)
    recipe = from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))
    if tta is not None:
        recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"tta": tta})})
    root = data_root(data_dir or recipe.data.dir, environ)
    known, cache = find_manifest(recipe.data, root), find_cache(recipe.data, root)
    manifest = open_shards(manifest_path or known, cache)
    if not has_split(manifest, split):
        raise UserError(
            f"{manifest.location} has no galaxies in a split {split!r}. It has {', '.join(manifest.splits)}: give --split."
        )
    world = enter_world(recipe.train.precision, environ)
    try:
        world.on_main(lambda: check_columns(manifest))
        metrics = judge_run(
            world,
            folder,
            recipe,
            manifest,
            split,
            find_trained=lambda trained_on: open_trained(trained_on, known, trained_path, cache),
        )
    finally:
        leave_world()
    assert metrics is not None
    return metrics


def save_weights(run_dir: Path, target: Path) -> int:
    """Write the weights that a run is judged by as one safetensors file, for ``model.weights=FILE`` of another run.

    The file carries the normalisation that the model was trained with. It appears only when it is whole.

    Args:
        run_dir: the run folder.
        target: the file to write, replaced if it is there.

    Returns:
        The step that the weights are from.

    Raises:
        UserError: no run or no checkpoint there.
    """
    folder = RunFolder(run_dir)
    recipe = from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))
    checkpoint = checkpoints.read_sound(_find_checkpoint(folder, recipe.eval.checkpoint), groups=JUDGED)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, evaluation_weights(checkpoint.tensors, checkpoint.state), trained_on.statistics)
    return checkpoint.step


def judge_run(
    world: World, folder: RunFolder, recipe: Recipe, manifest: Manifest, split: str, *, find_trained: FindTrained
) -> dict[str, Any] | None:
    """Evaluate the checkpoint that the recipe names, unless that was done already; print the table. All ranks take part.

    Args:
        world, folder, recipe: of the run.
        manifest, split: what it is judged on.
        find_trained: gives rank 0 the shards that the run was trained on, where they are not these.

    Returns:
        The evaluation; None where the split has no galaxies. Where some of them were in the run's validation set, it has
        ``without_validation``: the metrics of the others.

    Raises:
        UserError: no checkpoint, shards of other classes, or test galaxies that the run was trained on.
    """
    if not has_split(manifest, split):
        world.say(f"no {split} split in {manifest.location}: nothing to evaluate")
        return None
    path = world.on_main(lambda: _find_checkpoint(folder, recipe.eval.checkpoint))
    checkpoint = world.together(lambda: checkpoints.read_sound(path, groups=JUDGED))
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    if trained_on.class_names != manifest.class_names:
        raise EveryRankError(
            f"{folder} was trained on the classes {', '.join(trained_on.class_names)}; {manifest.location} has "
            f"{', '.join(manifest.class_names)}. Give shards of the same classes."
        )
    # The run's own data set stands at the top, others each in a folder of their own.
    is_own = trained_on.manifest_hash == manifest.hash
    evaluation_dir = folder.evaluation_dir if is_own else folder.evaluation_dir / f"{manifest.dataset}-{manifest.variant}"
    context = {
        "dataset": manifest.dataset,
        "variant": manifest.variant,
        "split": split,
        "tta": recipe.eval.tta,
        "manifest_hash": manifest.hash,
        "recipe": recipe.name,
        "model": recipe.model.name,
        "seed": recipe.seed,
        "checkpoint": path.name,
        "step": checkpoint.step,
        # Evaluations that were made before anyone looked lack these.
        **({"trained_on_hash": trained_on.manifest_hash, "apart_arcsec": CUTOUT_ARCSEC} if split == JUDGED_SPLIT else {}),
    }
    known = world.on_main(lambda: read_evaluation(evaluation_dir, split, recipe.eval.tta))
    if known is None or any(known.get(key) != value for key, value in context.items()):
        chosen_on_N = world.on_main(lambda: find_validation(manifest, split, trained_on, find_trained))
        metrics = _evaluate(world, checkpoint, trained_on, recipe=recipe, manifest=manifest, split=split, chosen_on_N=chosen_on_N)
        known = world.on_main(lambda: write_evaluation(evaluation_dir, metrics, context, metrics_log=folder.metrics_path))
    world.say(render_evaluation(known, evaluation_dir))
    return known


def _find_checkpoint(folder: RunFolder, which: str) -> Path:
    path = checkpoints.best_path(folder.checkpoints_dir) if which == "best" else None
    if path is None:
        newest = checkpoints.load(folder.checkpoints_dir, groups=())
        path = newest.path if newest is not None else None
    if path is None:
        raise UserError(
            f"{folder} has no checkpoint yet: it was stopped before its first one. Train it on with the command that started it."
        )
    return path


def _evaluate(
    world: World,
    checkpoint: Checkpoint,
    trained_on: TrainingData,
    *,
    recipe: Recipe,
    manifest: Manifest,
    split: str,
    chosen_on_N: NDArray[np.bool_] | None,
) -> dict[str, Any]:
    # The weights come from the checkpoint: those the run started from are not needed.
    config = recipe.model.model_copy(update={"pretrained": False, "weights": None, "freeze_backbone": False})
    model = build_model(config, manifest.num_classes, recipe.data.image_size)
    model.load_state_dict(evaluation_weights(checkpoint.tensors, checkpoint.state))
    augment = build_augment(recipe, trained_on, threads=world.cores)
    model = model.to(device=world.device, dtype=world.dtype)
    set_tf32(recipe.train.tf32, world.device)
    return evaluate_split(world, model, manifest, split, augment=augment, recipe=recipe, apart_N=chosen_on_N)
