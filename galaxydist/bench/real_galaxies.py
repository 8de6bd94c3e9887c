"""``galaxydist bench folds``: networks on real galaxies at equal compute, or one recipe (``--recipe``), cross-validated."""

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils import ModelEmaV3

from galaxydist.atomic_files import read_json, write_json
from galaxydist.bench.common import show
from galaxydist.bench.in_memory import plain_step
from galaxydist.bench.simulator import TUNING_ROWS
from galaxydist.cpus import available_cores
from galaxydist.distributed import open_world
from galaxydist.errors import UserError
from galaxydist.evaluation.inference import evaluate_split
from galaxydist.evaluation.predictions import predictions_path, read_predictions
from galaxydist.evaluation.results_files import read_evaluation, stem_of
from galaxydist.loading.loader import DecodeOptions, TrainLoader
from galaxydist.loading.training_data import TrainingData, build_augment
from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.registry import recipe_of
from galaxydist.recipe.identity import run_name
from galaxydist.recipe.model_names import NAMED_MODELS
from galaxydist.recipe.resolve import ResolvedRecipe, load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.folder_scan import fold_name
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.training.optimizer import build_optimizer
from galaxydist.training.trainer import train

# Untimed first steps of each model: they allocate memory and decode ahead.
WARM_UP = 2


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step of one model.

    Args:
        seconds: median of the steps. On a CPU it is CPU time over all threads, so other work on the machine does not count.
        num_parameters: of the model.
    """

    seconds: float
    num_parameters: int


def measure_costs(recipes: Mapping[str, Recipe], manifest: Manifest, *, rounds: int = 8, steps: int = 2) -> dict[str, StepCost]:
    """Train each recipe for ``rounds`` times ``steps`` steps, in turn, so that a slower machine affects all alike.

    A step contains all parts of training: decode, augment, forward, backward, clip, optimizer, moving average.

    Raises:
        UserError: a recipe whose model cannot be built.
    """
    torch.set_num_threads(available_cores())
    with ExitStack() as stack:
        trainings = {name: _PlainTraining(recipe, manifest, stack) for name, recipe in recipes.items()}
        for number in range(rounds + 1):
            for training in trainings.values():
                for _ in range(steps if number else WARM_UP):
                    training.step()
    return {
        name: StepCost(median(one.seconds[WARM_UP:]), sum(parameter.numel() for parameter in one.model.parameters()))
        for name, one in trainings.items()
    }


class _PlainTraining:
    """Training of one model from random weights in plain PyTorch."""

    def __init__(self, recipe: Recipe, manifest: Manifest, stack: ExitStack) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe = recipe
        data, train = recipe.data, recipe.train
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model, manifest.num_classes, data.image_size).to(self.device)
        groups = [dict(group) for group in parameter_groups(self.model, recipe.optim.weight_decay)]
        self.optimizer = build_optimizer(groups, recipe.optim, self.device)
        self.ema = ModelEmaV3(self.model, decay=train.ema) if train.ema > 0 else None
        self.augment = build_augment(recipe, TrainingData.of(manifest, recipe, self.model), threads=available_cores())
        loader = TrainLoader(
            manifest,
            seed=recipe.seed,
            batch_size=train.batch_size,
            num_streams=data.num_streams,
            balance=data.balance,
            decode=DecodeOptions(data.image_size, data.crop, data.augment.zoom),
            draw=self.augment.draw,
        )
        self.batches = iter(stack.enter_context(loader))
        self.seconds: list[float] = []

    def step(self) -> None:
        start = self._clock()
        batch = next(self.batches)
        images_BCHW = self.augment(batch.images_BHWC.to(self.device), batch.draws.to(self.device))
        plain_step(
            self.model,
            self.optimizer,
            images_BCHW,
            batch.labels_B.to(self.device),
            label_smoothing=self.recipe.train.label_smoothing,
            clip_norm=self.recipe.train.clip_norm,
            bf16=self.device.type == "cuda",
        )
        if self.ema is not None:
            self.ema.update(self.model)
        self.seconds.append(self._clock() - start)

    def _clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


MODELS = ("d4_cnn", "custom_cnn", "resnet18")

# Equal for all: the central three quarters of the 256 pixels at 80 pixels; rotation, flips and zoom as in Dieleman et al. 2015
# (arXiv:1503.07077); small batches, since a fold is small; the last averaged weights are evaluated, so that nothing is chosen.
COMMON = {
    "data.image_size": "80",
    "data.crop": "0.75",
    "data.augment.rotate": "any",
    "data.augment.flip": "true",
    "data.augment.zoom": "1.2",
    "optim.name": "adamw",
    "optim.weight_decay": "0.05",
    "optim.warmup": "0.1",
    "train.batch_size": "32",
    "train.label_smoothing": "0.1",
    "train.ema": "0.995",
    "train.micro_batch": "0",
    "eval.checkpoint": "last",
    "eval.figures": "false",
    "tracker.name": "none",
}
# d4_cnn: best of 4e-3, 8e-3 and 2e-2 on three quarters of fold 1's training galaxies, evaluated on the rest (64 pixels, 12
# epochs). custom_cnn: as in the README's runs from random weights. resnet18: the first one tried.
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "d4_cnn": {"model.drop_rate": "0.2", "optim.lr": "8e-3"},
    "custom_cnn": {"model.drop_rate": "0.2", "optim.lr": "8e-3"},
    "resnet18": {"model.drop_rate": "0.2", "optim.lr": "2e-3"},
}
# Keys that the comparison itself sets.
FIXED = ("recipe", "data.manifest", "model.name", "train.epochs", "eval.checkpoint", "run.dir", "run.root")
SAVES = 8  # checkpoints of a fit


def measure_folds(
    real_dir: Path,
    work_dir: Path,
    environ: MutableMapping[str, str],
    *,
    minutes: float = 10.0,
    num_folds: int = 3,
    models: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train every model on every fold for the same processor time, test it on the rest; print a table and a JSON line.

    First a training step of each model is measured, in turn. It gives the number of whole epochs nearest to ``minutes``, which is
    stored. Nothing is chosen on a test fold: the epochs are fixed, and the last averaged weights are evaluated. A second call
    continues where the first one stopped.

    Args:
        real_dir: ``<class>/<image>``, without split folders.
        work_dir: folder for shards, costs and runs.
        environ: environment of the process.
        minutes: of a fit: CPU time on a CPU, wall-clock time on a GPU.
        num_folds: number of stratified folds; each is the test set once.
        models: architectures that have a recipe, each compared with the first one; None: ``MODELS``.
        overrides: further ``key=value`` for the recipes of all models.

    Returns:
        The content of the JSON line.

    Raises:
        UserError: no images, or a model or setting that cannot be used, before anything is trained; stopped by a signal.
    """
    extra = read_overrides(overrides)
    models = MODELS if models is None else models
    for model in models:
        if model not in NAMED_MODELS or list(models).count(model) > 1:
            raise UserError(f"--models: {model!r} is given twice, or is none of {', '.join(NAMED_MODELS)}")
        load_recipe(_arguments(model, extra))
    manifests = write_folds(real_dir, work_dir, num_folds)
    first_fold = {model: _recipe(model, extra, manifests[0], work_dir) for model in models}
    costs = _costs(first_fold.values(), manifests[0], work_dir / "costs.json")
    # Every fold is trained equally long: the folds differ by a galaxy or two.
    epochs = {model: _epochs(costs[model], minutes, first_fold[model].recipe, manifests[0]) for model in models}
    results: dict[str, list[Mapping[str, Any]]] = {model: [] for model in models}
    fits = list(itertools.product(range(num_folds), models))
    for number, (fold, model) in enumerate(fits, start=1):
        title = f"fit {number} of {len(fits)}: {model}, fold {fold + 1} of {num_folds}, {epochs[model]} epochs"
        show(f"\n{title}")
        results[model].append(fit(_recipe(model, extra, manifests[fold], work_dir, epochs[model]), environ))
        show(f"{title}: accuracy {results[model][-1]['accuracy']:.4f}")
    found = {model: _summary(runs, epochs[model], costs[model], results[models[0]]) for model, runs in results.items()}
    show_folds(found, minutes, manifests[0].num_classes)
    task = {"task": "folds", "num_folds": num_folds, "minutes": minutes, "overrides": extra, "models": found}
    show(json.dumps(task))
    return task


