"""Gallery of a run: most confident mistakes and least certain galaxies, with saliency maps."""

import base64
import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from galaxydist.atomic_files import read_json, replace_bytes, write_json
from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import JUDGED, find_checkpoint, find_evaluation, load_judged
from galaxydist.evaluation.inference import Views
from galaxydist.evaluation.predictions import PREDICTIONS, PredictionsFile, predictions_path, read_predictions
from galaxydist.evaluation.results_files import stem_of
from galaxydist.evaluation.text_table import readable, title_of
from galaxydist.galaxy import Variant
from galaxydist.gallery.choose import SelectedGalaxy, Selection, choose_mistakes
from galaxydist.loading.dataset import TrainingData, build_augment, find_cache, find_manifest, find_variant
from galaxydist.loading.decode import read_chosen, reduction
from galaxydist.models.saliency import explain, method_of
from galaxydist.pages.contact_sheet import SheetCell, SheetRow, compose_sheet, overlay, write_sheet
from galaxydist.pages.html import image_uri, render
from galaxydist.paths import data_root
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards
from galaxydist.version import __version__

FORMAT_VERSION = 1
# Image widths in pixels: the stored width, and the page's, the first with which all images fit into _PAGE_BYTES.
THUMBNAIL = 192
_WIDTHS, _PAGE_BYTES = (THUMBNAIL, 144, 112, 88, 64), 5_000_000
_SHEET_CELL, _SHEET_BYTES = 96, 600_000
# Suffix of the file names, after the evaluation's stem.
_GALLERY = "-gallery"
KINDS = {
    "mistakes": (
        "Most confident mistakes",
        "Galaxies of each class that are taken for another, the largest predicted probability first.",
    ),
    "uncertain": (
        "Least certain galaxies",
        "Galaxies of each class whose predicted probabilities have the largest entropy, whether the largest of them is right "
        "or wrong; the least certain first.",
    ),
}


@dataclass(frozen=True, slots=True)
class RenderedGalaxy:
    """Images of a selected galaxy.

    Args:
        image: H x W x 3 uint8, as stored.
        overlay: the same with the saliency map.
        peak: peak of the map, see ``models.saliency.Saliency``.
    """

    image: NDArray[np.uint8]
    overlay: NDArray[np.uint8]
    peak: float

    @classmethod
    def small(cls, image: NDArray[np.uint8], overlay: NDArray[np.uint8], peak: float) -> "RenderedGalaxy":
        """Return the images resized to at most ``THUMBNAIL`` pixels."""
        return cls(_small(image), _small(overlay), peak)


@dataclass(frozen=True, slots=True)
class Gallery:
    """Contents of a gallery.

    Args:
        picks: the selected galaxies.
        seen: their images by sample number.
        context: context of the predictions.
        class_names: class names by label.
        method: saliency method.
        command: the command that makes this gallery, for the page.
    """

    picks: Selection
    seen: Mapping[int, RenderedGalaxy]
    context: Mapping[str, Any]
    class_names: Sequence[str]
    method: str
    command: str

    @property
    def title(self) -> str:
        return title_of({**self.context, "count": sum(self.picks.num_galaxies)})

    def chosen(self, kind: str) -> tuple[tuple[SelectedGalaxy, ...], ...]:
        """Return the selected galaxies of a kind (a key of ``KINDS``) by true class."""
        return self.picks.confident if kind == "mistakes" else self.picks.uncertain

    def name(self, label: int) -> str:
        return readable(self.class_names[label])


def write_mistake_gallery(evaluation_dir: Path, gallery: Gallery, page: Path | None = None) -> Path:
    """Write the page ``<stem>-gallery.html``, a contact sheet ``<stem>-gallery-<kind>.jpg`` per kind, and last the JSON file.

    Args:
        evaluation_dir: existing folder of the predictions.
        gallery: contents of the gallery.
        page: another path for the page; its folder is created.

    Returns:
        The path of the page.

    Raises:
        UserError: the disk is full.
    """
    context, stem = gallery.context, _stem(gallery.context["split"], gallery.context.get("tta", "none"))
    (evaluation_dir / f"{stem}.json").unlink(missing_ok=True)  # its presence means that the sheets belong to it
    for kind in KINDS:
        compose = functools.partial(compose_sheet, list(_rows(kind, gallery)), f"{KINDS[kind][0]}: {gallery.title}")
        write_sheet(evaluation_dir / f"{stem}-{kind}.jpg", compose, cell=_SHEET_CELL, max_bytes=_SHEET_BYTES)
    page = page or evaluation_dir / f"{stem}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(page, _render(gallery).encode())
    content = {
        "format": FORMAT_VERSION,
        "galaxydist": __version__,
        **context,
        "classes": list(gallery.class_names),
        "saliency": gallery.method,
        "num_undefined": gallery.picks.num_undefined,
    }
    for kind in KINDS:
        chosen = [[asdict(pick) for pick in of_class] for of_class in gallery.chosen(kind)]
        content[kind] = {"caption": _caption(kind, gallery), "chosen": chosen}
    write_json(evaluation_dir / f"{stem}.json", content)
    return page


