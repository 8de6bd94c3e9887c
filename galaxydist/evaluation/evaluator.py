"""Evaluation of one checkpoint of a run on a split: predictions of every galaxy, metrics, figures and a table.

All ranks predict; rank 0 does the rest. Results of the same checkpoint and the same data are reused.
"""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.counter_rng import hash64
from galaxydist.distributed import World, open_world
from galaxydist.errors import EveryRankError, UserError
from galaxydist.evaluation.inference import CATALOGUE_COLUMNS, TTA, PredictionWriter, evaluate_split, merge_predictions
from galaxydist.evaluation.leakage import TEST_SPLIT, FindTrainingShards, open_training_shards, validation_mask
from galaxydist.evaluation.metrics import summarise
from galaxydist.evaluation.predictions import PredictionsInfo, RankFile, predictions_path, rank_file_path, read_predictions
from galaxydist.evaluation.results_files import has_figures, read_evaluation, render_evaluation, stem_of, write_evaluation
from galaxydist.evaluation.run_model import MODEL_GROUPS, find_checkpoint, load_model, read_run_recipe
from galaxydist.galaxy import Variant, check_not_margin
from galaxydist.loading.loader import Batch
from galaxydist.loading.training_data import TrainingData, build_augment, find_cache, find_manifest, find_variant, has_split
from galaxydist.log import results
from galaxydist.models.own_function import trusts_code
from galaxydist.models.performance import choose_memory_format, deterministic_algorithms, set_memory_format, set_tf32
from galaxydist.paths import data_root, folder_name
from galaxydist.rank_store import LONG_TIMEOUT
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock import guarded
from galaxydist.runs.metrics_file import MetricsFile
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns
from galaxydist.surveys.split import CUTOUT_ARCSEC

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "timm", "numpy")
# Longest wait for another evaluation of the same run, whose predictions then serve.
WAIT_S = 3600.0
# Number of invented galaxies in a rehearsal: enough for every metric and figure (properties are shown from 25 galaxies on).
NUM_GALAXIES = 32


