"""Trackers: where metrics go beside the run folder. Rank 0 holds a real one, every other rank the null one."""

import logging
import netrc
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from galaxydist.recipe.identity import to_dict
from galaxydist.recipe.schema import Recipe, TrackerConfig
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.training.world import World

LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the trainer asks of a tracker."""

    @property
    def run_id(self) -> str | None: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None: ...


class NullTracker:
    """Tracks nothing."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None:
        """Nothing."""


class WandbTracker:
    """Weights & Biases, online or offline. A failure is said once and never stops the training.

    Args:
        config: project, entity, tags.
        mode: ``online`` or ``offline``.
        folder: where wandb keeps its files.
        run_id: of the run to continue, or a new one.
        name: shown on the dashboard.
        recipe: the resolved recipe, stored as the run's config.
        logged_step: the highest step logged before; steps up to it are not logged again (a curve cannot go back).
    """

    def __init__(
        self,
        config: TrackerConfig,
        *,
        mode: str,
        folder: Path,
        run_id: str,
        name: str,
        recipe: Mapping[str, Any],
        logged_step: int,
    ) -> None:
        import wandb

        self.run_id: str | None = run_id
        self._logged_step = logged_step
        self._failed = False
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=list(config.tags) or None,
            mode="online" if mode == "online" else "offline",
            dir=str(folder),
            id=run_id,
            name=name,
            resume="allow",
            config=dict(recipe),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._failed or step <= self._logged_step:
            return
        try:
            self._run.log({**metrics, "step": step}, step=step)
        except Exception as error:  # whatever a tracker does, the training goes on
            self._fail(error)

    def finish(self, summary: Mapping[str, float], exit_code: int) -> None:
        try:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            LOG.warning("wandb failed (%s); the training goes on without it, metrics.jsonl has every number", error)
        self._failed = True


def build_tracker(
    config: TrackerConfig,
    *,
    folder: Path,
    run_id: str,
    name: str,
    recipe: Mapping[str, Any],
    logged_step: int,
    environ: Mapping[str, str],
) -> Tracker:
    """The recipe's tracker, or the null tracker where it cannot be started."""
    if config.name == "none":
        return NullTracker()
    mode = config.mode if config.mode != "auto" else choose_wandb_mode(environ)
    try:
        return WandbTracker(config, mode=mode, folder=folder, run_id=run_id, name=name, recipe=recipe, logged_step=logged_step)
    except Exception as error:  # a tracker that fails never stops a training run
        LOG.warning("wandb could not start (%s); metrics.jsonl has every number", error)
        return NullTracker()


def start_tracker(
    world: World, recipe: Recipe, folder: RunFolder, manifest: Manifest, *, run_id: str | None, environ: Mapping[str, str]
) -> Tracker:
    """The tracker of a run: on rank 0 the recipe's, elsewhere none. It goes on with the curve ``run_id``, or the run folder's."""
    if not world.is_main:
        return NullTracker()
    told = to_dict(recipe)
    if manifest.remote is not None:
        told["data"]["manifest"] = manifest.location  # without what may be secret in a URL
    stored = folder.read_tracker()
    return build_tracker(
        recipe.tracker,
        folder=folder.path,
        run_id=run_id or stored.get("run_id") or uuid.uuid4().hex[:8],
        name=folder.path.name,
        recipe=told,
        logged_step=stored.get("highest_step", 0),
        environ=environ,
    )


def choose_wandb_mode(environ: Mapping[str, str]) -> str:
    """``online`` where there is a key and wandb's server answers within two seconds, else ``offline``."""
    if environ.get("WANDB_MODE") in ("online", "offline"):
        return environ["WANDB_MODE"]
    host, port = wandb_address(environ)
    return "online" if has_wandb_key(environ, host) and is_reachable(host, port) else "offline"


def wandb_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of wandb's server."""
    host = environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    return name, int(port or 443)


def has_wandb_key(environ: Mapping[str, str], host: str) -> bool:
    """Whether there is a key for a server: in the environment, or where ``wandb login`` puts it."""
    if environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(host: str, port: int) -> bool:
    """Whether a server takes connections within two seconds."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