def gallery_sections(predictions: Path) -> list[tuple[str, str, str]]:
    """Return the contact sheets of a written gallery, for another page.

    Args:
        predictions: the predictions file in the gallery's folder.

    Returns:
        (title, data URI of a JPEG, caption) of each sheet; empty if there is no gallery of these predictions.
    """
    stem = f"{predictions.name.removesuffix(PREDICTIONS)}{_GALLERY}"
    try:
        content = read_json(predictions.with_name(f"{stem}.json"))
        context = read_predictions(predictions).info.context
        if content["format"] != FORMAT_VERSION or any(content.get(name) != value for name, value in context.items()):
            return []
        return [
            (KINDS[kind][0], _data_uri(predictions.with_name(f"{stem}-{kind}.jpg")), content[kind]["caption"]) for kind in KINDS
        ]
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return []


def describe(pick: SelectedGalaxy, class_names: Sequence[str]) -> str:
    """Describe a galaxy in one line: id, true class, predicted class, probability."""
    true, predicted = readable(class_names[pick.label]), readable(class_names[pick.predicted])
    return f"{pick.id}: true {true}, predicted {predicted} ({_percent(pick.probability)})"


def _stem(split: str, tta: str) -> str:
    return f"{stem_of(split, tta)}{_GALLERY}"


def _rows(kind: str, gallery: Gallery) -> Iterator[SheetRow]:
    for label, of_class in enumerate(gallery.chosen(kind)):
        cells = []
        for pick in of_class:
            said = f"{'predicted' if pick.is_mistake else 'right:'} {gallery.name(pick.predicted)}"
            entropy = f", entropy {pick.entropy:.2f}" if kind == "uncertain" else ""
            seen = gallery.seen[pick.sample]
            cells.append(SheetCell(seen.image, seen.overlay, (pick.id, said, _percent(pick.probability) + entropy)))
        yield SheetRow(gallery.name(label), _note(kind, label, gallery), cells)


def _note(kind: str, label: int, gallery: Gallery) -> str:
    count, wrong = gallery.picks.num_galaxies[label], gallery.picks.num_mistakes[label]
    shown = len(gallery.chosen(kind)[label])
    if not count:
        return "no galaxies"
    if kind == "mistakes":
        return f"{shown} of {wrong:,} mistakes among {count:,} galaxies" if wrong else f"no mistake among {count:,} galaxies"
    return f"{shown} of {count:,} galaxies"


def _section(kind: str, gallery: Gallery) -> dict[str, Any]:
    classes = [
        {
            "name": gallery.name(label),
            "note": _note(kind, label, gallery),
            "galaxies": [
                {
                    "pick": pick,
                    "text": describe(pick, gallery.class_names),
                    "predicted": gallery.name(pick.predicted),
                    "percent": _percent(pick.probability),
                    "label_percent": _percent(pick.label_probability),
                    "peak": _peak(gallery.seen[pick.sample].peak, gallery.method),
                }
                for pick in of_class
            ],
        }
        for label, of_class in enumerate(gallery.chosen(kind))
    ]
    return {"kind": kind, "title": KINDS[kind][0], "caption": _caption(kind, gallery), "classes": classes}


def _render(gallery: Gallery) -> str:
    picks, context = gallery.picks, gallery.context
    return render(
        "mistakes.html",
        {
            "title": gallery.title,
            "sections": [_section(kind, gallery) for kind in KINDS],
            "uris": _uris(gallery.seen),
            "picks": picks,
            "context": context,
            "method": gallery.method,
            "tta": context.get("tta", "none"),
            "total": sum(picks.num_galaxies),
            "mistakes": sum(picks.num_mistakes),
            "provenance": {"version": __version__, "command": gallery.command},
        },
    )


