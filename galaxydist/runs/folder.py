"""Run folder: the layout of a run's files, and the recipe changes allowed when the run continues."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from galaxydist.atomic_files import read_json, write_json
from galaxydist.errors import UserError
from galaxydist.runs.metrics_file import MetricsFile

FORMAT_VERSION = 1
# Key of result.json: licence, citation and source of the training data, where they are known.
ORIGIN_KEY = "data_origin"
FailureKind = Literal["bad_input", "nonfinite", "crash"]
TrackerName = Literal["wandb", "trackio", "tensorboard"]


@dataclass(frozen=True)
class Change:
    """A recipe key that differs between the run folder and a new command; a missing key has the value None."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} in the run folder, {json.dumps(self.new)} now"


@dataclass(frozen=True)
class StoredRecipe:
    """The resolved recipe of a run folder.

    Args:
        recipe: value by dotted key.
        origins: origin of each value, by dotted key.
        forced: earlier changes by ``resume.force``, one entry per time: ``{"step": ..., "changes": [{"key", "old", "new"}]}``.
    """

    recipe: Mapping[str, Any]
    origins: Mapping[str, str]
    forced: Sequence[Mapping[str, Any]] = ()


class RunFolder:
    """Layout of one run's folder; creates nothing until something is written.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.json"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.pruned_path = path / "pruned.json"
        self.failure_path = path / "failure.json"
        self.events_path = path / "events.jsonl"
        self.facts_path = path / "run.json"
        self.lock_path = path / "lock.json"
        self.checkpoints_dir = path / "checkpoints"
        self.evaluation_dir = path / "evaluation"
        self.stacks_dir = path / "stacks"
        self.galaxies_dir = path / "galaxies"
        self.system_dir = path / "system"
        self.metrics = MetricsFile(self.metrics_path)
        self.timing = MetricsFile(path / "timing.jsonl")
        self.validations = MetricsFile(path / "validation.jsonl")

    def __str__(self) -> str:
        return str(self.path)

    def cut_back(self, step: int) -> None:
        """Remove what the logs of metrics hold of later steps; a run that continues from ``step`` writes it again."""
        for log in (self.metrics, self.timing, self.validations):
            log.cut_back(step)

    def remove_leftovers(self) -> None:
        """Remove what killed writes of a training left; only the process that holds the lock may call it."""
        written = (self.recipe_path, self.facts_path, self.result_path, self.pruned_path, self.failure_path)
        logs = (self.metrics.path, self.timing.path, self.validations.path)
        places = [(self.galaxies_dir, "*"), *((self.path, path.name) for path in (*written, *logs))]
        for folder, name in places:
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)

    def galaxy_image(self, sample: int) -> Path:
        """Return the path of a small image of a validation galaxy, by its stored sample number."""
        return self.galaxies_dir / f"{sample}.jpg"

    def create(self) -> None:
        """Create the folder.

        Raises:
            UserError: the folder cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The run folder {self.path} cannot be made: {error.strerror or error}. Choose another with run.dir=FOLDER."
            ) from error

    @property
    def is_started(self) -> bool:
        """True once a run has written its recipe here."""
        return self.recipe_path.exists()

    @property
    def is_finished(self) -> bool:
        """True once the run has finished and written its result."""
        return self.result_path.exists()

    @property
    def is_pruned(self) -> bool:
        """True if a search has ended the run early. Another start of it would train on."""
        return self.pruned_path.exists()

    def write_recipe(self, stored: StoredRecipe) -> None:
        """Write the resolved recipe with the origins of its values and the forced changes."""
        content = {
            "format": FORMAT_VERSION,
            "recipe": plain(stored.recipe),
            "origins": plain(stored.origins),
            "forced": plain(stored.forced),
        }
        write_json(self.recipe_path, content)

    def read_recipe(self) -> StoredRecipe:
        """Read the resolved recipe.

        Raises:
            UserError: it is missing, damaged, or of another format version.
        """
        if not self.recipe_path.exists():
            raise UserError(
                f"{self.path} is not a run folder: it has no {self.recipe_path.name}. Give a folder that a training run made."
            )
        content = read_json(self.recipe_path)
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT_VERSION
            or not isinstance(content.get("recipe"), dict)
        ):
            raise UserError(
                f"{self.recipe_path} is not a recipe of format {FORMAT_VERSION}: it was edited, or written by another version of "
                "galaxydist. Use that version, or another run.dir."
            )
        return StoredRecipe(content["recipe"], content.get("origins", {}), tuple(content.get("forced", ())))

    def continue_recipe(
        self,
        recipe: Mapping[str, Any],
        origins: Mapping[str, str],
        *,
        result_keys: Collection[str],
        defaults: Mapping[str, Any] | None = None,
        force: Collection[str] = (),
        step: int = 0,
    ) -> list[Change]:
        """Store the recipe of a new command; when the run continues, first compare it with the stored one.

        Args:
            recipe: value by dotted key, resolved.
            origins: origin of each value.
            result_keys: the dotted keys that change a run's numbers.
            defaults: values of keys that the stored recipe may lack because they were added later.
            force: result keys that may differ (``resume.force``).
            step: the step at which the run continues, for the record.

        Returns:
            The forced changes, which are also recorded in recipe.json.

        Raises:
            UserError: a result key differs and is not forced.
        """
        if not self.is_started:
            self.create()
            self.write_recipe(StoredRecipe(recipe, origins))
            return []
        stored = self.read_recipe()
        known = {**(defaults or {}), **stored.recipe}
        forced = compare_recipes(known, recipe, result_keys=result_keys, force=force, name=str(self.path))
        record = [{"step": step, "changes": [vars(change) for change in forced]}] if forced else []
        self.write_recipe(StoredRecipe(recipe, origins, [*stored.forced, *record]))
        return forced

    def saved_step(self) -> int | None:
        """Return the highest step of a complete checkpoint; None if there is none."""
        names = [FOLDER_NAME.fullmatch(path.name) for path in self.checkpoints_dir.glob("step-*")]
        return max((int(name[1]) for name in names if name is not None), default=None)

    def tracker_file(self, name: TrackerName) -> Path:
        """Return the path of a tracker's state."""
        return self.path / ("tracker.json" if name == "wandb" else f"tracker-{name}.json")

    def read_tracker(self, name: TrackerName = "wandb") -> dict[str, Any]:
        """Return a tracker's state (``run_id``, ``stored_step``, ``is_complete``); empty if there is none, or a damaged one."""
        with contextlib.suppress(UserError):  # a tracker never stops a run
            return _read_object(self.tracker_file(name)) or {}
        return {}

    def write_tracker(self, name: TrackerName = "wandb", *, run_id: str | None, stored_step: int, is_complete: bool) -> None:
        """Write a tracker's state.

        Args:
            name: of the tracker.
            run_id: the tracker's id of the run, with which a requeued job continues the same curves.
            stored_step: the highest step that the tracker is known to have stored.
            is_complete: True if the run has ended and the tracker has all of it.
        """
        write_json(self.tracker_file(name), {"run_id": run_id, "stored_step": stored_step, "is_complete": is_complete})

    def read_result(self) -> dict[str, Any] | None:
        """Return the result of the run; None if it has not finished."""
        return _read_object(self.result_path)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as finished."""
        write_json(self.result_path, plain(result))

    def write_pruned(self, *, step: int, epoch: int, metric: str, value: float | None) -> None:
        """Write that a search has ended the run, whose state is saved.

        Args:
            step: optimizer steps done.
            epoch: epochs done.
            metric: the validation metric that the search compares.
            value: of the last validation; None if it was not finite.
        """
        write_json(self.pruned_path, {"step": step, "epoch": epoch, "metric": metric, "value": value})

    def read_failure(self) -> dict[str, Any] | None:
        """Return the record of the last start's failure; None if there is no valid one."""
        content = _read_object(self.failure_path) or {}
        return content if {"kind", "step", "error"} <= content.keys() else None

    def write_failure(self, kind: FailureKind, step: int | None, error: str, *, start: str | None = None) -> bool:
        """Record how this start failed, for the decision to requeue.

        Of several failures of one start the first is kept, because the others follow from it (a new start clears the record).

        Args:
            kind: ``bad_input`` or ``nonfinite`` if a restart would fail again, ``crash`` if it might succeed.
            step: optimizer steps done, if known.
            error: one line that describes the failure.
            start: job and restart (``job_environment.start_of``); None outside of a job.

        Returns:
            True if it was recorded.
        """
        with contextlib.suppress(UserError):  # a damaged record is replaced
            before = self.read_failure()
            if before is not None and before.get("start") == start:
                return False
        write_json(self.failure_path, {"kind": kind, "step": step, "error": error, "start": start})
        return True

    def clear_failure(self) -> None:
        """Remove the record of the last start's failure."""
        self.failure_path.unlink(missing_ok=True)


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, empty if the file holds another value; None if there is no file."""
    if not path.exists():
        return None
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def plain(value: Any) -> Any:
    """Return ``value`` as JSON would restore it (tuples as lists, paths as text), so that stored and new values compare equal."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    return value


