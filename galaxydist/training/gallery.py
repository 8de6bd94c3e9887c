"""The gallery of a run: its most confident mistakes and least certain galaxies, and where in them its model looks."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import JUDGED, find_checkpoint, find_evaluation, load_judged
from galaxydist.evaluation.inference import Views
from galaxydist.evaluation.mistake_gallery import Gallery, Seen, write_mistake_gallery
from galaxydist.evaluation.mistakes import Picks, choose_mistakes
from galaxydist.evaluation.predictions import PredictionsFile, predictions_path, read_predictions
from galaxydist.evaluation.results_files import stem_of
from galaxydist.galaxy import Variant
from galaxydist.loading.dataset import TrainingData, build_augment, find_cache, find_manifest, find_variant
from galaxydist.loading.decode import read_chosen, reduction
from galaxydist.models.saliency import explain, method_of
from galaxydist.pages.contact_sheet import overlay
from galaxydist.paths import data_root
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards

# Pictures that the model sees together.
_TOGETHER = 8


def make_gallery(
    run_dir: Path,
    split: str,
    environ: Mapping[str, str],
    *,
    per_class: int = 4,
    page: Path | None = None,
    manifest_path: str | Path | None = None,
    variant: Variant | None = None,
    data_dir: Path | None = None,
    tta: Views | None = None,
    threads: int = 1,
) -> tuple[Path, Picks]:
    """Choose galaxies from the stored predictions of a run, look at them with its model, and write the gallery.

    Page, sheets and JSON go to where the predictions lie; see ``write_mistake_gallery``.

    Args:
        run_dir: the run folder.
        split: that was evaluated.
        environ: the process's environment.
        per_class: galaxies of each class and kind, at most.
        page: another place for the page.
        manifest_path: path or URL of the shards that were evaluated on; None: those that the run was trained on.
        variant: instead, another data set of the run's survey.
        data_dir: the data root.
        tta: of the evaluation, where it is not the recipe's.
        threads: that prepare pictures.

    Returns:
        The page, and what it shows.

    Raises:
        UserError: no run, no predictions, no shards there, predictions of other shards or of a checkpoint that is gone.
    """
    folder = RunFolder(run_dir)
    recipe = from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))
    tta = tta or recipe.eval.tta
    root = data_root(data_dir or recipe.data.dir, environ)
    known, cache = find_manifest(recipe.data, root), find_cache(recipe.data, root)
    manifest = open_shards(manifest_path or (known if variant is None else find_variant(recipe.data, root, variant)), cache)
    newest = store.read_sound(find_checkpoint(folder, "last"), groups=())
    evaluation_dir = find_evaluation(folder, TrainingData.from_dict(newest.state["data"]), manifest)
    command = _command(run_dir, split, tta, manifest_path, variant)
    predictions = _open_predictions(evaluation_dir, split, tta, manifest, f"galaxydist evaluate {command}")
    checkpoint = _open_checkpoint(folder, predictions, f"galaxydist evaluate {command}")
    picks = choose_mistakes(predictions, per_class)
    seen = _look(recipe, checkpoint, manifest, split, picks, threads=threads)
    gallery = Gallery(
        picks,
        seen,
        context=predictions.info.context,
        class_names=predictions.info.class_names,
        method=method_of(recipe.model.name),
        command=f"galaxydist gallery {command} --per-class {per_class}",
    )
    return write_mistake_gallery(evaluation_dir, gallery, page), picks


def _command(run_dir: Path, split: str, tta: str, manifest_path: str | Path | None, variant: str | None) -> str:
    """The arguments that name an evaluation, for ``evaluate`` and ``gallery``."""
    words = [str(run_dir), "--split", split]
    words += [] if tta == "none" else ["--tta", tta]
    words += [] if manifest_path is None else ["--manifest", str(manifest_path)]
    words += [] if variant is None else [f"data.variant={variant}"]
    return shlex.join(words)


def _open_predictions(evaluation_dir: Path, split: str, tta: str, manifest: Manifest, command: str) -> PredictionsFile:
    path = predictions_path(evaluation_dir, stem_of(split, tta))
    if not path.is_file():
        raise UserError(f"there are no predictions of the {split} split at {path}: make them with `{command}`")
    predictions = read_predictions(path)
    stored = predictions.info.context.get("manifest_hash", "")
    if stored != manifest.hash or split not in manifest.splits or manifest.splits[split].num_samples != predictions.num_galaxies:
        raise UserError(
            f"the predictions in {path} are of other shards than {manifest.location} (manifest {stored[:12]} there, "
            f"{manifest.hash[:12]} here): give theirs with --manifest FILE, or predict these with `{command}`"
        )
    return predictions


def _open_checkpoint(folder: RunFolder, predictions: PredictionsFile, command: str) -> Checkpoint:
    """The one that predicted."""
    name, step = (predictions.info.context.get(key) for key in ("checkpoint", "step"))
    path = next((path for path in store.list_checkpoints(folder.checkpoints_dir) if path.name == name), None)
    if path is None:
        raise UserError(
            f"the predictions in {predictions.path} are of checkpoint {name} (step {step}), which is no longer in "
            f"{folder.checkpoints_dir}: predict with the present one: `{command}`"
        )
    return store.read_sound(path, groups=JUDGED)


def _look(
    recipe: Recipe, checkpoint: Checkpoint, manifest: Manifest, split: str, picks: Picks, *, threads: int
) -> dict[int, Seen]:
    """The chosen galaxies by sample number, with the maps of the model for the classes that it predicts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_judged(recipe, checkpoint).to(device).eval()
    normalise = build_augment(recipe, TrainingData.from_dict(checkpoint.state["data"]), threads=threads).normalise
    predicted = {pick.sample: pick.predicted for of_class in (*picks.confident, *picks.uncertain) for pick in of_class}
    crop, size = recipe.data.crop, recipe.data.image_size
    factor = reduction(manifest.image_size, size, crop, recipe.data.augment.zoom)
    seen: dict[int, Seen] = {}
    waiting: list[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]] = []

    def flush() -> None:
        if not waiting:
            return
        samples, pictures, decoded = zip(*waiting, strict=True)
        images_BCHW = normalise(torch.from_numpy(np.stack(decoded)).to(device))
        targets_B = torch.tensor([predicted[sample] for sample in samples], device=device)
        found = explain(model, recipe.model.name, images_BCHW, targets_B)
        maps_BHW = found.maps_BHW.numpy()
        for sample, picture, map_HW, peak in zip(samples, pictures, maps_BHW, found.peaks_B.tolist(), strict=True):
            seen[sample] = Seen.small(picture, overlay(picture, map_HW, crop=crop), peak)
        waiting.clear()

    for sample, (picture, decoded) in read_chosen(manifest, split, picks.samples(), (1, factor)):
        waiting.append((sample, picture, decoded))
        if len(waiting) == _TOGETHER:
            flush()
    flush()
    return seen
