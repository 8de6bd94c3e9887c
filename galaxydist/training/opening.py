"""Opening a run folder: for this run alone, and only if it belongs to it."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.errors import UserError
from galaxydist.recipe.identity import flatten, later_defaults, result_fields, run_path
from galaxydist.recipe.load import ResolvedRecipe
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.checkpoint_names import read_newest_state
from galaxydist.runs.folder import RunFolder, compare_recipes
from galaxydist.runs.lock import RunLock
from galaxydist.shards.manifest import Manifest

if TYPE_CHECKING:  # torch, which a login node need not load
    from galaxydist.runs.checkpoint_folder import Checkpoint
    from galaxydist.training.world import World


@dataclass(frozen=True)
class OpenedFolder:
    """What all ranks must know of a run folder.

    Args:
        path: the folder.
        micro_batch: what an earlier start found out about ``train.micro_batch=auto``; None where there was none.
        threads: that an earlier start computed with, likewise: see ``keep_threads``.
    """

    path: Path
    micro_batch: dict[str, Any] | None
    threads: dict[str, int] | None


def open_run_folder(world: "World", resolved: ResolvedRecipe, manifest: Manifest) -> tuple[OpenedFolder, RunLock]:
    """Lock the recipe's run folder, and see that recipe and data are those that it was started with. For rank 0.

    Returns:
        The folder, and its lock, which is held.

    Raises:
        UserError: it is in use, cannot be written, or belongs to another run.
    """
    recipe = resolved.recipe
    folder = RunFolder(run_path(recipe))
    folder.create()
    lock = RunLock(
        folder.lock_path,
        host=socket.gethostname(),
        pid=os.getpid(),
        clock=time.time,
        job_id=world.job_id,
        restart_count=world.restart_count,
        is_patient=world.job_id is not None,
    )
    lock.acquire()
    try:
        progress = _continue(folder, resolved, manifest)
        return OpenedFolder(folder.path, progress.get("micro_batch"), progress.get("threads")), lock
    except BaseException:
        lock.release()
        raise


def check_continues(folder: RunFolder, recipe: Recipe, manifest: Manifest) -> "Checkpoint | None":
    """See that recipe and data are those that a run folder was started with; nothing is changed.

    Returns:
        The newest checkpoint, without its tensors.

    Raises:
        UserError: naming what differs.
    """
    from galaxydist.runs import checkpoints

    newest = checkpoints.load(folder.checkpoints_dir, groups=())
    _check_same_run(folder, recipe, manifest, None if newest is None else newest.state)
    return newest


def check_would_continue(folder: RunFolder, recipe: Recipe, manifest: Manifest) -> None:
    """The same before a run is sent: quick, and without a look at the checkpoints' tensors.

    Raises:
        UserError: naming what differs.
    """
    _check_same_run(folder, recipe, manifest, read_newest_state(folder.checkpoints_dir))


def _check_same_run(folder: RunFolder, recipe: Recipe, manifest: Manifest, state: Mapping[str, Any] | None) -> None:
    started_on = manifest.hash if state is None else state["data"]["manifest_hash"]
    if started_on != manifest.hash:
        raise UserError(
            f"The run in {folder} was started on other shards than {manifest.location} (manifest {started_on[:12]} there, "
            f"{manifest.hash[:12]} here). "
            "Give it the old shards with data.manifest=FILE, or start a new run with run.dir=FOLDER."
        )
    if folder.is_started:
        keys, force = result_fields(recipe).keys(), recipe.resume.force
        stored = {**later_defaults(), **folder.read_recipe().recipe}
        compare_recipes(stored, flatten(recipe), result_keys=keys, force=force, place=str(folder))


def _continue(folder: RunFolder, resolved: ResolvedRecipe, manifest: Manifest) -> dict[str, Any]:
    """Compare with what the folder holds, and note the present recipe; gives the progress of the newest checkpoint."""
    recipe = resolved.recipe
    newest = check_continues(folder, recipe, manifest)
    folder.continue_recipe(
        flatten(recipe),
        resolved.origins,
        result_keys=result_fields(recipe).keys(),
        defaults=later_defaults(),
        force=recipe.resume.force,
        step=newest.step if newest is not None else 0,
    )
    progress: dict[str, Any] = newest.state["progress"] if newest is not None else {}
    return progress
