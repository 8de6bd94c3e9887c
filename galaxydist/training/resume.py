"""Continuing a run: the locked run folder, checks that recipe and data are those of its start, early stopping and pruning."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from galaxydist.errors import EveryRankError, UserError, name_some
from galaxydist.models.own_function import find_source, source_hash
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.identity import flatten, later_defaults, result_fields
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.events import EventLog
from galaxydist.runs.folder import RunFolder, compare_recipes, plain, read_newest_state
from galaxydist.runs.lock import RunLock
from galaxydist.shards.manifest import Manifest
from galaxydist.version import __version__

if TYPE_CHECKING:  # torch, which a login node need not load
    from galaxydist.distributed import World


def lock_run_folder(
    folder: RunFolder, world: "World", resolved: ResolvedRecipe, manifest: Manifest
) -> tuple[RunLock, dict[str, Any], bool]:
    """Lock a run folder on rank 0, and check that it was started with this recipe and these shards.

    Returns:
        The lock, which is held; the progress that the newest checkpoint holds (empty without one); and True if the run is
        finished, with no step left to train.

    Raises:
        UserError: the folder is in use, cannot be written, or belongs to another run.
    """
    recipe = resolved.recipe
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
        from galaxydist.checkpoints import store

        newest = store.load(folder.checkpoints_dir, groups=())
        state = newest.state if newest is not None else None
        _check_same_run(folder, recipe, manifest, state)
        folder.continue_recipe(
            flatten(recipe),
            resolved.origins,
            result_keys=result_fields(recipe).keys(),
            defaults=later_defaults(),
            force=recipe.resume.force,
            step=newest.step if newest is not None else 0,
        )
        is_finished = _is_finished(folder, recipe, manifest, state)
        if not is_finished:
            folder.remove_leftovers()
            store.remove_leftovers(folder.checkpoints_dir)
            folder.result_path.unlink(missing_ok=True)
            folder.pruned_path.unlink(missing_ok=True)
        return lock, state["progress"] if state is not None else {}, is_finished
    except BaseException:
        lock.release()
        raise


# Keys that may have a value for each node or process: places, threads, and what rank 0 alone uses.
OF_ONE_RANK = (
    "data.dir",
    "data.manifest",
    "data.cache_dir",
    "data.cache_size",
    "data.prefetch",
    "data.threads",
    "data.fetch_threads",
    "train.threads",
    "tracker.webhook",
)


# Value of a recipe key that the version of one process does not have.
UNKNOWN_KEY = "unknown"


def check_same_recipe(world: "World", recipe: Recipe, manifest: Manifest) -> None:
    """Check that all processes were started with the version, the recipe and the shards of rank 0; all call it.

    Raises:
        EveryRankError: they were not; the text names the keys and values of the first process that differs.
    """
    own = {key: value for key, value in plain(flatten(recipe)).items() if key not in OF_ONE_RANK}
    own = {"galaxydist": __version__, "shards": manifest.hash[:16], **own}
    main = world.run_on_main(lambda: own)
    pairs = {key: (own.get(key, UNKNOWN_KEY), main.get(key, UNKNOWN_KEY)) for key in {**own, **main}}
    changes = [f"{key}={here} (on rank 0 {there})" for key, (here, there) in pairs.items() if here != there]
    for rank, found in enumerate(world.all_gather(changes)):
        if found:
            raise EveryRankError(
                f"Rank {rank} was started with other settings than rank 0: {name_some(found)}. Give all processes of a run the "
                "same arguments and shards; if these are two runs, give each its own MASTER_PORT."
            )


def check_would_continue(folder: RunFolder, recipe: Recipe, manifest: Manifest) -> bool:
    """Check before a submission that a run folder was started with this recipe and these shards, without changing it.

    It reads no tensors of the checkpoints, and imports no torch.

    Returns:
        False if the run is finished, with no step left to train.

    Raises:
        UserError: other shards or another recipe, with the differences; or changes (``resume.force``) without effect, since no
            step is left.
    """
    state = read_newest_state(folder.checkpoints_dir)
    _check_same_run(folder, recipe, manifest, state)
    return not _is_finished(folder, recipe, manifest, state)


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
        compare_recipes(stored, flatten(recipe), result_keys=keys, force=force, name=str(folder))
    if state is not None:
        _check_code(folder, recipe, state)
        _check_length(folder, recipe, manifest, state)


def _check_code(folder: RunFolder, recipe: Recipe, state: Mapping[str, Any]) -> None:
    """Refuse another source of an own function than that of the run's checkpoints, as another value of a result key."""
    before = (state.get("model") or {}).get("code")
    if before is None or "model.name" in recipe.resume.force or before == source_hash(recipe.model.name):
        return
    raise UserError(
        f"model.name={recipe.model.name}: its source {find_source(recipe.model.name) or '(not found)'} is not that with which "
        f"the run in {folder} was started (SHA-256 {before[:12]}). Give it the old source, start a new run with run.dir=FOLDER, "
        "or continue it all the same with resume.force=[model.name]."
    )


