"""From a sweep's file to its trials: which runs there are, each resolved and checked, and where each lies."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from galaxydist.cluster.sweep_file import DECIDED, SweepError, SweepFile
from galaxydist.errors import UserError
from galaxydist.recipe.identity import flatten, run_name
from galaxydist.recipe.resolve import COMMAND_LINE, RecipeError, ResolvedRecipe, Setting, load_recipe
from galaxydist.recipe.yaml12 import to_text


@dataclass(frozen=True)
class Cell:
    """One point of a sweep, before its recipe is resolved.

    Attributes:
        label: the keys that tell it from the others, ``recipe=vit seed=1``.
        settings: key -> value, of all keys that the sweep's file sets.
    """

    label: str
    settings: dict[str, Setting]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        label: of its cell.
        name: of its folder: the same file gives the same name, on any day and machine.
        run_dir: its folder.
        resolved: its recipe.
        arguments: what launch.py would be given for it, with ``run.dir``.
    """

    label: str
    name: str
    run_dir: Path
    resolved: ResolvedRecipe
    arguments: tuple[str, ...]


def expand(sweep: SweepFile, overridden: Sequence[str] = ()) -> list[Cell]:
    """All points of a sweep in the file's order: for each entry of the list (once, where there is none) each point of the grid.

    Args:
        sweep: the file.
        overridden: keys that the command line sets: they take the place of the file's, of a whole axis too.
    """
    axes = [[(key, value) for value in values] for key, values in sweep.axes.items() if key not in overridden]
    cells = []
    for entry in sweep.entries or ({},):
        for point in itertools.product(*axes):
            varied = {key: value for key, value in (*entry.items(), *point) if key not in overridden}
            common = {key: value for key, value in sweep.common.items() if key not in overridden}
            label = " ".join(f"{key}={to_text(setting.value)}" for key, setting in varied.items())
            cells.append(Cell(label, common | varied))
    return cells


def resolve(
    sweep: SweepFile,
    arguments: Sequence[str] = (),
    *,
    check: Callable[[ResolvedRecipe], object] = lambda _: None,
    folders: Sequence[Path] | None = None,
) -> list[Trial]:
    """The runs of a sweep, all of them checked.

    Args:
        sweep: the file.
        arguments: ``key=value`` of the command line, for all runs; ``run.root=DIR`` takes the place of the sweep's root.
        check: what else must hold for a recipe; raises UserError.
        folders: where recipes are looked up (see ``load_recipe``).

    Raises:
        SweepError: with all problems of all trials, each once; says which trials have it.
    """
    problems = _Problems(sweep)
    root, kept = sweep.root, []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key == "run.root" and text:
            root = Path(text).expanduser()
        elif key in DECIDED and key != "run.root":
            problems.add("", (COMMAND_LINE, f"{argument}: {DECIDED[key]}"))
        else:
            kept.append(argument)
    cells = expand(sweep, [argument.partition("=")[0] for argument in kept])
    problems.num_cells = len(cells)
    trials = []
    for cell in cells:
        try:
            trial = _resolve_cell(cell, kept, root.absolute(), folders)
            trials.append(trial)
            check(trial.resolved)
        except RecipeError as error:
            problems.add(cell.label, *error.problems)
        except UserError as error:
            problems.add(cell.label, ("", str(error)))
    for problem in (*_same_runs(trials), *_same_names(trials)):
        problems.add("", ("", problem))
    problems.raise_if_any()
    return trials


def _resolve_cell(cell: Cell, arguments: Sequence[str], root: Path, folders: Sequence[Path] | None) -> Trial:
    if "recipe" not in cell.settings and not any(argument.startswith("recipe=") for argument in arguments):
        raise RecipeError([("", "recipe is missing: write it under set, grid or list, or give recipe=NAME")])
    resolved = load_recipe(arguments, folders=folders, settings=cell.settings)
    run_dir = root / run_name(resolved.recipe)
    placed = resolved.recipe.model_copy(update={"run": resolved.recipe.run.model_copy(update={"dir": run_dir})})
    # The job reads its recipe from text again.
    given = {argument.partition("=")[0] for argument in arguments}
    typed = [f"{key}={to_text(setting.value)}" for key, setting in cell.settings.items() if key not in given]
    texts = (*typed, *arguments, f"run.dir={run_dir}")
    again = load_recipe(texts, folders=folders).recipe
    if again != placed:
        values, meant = flatten(again), flatten(placed)
        key = next(key for key in meant if values[key] != meant[key])
        raise RecipeError([(resolved.origins[key], f"{key}={to_text(meant[key])}: cannot be written on a command line")])
    return Trial(cell.label, run_dir.name, run_dir, replace(resolved, recipe=placed), texts)


def _same_runs(trials: Sequence[Trial]) -> Iterator[str]:
    """Trials that would share a run folder."""
    by_name: dict[str, list[Trial]] = {}
    for trial in trials:
        by_name.setdefault(trial.name, []).append(trial)
    for name, same in by_name.items():
        if len(same) > 1:
            flat = [flatten(trial.resolved.recipe) for trial in same]
            keys = [key for key in flat[0] if any(values[key] != flat[0][key] for values in flat)]
            why = f"they differ in {', '.join(keys)}, which does not change a run's numbers: keep one" if keys else "keep one"
            labels = " | ".join(trial.label or "(an empty entry)" for trial in same)
            yield f"{len(same)} trials are the same run {name}: {labels}; {why}"


def _same_names(trials: Sequence[Trial]) -> Iterator[str]:
    """Recipes of one name from several files: a submission keeps a copy of each under its name."""
    paths: dict[str, Path] = {}
    for trial in trials:
        name, path = trial.resolved.recipe.name, trial.resolved.path
        if paths.setdefault(name, path) != path:
            yield f"two recipes have the name {name}: {paths[name]} and {path}; rename one"


class _Problems:
    """What is wrong, each once, with the trials that have it."""

    def __init__(self, sweep: SweepFile) -> None:
        self.sweep = sweep
        self.num_cells = 0
        self._labels: dict[tuple[str, str], list[str]] = {}

    def add(self, label: str, *problems: tuple[str, str]) -> None:
        """Notes problems of a trial; label "": of the sweep as a whole."""
        for problem in problems:
            self._labels.setdefault(problem, []).append(label)

    def raise_if_any(self) -> None:
        if self._labels:
            raise SweepError(
                self.sweep.path, [(origin, f"{text}{self._where(labels)}") for (origin, text), labels in self._labels.items()]
            )

    def _where(self, labels: Sequence[str]) -> str:
        if not any(labels) or self.num_cells == 1:
            return ""
        if len(labels) == self.num_cells:
            return f" (all {self.num_cells} trials)"
        if len(labels) == 1:
            return f" ({labels[0]})"
        return f" ({len(labels)} of {self.num_cells} trials, the first: {labels[0]})"
