"""The runs in a folder, each with a label of the settings in which it differs from its neighbours."""

from collections.abc import Mapping
from pathlib import Path

from galaxydist.atomic_files import read_json
from galaxydist.errors import UserError
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_file import read_tail_records

JOBS_FILE, TRIAL_FILE = "jobs.jsonl", "trial.json"
# Default of ``run.root``.
DEFAULT_ROOT = "runs"
_DEPTH = 2
_BARE_KEYS = ("recipe", "model.name", "data.variant")
_NAMING_KEYS = ("model.name", "data.dataset", "data.variant", "seed")


def is_run(folder: Path) -> bool:
    """Return True if a run was submitted or started in this folder."""
    return any((folder / name).exists() for name in ("recipe.json", JOBS_FILE, "lock.json"))


def find_runs(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Find run folders at or below a folder, by default two levels deep, without following links."""
    try:
        if is_run(folder):
            return [folder]
        if depth == 0:
            return []
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # it may not be read, or was just removed
        return []
    return [run for path in inner if not path.name.startswith(".") for run in find_runs(path, depth - 1)]


def read_settings(run: Path) -> dict[str, str]:
    """Return settings of a run by dotted key: of its newest submission, its values as a trial, and model, data and seed."""
    from galaxydist.recipe.scalars import to_text

    try:
        recipe = RunFolder(run).read_recipe().recipe if RunFolder(run).is_started else {}
        trial = read_json(run / TRIAL_FILE) if (run / TRIAL_FILE).exists() else {}
        jobs = read_tail_records(run / JOBS_FILE)
    except (UserError, OSError):
        recipe, trial, jobs = {}, {}, []
    found = {key: to_text(recipe[key]) for key in _NAMING_KEYS if recipe.get(key) is not None}
    for argument in jobs[-1].get("arguments", ()) if jobs else ():
        key, _, value = argument.partition("=")
        if not key.startswith(("run.", "tracker.")):
            found[key] = value
    for key, value in (trial.get("values") or {}).items():
        found[key] = f"{value:.4g}" if isinstance(value, float) else to_text(value)
    if "recipe" in found:  # it includes the model
        found["recipe"] = Path(found["recipe"]).stem
        found.pop("model.name", None)
    return found


def label_runs(settings: Mapping[Path, Mapping[str, str]]) -> dict[Path, str]:
    """Return a label of each run with the settings that differ within its folder."""
    labels: dict[Path, str] = {}
    for folder in {run.parent for run in settings}:
        siblings = {run: own for run, own in settings.items() if run.parent == folder}
        keys = dict.fromkeys(key for own in siblings.values() for key in own)
        differing = [key for key in keys if len({own.get(key) for own in siblings.values()}) > 1]
        for run, own in siblings.items():
            labels[run] = " ".join(
                own[key] if key in _BARE_KEYS else f"{key.rpartition('.')[2]}={own[key]}" for key in differing if key in own
            )
    return labels


def group_of(run: Path) -> str | None:
    """Return the name of the folder that a run shares with others, such as its sweep's.

    Returns:
        None for a single run, and for a run of ``runs``, the default folder of runs that have nothing to do with each other.
    """
    parent = run.absolute().parent
    return parent.name if parent.name != DEFAULT_ROOT and len(find_runs(parent, 1)) > 1 else None


def label_of(run: Path) -> str:
    """Return the settings in which a run differs from the others in its folder; empty if they tell it from none of them."""
    run = run.absolute()
    labels = label_runs({path: read_settings(path) for path in find_runs(run.parent, 1)})
    own = labels.get(run, "")
    return own if list(labels.values()).count(own) == 1 else ""
