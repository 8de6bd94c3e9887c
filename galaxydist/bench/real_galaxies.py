"""``galaxydist bench folds``: networks from random weights on real galaxies, at equal compute, cross-validated."""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from timm.utils import ModelEmaV3
from torch import nn

from galaxydist.atomic_files import read_json, write_json
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.evaluation.results_files import read_evaluation
from galaxydist.loading.dataset import TrainingData, build_augment
from galaxydist.loading.loader import DecodeOptions, TrainLoader
from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.registry import recipe_of
from galaxydist.recipe.identity import run_name
from galaxydist.recipe.resolve import ResolvedRecipe, load_recipe
from galaxydist.recipe.schema import ModelName, Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.folder_scan import fold_name
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.training.optimizer import build_optimizer
from galaxydist.training.trainer import train

# What a training step of each model costs on this machine, measured with the models in turn.

# The first steps of a model are not counted: they ask for memory, and decode ahead.
WARM_UP = 2


@dataclass(frozen=True)
class StepCost:
    """Of one model.

    Args:
        seconds: of a step, median. On a CPU the processor's, over all threads: other work on the machine does not count.
        num_parameters: of the model.
    """

    seconds: float
    num_parameters: int


def measure_costs(recipes: Mapping[str, Recipe], manifest: Manifest, *, rounds: int = 8, steps: int = 2) -> dict[str, StepCost]:
    """Train each recipe for ``rounds`` times ``steps`` steps, in turn, so that a machine that slows down slows all of them.

    A step is what training does: decode, augment, forward, backward, clip, optimizer, moving average.

    Raises:
        UserError: a recipe whose model cannot be built.
    """
    torch.set_num_threads(available_cores())
    with ExitStack() as stack:
        trials = {name: _Trial(recipe, manifest, stack) for name, recipe in recipes.items()}
        for number in range(rounds + 1):
            for trial in trials.values():
                for _ in range(steps if number else WARM_UP):
                    trial.step(counted=number > 0)
    return {name: StepCost(statistics.median(trial.seconds), trial.num_parameters) for name, trial in trials.items()}


class _Trial:
    """One model under training, from random weights."""

    def __init__(self, recipe: Recipe, manifest: Manifest, stack: ExitStack) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe = recipe
        data, train = recipe.data, recipe.train
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model, manifest.num_classes, data.image_size).to(self.device)
        groups = [dict(group) for group in parameter_groups(self.model, recipe.optim.weight_decay)]
        self.optimizer = build_optimizer(groups, recipe.optim, self.device)
        self.ema = ModelEmaV3(self.model, decay=train.ema) if train.ema > 0 else None
        self.augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=available_cores())
        reader = TrainLoader(
            manifest,
            seed=recipe.seed,
            batch_size=train.batch_size,
            num_streams=data.num_streams,
            balance=data.balance,
            decode=DecodeOptions(data.image_size, data.crop, data.augment.zoom),
        )
        self.batches = iter(stack.enter_context(reader))
        self.seconds: list[float] = []

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, *, counted: bool) -> None:
        start = self._clock()
        batch = next(self.batches)
        images_BCHW = self.augment(batch.images_BHWC.to(self.device), batch.epoch, batch.positions_B)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits_BK = self.model(images_BCHW)
        smoothing = self.recipe.train.label_smoothing
        labels_B = batch.labels_B.to(self.device)
        loss = nn.functional.cross_entropy(logits_BK.float(), labels_B, label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.recipe.train.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        if counted:
            self.seconds.append(self._clock() - start)

    def _clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


MODELS = ("d4_cnn", "custom_cnn", "resnet18")

# Equal for all: the central three quarters of the 256 pixels at 80 pixels; rotation, flips and zoom as in Dieleman et al. 2015
# (arXiv:1503.07077); small batches, since a fold is small; the last averaged weights are judged, so that nothing is chosen.
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
    "tracker.name": "none",
}
# d4_cnn: of 4e-3, 8e-3 and 2e-2 on three quarters of fold 1's training galaxies, judged on the rest (64 pixels, 12 epochs).
# custom_cnn: as README's runs from random weights. resnet18: the first that was tried.
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "d4_cnn": {"model.drop_rate": "0.2", "optim.lr": "8e-3"},
    "custom_cnn": {"model.drop_rate": "0.2", "optim.lr": "8e-3"},
    "resnet18": {"model.drop_rate": "0.2", "optim.lr": "2e-3"},
}
# What the comparison itself decides.
FIXED = ("recipe", "data.manifest", "model.name", "train.epochs", "eval.checkpoint", "run.dir", "run.root")
SAVES = 8  # checkpoints of a fit


