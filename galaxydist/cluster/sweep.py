"""Sweep files and their expansion into runs, each with a checked recipe and a run folder.

A sweep file with all keys:

    cluster: a100                          # profile (cluster=NAME on the command line has precedence)
    root: runs/galaxy10                    # folder of the run folders (default: runs/<name of this file>)
    parallel: 8                            # most runs at a time (default: the profile's)
    set: {train.epochs: 30}                # values for all runs
    grid:                                  # all combinations; the first key varies slowest
      recipe: [resnet50, vit]
      seed: [0, 1, 2]
    list:                                  # single runs; with a grid, each entry is combined with every grid point
      - {optim.lr: 1e-4}
      - {optim.lr: 1e-3, optim.warmup: 0.1}
    evaluate: [original, balanced]         # eval.variants of all runs

In place of ``grid`` and ``list`` it may have a search (``search_space.py``), whose runs get their values when they start.

Keys are written as on the command line, ``optim.lr``, or as in a recipe, ``optim: {lr: ...}``. A value of ``list`` has precedence
over one of ``set``; the grid must not share a key with either.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from galaxydist.cluster.search.search_space import MAX_RUNS, SEARCH_KEYS, Search, SearchParser
from galaxydist.errors import UserError
from galaxydist.paths import shipped_dir
from galaxydist.recipe.identity import flatten, run_name
from galaxydist.recipe.resolve import COMMAND_LINE, Override, RecipeError, ResolvedRecipe, list_files, load_recipe
from galaxydist.recipe.scalars import to_text
from galaxydist.recipe.yaml12 import Document, read_document

SECTIONS = ("cluster", "root", "parallel", "set", "grid", "list", "evaluate", *SEARCH_KEYS)
COUNT = "a whole number of at least 1"
# Keys that a sweep sets itself -> hint for the user.
RESERVED_KEYS = {
    "run.dir": "each run's folder is named after its recipe; root: DIR sets their parent folder",
    "run.root": "write root: DIR beside set and grid",
    "cluster": "a sweep is submitted to one cluster; write cluster: NAME beside set and grid",
}


class SweepError(UserError):
    """An invalid sweep; the message lists all problems with their origins.

    Attributes:
        problems: (origin, text) of each problem.
    """

    def __init__(self, path: Path, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        lines = [f"  {origin}: {text}" if origin else f"  {text}" for origin, text in problems]
        super().__init__("\n".join([f"{count} in the sweep {path}; nothing was submitted:", *lines]))


@dataclass(frozen=True)
class SweepFile:
    """The content of a sweep file.

    Attributes:
        path: the file.
        cluster: name of the cluster profile.
        root: folder of the run folders.
        parallel: most runs at the same time; None: the profile's.
        common: key -> value for all runs.
        axes: key -> values of the grid.
        entries: key -> value for each entry of the list.
        search: in place of axes and entries; None for a sweep without one.
    """

    path: Path
    cluster: str | None
    root: Path
    parallel: int | None
    common: Mapping[str, Override]
    axes: Mapping[str, tuple[Override, ...]]
    entries: tuple[Mapping[str, Override], ...]
    search: Search | None = None


def find_sweep(name: str) -> Path:
    """Return the file of a sweep, given by path or by its name in ``slurm/sweeps`` here or in the package.

    Raises:
        UserError: the sweep does not exist; lists the available ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = list_sweeps()
    if name in known:
        return known[name]
    listed = ", ".join(map(str, known.values())) or "none found"
    raise UserError(f"there is no sweep {name}; sweeps: {listed}; or give the path of your own file")


