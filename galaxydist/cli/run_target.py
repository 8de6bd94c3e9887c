"""What ``evaluate`` and ``gallery`` are told: a run, and the data to judge it on where that is not its own."""

from dataclasses import dataclass
from pathlib import Path

from galaxydist.cli.status import find_folder
from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS, Variant

HELP = (
    "a run folder, or its name under ./runs [data.manifest=FILE | data.variant=NAME], "
    "or the recipe=NAME [key=value] that trained it"
)
_KEYS = ("data.manifest", "data.variant")


@dataclass(frozen=True)
class RunTarget:
    """A run and its data.

    Args:
        run_dir: the run folder, which is there.
        manifest: path or URL of other data; None for the run's own, or ``variant``.
        variant: another data set of the run's survey.
    """

    run_dir: Path
    manifest: str | None = None
    variant: Variant | None = None


def read_target(words: list[str], manifest: str | None) -> RunTarget:
    """The target of a command line.

    Args:
        words: those of ``HELP``.
        manifest: the option ``--manifest``.

    Raises:
        UserError: no run, several, or keys that name no data or name it twice.
    """
    if any(word.startswith("recipe=") for word in words):
        return RunTarget(_trained_by(words), manifest)
    folders = [word for word in words if "=" not in word or Path(word).is_dir()]
    if len(folders) != 1:
        raise UserError(f"one run at a time, not {len(folders)}: {' '.join(words)}")
    keys = dict(word.split("=", 1) for word in words if word not in folders)
    if unknown := [key for key in keys if key not in _KEYS]:
        raise UserError(
            f"{unknown[0]} cannot be changed for an evaluation; with a run folder there are {', '.join(_KEYS)} (with recipe=NAME "
            "all keys: they name the run that was trained so)"
        )
    given = [*keys, *(["--manifest"] if manifest is not None else [])]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both say which data: keep one")
    named = keys.get("data.variant")
    variant = next((known for known in VARIANTS if known == named), None)
    if named is not None and variant is None:
        raise UserError(f"data.variant={named}: there are {' and '.join(VARIANTS)}")
    return RunTarget(find_folder(folders[0]), keys.get("data.manifest", manifest), variant)


def _trained_by(words: list[str]) -> Path:
    from galaxydist.recipe.identity import run_path
    from galaxydist.recipe.resolve import load_recipe

    path = run_path(load_recipe(words).recipe)
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; train it first: accelerate launch launch.py {' '.join(words)}")
    return path