def compare_recipes(
    stored: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    result_keys: Collection[str],
    force: Collection[str] = (),
    name: str = "the run folder",
) -> list[Change]:
    """Return the forced changes of result keys between two resolved recipes (value by dotted key); other keys may differ.

    Raises:
        UserError: result keys that are not in ``force`` differ; each is listed with its old and new value.
    """
    old_values, new_values = plain(stored), plain(new)
    missing = object()
    changes = [
        Change(key, old_values.get(key), new_values.get(key))
        for key in sorted({*old_values, *new_values} & set(result_keys))
        if old_values.get(key, missing) != new_values.get(key, missing)
        or isinstance(old_values.get(key), bool) != isinstance(new_values.get(key), bool)
    ]
    refused = [change for change in changes if change.key not in force]
    if refused:
        listed = "\n".join(f"  {change}" for change in refused)
        keys = ",".join(sorted({*force, *(change.key for change in refused)}))
        raise UserError(
            f"{name} belongs to a run with other values of keys that change its numbers:\n{listed}\n"
            f"Give the old values to continue it, another run.dir to start a new run, or resume.force=[{keys}] to continue it "
            "all the same (this is recorded)."
        )
    return changes


# Names in the checkpoints folder, defined here so that they can be imported without torch.
LATEST, BEST = "latest", "best"
STATE_FILE = "checkpoint.json"
# Groups: the step, the number of the save.
FOLDER_NAME = re.compile(r"step-(\d+)-(\d+)")


def read_newest_state(checkpoints_dir: Path) -> dict[str, Any] | None:
    """Return the plain values of the newest readable checkpoint, without checking its files; None if there is none."""
    names = [match for path in checkpoints_dir.glob("step-*") if (match := FOLDER_NAME.fullmatch(path.name))]
    newest_first = sorted(names, key=lambda match: int(match[2]), reverse=True)
    return next((state for match in newest_first if (state := read_state(checkpoints_dir / match[0])) is not None), None)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the plain values of a checkpoint, without checking its files; None if it cannot be read."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_bytes())["content"]["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("data"), dict) else None
