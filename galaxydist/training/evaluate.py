"""The exact evaluation of a run: the weights of one of its checkpoints on a split, as JSON, figures and a table."""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from galaxydist.checkpoints import store
from galaxydist.distributed import enter_world, leave_world
from galaxydist.errors import UserError
from galaxydist.evaluation.views import Views
from galaxydist.galaxy import Variant
from galaxydist.loading.dataset import TrainingData, find_cache, find_manifest, find_variant, has_split
from galaxydist.models.weights import write_weights
from galaxydist.paths import data_root
from galaxydist.recipe.identity import from_dict
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns
from galaxydist.training.judging import JUDGED, Judge, find_checkpoint
from galaxydist.training.state import evaluation_weights
from galaxydist.training.trained_on import open_trained


def evaluate_run(
    run_dir: Path,
    split: str,
    environ: MutableMapping[str, str],
    *,
    manifest_path: str | Path | None = None,
    variant: Variant | None = None,
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
        variant: instead, another data set of the run's survey.
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
    path = manifest_path or (known if variant is None else find_variant(recipe.data, root, variant))
    manifest = open_shards(path, cache)
    if not has_split(manifest, split):
        raise UserError(
            f"{manifest.location} has no galaxies in a split {split!r}. It has {', '.join(manifest.splits)}: give --split."
        )
    world = enter_world(recipe.train.precision, environ)
    try:
        world.on_main(lambda: check_columns(manifest))

        def find_trained(trained_on: TrainingData) -> Manifest:
            return open_trained(trained_on, known, trained_path, cache)

        judge = Judge(world, folder, recipe, find_trained=find_trained, figures=True)
        metrics = judge.judge(manifest, split)
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
    checkpoint = store.read_sound(find_checkpoint(folder, recipe.eval.checkpoint), groups=JUDGED)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, evaluation_weights(checkpoint.tensors, checkpoint.state), trained_on.statistics)
    return checkpoint.step