@dataclass(frozen=True)
class Fit:
    """One model on one fold."""

    model: str
    fold: int
    resolved: ResolvedRecipe

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run.root / run_name(self.recipe))


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

    First a training step of each model is measured, in turn; the whole epochs nearest to ``minutes`` follow from it, and are
    kept. Nothing is chosen on a test fold: fixed epochs, the last averaged weights. A second call takes up what the first one
    finished, in whatever state it ended.

    Args:
        real_dir: ``<class>/<image>``, without split folders.
        work_dir: where shards, costs and runs are kept.
        environ: the process's environment.
        minutes: of a fit: processor time on a CPU, time on a GPU.
        num_folds: stratified ones; each is the test set once.
        models: architectures that have a recipe, each compared with the first one; None: ``MODELS``.
        overrides: further ``key=value`` for the recipes of all.

    Returns:
        What the JSON line holds.

    Raises:
        UserError: no images there, or a model or setting that cannot be used, before anything is trained; stopped by a signal.
    """
    extra = _read_overrides(overrides)
    models = MODELS if models is None else models
    _check_models(models, extra)
    manifests = _write_folds(real_dir, work_dir, num_folds)
    costs = _costs([_recipe(model, extra, manifests[0], work_dir) for model in models], manifests[0], work_dir / "costs.json")
    fits = []
    for fold, manifest in enumerate(manifests):
        for model in models:
            # Every fold is trained equally long: the folds differ by a galaxy or two.
            epochs = _epochs(costs[model], minutes, _recipe(model, extra, manifests[0], work_dir).recipe, manifests[0])
            fits.append(Fit(model, fold, _recipe(model, extra, manifest, work_dir, epochs)))
    results: dict[str, list[Mapping[str, Any]]] = {model: [] for model in models}
    for number, fit in enumerate(fits, start=1):
        what = f"fit {number} of {len(fits)}: {fit.model}, fold {fit.fold + 1} of {num_folds}, {fit.recipe.train.epochs} epochs"
        print(f"\n{what}", flush=True)
        results[fit.model].append(_carry_out(fit, environ))
        print(f"{what}: accuracy {results[fit.model][-1]['accuracy']:.4f}", flush=True)
    epochs_of = {fit.model: fit.recipe.train.epochs for fit in fits}
    found = {model: _summary(runs, epochs_of[model], costs[model], results[models[0]]) for model, runs in results.items()}
    print_folds(found, minutes, manifests[0].num_classes)
    task = {"task": "folds", "num_folds": num_folds, "minutes": minutes, "overrides": extra, "models": found}
    print(json.dumps(task))
    return task


def _read_overrides(overrides: Sequence[str]) -> dict[str, str]:
    extra: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key in extra:
            raise UserError(f"{text!r} is no key=value, or its key is given twice")
        if key in FIXED:
            raise UserError(f"{text}: the comparison itself decides {key}; leave it out")
        extra[key] = value
    return extra


def _check_models(models: Sequence[str], extra: Mapping[str, str]) -> None:
    for model in models:
        if model not in get_args(ModelName) or list(models).count(model) > 1:
            raise UserError(f"--models: {model!r} stands there twice, or is none of {', '.join(get_args(ModelName))}")
        load_recipe(_arguments(model, extra))


def _write_folds(real_dir: Path, work_dir: Path, num_folds: int) -> list[Manifest]:
    """The shards of each fold, in a folder of the images' hash; found again by a second call."""
    manifests = []
    for fold in range(num_folds):
        survey = open_image_folder(real_dir, fold=(fold, num_folds))
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