def _uris(seen: Mapping[int, RenderedGalaxy]) -> dict[int, tuple[str, str]]:
    """Return the data URIs of both images by sample number, as large as ``_PAGE_BYTES`` allows; the page may show each twice."""
    uris: dict[int, tuple[str, str]] = {}
    for width in _WIDTHS:
        uris = {
            sample: (image_uri(found.image, width=width), image_uri(found.overlay, width=width)) for sample, found in seen.items()
        }
        if 2 * sum(len(one) + len(other) for one, other in uris.values()) <= _PAGE_BYTES:
            break
    return uris


def _caption(kind: str, gallery: Gallery) -> str:
    num_undefined, method = gallery.picks.num_undefined, gallery.method
    left_out = f" {num_undefined:,} galaxies without finite probabilities are left out." if num_undefined else ""
    what = "evidence for the predicted class" if method == "Grad-CAM" else "the same for every class"
    return (
        f"{KINDS[kind][1]} Each as it is stored and, beside it, with the {method} of the model over it ({what}; violet little, "
        f"yellow most); below: id, predicted class, its probability.{left_out}"
    )


def _peak(peak: float, method: str) -> str:
    return f"{method}: zero everywhere" if peak == 0 else f"{method} peak {peak:.1f} × mean"


def _percent(probability: float) -> str:
    share = 100 * probability
    return f"{share:.0f} %" if share < 99.5 else ("> 99.9 %" if share > 99.9 else f"{share:.1f} %")


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.shape[1] <= THUMBNAIL:
        return image
    return np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))


def _data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


# Batch size of the model.
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
) -> tuple[Path, Selection]:
    """Select galaxies from the stored predictions of a run, compute saliency maps with its model, and write the gallery.

    Page, sheets and JSON are written to the folder of the predictions; see ``write_mistake_gallery``.

    Args:
        run_dir: the run folder.
        split: the evaluated split.
        environ: the process's environment.
        per_class: maximum number of galaxies per class and kind.
        page: another path for the page.
        manifest_path: path or URL of the manifest of the evaluated shards; None for the shards the run was trained on.
        variant: another variant of the run's survey, instead of ``manifest_path``.
        data_dir: the data root.
        tta: test-time augmentation of the evaluation; None for the recipe's.
        threads: threads that prepare images.

    Returns:
        The path of the page, and the selection.

    Raises:
        UserError: no run, predictions or shards; the predictions are of other shards or of a deleted checkpoint.
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
    """Return the arguments that identify an evaluation, for the commands ``evaluate`` and ``gallery``."""
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
    """Open the checkpoint that made the predictions."""
    name, step = (predictions.info.context.get(key) for key in ("checkpoint", "step"))
    path = next((path for path in store.list_checkpoints(folder.checkpoints_dir) if path.name == name), None)
    if path is None:
        raise UserError(
            f"the predictions in {predictions.path} are of checkpoint {name} (step {step}), which is no longer in "
            f"{folder.checkpoints_dir}: predict with the present one: `{command}`"
        )
    return store.read_sound(path, groups=JUDGED)


def _look(
    recipe: Recipe, checkpoint: Checkpoint, manifest: Manifest, split: str, picks: Selection, *, threads: int
) -> dict[int, RenderedGalaxy]:
    """Render the selected galaxies, by sample number, with saliency maps of the predicted classes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_judged(recipe, checkpoint).to(device).eval()
    normalise = build_augment(recipe, TrainingData.from_dict(checkpoint.state["data"]), threads=threads).normalise
    predicted = {pick.sample: pick.predicted for of_class in (*picks.confident, *picks.uncertain) for pick in of_class}
    crop, size = recipe.data.crop, recipe.data.image_size
    factor = reduction(manifest.image_size, size, crop, recipe.data.augment.zoom)
    seen: dict[int, RenderedGalaxy] = {}
    waiting: list[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]] = []

    def flush() -> None:
        if not waiting:
            return
        samples, images, decoded = zip(*waiting, strict=True)
        images_BCHW = normalise(torch.from_numpy(np.stack(decoded)).to(device))
        targets_B = torch.tensor([predicted[sample] for sample in samples], device=device)
        found = explain(model, recipe.model.name, images_BCHW, targets_B)
        maps_BHW = found.maps_BHW.numpy()
        for sample, image, map_HW, peak in zip(samples, images, maps_BHW, found.peaks_B.tolist(), strict=True):
            seen[sample] = RenderedGalaxy.small(image, overlay(image, map_HW, crop=crop), peak)
        waiting.clear()

    for sample, (image, decoded) in read_chosen(manifest, split, picks.samples(), (1, factor)):
        waiting.append((sample, image, decoded))
        if len(waiting) == _TOGETHER:
            flush()
    flush()
    return seen
