"""Checks on the login node before submission: data, weights, run folder, number of processes."""

import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from galaxydist.cluster.profile import ClusterConfig
from galaxydist.cluster.slurm import check_controller, is_slurm_here, run_slurm
from galaxydist.cluster.submit import build_request
from galaxydist.errors import UserError
from galaxydist.loading.training_data import find_cache, find_manifest, find_variant, has_split, open_manifest
from galaxydist.models.hub_weights import check_files
from galaxydist.paths import data_root, weights_dir
from galaxydist.planner.limits import check_processes
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.recipe.rules import check_optimizer
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.remote.open import open_shards
from galaxydist.training.resume import check_would_continue

# Folders that are local to every node.
LOCAL_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/run"))
IN_MEMORY = {"tmpfs", "ramfs"}


def check_shared(folder: Path, name: str, remedy: str) -> None:
    """Raise an error if a folder lies on storage that is local to each machine.

    A local disk of the login node is accepted, since the nodes may mount it over the network; `galaxydist doctor cluster=NAME`
    checks this from the nodes.

    Args:
        folder: need not exist.
        name: of the folder in the message, such as ``run folder``.
        remedy: the keys that choose another folder.

    Raises:
        UserError: the folder is not shared.
        SlurmUnavailableError: SLURM must be asked for the cluster's nodes, and does not answer.
    """
    storage = _local_storage(folder.resolve())
    if storage is not None and not _is_only_host():
        raise UserError(
            f"The {name} {folder} lies {storage}, which the nodes of the cluster do not see. Put it on a file system that all "
            f"of them share, such as your home or project folder: {remedy} (`galaxydist doctor cluster=NAME` checks that the "
            "nodes see it)."
        )


def _local_storage(path: Path) -> str | None:
    """Describe the storage of a path if it is local to each machine, else return None."""
    for folder in LOCAL_FOLDERS:
        if path.is_relative_to(folder):
            return f"in {folder}"
    kind = file_system(path)
    return f"in memory ({kind})" if kind in IN_MEMORY else None


def file_system(folder: Path) -> str | None:
    """Return the type of a folder's file system, such as ``ext4``, ``nfs4`` or ``tmpfs``; None if it is unknown."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    path = folder.resolve()
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), None)


def _is_only_host() -> bool:
    """Return True if this machine is every node of the cluster, as in tests; raise SlurmUnavailableError if SLURM is down."""
    if not is_slurm_here():
        return False
    check_controller()
    answer = run_slurm(["sinfo", "--noheader", "--Node", "--format", "%o %n"])
    nodes = [line.split() for line in answer.stdout.splitlines()]
    own = socket.gethostname().partition(".")[0]
    return bool(nodes) and all(node[0].startswith("127.") or node[-1].partition(".")[0] == own for node in nodes)


def check_request(resolved: ResolvedRecipe, cluster: ClusterConfig, environ: Mapping[str, str]) -> bool:
    """Check on this machine that a run could start; write nothing.

    Returns:
        False if the run is already finished.

    Raises:
        UserError: the run could not start.
    """
    recipe = resolved.recipe
    root = data_root(recipe.data.dir, {**environ, **dict(item.split("=", 1) for item in cluster.environment)})
    manifest = open_manifest(
        find_manifest(recipe.data, root), find_cache(recipe.data, root), recipe, min(cluster.num_tasks, recipe.train.batch_size)
    )
    for variant in recipe.eval.variants:
        open_shards(find_variant(recipe.data, root, variant), find_cache(recipe.data, root))
    check_processes(recipe, manifest.split("train").num_samples, cluster.nodes, cluster.tasks_on_node, fewer=_fewer)
    check_files(recipe.model, weights_dir(root))
    if recipe.model.weights is not None and not recipe.model.weights.expanduser().is_file():
        raise UserError(f"model.weights={recipe.model.weights}: there is no such file on this machine")
    run_dir = build_request(resolved, ()).run_dir
    is_due = check_would_continue(RunFolder(run_dir), recipe, manifest)
    if is_due:
        check_optimizer(recipe.optim.name)
    if cluster.scheduler == "slurm":
        check_shared(run_dir, "run folder", "run.root=FOLDER or run.dir=FOLDER")
        if manifest.remote is None:
            check_shared(manifest.dir, "folder of shards", "GALAXYDIST_DATA=FOLDER, data.dir=FOLDER or data.manifest=FILE")
        if manifest.tars is not None and not manifest.has_remote_shards:
            check_shared(Path(manifest.shard_folder), "folder of tars", "data.manifest=FILE, an index of tars elsewhere")
    return is_due


def check_validation(resolved: ResolvedRecipe, cluster: ClusterConfig, environ: Mapping[str, str]) -> None:
    """Raise an error if the data of a run have no validation split, by which a search compares its trials.

    Raises:
        UserError: there is none, or the data cannot be read.
    """
    recipe = resolved.recipe
    root = data_root(recipe.data.dir, {**environ, **dict(item.split("=", 1) for item in cluster.environment)})
    manifest = open_manifest(find_manifest(recipe.data, root), find_cache(recipe.data, root), recipe, 1)
    if not has_split(manifest, "val"):
        raise UserError(
            f"{manifest.location} has no validation split, by which a search compares its trials: write the shards again with one"
        )


def _fewer(num_nodes: int, per_node: int) -> str:
    """Return the profile keys for these processes, for a message."""
    return f"cluster.nodes={num_nodes} with {per_node} of cluster.gpus_per_node or cluster.tasks_per_node"