@dataclass
class Evaluator:
    """Evaluates the checkpoint that a recipe names. All ranks create one and call its methods together.

    Args:
        world: the processes.
        folder: of the run.
        recipe: of the run; its ``eval`` chooses the checkpoint and the test-time augmentation.
        find_training_shards: called on rank 0 if other shards than those of the training are evaluated.
        figures: draw figures; None for the recipe's setting.
        trust_code: run the function that the recipe names, if it names one.
        beat: called after each batch, and between the parts of an evaluation.

    Raises:
        UserError: the run has no checkpoint.
    """

    world: World
    folder: RunFolder
    recipe: Recipe
    _: KW_ONLY
    find_training_shards: FindTrainingShards
    figures: bool | None = None
    trust_code: bool = False
    beat: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        eval_config = self.recipe.eval
        self._figures = eval_config.figures if self.figures is None else self.figures
        self._find_training_shards = functools.cache(self.find_training_shards)  # for the overlap and for the temperature
        path = self.world.run_on_main(lambda: find_checkpoint(self.folder, eval_config.checkpoint))
        self._checkpoint = self.world.run_on_all(lambda: store.read_sound(path, groups=MODEL_GROUPS))
        self.trained_on = TrainingData.from_dict(self._checkpoint.state["data"])
        self._model: nn.Module | None = None
        self._catalogue: pa.Table | None = None  # on rank 0, until the ranks' files are merged

    def evaluate(self, manifest: Manifest, split: str) -> dict[str, Any] | None:
        """Evaluate a split, unless this was already done, and print the result.

        Args:
            manifest: shards with the split.
            split: ``train``, ``val`` or ``test``.

        Returns:
            The evaluation; None if the split has no galaxies. If some are in the run's validation split, the metrics of the
            others are added as ``without_validation``.

        Raises:
            UserError: other classes than the run's; test galaxies that it was trained on; a galaxy that cannot be read.
        """
        if not has_split(manifest, split):
            logger.info("no %s split in %s: nothing to evaluate", split, manifest.location)
            return None
        path, validation = self.predict(manifest, split), self._validation_predictions(manifest)
        context, evaluation_dir = self._context(manifest, split), find_evaluation_dir(self.folder, self.trained_on, manifest)

        def load_or_write() -> dict[str, Any]:
            stored = self._stored_evaluation(evaluation_dir, context, has_validation=validation is not None)
            if stored is not None:
                return stored
            summary = summarise(read_predictions(path), read_predictions(validation) if validation is not None else None)
            log, curves = self.folder.metrics_path, summary.curves
            return write_evaluation(
                evaluation_dir, summary.metrics, context, metrics_log=log, curves=curves, figures=self._figures
            )

        self.beat()
        evaluation = self.world.run_on_main(load_or_write)
        results.info("%s", render_evaluation(evaluation, evaluation_dir))
        return evaluation

    def predict(self, manifest: Manifest, split: str) -> Path:
        """Return the path of a split's predictions, and write them unless they exist.

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
        evaluation_dir = find_evaluation_dir(self.folder, self.trained_on, manifest)
        path = predictions_path(evaluation_dir, stem_of(split, self.recipe.eval.tta))
        with contextlib.ExitStack() as stack:
            if world.run_on_main(lambda: self._is_predicted(path, context, stack)):
                return path
            in_validation_N = world.run_on_main(
                lambda: validation_mask(manifest, split, self.trained_on, self._find_training_shards)
            )
            world.run_on_main(lambda: self._prepare(path, manifest, split))
            rank_file = RankFile(rank_file_path(path, world.rank), manifest.num_classes)
            world.run_on_all(lambda: stack.enter_context(rank_file))
            metrics = self._run_inference(manifest, split, in_validation_N, rank_file)
            self.beat()
            world.run_on_main(lambda: self._merge(path, manifest, context, metrics, in_validation_N))
        return path

    def _is_predicted(self, path: Path, context: Mapping[str, Any], stack: contextlib.ExitStack) -> bool:
        """On rank 0, return True if the predictions exist; else other evaluations of the run wait until the stack is closed."""
        if _stored_context(path) != context:
            stack.enter_context(guarded(self.folder.evaluation_dir, wait_s=WAIT_S))
        return _stored_context(path) == context

    def _prepare(self, path: Path, manifest: Manifest, split: str) -> None:
        """On rank 0, do before the inference what may fail."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._catalogue = read_catalogue(manifest, split, columns=CATALOGUE_COLUMNS)

    def _run_inference(
        self, manifest: Manifest, split: str, in_validation_N: NDArray[np.bool_] | None, rank_file: RankFile
    ) -> dict[str, Any]:
        recipe, world = self.recipe, self.world
        if self._model is None:
            model = world.run_on_all(lambda: load_model(recipe, self._checkpoint, trust_code=self.trust_code))
            layout = choose_memory_format(recipe.train.channels_last, model, world.device, world.dtype)
            self._model = model.to(device=world.device, dtype=world.dtype)
            set_memory_format(model, layout)
            set_tf32(recipe.train.tf32, world.device)
        return evaluate_split(
            world,
            self._model,
            manifest,
            split,
            augment=build_augment(recipe, self.trained_on, threads=world.cores),
            recipe=recipe,
            beat=self.beat,
            in_validation_N=in_validation_N,
            rank_file=rank_file,
        )

    def _merge(
        self,
        path: Path,
        manifest: Manifest,
        context: Mapping[str, Any],
        metrics: Mapping[str, Any],
        in_validation_N: NDArray[np.bool_] | None,
    ) -> None:
        """On rank 0, merge the ranks' files."""
        info = PredictionsInfo(
            class_names=manifest.class_names,
            context=context,
            loss=metrics["loss"],
            loss_without_validation=metrics.get("without_validation", {}).get("loss"),
            versions={name: version(name) for name in LIBRARIES},
        )
        files = [rank_file_path(path, rank) for rank in range(self.world.size)]
        merge_predictions(
            path,
            info,
            files,
            self._catalogue,
            batch_size=self.recipe.eval.batch_size,
            resampling=manifest.resampling,
            in_validation_N=in_validation_N,
        )
        self._catalogue = None

    def _validation_predictions(self, manifest: Manifest) -> Path | None:
        """Return the predictions of the run's own validation split: new ones if its shards are available, else stored ones."""
        own = self.world.run_on_main(lambda: self._own_shards(manifest))
        if own is not None:
            return self.predict(own, "val") if has_split(own, "val") else None
        tta = self.recipe.eval.tta
        return self.world.run_on_main(lambda: stored_validation(self.folder, self._checkpoint, tta))

    def _own_shards(self, manifest: Manifest) -> Manifest | None:
        try:
            own = manifest if manifest.hash == self.trained_on.manifest_hash else self._find_training_shards(self.trained_on)
        except UserError:
            return None
        return own if own.hash == self.trained_on.manifest_hash else None

    def _stored_evaluation(
        self, evaluation_dir: Path, context: Mapping[str, Any], *, has_validation: bool
    ) -> dict[str, Any] | None:
        """On rank 0, return the stored evaluation, unless it lacks a temperature or figures that can be added now."""
        tta = self.recipe.eval.tta
        stored = read_evaluation(evaluation_dir, context["split"], tta)
        if stored is None or not _has_values(stored, context):
            return None
        # Logits that are not finite have no calibration, so that no temperature could be added.
        has_temperature = "calibration" not in stored or stored["calibration"]["temperature"] is not None
        # Missing figures are not added at the cost of a temperature that could no longer be fitted.
        lacks_figures = self._figures and not has_figures(evaluation_dir, stem_of(context["split"], tta))
        if has_validation:
            return stored if has_temperature and not lacks_figures else None
        return stored if has_temperature or not lacks_figures else None

    def _context(self, manifest: Manifest, split: str) -> dict[str, Any]:
        context = {
            **_data_context(self.recipe, manifest, split),
            "seed": self.recipe.seed,
            "checkpoint": self._checkpoint.path.name,
            "step": self._checkpoint.step,
        }
        if split == TEST_SPLIT:  # evaluations of versions without leakage checks lack these, and are made again
            context |= {"trained_on_hash": self.trained_on.manifest_hash, "apart_arcsec": CUTOUT_ARCSEC}
        return context


