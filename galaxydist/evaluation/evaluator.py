"""One checkpoint of a run and what it is worth: predictions of every galaxy of a split, and what follows from them.

All ranks predict, rank 0 does the rest. What is there already, of the same checkpoint and the same data, is not made again.
"""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.checkpoints.tensor_files import unflatten_state
from galaxydist.counter_rng import hash64
from galaxydist.distributed import World, init_distributed, shutdown_distributed
from galaxydist.errors import EveryRankError, UserError
from galaxydist.evaluation.counts import BatchPredictions
from galaxydist.evaluation.inference import CATALOGUE_COLUMNS, PredictionWriter, Views, evaluate_split, merge_predictions
from galaxydist.evaluation.leakage import JUDGED_SPLIT, FindTrained, open_training_shards, validation_mask
from galaxydist.evaluation.metrics import summarise
from galaxydist.evaluation.predictions import PredictionsInfo, RankFile, part_path, predictions_path, read_predictions
from galaxydist.evaluation.results_files import has_figures, read_evaluation, render_evaluation, stem_of, write_evaluation
from galaxydist.galaxy import Variant
from galaxydist.loading.dataset import TrainingData, build_augment, find_cache, find_manifest, find_variant, has_split
from galaxydist.loading.loader import Batch
from galaxydist.log import results
from galaxydist.models.build import build_model
from galaxydist.models.performance import set_tf32
from galaxydist.models.weights import write_weights
from galaxydist.paths import data_root, folder_name
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_log import MetricsLog
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns
from galaxydist.surveys.split import CUTOUT_ARCSEC

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# What of a checkpoint is needed to judge it.
JUDGED = ("model", "ema")
LIBRARIES = ("torch", "timm", "numpy")