def read_overrides(overrides: Sequence[str], fixed: Sequence[str] = FIXED) -> dict[str, str]:
    """Return ``key=value`` texts as a dictionary; a key in ``fixed``, which the comparison sets, is refused (UserError)."""
    extra: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key in extra:
            raise UserError(f"{text!r} is no key=value, or its key is given twice")
        if key in fixed:
            raise UserError(f"{text}: the comparison itself sets {key}; leave it out")
        extra[key] = value
    return extra


def write_folds(real_dir: Path, work_dir: Path, num_folds: int, classes: str | None = None) -> list[Manifest]:
    """Write the shards of each fold to a folder named after the images' hash, unless they exist.

    Args:
        real_dir: ``<class>/<image>``, without split folders.
        work_dir: folder for the shards.
        num_folds: number of stratified folds.
        classes: ``galaxy10``: the folders are Galaxy10's classes.
    """
    manifests = []
    for fold in range(num_folds):
        survey = open_image_folder(real_dir, fold=(fold, num_folds), classes=classes)
        survey = dataclasses.replace(survey, name=fold_name(survey.name, fold, num_folds))
        manifests.append(write_shards(survey, work_dir / f"shards-{survey.source_hash[:8]}"))
    return manifests


def _recipe(model: str, extra: Mapping[str, str], manifest: Manifest, work_dir: Path, epochs: int = 1) -> ResolvedRecipe:
    own = {
        "data.manifest": str(manifest.path),
        "run.root": str(work_dir / "runs"),
        "train.epochs": str(epochs),
        "train.save_every": str(max(1, epochs // SAVES)),
    }
    return load_recipe(_arguments(model, {**own, **extra}))


def _arguments(model: str, further: Mapping[str, str]) -> list[str]:
    values = {"recipe": recipe_of(model), **COMMON, **SETTINGS.get(model, {}), **further}
    return [f"{key}={value}" for key, value in values.items()]


def _costs(recipes: Iterable[ResolvedRecipe], manifest: Manifest, path: Path) -> dict[str, StepCost]:
    """Return the cost by model, measured now or by an earlier call with the same settings."""
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    by_run = {run_name(resolved.recipe): resolved.recipe for resolved in recipes}
    if missing := {name: recipe for name, recipe in by_run.items() if name not in known}:
        show(f"measuring a training step of {', '.join(recipe.model.name for recipe in missing.values())}")
        known |= {name: dataclasses.asdict(cost) for name, cost in measure_costs(missing, manifest).items()}
        write_json(path, known)
    return {recipe.model.name: StepCost(**known[name]) for name, recipe in by_run.items()}


def _epochs(cost: StepCost, minutes: float, recipe: Recipe, manifest: Manifest) -> int:
    steps = manifest.splits["train"].num_samples // recipe.train.batch_size
    return max(1, round(60 * minutes / (cost.seconds * max(1, steps))))


def fit(resolved: ResolvedRecipe, environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Train or continue a run, unless it is finished; return its evaluation with the CPU minutes of all calls.

    Raises:
        UserError: stopped by a signal, or a recipe that cannot be used.
    """
    folder, tta = RunFolder(resolved.recipe.run.root / run_name(resolved.recipe)), resolved.recipe.eval.tta
    spent_path = folder.path / "processor-time.json"
    if folder.read_result() is None or read_evaluation(folder.evaluation_dir, "test", tta) is None:
        start = time.process_time()
        try:
            stopped = train(resolved, environ)
        finally:
            if folder.path.is_dir():
                write_json(spent_path, {"seconds": _spent(spent_path) + time.process_time() - start})
        if stopped:
            raise UserError(f"stopped; the same command continues with {folder}")
    evaluation = read_evaluation(folder.evaluation_dir, "test", tta)
    assert evaluation is not None
    return evaluation | {"processor_minutes": _spent(spent_path) / 60}


def _spent(path: Path) -> float:
    """Return the CPU seconds of earlier calls; a call that was killed did not write its own."""
    return float(read_json(path)["seconds"]) if path.is_file() else 0.0


def _summary(
    runs: Sequence[Mapping[str, Any]], epochs: int, cost: StepCost, first: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "num_parameters": cost.num_parameters,
        "seconds_per_step": cost.seconds,
        "epochs": epochs,
        "processor_minutes": [round(run["processor_minutes"], 2) for run in runs],
        "accuracy": mean_and_error([run["accuracy"] for run in runs]),
        "balanced_accuracy": mean_and_error([run["balanced_accuracy"] for run in runs]),
        "behind_the_first": mean_and_error([best["accuracy"] - own["accuracy"] for best, own in zip(first, runs, strict=True)]),
    }


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over the folds and its standard error (their deviation over the root of their number)."""
    return {"mean": fmean(values), "standard_error": stdev(values) / len(values) ** 0.5, "folds": list(values)}


def show_folds(found: Mapping[str, Mapping[str, Any]], minutes: float, num_classes: int) -> None:
    """Print the table: a row per model, in the order of the call."""
    show(f"\naccuracy on the test folds, {num_classes} classes, {minutes:g} CPU minutes a fit; mean and standard error")
    show(f"  {'':<12} {'accuracy, %':<32} {'behind the first':<18} {'weights':>9} {'epochs':>7} {'minutes':>8}")
    for model, row in found.items():
        accuracy = f"{_percent(row['accuracy'])} ({', '.join(f'{100 * value:.1f}' for value in row['accuracy']['folds'])})"
        behind = _percent(row["behind_the_first"]) if model != next(iter(found)) else ""
        weights, spent = f"{row['num_parameters'] / 1e6:.2f} M", fmean(row["processor_minutes"])
        show(f"  {model:<12} {accuracy:<32} {behind:<18} {weights:>9} {row['epochs']:>7} {spent:>8.2f}")


def _percent(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} +- {100 * value['standard_error']:.1f}"


RECIPE_FIXED = ("recipe", "data.manifest", "eval.checkpoint", "run.dir", "run.root", "tracker.name")


def measure_recipe(
    recipe: str,
    real_dir: Path,
    work_dir: Path,
    environ: MutableMapping[str, str],
    *,
    num_folds: int = 3,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a recipe on every fold of a folder of real galaxies and test it on the rest; print a table and a JSON line.

    Nothing is chosen on a test fold: the recipe's epochs are fixed, and its last weights are evaluated. Images are in folders
    named 0 to 9 or after Galaxy10's classes. A second call continues where the first one stopped.

    Args:
        recipe: name or path.
        real_dir: ``<class>/<image>``, without split folders.
        work_dir: folder for shards and runs.
        environ: environment of the process.
        num_folds: number of stratified folds; each is the test set once.
        overrides: further ``key=value`` of the recipe.

    Returns:
        The content of the JSON line. ``held_out`` is the accuracy on the galaxies after the first rows of each class, with which
        the simulator was made; None if the files are not named after rows. ``start`` is the accuracy of the weights that the
        recipe starts from; None for random weights.

    Raises:
        UserError: no images, or a recipe or setting that cannot be used, before anything is trained; stopped by a signal.
    """
    extra = read_overrides(overrides, RECIPE_FIXED)
    own = {"recipe": recipe, "run.root": str(work_dir / "runs"), "eval.checkpoint": "last", "tracker.name": "none"}
    arguments = [f"{key}={value}" for key, value in {**own, "eval.figures": "false", **extra}.items()]
    load_recipe(arguments)
    manifests = write_folds(real_dir, work_dir, num_folds, classes="galaxy10")
    found: dict[str, list[Any]] = {"accuracy": [], "balanced_accuracy": [], "held_out": [], "start": [], "processor_minutes": []}
    for fold, manifest in enumerate(manifests, start=1):
        resolved = load_recipe([*arguments, f"data.manifest={manifest.path}"])
        found["start"].append(_start_accuracy(resolved.recipe, manifest, environ))
        size, epochs = manifest.splits["train"].num_samples, resolved.recipe.train.epochs
        show(f"\nfold {fold} of {num_folds}: {size} galaxies, {epochs} epochs")
        evaluation = fit(resolved, environ)
        for key in ("accuracy", "balanced_accuracy", "processor_minutes"):
            found[key].append(evaluation[key])
        found["held_out"].append(_held_out_accuracy(resolved.recipe, real_dir))
    known = {key: mean_and_error(values) if None not in values else None for key, values in found.items()}
    show(f"\n{recipe} {' '.join(overrides)}: mean over {num_folds} folds and standard error")
    titles = {
        "accuracy": "accuracy on the test fold",
        "held_out": f"the same without the first {TUNING_ROWS} rows of each class",
        "start": "accuracy of the starting weights",
    }
    for key, title in titles.items():
        if (row := known[key]) is not None:
            values = ", ".join(f"{100 * value:.1f}" for value in row["folds"])
            show(f"  {title:<48} {100 * row['mean']:.1f} +- {100 * row['standard_error']:.1f} % ({values})")
    show(f"  {'CPU minutes of a fold':<48} {fmean(found['processor_minutes']):.1f}")
    result = {"task": "folds", "recipe": recipe, "overrides": extra, "num_folds": num_folds, **known}
    show(json.dumps(result))
    return result


def _start_accuracy(recipe: Recipe, manifest: Manifest, environ: MutableMapping[str, str]) -> float | None:
    """Return the test accuracy before the first step; None if the head starts from random weights."""
    if recipe.model.weights is None and not recipe.model.pretrained:
        return None
    with open_world(recipe.train.precision, environ) as world:
        model = build_model(recipe.model, manifest.num_classes, recipe.data.image_size).to(world.device)
        augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=available_cores())
        return float(evaluate_split(world, model, manifest, "test", augment=augment, recipe=recipe)["accuracy"])


def _held_out_accuracy(recipe: Recipe, real_dir: Path) -> float | None:
    """Return the accuracy of a run's test predictions without the first ``TUNING_ROWS`` rows of each class folder."""
    rows = {folder.name: sorted(int(path.stem) for path in folder.iterdir()) for folder in _row_folders(real_dir)}
    tuning = {row for folder in rows.values() for row in folder[:TUNING_ROWS]}
    path = predictions_path(RunFolder(recipe.run.root / run_name(recipe)).evaluation_dir, stem_of("test", recipe.eval.tta))
    is_correct: list[NDArray[np.bool_]] = []
    for columns in read_predictions(path).batches(("id", "label", "predicted")):
        if not all(str(name).isdecimal() for name in columns["id"]):
            return None
        is_held_out = np.array([int(name) not in tuning for name in columns["id"]])
        is_correct.append((columns["label"] == columns["predicted"])[is_held_out])
    correct = np.concatenate(is_correct)
    return float(correct.mean()) if rows and len(correct) else None


def _row_folders(real_dir: Path) -> list[Path]:
    folders = [folder for folder in sorted(real_dir.iterdir()) if folder.is_dir()]
    return [folder for folder in folders if all(re.fullmatch(r"\d+", path.stem) for path in folder.iterdir())]