def list_sweeps() -> dict[str, Path]:
    """Return name -> file of the sweeps in ``slurm/sweeps`` here and in the package."""
    return list_files((Path("slurm/sweeps"), shipped_dir("slurm") / "sweeps"))


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file without checking its values against the recipe schema.

    Raises:
        SweepError: lists all problems of the file with their lines.
    """
    try:
        document = read_document(path, noun="sweep", example="grid: {seed: [0, 1]}", is_dotted=True, lists=("list",))
    except OSError as error:
        raise SweepError(path, [(str(path), f"cannot be read: {error.strerror}")]) from error
    parser = _SweepParser(path, document)
    sweep = parser.parse()
    if parser.problems:
        raise SweepError(path, sorted(parser.problems, key=lambda problem: _line_of(problem[0])))
    return sweep


class _SweepParser:
    """Parses one sweep file and collects its problems."""

    def __init__(self, path: Path, document: Document) -> None:
        self.path = path
        self.document = document
        self.problems = [(self._origin(line), text) for line, text in document.problems]

    def parse(self) -> SweepFile:
        self._check_sections()
        common = self._settings(self.document, "set.")
        if "evaluate" in self.document.lines:
            common |= self._evaluate(common)
        axes = dict(self._axes())
        entries = tuple(self._settings(entry, "") for entry in self.document.entries.get("list", ()))
        if "list" in self.document.lines and not entries:
            self._add("list", "list: has no entries; write one like - {recipe: vit, seed: 1}, or remove it")
        if not {"grid", "list", "search"} & set(self.document.lines):
            self.problems.append((str(self.path), "a sweep needs grid:, list: or search:, in which its runs differ"))
        searching = SearchParser(self.document, self._origin)
        search = searching.parse()
        self.problems += searching.problems
        self._check_shared_keys(common, axes, entries)
        cluster: str | None = self._value("cluster", str, "a profile's name or file")
        root: str | None = self._value("root", str, "a folder")
        parallel: int | None = self._value("parallel", int, COUNT)
        if parallel is not None and parallel < 1:
            self._add("parallel", f"parallel={parallel}: must be {COUNT}")
        folder = Path(root).expanduser() if root else Path("runs") / self.path.stem
        return SweepFile(self.path, cluster, folder, parallel, common, axes, entries, search)

    def _origin(self, line: int) -> str:
        return f"{self.path}:{line}" if line else str(self.path)

    def _add(self, key: str, text: str) -> None:
        self.problems.append((self._origin(self.document.lines[key]), text))

    def _check_sections(self) -> None:
        for key in self.document.lines:
            section = key.partition(".")[0]
            if section not in SECTIONS:
                if "." not in key or section not in self.document.lines:
                    close = get_close_matches(section, SECTIONS, n=1)
                    hint = f"; did you mean {close[0]}?" if close else f"; write recipe keys under set, grid or list: {section}"
                    self._add(key, f"{key}: a sweep has no such key{hint} (it has {', '.join(SECTIONS)})")
            elif section not in ("set", "grid", "search") and "." in key:
                self._add(key, f"{key}: {section} has no keys")
            elif key in ("set", "grid", "search") and self.document.values.get(key) is not None:
                self._add(key, f"{key}={to_text(self.document.values[key])}: must be a mapping of keys to values")
            elif key == "list" and key in self.document.values:
                self._add(key, "list: must be a list of mappings, like - {recipe: vit, seed: 1}")

    def _settings(self, document: Document, prefix: str) -> dict[str, Override]:
        found = {}
        for written, value in document.values.items():
            if written.startswith(prefix):
                key = written.removeprefix(prefix)
                found[key] = Override(value, self._origin(document.lines[written]))
                if key in RESERVED_KEYS:
                    self.problems.append((found[key].origin, f"{key}: {RESERVED_KEYS[key]}"))
        return found

    def _axes(self) -> Iterator[tuple[str, tuple[Override, ...]]]:
        given = [key for key in self.document.values if key.startswith("grid.")]
        if "grid" in self.document.lines and not given and self.document.values.get("grid") is None:
            self._add("grid", "grid: has no keys; write one like seed: [0, 1, 2], or remove it")
        for key, setting in self._settings(self.document, "grid.").items():
            values, origin = setting.value, setting.origin
            if not isinstance(values, list):
                shown = to_text(values)
                self.problems.append((origin, f"{key}={shown}: a key of the grid has a list of values, like [{shown}]"))
            elif not values:
                self.problems.append((origin, f"{key}: has no values; give some, like [0, 1], or remove the key"))
            else:
                texts = [to_text(value) for value in values]
                repeated = next((text for number, text in enumerate(texts) if text in texts[:number]), None)
                if repeated is not None:
                    self.problems.append((origin, f"{key}: {repeated} is given twice; keep one"))
                yield key, tuple(Override(value, origin) for value in values)

    def _check_shared_keys(
        self,
        common: Mapping[str, Override],
        axes: Mapping[str, tuple[Override, ...]],
        entries: Sequence[Mapping[str, Override]],
    ) -> None:
        for key, (value, *_) in axes.items():
            for others in (common, *entries):
                if key in others:
                    text = f"{key}: is in the grid too ({value.origin}), whose values would replace this one; keep one of them"
                    self.problems.append((others[key].origin, text))

    def _evaluate(self, common: Mapping[str, Override]) -> dict[str, Override]:
        if "eval.variants" in common:
            self._add("evaluate", f"evaluate: sets eval.variants, which is set too ({common['eval.variants'].origin}); keep one")
        value = self.document.values.get("evaluate")
        if not isinstance(value, list):
            self._add("evaluate", f"evaluate={to_text(value)}: must be a list, like [original, balanced]")
        return {"eval.variants": Override(value, self._origin(self.document.lines["evaluate"]))}

    def _value(self, key: str, kind: type, description: str) -> Any:
        """Return a scalar value; None if it is missing, null or of the wrong type."""
        value = self.document.values.get(key)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool) and value != ""):
            return value
        self._add(key, f"{key}={to_text(value)}: must be {description}")
        return None


def _line_of(origin: str) -> int:
    """Return an origin's line, for sorting; 0 if it is the whole file."""
    line = origin.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


