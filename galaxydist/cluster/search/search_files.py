"""Files of a search: search.json in the sweep's folder, and trial.json with a trial's values in its run folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from galaxydist.atomic_files import read_json, write_json
from galaxydist.cluster.search.search_space import Choices, Dimension, Interval, Search
from galaxydist.errors import UserError
from galaxydist.recipe.identity import later_defaults, result_fields
from galaxydist.recipe.scalars import to_text
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import plain
from galaxydist.runs.listing import TRIAL_FILE

FORMAT_VERSION = 1
RECORD_NAME = "search.json"
PREFIX = "trial-"


@dataclass(frozen=True)
class SearchRecord:
    """Settings that the trials of a search have in common, in search.json of the sweep's folder.

    Args:
        space: recipe key -> its values.
        method: ``random`` or ``tpe``.
        prune: ``median``, ``asha`` or None.
        seed: of the search.
        metric: ``train.metric``.
        base: the other keys that change the numbers.
    """

    space: Mapping[str, Dimension]
    method: str
    prune: str | None
    seed: int
    metric: Literal["accuracy", "balanced_accuracy", "loss"]
    base: Mapping[str, Any]

    @classmethod
    def of(cls, search: Search, recipe: Recipe) -> "SearchRecord":
        """Return the record of a search.

        Args:
            search: the search.
            recipe: of any trial.
        """
        base = {key: value for key, value in result_fields(recipe).items() if key not in search.space}
        return cls(search.space, search.method, search.prune, search.seed, recipe.train.metric, plain(base))

    @property
    def is_smaller_better(self) -> bool:
        return self.metric == "loss"

    @property
    def epochs(self) -> int:
        """Epochs of the longest trial."""
        searched = self.space.get("train.epochs")
        return int(self.base["train.epochs"]) if searched is None else int(max(searched.corners))

    def write(self, root: Path) -> None:
        """Write the record into the sweep's folder.

        Raises:
            UserError: the disk is full.
        """
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / RECORD_NAME, {"format": FORMAT_VERSION, **plain(asdict(self))})

    @classmethod
    def read(cls, root: Path) -> "SearchRecord | None":
        """Read the record of a sweep's folder; None if there is none.

        Raises:
            UserError: the file is damaged, or was written by another version.
        """
        path = root / RECORD_NAME
        if not path.exists():
            return None
        content = read_json(path)
        try:
            if content.pop("format") != FORMAT_VERSION:
                raise ValueError("another format")
            space = {
                key: Choices(tuple(values["values"])) if "values" in values else Interval(**values)
                for key, values in content.pop("space").items()
            }
            return cls(space=space, **content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not a search of format {FORMAT_VERSION} ({error}): it was edited, or written by another version of "
                "galaxydist. Restore it, or start a new search with another root."
            ) from error

    def changes(self, other: "SearchRecord") -> list[str]:
        """Return the names of the settings that differ between two records, as they are written in a sweep file."""
        names = [field.name for field in fields(self) if field.name not in ("space", "base", "metric")]
        found = [name for name in names if getattr(self, name) != getattr(other, name)]
        space = plain(asdict(self)["space"]), plain(asdict(other)["space"])
        base = tuple(plain(later_defaults()) | dict(record.base) for record in (self, other))
        for old, new in (space, base):
            found += [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
        return list(dict.fromkeys(found))


def trial_dir(root: Path, number: int) -> Path:
    """Return the run folder of a trial, such as ``trial-007``."""
    return root / f"{PREFIX}{number:03d}"


def trial_number(run_dir: Path) -> int:
    return int(run_dir.name.removeprefix(PREFIX))


def read_trial(run_dir: Path) -> dict[str, Any] | None:
    """Return the values of a trial by recipe key; None before it has some, and for other runs.

    Raises:
        UserError: trial.json is damaged.
    """
    path = run_dir / TRIAL_FILE
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION or not isinstance(content.get("values"), dict):
        raise UserError(
            f"{path} is not a trial of format {FORMAT_VERSION}: it was edited, or written by another version of galaxydist. "
            "Restore it, or remove the run folder: the trial then starts anew."
        )
    values: dict[str, Any] = content["values"]
    return values


def write_trial(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Write the values of a trial into its run folder.

    Raises:
        UserError: the disk is full.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / TRIAL_FILE, {"format": FORMAT_VERSION, "trial": trial_number(run_dir), "values": plain(values)})


def value_arguments(values: Mapping[str, Any]) -> list[str]:
    """Return the values as arguments ``key=value`` of launch.py."""
    return [f"{key}={to_text(value)}" for key, value in values.items()]