def _costs(recipes: Sequence[ResolvedRecipe], manifest: Manifest, path: Path) -> dict[str, StepCost]:
    """By model, as measured now, or by an earlier call with the same settings."""
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    missing = {run_name(resolved.recipe): resolved.recipe for resolved in recipes if run_name(resolved.recipe) not in known}
    if missing:
        print(f"measuring a training step of {', '.join(recipe.model.name for recipe in missing.values())}", flush=True)
        known |= {name: dataclasses.asdict(cost) for name, cost in measure_costs(missing, manifest).items()}
        write_json(path, known)
    return {resolved.recipe.model.name: StepCost(**known[run_name(resolved.recipe)]) for resolved in recipes}


def _epochs(cost: StepCost, minutes: float, recipe: Recipe, manifest: Manifest) -> int:
    steps = manifest.splits["train"].num_samples // recipe.train.batch_size
    return max(1, round(60 * minutes / (cost.seconds * max(1, steps))))


def _carry_out(fit: Fit, environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Train, continue or only look up one fit; its evaluation, with the processor minutes that its calls took."""
    spent_path = fit.folder.path / "processor-time.json"
    evaluation = read_evaluation(fit.folder.evaluation_dir, "test") if fit.folder.read_result() is not None else None
    if evaluation is None:
        start = time.process_time()
        try:
            stopped = train(fit.resolved, environ)
        finally:
            if fit.folder.path.is_dir():
                write_json(spent_path, {"seconds": _spent(spent_path) + time.process_time() - start})
        if stopped:
            raise UserError(f"stopped; the same command continues with {fit.folder}")
        evaluation = read_evaluation(fit.folder.evaluation_dir, "test")
        assert evaluation is not None
    return evaluation | {"processor_minutes": _spent(spent_path) / 60}


def _spent(path: Path) -> float:
    """Processor seconds of the calls before; a call that was killed could not write its own."""
    return float(read_json(path)["seconds"]) if path.is_file() else 0.0


def _summary(
    runs: Sequence[Mapping[str, Any]], epochs: int, cost: StepCost, first: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    found: dict[str, Any] = {"num_parameters": cost.num_parameters, "seconds_per_step": cost.seconds, "epochs": epochs}
    found["processor_minutes"] = [round(run["processor_minutes"], 2) for run in runs]
    for name in ("accuracy", "balanced_accuracy"):
        found[name] = mean_and_error([run[name] for run in runs])
    differences = [theirs["accuracy"] - own["accuracy"] for theirs, own in zip(first, runs, strict=True)]
    return found | {"behind_the_first": mean_and_error(differences)}


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """The mean over the folds and its standard error (their deviation over the root of their number)."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "standard_error": error, "folds": list(values)}


def print_folds(found: Mapping[str, Mapping[str, Any]], minutes: float, num_classes: int) -> None:
    """The table: a line a model, in the order of the call."""
    print(f"\naccuracy on the test folds, {num_classes} classes, {minutes:g} processor minutes a fit; mean and standard error")
    print(f"  {'':<12} {'accuracy, %':<32} {'behind the first':<18} {'weights':>9} {'epochs':>7} {'minutes':>8}")
    for model, row in found.items():
        folds = ", ".join(f"{100 * value:.1f}" for value in row["accuracy"]["folds"])
        accuracy = f"{_percent(row['accuracy'])} ({folds})"
        behind = _percent(row["behind_the_first"]) if model != next(iter(found)) else ""
        spent = statistics.fmean(row["processor_minutes"])
        weights = f"{row['num_parameters'] / 1e6:.2f} M"
        print(f"  {model:<12} {accuracy:<32} {behind:<18} {weights:>9} {row['epochs']:>7} {spent:>8.2f}")


def _percent(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} +- {100 * value['standard_error']:.1f}"