@dataclass(frozen=True)
class GridPoint:
    """One point of a sweep, before its recipe is resolved.

    Attributes:
        label: the varied keys of this point, such as ``recipe=vit seed=1``.
        settings: key -> value for all keys that the sweep file sets.
    """

    label: str
    settings: dict[str, Override]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        label: of its grid point, or the values of a search's trial; empty before it has some.
        name: of its folder; the same file gives the same name at any time and on any machine.
        run_dir: its folder.
        resolved: its recipe.
        arguments: the arguments of launch.py for this run, including ``run.dir``, without the values of a trial.
        is_trial: the run is a trial of a search, whose values are in its folder once it has started.
    """

    label: str
    name: str
    run_dir: Path
    resolved: ResolvedRecipe
    arguments: tuple[str, ...]
    is_trial: bool = False


def expand(sweep: SweepFile, overridden: Sequence[str] = ()) -> list[GridPoint]:
    """Return all points of a sweep in the file's order: each entry of the list (if any) combined with each grid point.

    For a search they are its corners.

    Args:
        sweep: the file.
        overridden: keys set on the command line; they replace the file's values, also a whole axis of the grid.

    Raises:
        UserError: too many points.
    """
    axes = [[(key, value) for value in values] for key, values in sweep.axes.items() if key not in overridden]
    entries = list(sweep.entries) or [{}]
    if sweep.search is not None:
        origins = sweep.search.origins
        entries = [{key: Override(value, origins[key]) for key, value in corner.items()} for corner in sweep.search.corners()]
    count = len(entries) * math.prod(map(len, axes))
    if count > MAX_RUNS:
        raise UserError(f"{sweep.path}: {count:,} runs are more than {MAX_RUNS:,}: give fewer values, or make it a search")
    points = []
    for entry in entries:
        for values in itertools.product(*axes):
            varied = {key: value for key, value in (*entry.items(), *values) if key not in overridden}
            common = {key: value for key, value in sweep.common.items() if key not in overridden}
            label = " ".join(f"{key}={to_text(setting.value)}" for key, setting in varied.items())
            points.append(GridPoint(label, common | varied))
    return points


def resolve(
    sweep: SweepFile,
    arguments: Sequence[str] = (),
    *,
    check: Callable[[ResolvedRecipe], object] = lambda _: None,
    folders: Sequence[Path] | None = None,
) -> list[SweepRun]:
    """Return the checked runs of a sweep; for a search one for each of its corners (``plan_search`` has its trials).

    Args:
        sweep: the file.
        arguments: ``key=value`` of the command line, for all runs; ``run.root=DIR`` replaces the sweep's root.
        check: further check of each recipe; raises UserError.
        folders: searched for recipes (see ``load_recipe``).

    Raises:
        SweepError: lists each problem once, with the runs that have it.
    """
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)  # (origin, text) -> labels of the runs that have it
    root, kept = sweep.root, []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key == "run.root" and text:
            root = Path(text).expanduser()
        elif key in RESERVED_KEYS and key != "run.root":
            problems[COMMAND_LINE, f"{argument}: {RESERVED_KEYS[key]}"].append("")
        elif sweep.search is not None and key in sweep.search.space:
            problems[COMMAND_LINE, f"{argument}: {key} is searched; leave it out here, or out of the search"].append("")
        else:
            kept.append(argument)
    points = expand(sweep, [argument.partition("=")[0] for argument in kept])
    runs = []
    for point in points:
        try:
            run = _resolve_point(point, kept, root.absolute(), folders)
            runs.append(run)
            check(run.resolved)
        except RecipeError as error:
            for problem in error.problems:
                problems[problem].append(point.label)
        except UserError as error:
            problems["", str(error)].append(point.label)
    for text in (*_same_folders(runs), *_same_recipe_names(runs)):
        problems["", text].append("")
    if problems:
        noun = "runs" if sweep.search is None else "corners"
        listed = [(origin, text + _name_runs(labels, len(points), noun)) for (origin, text), labels in problems.items()]
        raise SweepError(sweep.path, listed)
    return runs


def _name_runs(labels: Sequence[str], num_runs: int, noun: str) -> str:
    """Return the runs with a problem, for its message; empty if it is one of the whole sweep.

    Args:
        labels: of the runs that have the problem; empty texts for the whole sweep.
        num_runs: runs of the sweep, or corners of its search.
        noun: ``runs`` or ``corners``.
    """
    if not any(labels) or num_runs == 1:
        return ""
    if len(labels) == num_runs:
        return f" (all {num_runs} {noun})"
    if len(labels) == 1:
        return f" ({labels[0]})"
    return f" ({len(labels)} of {num_runs} {noun}, the first: {labels[0]})"


def _resolve_point(point: GridPoint, arguments: Sequence[str], root: Path, folders: Sequence[Path] | None) -> SweepRun:
    if "recipe" not in point.settings and not any(argument.startswith("recipe=") for argument in arguments):
        raise RecipeError([("", "recipe is missing: write it under set, grid or list, or give recipe=NAME")])
    resolved = load_recipe(arguments, folders=folders, settings=point.settings)
    run_dir = root / run_name(resolved.recipe)
    recipe = resolved.recipe.model_copy(update={"run": resolved.recipe.run.model_copy(update={"dir": run_dir})})
    # The job reads these arguments, so they must give the same recipe.
    given = {argument.partition("=")[0] for argument in arguments}
    typed = [f"{key}={to_text(setting.value)}" for key, setting in point.settings.items() if key not in given]
    texts = (*typed, *arguments, f"run.dir={run_dir}")
    again = load_recipe(texts, folders=folders).recipe
    if again != recipe:
        values, expected = flatten(again), flatten(recipe)
        key = next(key for key in expected if values[key] != expected[key])
        raise RecipeError([(resolved.origins[key], f"{key}={to_text(expected[key])}: cannot be written on a command line")])
    return SweepRun(point.label, run_dir.name, run_dir, replace(resolved, config=recipe), texts)


def _same_folders(runs: Sequence[SweepRun]) -> Iterator[str]:
    """Yield a message for each run folder that several runs would share."""
    by_name: dict[str, list[SweepRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    for name, same in by_name.items():
        if len(same) > 1:
            flat = [flatten(run.resolved.recipe) for run in same]
            keys = [key for key in flat[0] if any(values[key] != flat[0][key] for values in flat)]
            reason = f"they differ in {', '.join(keys)}, which does not change a run's numbers: keep one" if keys else "keep one"
            labels = " | ".join(run.label or "(an empty entry)" for run in same)
            yield f"{len(same)} entries are the same run {name}: {labels}; {reason}"


def _same_recipe_names(runs: Sequence[SweepRun]) -> Iterator[str]:
    """Yield a message for each recipe name with several files, because a snapshot keeps one file for each name."""
    paths: dict[str, Path] = {}
    for run in runs:
        name, path = run.resolved.recipe.name, run.resolved.path
        if paths.setdefault(name, path) != path:
            yield f"two recipes have the name {name}: {paths[name]} and {path}; rename one"