def _check_length(folder: RunFolder, recipe: Recipe, manifest: Manifest, state: Mapping[str, Any]) -> None:
    """Refuse a recipe that disagrees with the steps that are already done."""
    done, steps_per_epoch = state["progress"]["step"], _steps_per_epoch(recipe, manifest)
    if done > steps_per_epoch * recipe.train.epochs:
        raise UserError(
            f"train.epochs={recipe.train.epochs}: the run in {folder} has trained {done / steps_per_epoch:.4g} epochs already. "
            "Give more, or start a new run with another run.dir."
        )
    if not _is_finished(folder, recipe, manifest, state):
        return
    trained = {key for key in result_fields(recipe) if not key.startswith("eval.")}
    before = {**later_defaults(), **dict(RECIPE.flat(state["recipe"]))}
    changes = compare_recipes(before, flatten(recipe), result_keys=trained, force=trained)
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise UserError(
            f"The run in {folder} is finished: no step is left in which this could change anything:\n{listed}\n"
            "Raise train.epochs to train on (and train.patience where early stopping has ended it), or start a new run with "
            "another run.dir."
        )


def _is_finished(folder: RunFolder, recipe: Recipe, manifest: Manifest, state: Mapping[str, Any] | None) -> bool:
    """Return True if the run has its result and the recipe asks for no further step.

    Args:
        state: the state of the newest checkpoint, or None.
    """
    result = folder.read_result()
    if result is None:
        return False
    if state is None or state["progress"]["step"] < result.get("step", 0):
        return True  # the checkpoint of the result is gone: there is none to continue from
    stopping = EarlyStopping(recipe.train.metric, recipe.train.patience)
    stopping.load_state_dict(state["progress"]["stopping"])
    return stopping.should_stop or state["progress"]["step"] >= _steps_per_epoch(recipe, manifest) * recipe.train.epochs


def _steps_per_epoch(recipe: Recipe, manifest: Manifest) -> int:
    return manifest.splits["train"].num_samples // recipe.train.batch_size


@dataclass
class EarlyStopping:
    """Keeps the best value of a validation metric, and stops the run if it no longer improves.

    Args:
        metric: ``loss`` is better if smaller, the others if larger.
        patience: validations without a better value after which the run stops (0: never).
    """

    metric: Literal["accuracy", "balanced_accuracy", "loss"]
    patience: int
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def update(self, value: float | None, step: int) -> bool:
        """Record a validation and return True if it is better than all before; None (a loss that is not finite) never is."""
        better = value is not None and (self.best is None or (value < self.best if self.metric == "loss" else value > self.best))
        if better:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better

    @property
    def should_stop(self) -> bool:
        return self.patience > 0 and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; with another metric than before (``resume.force``) start anew."""
        if state.get("metric", self.metric) != self.metric:
            return
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


# Called on rank 0 after a validation with the epochs done and the metric's value (None: not finite); True ends the run early.
Prune = Callable[[int, float | None], bool]


@dataclass
class Pruning:
    """Ends a run early if its caller, such as a search, says so after a validation.

    Args:
        world: the processes.
        folder: the run folder.
        metric: ``train.metric``.
        prune: the caller's decision, which all processes have and rank 0 calls; None: the run is never pruned.

    Attributes:
        is_pruned: the run is to end with the step that was validated last.
    """

    world: "World"
    folder: RunFolder
    metric: str
    prune: Prune | None = None
    is_pruned: bool = False

    def update(self, epoch: int, value: float | None, *, is_last: bool) -> None:
        """Ask after a validation. All processes call it.

        Args:
            epoch: epochs done.
            value: of the metric.
            is_last: the run ends anyway, so the caller is told only.
        """
        prune = self.prune
        if prune is not None:
            self._epoch, self._value = epoch, value
            self.is_pruned = self.world.run_on_main(lambda: prune(epoch, value)) and not is_last

    def finish(self, step: int, events: EventLog) -> str:
        """Write that the run was pruned, once its state is saved, and return a line about it. All processes call it.

        Args:
            step: optimizer steps done.
            events: of the run.
        """
        epoch, value = self._epoch, self._value
        text = f"pruned after epoch {epoch}: {self.metric} {'not finite' if value is None else f'{value:.4f}'} (val)"

        def write() -> None:
            events.write("pruned", text, step)
            self.folder.write_pruned(step=step, epoch=epoch, metric=self.metric, value=value)

        self.world.run_on_main(write)
        return text
