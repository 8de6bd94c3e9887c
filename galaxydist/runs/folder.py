"""The run folder: where everything of one run lies, and what may change when the run goes on."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from galaxydist.atomic_files import read_json, write_json
from galaxydist.errors import UserError
from galaxydist.runs.metrics_log import MetricsLog

FORMAT_VERSION = 1
FailureKind = Literal["bad_input", "nonfinite", "crash"]


@dataclass(frozen=True)
class Change:
    """A recipe key that differs between the run folder and a new command; a value is None where the key does not exist."""

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
        origins: where each value came from, by dotted key.
        forced: what ``resume.force`` changed so far: one entry a time, ``{"step": ..., "changes": [{"key", "old", "new"}]}``.
    """

    recipe: Mapping[str, Any]
    origins: Mapping[str, str]
    forced: Sequence[Mapping[str, Any]] = ()


class RunFolder:
    """The layout of one run's folder; makes nothing until something is written.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.json"
        self.metrics_path = path / "metrics.jsonl"
        self.tracker_path = path / "tracker.json"
        self.result_path = path / "result.json"
        self.failure_path = path / "failure.json"
        self.lock_path = path / "lock.json"
        self.checkpoints_dir = path / "checkpoints"
        self.evaluation_dir = path / "evaluation"
        self.stacks_dir = path / "stacks"
        self.metrics = MetricsLog(self.metrics_path)
        self.timing = MetricsLog(path / "timing.jsonl")

    def __str__(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: a file is in the way, or it may not be made there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The run folder {self.path} cannot be made: {error.strerror or error}. Choose another with run.dir=FOLDER."
            ) from error

    @property
    def is_started(self) -> bool:
        """A run has written its recipe here."""
        return self.recipe_path.exists()

    @property
    def is_finished(self) -> bool:
        """The run has come to its end and left its result."""
        return self.result_path.exists()

    def write_recipe(self, stored: StoredRecipe) -> None:
        """Write the resolved recipe, with where each value came from and what was forced."""
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
            UserError: it is missing, damaged, or of a newer galaxydist.
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
        """Take the recipe of a new command for this folder: write it the first time, compare it when the run goes on.

        Args:
            recipe: value by dotted key, resolved.
            origins: where each value came from.
            result_keys: the dotted keys that change a run's numbers.
            defaults: values of keys that the stored recipe may lack, since it is older than they are.
            force: ``resume.force``: result keys that may differ all the same.
            step: the step at which the run goes on, for the record.

        Returns:
            The forced changes; they are recorded in recipe.json.

        Raises:
            UserError: a result key differs and is not forced.
        """
        if not self.is_started:
            self.create()
            self.write_recipe(StoredRecipe(recipe, origins))
            return []
        stored = self.read_recipe()
        known = {**(defaults or {}), **stored.recipe}
        forced = compare_recipes(known, recipe, result_keys=result_keys, force=force, place=str(self.path))
        record = [{"step": step, "changes": [vars(change) for change in forced]}] if forced else []
        self.write_recipe(StoredRecipe(recipe, origins, [*stored.forced, *record]))
        return forced

    def read_tracker(self) -> dict[str, Any]:
        """The tracker's state (``run_id``, ``stored_step``, ``is_complete``); empty where there is none yet."""
        if not self.tracker_path.exists():
            return {}
        content = read_json(self.tracker_path)
        return content if isinstance(content, dict) else {}

    def write_tracker(self, *, run_id: str | None, stored_step: int, is_complete: bool) -> None:
        """Keep the tracker's state.

        Args:
            run_id: the tracker's name for the run: a requeue goes on with the same curve.
            stored_step: the highest step that the tracker is known to have stored.
            is_complete: the run has ended, and the tracker has all of it.
        """
        write_json(self.tracker_path, {"run_id": run_id, "stored_step": stored_step, "is_complete": is_complete})

    def read_result(self) -> dict[str, Any] | None:
        """What the finished run left; None while it has not finished."""
        if not self.result_path.exists():
            return None
        content = read_json(self.result_path)
        return content if isinstance(content, dict) else {}

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, with its result."""
        write_json(self.result_path, plain(result))

    def read_failure(self) -> dict[str, Any] | None:
        """How the last start failed; None where it did not (or left nothing behind)."""
        if not self.failure_path.exists():
            return None
        content = read_json(self.failure_path)
        return content if isinstance(content, dict) and {"kind", "step", "error"} <= set(content) else None

    def write_failure(self, kind: FailureKind, step: int | None, error: str, *, start: str | None = None) -> None:
        """Note how this start failed, for whoever decides whether it is started again. Of several that one start notes the
        first stays: the others follow from it.

        Args:
            kind: what starting again would change: nothing (``bad_input``, ``nonfinite``), or perhaps something (``crash``).
            step: optimizer steps done, where that is known.
            error: a line.
            start: of which job, see ``start_of``; None outside of a job.
        """
        with contextlib.suppress(UserError):  # a damaged one is replaced
            before = self.read_failure()
            if start is not None and before is not None and before.get("start") == start:
                return
        write_json(self.failure_path, {"kind": kind, "step": step, "error": error, "start": start})

    def clear_failure(self) -> None:
        """A new start: what became of the last one does not count any more."""
        self.failure_path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back (tuples are lists, paths are text), so that stored and new values compare equal."""
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
    place: str = "the run folder",
) -> list[Change]:
    """The forced changes of result keys between two resolved recipes (value by dotted key); run keys may differ freely.

    Raises:
        UserError: result keys differ that are not in ``force``; each is listed with its old and new value.
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
            f"{place} belongs to a run with other values of keys that change its numbers:\n{listed}\n"
            f"Give the old values to continue it, another run.dir to start a new run, or resume.force=[{keys}] to continue it "
            "all the same (this is recorded)."
        )
    return changes


# The names in a folder of checkpoints: known to the module that writes them, and to what must answer without torch.

LATEST, BEST = "latest", "best"
STATE_FILE = "checkpoint.json"
# Step, and number of the save.
FOLDER_NAME = re.compile(r"step-(\d+)-(\d+)")


def read_newest_state(checkpoints_dir: Path) -> dict[str, Any] | None:
    """The plain values of the newest checkpoint that can be read, its files not checked; None where there is none."""
    names = [match for path in checkpoints_dir.glob("step-*") if (match := FOLDER_NAME.fullmatch(path.name))]
    for match in sorted(names, key=lambda match: int(match[2]), reverse=True):
        try:
            state: dict[str, Any] = json.loads((checkpoints_dir / match[0] / STATE_FILE).read_bytes())["content"]["state"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(state, dict) and isinstance(state.get("data"), dict):
            return state
    return None
