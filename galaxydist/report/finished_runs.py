"""Finished runs, read from their folders: recipe.json, result.json, metrics.jsonl and evaluations.

A run or evaluation that cannot be used becomes a note; the other runs are still read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from galaxydist.errors import UserError
from galaxydist.evaluation.predictions import predictions_path
from galaxydist.evaluation.results_files import read_evaluation, stem_of
from galaxydist.galaxy import VARIANTS, Variant
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.identity import later_defaults
from galaxydist.report.published_results import TrainTest
from galaxydist.runs.folder import RunFolder, StoredRecipe

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class ValidationScore:
    """Value at the chosen checkpoint of the validation metric that selected it; smaller is better for ``loss``."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True)
class WithoutValidation:
    """Results on the test galaxies outside the run's validation split: count, accuracy, mean cross-entropy in nats.

    Accuracy and loss are None if there is no such galaxy.
    """

    count: int
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class Score:
    """Metric of an evaluation and its 95 % interval; each is None where it was not computed."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class SplitResult:
    """One evaluation on a test set.

    Args:
        dataset, variant, manifest_hash: identify the test set.
        loss: mean cross-entropy in nats; None where it was not finite.
        confusion: K x K counts; row: true class, column: predicted class.
        predictions_path: file of the predictions for each galaxy; None where they were not kept.
        without_validation: results without the galaxies of the run's validation split; None where the test set holds none.
        scores: by their key in the evaluation's file.
    """

    dataset: str
    variant: Variant
    manifest_hash: str
    loss: float | None
    confusion: tuple[tuple[int, ...], ...]
    predictions_path: Path | None
    without_validation: WithoutValidation | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def support(self) -> tuple[int, ...]:
        """Number of galaxies of each true class."""
        return tuple(sum(row) for row in self.confusion)

    @property
    def count(self) -> int:
        return sum(self.support)

    @property
    def correct(self) -> int:
        return sum(row[label] for label, row in enumerate(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def recall(self) -> tuple[float | None, ...]:
        """Share of each class that is classified correctly; None for a class without galaxies."""
        return tuple(row[label] / sum(row) if sum(row) else None for label, row in enumerate(self.confusion))


@dataclass(frozen=True)
class FinishedRun:
    """One finished run.

    Args:
        run_dir: its folder.
        recipe: the recipe's name.
        regime: ``reference`` for a recipe that follows the published work, else ``own``.
        model: ``model.name``.
        dataset: name of the training data set.
        variant: of the training data set.
        class_names: by label.
        seed: ``seed``.
        settings: hash of 8 hex digits, equal for runs that differ only in seed and variant.
        validation: metric that selected its checkpoint; None where it is not known.
        results: of its evaluations, by the variant of the test set.
    """

    run_dir: Path
    recipe: str
    regime: str
    model: str
    dataset: str
    variant: Variant
    class_names: tuple[str, ...]
    seed: int
    settings: str
    validation: ValidationScore | None
    results: Mapping[Variant, SplitResult]

    @property
    def name(self) -> str:
        return self.run_dir.name or str(self.run_dir)

    def result_in(self, setting: TrainTest) -> SplitResult | None:
        """Return the result of its evaluation in a setting; None if it has none."""
        return self.results.get(setting.test) if self.variant == setting.train else None


# Recipe keys that may differ between the runs of one row of the matrix: the seed, and the training data of its columns.
FREE_KEYS = frozenset({"seed", "data.variant", "data.manifest", "name"})

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "loss")


def read_finished_runs(run_dirs: Iterable[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Return the finished runs among some folders, and notes (``FOLDER: text``) on everything that was left out.

    A run is left out if its classes differ from those of most runs on its data set, or if another run has the same settings,
    variant and seed: the two are no independent repeats.

    Args:
        run_dirs: run folders; a folder given twice is read once.
    """
    runs: list[FinishedRun] = []
    notes: list[str] = []
    for run_dir in {path.resolve(): path for path in run_dirs}.values():
        try:
            run, found = _read_run(run_dir)
        except (UserError, OSError) as error:
            notes.append(f"{run_dir}: {error}")
            continue
        notes += [f"{run_dir}: {text}" for text in found]
        runs.append(run)
    kept, left_out = _comparable(runs)
    return kept, [*notes, *left_out]