class Evaluator:
    """The checkpoint that a recipe names. All ranks make one, and call its methods together.

    Args:
        world: the processes.
        folder: of the run.
        recipe: of the run; its ``eval`` says which checkpoint and which views.
        find_trained: gives rank 0 the shards that the run was trained on, where a split of others is judged.
        figures: draw; None: as the recipe says.

    Raises:
        UserError: the run has no checkpoint.
    """

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        recipe: Recipe,
        *,
        find_trained: FindTrained,
        figures: bool | None = None,
    ) -> None:
        self.world, self.folder, self.recipe = world, folder, recipe
        self._figures = recipe.eval.figures if figures is None else figures
        self._find_trained = functools.cache(find_trained)  # asked for the overlap and for the temperature
        path = world.run_on_main(lambda: find_checkpoint(folder, recipe.eval.checkpoint))
        self._checkpoint = world.run_on_all(lambda: store.read_sound(path, groups=JUDGED))
        self.trained_on = TrainingData.from_dict(self._checkpoint.state["data"])
        self._model: nn.Module | None = None
        self._catalogue: pa.Table | None = None  # on rank 0, while there are parts to be merged

    def judge(self, manifest: Manifest, split: str) -> dict[str, Any] | None:
        """Evaluate a split, unless that was done already, and say the result.

        Args:
            manifest: the shards that the split is of.
            split: ``train``, ``val`` or ``test``.

        Returns:
            The evaluation; None where the split has no galaxies. Where some of them were in the run's validation set, it has
            ``without_validation``: the metrics of the others.

        Raises:
            UserError: other classes than the run's; test galaxies that it was trained on; a galaxy that cannot be read.
        """
        world = self.world
        if not has_split(manifest, split):
            logger.info("no %s split in %s: nothing to evaluate", split, manifest.location)
            return None
        path = self.predict(manifest, split)
        validation = self._validation(manifest)
        context, evaluation_dir = self._context(manifest, split), self._dir(manifest)
        known = world.run_on_main(lambda: self._read(evaluation_dir, split, context, validation))
        if known is None:
            known = world.run_on_main(lambda: self._write(path, validation, evaluation_dir, context))
        results.info("%s", render_evaluation(known, evaluation_dir))
        return known

    def predict(self, manifest: Manifest, split: str) -> Path:
        """The predictions of a split, made unless they are there.

        Raises:
            UserError: other classes than the run's; test galaxies that it was trained on; a galaxy or an id that cannot be
                read; a full disk.
        """
        if self.trained_on.class_names != manifest.class_names:
            raise EveryRankError(
                f"{self.folder} was trained on the classes {', '.join(self.trained_on.class_names)}; {manifest.location} has "
                f"{', '.join(manifest.class_names)}. Give shards of the same classes."
            )
        context, world = self._context(manifest, split), self.world
        path = predictions_path(self._dir(manifest), stem_of(split, self.recipe.eval.tta))
        if world.run_on_main(lambda: _stored_context(path) == context):
            return path
        seen_N = world.run_on_main(lambda: validation_mask(manifest, split, self.trained_on, self._find_trained))
        world.run_on_main(lambda: self._prepare(path, manifest, split))
        with contextlib.ExitStack() as stack:
            part = RankFile(part_path(path, world.rank), manifest.num_classes)
            world.run_on_all(lambda: stack.enter_context(part))
            metrics = self._evaluate(manifest, split, seen_N, part)
            world.run_on_main(lambda: self._merge(path, manifest, context, metrics, seen_N))
        return path

    def _prepare(self, path: Path, manifest: Manifest, split: str) -> None:
        """Rank 0, before the work: what could fail after it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._catalogue = read_catalogue(manifest, split, columns=CATALOGUE_COLUMNS)

    def _merge(
        self,
        path: Path,
        manifest: Manifest,
        context: Mapping[str, Any],
        metrics: Mapping[str, Any],
        seen_N: NDArray[np.bool_] | None,
    ) -> None:
        """Rank 0: one file of all parts."""
        info = PredictionsInfo(
            class_names=manifest.class_names,
            context=context,
            loss=metrics["loss"],
            loss_without_validation=metrics.get("without_validation", {}).get("loss"),
            versions={name: version(name) for name in LIBRARIES},
        )
        parts = [part_path(path, rank) for rank in range(self.world.size)]
        merge_predictions(path, info, parts, self._catalogue, batch_size=self.recipe.eval.batch_size, seen_N=seen_N)
        self._catalogue = None

    def _validation(self, manifest: Manifest) -> Path | None:
        """The predictions of the run's own validation split: made if its shards are at hand, else those in the run folder."""
        own = self.world.run_on_main(lambda: self._own_shards(manifest))
        if own is not None:
            return self.predict(own, "val") if has_split(own, "val") else None
        path = predictions_path(self.folder.evaluation_dir, stem_of("val", self.recipe.eval.tta))

        def is_usable() -> bool:
            stored = _stored_context(path)
            wanted: dict[str, Any] = {"split": "val", "tta": self.recipe.eval.tta, "manifest_hash": self.trained_on.manifest_hash}
            wanted |= {"checkpoint": self._checkpoint.path.name, "step": self._checkpoint.step}
            return stored is not None and all(stored.get(name) == value for name, value in wanted.items())

        return path if self.world.run_on_main(is_usable) else None

    def _own_shards(self, manifest: Manifest) -> Manifest | None:
        try:
            own = manifest if manifest.hash == self.trained_on.manifest_hash else self._find_trained(self.trained_on)
        except UserError:
            return None
        return own if own.hash == self.trained_on.manifest_hash else None

    def _read(
        self, evaluation_dir: Path, split: str, context: Mapping[str, Any], validation: Path | None
    ) -> dict[str, Any] | None:
        """Rank 0: an evaluation that was made, where nothing of it can be added: a temperature, figures that are asked for."""
        tta = self.recipe.eval.tta
        known = read_evaluation(evaluation_dir, split, tta)
        if known is None or not _is_of(known, context) or (validation and not _has_temperature(known)):
            return None
        lacks_figures = self._figures and not has_figures(evaluation_dir, stem_of(split, tta))
        # A temperature whose galaxies are gone is worth more than figures.
        return None if lacks_figures and (validation or not _has_temperature(known)) else known

    def _write(self, path: Path, validation: Path | None, evaluation_dir: Path, context: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0: the evaluation's JSON and figures."""
        summary = summarise(read_predictions(path), read_predictions(validation) if validation is not None else None)
        log, curves = self.folder.metrics_path, summary.curves
        return write_evaluation(evaluation_dir, summary.metrics, context, metrics_log=log, curves=curves, figures=self._figures)

    def _dir(self, manifest: Manifest) -> Path:
        return find_evaluation(self.folder, self.trained_on, manifest)

    def _context(self, manifest: Manifest, split: str) -> dict[str, Any]:
        """What is judged on what."""
        recipe = self.recipe
        return {
            "dataset": manifest.dataset,
            "variant": manifest.variant,
            "split": split,
            "tta": recipe.eval.tta,
            "manifest_hash": manifest.hash,
            "recipe": recipe.name,
            "model": recipe.model.name,
            "seed": recipe.seed,
            "checkpoint": self._checkpoint.path.name,
            "step": self._checkpoint.step,
            # Evaluations that were made before anyone looked lack these.
            **(
                {"trained_on_hash": self.trained_on.manifest_hash, "apart_arcsec": CUTOUT_ARCSEC} if split == JUDGED_SPLIT else {}
            ),
        }

    def _evaluate(self, manifest: Manifest, split: str, seen_N: NDArray[np.bool_] | None, part: RankFile) -> dict[str, Any]:
        recipe, world = self.recipe, self.world
        if self._model is None:
            self._model = load_judged(recipe, self._checkpoint).to(device=world.device, dtype=world.dtype)
            set_tf32(recipe.train.tf32, world.device)
        augment = build_augment(recipe, self.trained_on, threads=world.cores)
        return evaluate_split(world, self._model, manifest, split, augment=augment, recipe=recipe, apart_N=seen_N, part=part)


def _stored_context(path: Path) -> Mapping[str, Any] | None:
    """What the predictions in a file are of; None where there are none, or damaged ones, which are made again."""
    try:
        return read_predictions(path).info.context
    except UserError:
        return None


def _is_of(evaluation: Mapping[str, Any], context: Mapping[str, Any]) -> bool:
    return all(evaluation.get(name) == value for name, value in context.items())


def _has_temperature(evaluation: Mapping[str, Any]) -> bool:
    """Or cannot have one, its logits being not finite."""
    return "calibration" not in evaluation or evaluation["calibration"]["temperature"] is not None


def find_evaluation(folder: RunFolder, trained_on: TrainingData, manifest: Manifest) -> Path:
    """Where evaluations on a data set lie: the run's own stands at the top, others each in a folder of their own."""
    is_own = trained_on.manifest_hash == manifest.hash
    return folder.evaluation_dir if is_own else folder.evaluation_dir / folder_name(f"{manifest.dataset}-{manifest.variant}")


def load_judged(recipe: Recipe, checkpoint: Checkpoint) -> nn.Module:
    """The model with the weights that it is judged by, on the CPU.

    Args:
        recipe: of the run.
        checkpoint: of it, with the tensors of ``JUDGED``.
    """
    # The weights come from the checkpoint: those the run started from are not needed.
    config = recipe.model.model_copy(update={"pretrained": False, "weights": None, "freeze_backbone": False})
    model = build_model(config, len(checkpoint.state["data"]["class_names"]), recipe.data.image_size)
    model.load_state_dict(evaluation_weights(checkpoint.tensors, checkpoint.state))
    return model


def find_checkpoint(folder: RunFolder, which: str) -> Path:
    """The checkpoint that a run is judged by.

    Args:
        folder: of the run.
        which: ``best`` or ``last``; the last where there is no best.

    Raises:
        UserError: there is none.
    """
    path = store.best_path(folder.checkpoints_dir) if which == "best" else None
    if path is None:
        newest = store.load(folder.checkpoints_dir, groups=())
        path = newest.path if newest is not None else None
    if path is None:
        raise UserError(
            f"{folder} has no checkpoint yet: it was stopped before its first one. Train it on with the command that started it."
        )
    return path


# The exact evaluation of a run: the weights of one of its checkpoints on a split, as JSON, figures and a table.


def evaluate_run(
    run_dir: Path,
    split: str,
    environ: MutableMapping[str, str],
    *,
    manifest_path: str | Path | None = None,
    variant: Variant | None = None,
    trained_path: str | Path | None = None,
    data_dir: Path | None = None,
    tta: Views | None = None,
) -> dict[str, Any]:
    """Evaluate a run of ``launch.py`` on a split, write it into the run folder and print the table.

    Args:
        run_dir: the run folder.
        split: ``train``, ``val`` or ``test``.
        environ: the process's environment.
        manifest_path: path or URL of the shards to judge it on; None: those that the run was trained on, where it had them.
        variant: instead, another data set of the run's survey.
        trained_path: path or URL of the shards that the run was trained on, where they are no longer where it had them.
        data_dir: the data root, likewise.
        tta: instead of the recipe's ``eval.tta``; evaluations with and without lie side by side.

    Returns:
        The evaluation, as in its JSON file.

    Raises:
        UserError: no run or no checkpoint there, no such split, shards of other classes, test galaxies that the run was trained
            on.
    """
    folder = RunFolder(run_dir)
    recipe = from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))
    if tta is not None:
        recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"tta": tta})})
    root = data_root(data_dir or recipe.data.dir, environ)
    known, cache = find_manifest(recipe.data, root), find_cache(recipe.data, root)
    path = manifest_path or (known if variant is None else find_variant(recipe.data, root, variant))
    manifest = open_shards(path, cache)
    if not has_split(manifest, split):
        raise UserError(
            f"{manifest.location} has no galaxies in a split {split!r}. It has {', '.join(manifest.splits)}: give --split."
        )
    world = init_distributed(recipe.train.precision, environ)
    try:
        world.run_on_main(lambda: check_columns(manifest))

        def find_trained(trained_on: TrainingData) -> Manifest:
            return open_training_shards(trained_on, known, trained_path, cache)

        judge = Evaluator(world, folder, recipe, find_trained=find_trained, figures=True)
        metrics = judge.judge(manifest, split)
    finally:
        shutdown_distributed()
    assert metrics is not None
    return metrics


