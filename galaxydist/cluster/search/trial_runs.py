"""The trials of a search as the runs of a sweep, for the command that submits them."""

import contextlib
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from galaxydist.cluster.search.search_files import RECORD_NAME, SearchRecord, read_trial, trial_dir, value_arguments
from galaxydist.cluster.search.search_space import describe_values
from galaxydist.cluster.search.search_study import SearchStudy, check_optuna
from galaxydist.cluster.search.trial import settle
from galaxydist.cluster.slurm import JobState
from galaxydist.cluster.status import read_progress
from galaxydist.cluster.sweep import SweepError, SweepFile, SweepRun
from galaxydist.errors import UserError
from galaxydist.recipe.resolve import RecipeError, ResolvedRecipe, load_recipe
from galaxydist.runs.folder import RunFolder


@dataclass(frozen=True)
class PlannedSearch:
    """The search of a sweep, with its checked trials.

    Args:
        root: the sweep's folder.
        record: of search.json.
        common: the arguments of launch.py of all trials, without ``run.dir``.
        runs: the trials.
    """

    root: Path
    record: SearchRecord
    common: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    def open_study(self) -> SearchStudy:
        """Write search.json, and open the study."""
        self.record.write(self.root)
        return SearchStudy(self.root, self.record)

    def settle(self, read_states: Callable[[Sequence[str]], Mapping[str, JobState]]) -> None:
        """Tell the study the ends of trials that could not do it themselves.

        Raises:
            UserError: the journal is damaged.
        """
        if (self.root / RECORD_NAME).exists():
            settle(self.open_study(), self.root, read_states)

    def values(self) -> tuple[str, list[str]]:
        """Return the name of the metric, and its best value of each trial as text, empty without one."""
        found = [read_progress(RunFolder(run.run_dir)).best for run in self.runs]
        return f"val {self.record.metric}", ["" if value is None else f"{value:.4f}" for value in found]

    def describe_best(self) -> str:
        """Return lines with the best complete trial and the command that trains it again."""
        best = self.open_study().best() if (self.root / RECORD_NAME).exists() else None
        if best is None:
            return "best trial  none is complete yet"
        number, value, values = best
        command = shlex.join(["galaxydist", "train", *self.common, *value_arguments(values)])
        return (
            f"best trial  {trial_dir(self.root, number).name}: {self.record.metric} {value:.4f} (val), "
            f"{describe_values(values)}\n"
            f"train it    {command}"
        )


def plan_search(
    sweep: SweepFile, corners: Sequence[SweepRun], *, check: Callable[[ResolvedRecipe], object] = lambda _: None
) -> PlannedSearch:
    """Return the trials of a search.

    Args:
        sweep: the file.
        corners: the checked recipes at the corners of its space (``sweep.resolve``).
        check: further check of the recipe of each trial that has its values; raises UserError.

    Raises:
        SweepError: the search of the folder is another one, or a trial could not continue.
        UserError: Optuna is not installed.
    """
    search, first = sweep.search, corners[0]
    assert search is not None, "a sweep with a search"
    check_optuna()
    root = first.run_dir.parent
    record = SearchRecord.of(search, first.resolved.recipe)
    stored = SearchRecord.read(root)
    if stored is not None and (changes := stored.changes(record)):
        text = (
            f"the search in {root} was started with other values of {', '.join(changes)}: give the old ones (trials and parallel "
            "may change), or start a new search with another root"
        )
        raise SweepError(sweep.path, [("", text)])
    common = tuple(argument for argument in first.arguments if argument.partition("=")[0] not in {*search.space, "run.dir"})
    problems: dict[str, list[str]] = defaultdict(list)
    runs = []
    for number in range(search.trials):
        try:
            run = _plan_trial(root, number, common, first.resolved)
            runs.append(run)
            if run.label and not _has_bad_values(run):
                check(run.resolved)
        except UserError as error:
            problems[str(error)].append(trial_dir(root, number).name)
    if problems:
        raise SweepError(sweep.path, [(", ".join(names), text) for text, names in problems.items()])
    return PlannedSearch(root, record, common, tuple(runs))


def _plan_trial(root: Path, number: int, common: Sequence[str], corner: ResolvedRecipe) -> SweepRun:
    """Return a trial, with the recipe of its values if it has valid ones, else with that of a corner."""
    run_dir = trial_dir(root, number)
    arguments = (*common, f"run.dir={run_dir}")
    values = read_trial(run_dir)
    recipe = corner.recipe.model_copy(update={"run": corner.recipe.run.model_copy(update={"dir": run_dir})})
    resolved = replace(corner, config=recipe)
    if values is not None:
        with contextlib.suppress(RecipeError):  # values between valid corners; the trial itself fails with them
            resolved = load_recipe([*arguments, *value_arguments(values)])
    label = describe_values(values) if values is not None else ""
    return SweepRun(label, run_dir.name, run_dir, resolved, arguments, is_trial=True)


def _has_bad_values(run: SweepRun) -> bool:
    """Return True if a trial has failed with its values, so that it must not keep the others from running."""
    failure = RunFolder(run.run_dir).read_failure()
    return failure is not None and failure["kind"] == "bad_input"