def _comparable(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """Return the runs that share the classes of most runs on their data set and repeat no other run, and notes on the others."""
    # From the rarest to the most frequent classes of a data set, so that the last ones are kept.
    counted = Counter((run.dataset, run.class_names) for run in runs).most_common()
    classes = dict(key for key, _ in reversed(counted))
    kept: dict[tuple[Any, ...], FinishedRun] = {}
    notes: list[str] = []
    for run in runs:
        key = (run.dataset, run.model, run.recipe, run.settings, run.variant, run.seed)
        if run.class_names != classes[run.dataset]:
            notes.append(
                f"{run.run_dir}: left out: its classes ({', '.join(run.class_names)}) are not those of the other runs on "
                f"{run.dataset} ({', '.join(classes[run.dataset])})."
            )
        elif key in kept:
            notes.append(
                f"{run.run_dir}: left out: {kept[key].run_dir} has the same settings, variant and seed ({run.seed}); one of them "
                "counts."
            )
        else:
            kept[key] = run
    return list(kept.values()), notes


def _read_run(run_dir: Path) -> tuple[FinishedRun, list[str]]:
    """Return a run, and notes on the parts that were left out."""
    folder = RunFolder(run_dir)
    stored = folder.read_recipe()
    recipe = dict(stored.recipe)
    if folder.is_pruned:
        raise UserError("left out: a search has pruned the run.")
    if folder.read_result() is None:
        raise UserError("left out: the run has not finished. Give the command that started it again: it continues.")
    tta = str(recipe.get("eval.tta", "none"))
    own = _read_content(folder.evaluation_dir, tta)
    if own is None:
        raise UserError(
            f"left out: it has no evaluation {stem_of('test', tta)}.json on its own test split. "
            f"Make one: galaxydist evaluate {run_dir}"
        )
    notes: list[str] = []
    if stored.forced:
        keys = sorted({change["key"] for entry in stored.forced for change in entry.get("changes", ())})
        notes.append(f"resume.force changed {', '.join(keys)} in the middle of this run.")
    try:
        results = {_variant_of(own): _split_result(folder.evaluation_dir, own, tta)}
        for other_dir in sorted(path for path in folder.evaluation_dir.iterdir() if path.is_dir()):
            notes += _read_other(other_dir, own, tta, results)
        run = FinishedRun(
            run_dir,
            recipe=str(own["recipe"]),
            regime=REFERENCE if _is_reference(stored) else "own",
            model=str(own["model"]),
            dataset=str(own["dataset"]),
            variant=_variant_of(own),
            class_names=tuple(own["classes"]),
            seed=int(recipe["seed"]),
            settings=_settings(recipe),
            validation=_read_validation(folder, str(recipe.get("train.metric", "accuracy")), int(own["step"])),
            results=MappingProxyType(results),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"left out: its files do not fit together ({error!r}). Make its evaluation again.") from error
    return run, notes


def _read_other(folder: Path, own: Mapping[str, Any], tta: str, results: dict[Variant, SplitResult]) -> list[str]:
    """Add the evaluation in another folder of the run to ``results``; return the reason if it cannot be used."""
    try:
        if (content := _read_content(folder, tta)) is None:
            return []
        variant = _variant_of(content)
        name = f"its evaluation on {content['dataset']} ({variant})"
        problem = None
        if content["dataset"] != own["dataset"]:
            problem = f"{name} is in no table: the run was trained on {own['dataset']}."
        elif tuple(content["classes"]) != tuple(own["classes"]):
            problem = f"{name} is left out: it has other classes."
        elif content["step"] != own["step"]:
            problem = f"{name} is left out: it is of step {content['step']}, that on its own data of step {own['step']}."
        elif variant in results:
            problem = f"{name} in {folder.name} is left out: the run was trained on that variant, from other shards."
        else:
            results[variant] = _split_result(folder, content, tta)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"the evaluation in {folder.name} is left out ({error})."
    return [problem] if problem else []


def _read_content(folder: Path, tta: str) -> dict[str, Any] | None:
    path = folder / f"{stem_of('test', tta)}.json"
    content = read_evaluation(folder, "test", tta)
    if content is None and path.is_file():
        raise UserError(f"{path} is damaged or of another version of galaxydist. Remove it and evaluate the run again.")
    return content


def _variant_of(content: Mapping[str, Any]) -> Variant:
    if content["variant"] not in VARIANTS:
        raise ValueError(f"there is no variant {content['variant']!r}")
    return cast(Variant, content["variant"])


def _split_result(folder: Path, content: Mapping[str, Any], tta: str) -> SplitResult:
    confusion_KK = np.asarray(content["confusion"], np.int64)
    num_classes, count = len(content["classes"]), int(content["count"])
    if confusion_KK.shape != (num_classes, num_classes) or confusion_KK.min() < 0 or confusion_KK.sum() != count or count < 1:
        raise ValueError(f"its confusion matrix does not hold {count} galaxies of {num_classes} classes")
    predictions = predictions_path(folder, stem_of("test", tta))
    others, intervals = content.get("without_validation"), content.get("intervals") or {}
    scores = {
        name: Score(content.get(name), (limits[0], limits[1]) if (limits := intervals.get(name)) else None) for name in SCORES
    }
    return SplitResult(
        dataset=str(content["dataset"]),
        variant=_variant_of(content),
        manifest_hash=str(content["manifest_hash"]),
        loss=content["loss"],
        confusion=tuple(tuple(row) for row in confusion_KK.tolist()),
        predictions_path=predictions if predictions.is_file() else None,
        without_validation=WithoutValidation(others["count"], others["accuracy"], others["loss"]) if others else None,
        scores=scores,
    )


def _settings(recipe: Mapping[str, Any]) -> str:
    """Return a hash of the recipe keys that affect results, except those in ``FREE_KEYS`` and later ones at their default."""
    ignored = FREE_KEYS | {key for key, field in RECIPE.fields.items() if field.kind == "run"}
    later = later_defaults()  # runs of earlier versions lack them
    kept = {key: value for key, value in recipe.items() if key not in ignored and (key not in later or value != later[key])}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def _is_reference(stored: StoredRecipe) -> bool:
    """Return True if the recipe's file is in a folder ``reference``, or its name begins with ``reference``."""
    files = {str(origin).rpartition(":")[0] for origin in stored.origins.values()}
    name = str(stored.recipe.get("name", ""))
    return name.startswith(REFERENCE) or any(REFERENCE in Path(file).parent.parts[-1:] for file in files if file)


def _read_validation(folder: RunFolder, metric: str, step: int) -> ValidationScore | None:
    """Return the logged validation of the evaluated checkpoint; None if the log has none."""
    try:
        values = [line.get(f"val/{metric}") for line in folder.metrics.read() if line["step"] == step]
    except UserError:
        return None  # a damaged log removes the run from the ranking, but not from the matrix
    found = next((value for value in values if isinstance(value, int | float)), None)
    return None if found is None else ValidationScore(metric, float(found), step)