def save_weights(run_dir: Path, target: Path) -> int:
    """Write the weights that a run is judged by as one safetensors file, for ``model.weights=FILE`` of another run.

    The file carries the normalisation that the model was trained with. It appears only when it is whole.

    Args:
        run_dir: the run folder.
        target: the file to write, replaced if it is there.

    Returns:
        The step that the weights are from.

    Raises:
        UserError: no run or no checkpoint there.
    """
    folder = RunFolder(run_dir)
    recipe = from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))
    checkpoint = store.read_sound(find_checkpoint(folder, recipe.eval.checkpoint), groups=JUDGED)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, evaluation_weights(checkpoint.tensors, checkpoint.state), trained_on.statistics)
    return checkpoint.step


# A trial of what only the end of a run needs, before its first step: an evaluation of a few galaxies, with numbers and
# figures.
#
# A library that is missing, a number of classes that a figure cannot show, a name that cannot be written: all this would
# else be
# found hours later, and again at every restart.

# Enough for every number and figure: properties are shown from 25 galaxies on.
NUM_GALAXIES = 32


def rehearse_evaluation(manifest: Manifest, recipe: Recipe) -> None:
    """Evaluate some invented galaxies of the data set's classes in a temporary folder. For rank 0.

    Args:
        manifest: the shards.
        recipe: of the run.

    Raises:
        UserError: the disk of temporary files is full.
    """
    import pyarrow as pa

    numbers_N = torch.arange(NUM_GALAXIES)
    labels_N = numbers_N * manifest.num_classes // NUM_GALAXIES
    draws_NK = hash64(numbers_N.numpy()[:, None], np.arange(manifest.num_classes)) >> np.uint64(40)
    logits_NK = torch.from_numpy(draws_NK.astype(np.float32) / 2**22)
    predictions = BatchPredictions(numbers_N, labels_N, logits_NK.argmax(1), logits_NK)
    shape = (NUM_GALAXIES, manifest.image_size, manifest.image_size, 3)
    images_NHWC = torch.from_numpy(np.resize(np.arange(251, dtype=np.uint8), shape))
    batch = Batch(images_NHWC, labels_N, torch.ones(NUM_GALAXIES), numbers_N, numbers_N, epoch=0, step=0)
    context = {
        "dataset": manifest.dataset,
        "variant": manifest.variant,
        "split": "test",
        "tta": recipe.eval.tta,
        "manifest_hash": manifest.hash,
        "recipe": recipe.name,
        "model": recipe.model.name,
    }
    with tempfile.TemporaryDirectory(prefix="galaxydist-") as name:
        folder = Path(name)
        path = predictions_path(folder, stem_of("test", recipe.eval.tta))
        with RankFile(part_path(path, 0), manifest.num_classes) as part:
            with PredictionWriter(part, image_size=manifest.image_size, threads=1) as keeper:
                keeper.add(batch, predictions)
                keeper.finish()
            catalogue = pa.table({"id": [f"galaxy-{number}" for number in range(NUM_GALAXIES)]})
            info = PredictionsInfo(class_names=manifest.class_names, context=context)
            merge_predictions(path, info, [part.path], catalogue, batch_size=NUM_GALAXIES)
        log = MetricsLog(folder / "metrics.jsonl")
        log.append(1, {"train/loss": 1.0, "val/loss": 1.0})
        judged = read_predictions(path)
        summary = summarise(judged, judged)  # also as its own validation split, for the temperature
        # Drawing takes seconds, and a few classes with plain names are drawn in any test.
        is_unusual = manifest.num_classes > 20 or not all(name.isascii() and name.isprintable() for name in manifest.class_names)
        curves, figures = summary.curves, recipe.eval.figures and is_unusual
        written = write_evaluation(folder, summary.metrics, context, metrics_log=log.path, curves=curves, figures=figures)
        render_evaluation(written, folder)


def evaluation_weights(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model state that a checkpoint is judged by: the moving average where there is one, else the model's own."""
    described = state["described"]
    weights: dict[str, torch.Tensor] = unflatten_state(described.get("ema", described["model"]), tensors)
    return weights
