"""What is seen on the login node before a run is sent: its data, weights, folder and number of processes."""

from collections.abc import Mapping

from galaxydist.cluster.profile import ClusterConfig
from galaxydist.cluster.refusals import refuse_world
from galaxydist.cluster.shared_folder import check_shared
from galaxydist.cluster.submission import build_request
from galaxydist.errors import UserError
from galaxydist.models.published import find_weights
from galaxydist.recipe.load import ResolvedRecipe
from galaxydist.recipe.paths import data_root, weights_dir
from galaxydist.shards.open import open_shards
from galaxydist.training.data import find_cache, find_manifest, find_variant, open_manifest


def check_request(resolved: ResolvedRecipe, cluster: ClusterConfig, environ: Mapping[str, str]) -> None:
    """See on this machine that a run could start: data, weights, run folder, number of processes. Nothing is written.

    Raises:
        UserError: with what to do.
    """
    recipe = resolved.recipe
    root = data_root(recipe.data.dir, environ)
    manifest = open_manifest(
        find_manifest(recipe.data, root), find_cache(recipe.data, root), recipe, min(cluster.num_tasks, recipe.train.batch_size)
    )
    for variant in recipe.eval.variants:
        open_shards(find_variant(recipe.data, root, variant), find_cache(recipe.data, root))
    refuse_world(recipe, manifest.split("train").num_samples, cluster.nodes, cluster.tasks_on_node)
    if recipe.model.pretrained:
        find_weights(recipe.model, weights_dir(root))
    if recipe.model.weights is not None and not recipe.model.weights.expanduser().is_file():
        raise UserError(f"model.weights={recipe.model.weights}: there is no such file on this machine")
    if cluster.scheduler == "slurm":
        check_shared(build_request(resolved, ()).run_dir)