def _data_context(recipe: Recipe, manifest: Manifest, split: str) -> dict[str, Any]:
    return {
        "dataset": manifest.dataset,
        "variant": manifest.variant,
        "split": split,
        "tta": recipe.eval.tta,
        "manifest_hash": manifest.hash,
        "recipe": recipe.name,
        "model": recipe.model.name,
    }


def _stored_context(path: Path) -> Mapping[str, Any] | None:
    """Return the context of a file of predictions; None if it is missing or damaged."""
    try:
        return read_predictions(path).info.context
    except UserError:
        return None


def _has_values(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(stored.get(name) == value for name, value in wanted.items())


def stored_validation(folder: RunFolder, checkpoint: Checkpoint, tta: TTA) -> Path | None:
    """Return the stored predictions of a checkpoint on its run's own validation split; None if there are none."""
    path = predictions_path(folder.evaluation_dir, stem_of("val", tta))
    own = {"manifest_hash": checkpoint.state["data"]["manifest_hash"], "checkpoint": checkpoint.path.name}
    wanted = {"split": "val", "tta": tta, "step": checkpoint.step, **own}
    return path if _has_values(_stored_context(path) or {}, wanted) else None


def find_evaluation_dir(folder: RunFolder, trained_on: TrainingData, manifest: Manifest) -> Path:
    """Return the folder of evaluations on a data set: a sub-folder per data set, except for the run's own."""
    is_own = trained_on.manifest_hash == manifest.hash
    return folder.evaluation_dir if is_own else folder.evaluation_dir / folder_name(f"{manifest.dataset}-{manifest.variant}")


@dataclass(frozen=True)
class EvaluationData:
    """Data to evaluate a run on; by default, the shards that it was trained on.

    Args:
        manifest_path: path or URL of other shards.
        variant: instead, another variant of the run's survey.
        trained_path: path or URL of the shards that the run was trained on, if they were moved.
        data_dir: the data root, if it was moved.
    """

    manifest_path: str | Path | None = None
    variant: Variant | None = None
    trained_path: str | Path | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class EvaluatedRun:
    """A run, opened for an evaluation.

    Args:
        folder, recipe: of the run.
        own_shards: path or URL of the run's own shards, according to its recipe.
        cache: cache for the files of a URL.
        manifest: the shards to evaluate.
    """

    folder: RunFolder
    recipe: Recipe
    own_shards: str
    cache: CacheConfig
    manifest: Manifest

    @classmethod
    def open(cls, run_dir: Path, environ: Mapping[str, str], data: EvaluationData, tta: TTA | None) -> "EvaluatedRun":
        """Open a run and the shards to evaluate; ``tta`` replaces the recipe's ``eval.tta``, if given.

        Raises:
            UserError: there is no run or there are no shards.
        """
        folder = RunFolder(run_dir)
        recipe = read_run_recipe(folder)
        if tta is not None:
            recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"tta": tta})})
        root = data_root(data.data_dir or recipe.data.dir, environ)
        own, cache = find_manifest(recipe.data, root), find_cache(recipe.data, root)
        path = data.manifest_path or (own if data.variant is None else find_variant(recipe.data, root, data.variant))
        return cls(folder, recipe, own, cache, open_shards(path, cache))


