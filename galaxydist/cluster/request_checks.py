"""What is seen on the login node before a run is sent: its data, weights, folder and number of processes."""

from collections.abc import Mapping

from galaxydist.cluster.profile import ClusterConfig
from galaxydist.cluster.shared_folder import check_shared
from galaxydist.cluster.submission import build_request
from galaxydist.errors import UserError
from galaxydist.loading.dataset import find_cache, find_manifest, find_variant, open_manifest
from galaxydist.models.weights import find_weights
from galaxydist.paths import data_root, weights_dir
from galaxydist.planner.limits import refuse_world
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.remote.open import open_shards
from galaxydist.training.resume import check_would_continue


def check_request(resolved: ResolvedRecipe, cluster: ClusterConfig, environ: Mapping[str, str]) -> bool:
    """See on this machine that a run could start: data, weights, run folder, number of processes. Nothing is written.

    Returns:
        False where the run is finished: there is nothing to do.

    Raises:
        UserError: with what to do.
    """
    recipe = resolved.recipe
    root = data_root(recipe.data.dir, {**environ, **dict(item.split("=", 1) for item in cluster.environment)})
    manifest = open_manifest(
        find_manifest(recipe.data, root), find_cache(recipe.data, root), recipe, min(cluster.num_tasks, recipe.train.batch_size)
    )
    for variant in recipe.eval.variants:
        open_shards(find_variant(recipe.data, root, variant), find_cache(recipe.data, root))
    refuse_world(recipe, manifest.split("train").num_samples, cluster.nodes, cluster.tasks_on_node, fewer=_fewer)
    if recipe.model.pretrained:
        find_weights(recipe.model, weights_dir(root))
    if recipe.model.weights is not None and not recipe.model.weights.expanduser().is_file():
        raise UserError(f"model.weights={recipe.model.weights}: there is no such file on this machine")
    run_dir = build_request(resolved, ()).run_dir
    is_due = check_would_continue(RunFolder(run_dir), recipe, manifest)
    if cluster.scheduler == "slurm":
        check_shared(run_dir, "run folder", "run.root=FOLDER or run.dir=FOLDER")
        if manifest.remote is None:
            check_shared(manifest.dir, "folder of shards", "GALAXYDIST_DATA=FOLDER, data.dir=FOLDER or data.manifest=FILE")
    return is_due


def _fewer(num_nodes: int, per_node: int) -> str:
    """How a cluster is asked for so many processes."""
    return f"cluster.nodes={num_nodes} with {per_node} of cluster.gpus_per_node or cluster.tasks_per_node"