def evaluate_run(
    run_dir: Path,
    split: str,
    environ: MutableMapping[str, str],
    data: EvaluationData | None = None,
    *,
    tta: TTA | None = None,
) -> dict[str, Any]:
    """Evaluate a run of ``launch.py`` on a split, write the results to the run folder and print the table.

    Args:
        run_dir: the run folder.
        split: ``train``, ``val`` or ``test``.
        environ: the process's environment.
        data: other data than the run's own.
        tta: test-time augmentation; None for the recipe's. Evaluations with and without it are stored side by side.

    Returns:
        The evaluation, as in its JSON file.

    Raises:
        UserError: there is no run, checkpoint or split, or the split is the margin; the shards have other classes; the run was
            trained on test galaxies.
    """
    check_not_margin(split)
    data = data or EvaluationData()
    run = EvaluatedRun.open(run_dir, environ, data, tta)
    if not has_split(run.manifest, split):
        raise UserError(
            f"{run.manifest.location} has no galaxies in a split {split!r}. It has {', '.join(run.manifest.splits)}: "
            "give --split."
        )

    def find_training_shards(trained_on: TrainingData) -> Manifest:
        return open_training_shards(trained_on, run.own_shards, data.trained_path, run.cache)

    config = run.recipe.train
    with (
        deterministic_algorithms(config.deterministic, environ),
        open_world(config.precision, environ, timeout=LONG_TIMEOUT) as world,
    ):
        world.run_on_main(lambda: check_columns(run.manifest))
        evaluator = Evaluator(
            world,
            run.folder,
            run.recipe,
            find_training_shards=find_training_shards,
            figures=True,
            trust_code=trusts_code(environ),
        )
        evaluation = evaluator.evaluate(run.manifest, split)
        world.barrier()  # launchers kill ranks that outlive the first to exit
    assert evaluation is not None
    return evaluation


def rehearse_evaluation(manifest: Manifest, recipe: Recipe) -> None:
    """Evaluate a few invented galaxies in a temporary folder, on rank 0, before a run's first step.

    A missing library, a number of classes that a figure cannot show, or a name that cannot be written would otherwise be found
    only hours later, and again at every restart.

    Args:
        manifest: the shards, for their classes.
        recipe: of the run.

    Raises:
        UserError: the disk of temporary files is full.
    """
    import pyarrow as pa

    numbers_N = torch.arange(NUM_GALAXIES)
    labels_N = numbers_N * manifest.num_classes // NUM_GALAXIES
    draws_NK = hash64(numbers_N.numpy()[:, None], np.arange(manifest.num_classes)) >> np.uint64(40)
    logits_NK = torch.from_numpy(draws_NK.astype(np.float32) / 2**22)
    shape = (NUM_GALAXIES, manifest.image_size, manifest.image_size, 3)
    images_NHWC = torch.from_numpy(np.resize(np.arange(251, dtype=np.uint8), shape))
    batch = Batch(images_NHWC, labels_N, torch.ones(NUM_GALAXIES), numbers_N, numbers_N, epoch=0, step=0)
    context = _data_context(recipe, manifest, "test")
    with tempfile.TemporaryDirectory(prefix="galaxydist-") as name:
        folder = Path(name)
        path = predictions_path(folder, stem_of("test", recipe.eval.tta))
        with RankFile(rank_file_path(path, 0), manifest.num_classes) as rank_file:
            with PredictionWriter(rank_file, image_size=manifest.image_size, threads=1) as writer:
                writer.add(batch, logits_NK, logits_NK.argmax(1))
                writer.finish()
            catalogue = pa.table({"id": [f"galaxy-{number}" for number in range(NUM_GALAXIES)]})
            info = PredictionsInfo(class_names=manifest.class_names, context=context)
            merge_predictions(path, info, [rank_file.path], catalogue, batch_size=NUM_GALAXIES)
        log = MetricsFile(folder / "metrics.jsonl")
        log.append(1, {"train/loss": 1.0, "val/loss": 1.0})
        predictions = read_predictions(path)
        summary = summarise(predictions, predictions)  # also as its own validation split, for the temperature
        # Drawing takes seconds, and figures of a few classes with plain names are tested.
        is_unusual = manifest.num_classes > 20 or not all(name.isascii() and name.isprintable() for name in manifest.class_names)
        curves, figures = summary.curves, recipe.eval.figures and is_unusual
        written = write_evaluation(folder, summary.metrics, context, metrics_log=log.path, curves=curves, figures=figures)
        render_evaluation(written, folder)
