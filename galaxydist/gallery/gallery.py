"""Gallery of a run: most confident mistakes and least certain galaxies, with saliency maps."""

import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from galaxydist.atomic_files import read_json, replace_bytes, write_json
from galaxydist.checkpoints import store
from galaxydist.checkpoints.store import Checkpoint
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.evaluation.evaluator import EvaluatedRun, EvaluationData, find_evaluation_dir
from galaxydist.evaluation.inference import TTA
from galaxydist.evaluation.predictions import PREDICTIONS, PredictionsFile, predictions_path, read_predictions
from galaxydist.evaluation.results_files import stem_of
from galaxydist.evaluation.run_model import MODEL_GROUPS, find_checkpoint, load_model
from galaxydist.evaluation.text_table import readable, title_of
from galaxydist.gallery.choose import ByClass, SelectedGalaxy, Selection, choose_mistakes
from galaxydist.loading.decode import read_samples, reduction
from galaxydist.loading.training_data import TrainingData, build_augment
from galaxydist.models.own_function import trusts_code
from galaxydist.models.registry import architecture_of
from galaxydist.models.saliency import explain
from galaxydist.pages.contact_sheet import SheetCell, SheetRow, compose_sheet, overlay, write_sheet
from galaxydist.pages.html import image_uri, jpeg_uri, render
from galaxydist.version import __version__

FORMAT_VERSION = 1
# Image widths in pixels: the rendered width, and the page's, the first with which all images fit into _PAGE_BYTES.
THUMBNAIL = 192
_WIDTHS, _PAGE_BYTES = (THUMBNAIL, 144, 112, 88, 64), 5_000_000
_SHEET_CELL, _SHEET_BYTES = 96, 600_000
# Suffix of the file names, after the evaluation's stem.
_GALLERY = "-gallery"
# Batch size of the model.
_BATCH_SIZE = 8
KINDS = {
    "mistakes": (
        "Most confident mistakes",
        "Misclassified galaxies of each true class, the largest predicted probability first.",
    ),
    "uncertain": (
        "Least certain galaxies",
        "Galaxies of each true class whose predicted probabilities have the largest entropy, the largest first; right or wrong.",
    ),
}


@dataclass(frozen=True, slots=True)
class RenderedGalaxy:
    """Images of a selected galaxy, at most ``THUMBNAIL`` pixels wide.

    Args:
        image: H x W x 3 uint8, as stored.
        overlay: the same with the saliency map.
        method, peak: of the map, see ``models.saliency.Saliency``; without a map both are empty and the overlay is the image.
    """

    image: NDArray[np.uint8]
    overlay: NDArray[np.uint8]
    method: str = ""
    peak: float = 0.0


@dataclass(frozen=True, slots=True)
class Gallery:
    """Contents of a gallery.

    Args:
        selection: the selected galaxies.
        images: their images by sample number.
        context: context of the predictions.
        class_names: class names by label.
        command: the command that makes this gallery, for the page.
    """

    selection: Selection
    images: Mapping[int, RenderedGalaxy]
    context: Mapping[str, Any]
    class_names: Sequence[str]
    command: str

    @property
    def method(self) -> str:
        """Saliency method; empty for a model without saliency maps."""
        return next((found.method for found in self.images.values()), "")

    @property
    def title(self) -> str:
        return title_of({**self.context, "count": sum(self.selection.num_galaxies)})

    def galaxies(self, kind: str) -> ByClass:
        """Return the selected galaxies of a kind (a key of ``KINDS``)."""
        return self.selection.confident if kind == "mistakes" else self.selection.uncertain

    def name(self, label: int) -> str:
        return readable(self.class_names[label])

    def caption(self, kind: str) -> str:
        left_out = f" {self.selection.num_undefined:,} galaxies without finite probabilities are left out."
        shown = self._map_caption() if self.method else "This model has no map of the image that could be shown over it."
        return (
            f"{KINDS[kind][1]} {shown} Below: id, predicted class and its probability."
            f"{left_out if self.selection.num_undefined else ''}"
        )

    def _map_caption(self) -> str:
        meaning = "evidence for the predicted class" if self.method == "Grad-CAM" else "the same for every class"
        return (
            f"Each image is shown as stored and with the model's {self.method} map over it ({meaning}; violet: least, "
            "yellow: most)."
        )

    def note(self, kind: str, label: int) -> str:
        """Return the number of shown galaxies of a class, for its heading."""
        count, wrong = self.selection.num_galaxies[label], self.selection.num_mistakes[label]
        shown = len(self.galaxies(kind)[label])
        if not count:
            return "no galaxies"
        if kind == "mistakes":
            return f"{shown} of {wrong:,} mistakes among {count:,} galaxies" if wrong else f"no mistake among {count:,} galaxies"
        return f"{shown} of {count:,} galaxies"

    def describe(self, galaxy: SelectedGalaxy) -> str:
        """Describe a galaxy in one line: id, true class, predicted class, probability."""
        predicted = f"{self.name(galaxy.predicted)} ({_percent(galaxy.probability)})"
        return f"{galaxy.id}: true {self.name(galaxy.label)}, predicted {predicted}"


def write_gallery_files(evaluation_dir: Path, gallery: Gallery, page: Path | None = None) -> Path:
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
    context = gallery.context
    stem = f"{stem_of(context['split'], context.get('tta', 'none'))}{_GALLERY}"
    (evaluation_dir / f"{stem}.json").unlink(missing_ok=True)  # its presence means that the sheets belong to it
    for kind in KINDS:
        compose = functools.partial(compose_sheet, list(_sheet_rows(kind, gallery)), f"{KINDS[kind][0]}: {gallery.title}")
        write_sheet(evaluation_dir / f"{stem}-{kind}.jpg", compose, cell=_SHEET_CELL, max_bytes=_SHEET_BYTES)
    page = page or evaluation_dir / f"{stem}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(page, _render_page(gallery).encode())
    content = {
        "format": FORMAT_VERSION,
        "galaxydist": __version__,
        **context,
        "classes": list(gallery.class_names),
        "saliency": gallery.method,
        "num_undefined": gallery.selection.num_undefined,
    }
    for kind in KINDS:
        chosen = [[asdict(galaxy) for galaxy in of_class] for of_class in gallery.galaxies(kind)]
        content[kind] = {"caption": gallery.caption(kind), "chosen": chosen}
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
        sheets = {kind: predictions.with_name(f"{stem}-{kind}.jpg").read_bytes() for kind in KINDS}
        return [(KINDS[kind][0], jpeg_uri(sheet), content[kind]["caption"]) for kind, sheet in sheets.items()]
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return []


def _sheet_rows(kind: str, gallery: Gallery) -> Iterator[SheetRow]:
    for label, of_class in enumerate(gallery.galaxies(kind)):
        cells = []
        for galaxy in of_class:
            prediction = f"{'predicted' if galaxy.is_mistake else 'right:'} {gallery.name(galaxy.predicted)}"
            entropy = f", entropy {galaxy.entropy:.2f}" if kind == "uncertain" else ""
            images, lines = gallery.images[galaxy.sample], (galaxy.id, prediction, _percent(galaxy.probability) + entropy)
            cells.append(SheetCell(images.image, images.overlay, lines))
        yield SheetRow(gallery.name(label), gallery.note(kind, label), cells)


def _render_page(gallery: Gallery) -> str:
    selection, context = gallery.selection, gallery.context

    def describe(galaxy: SelectedGalaxy) -> dict[str, Any]:
        return {
            "selected": galaxy,
            "text": gallery.describe(galaxy),
            "predicted": gallery.name(galaxy.predicted),
            "percent": _percent(galaxy.probability),
            "label_percent": _percent(galaxy.label_probability),
            "peak": _peak(gallery.images[galaxy.sample].peak, gallery.method),
        }

    galleries = [
        {
            "kind": kind,
            "title": title,
            "caption": gallery.caption(kind),
            "classes": [
                {"name": gallery.name(label), "note": gallery.note(kind, label), "galaxies": [*map(describe, of_class)]}
                for label, of_class in enumerate(gallery.galaxies(kind))
            ],
        }
        for kind, (title, _) in KINDS.items()
    ]
    return render(
        "mistakes.html",
        {
            "title": gallery.title,
            "sections": [*((kind, title) for kind, (title, _) in KINDS.items()), ("reading", "How to read it")],
            "galleries": galleries,
            "uris": _uris(gallery.images),
            "num_undefined": selection.num_undefined,
            "context": context,
            "method": gallery.method,
            "tta": context.get("tta", "none"),
            "total": sum(selection.num_galaxies),
            "mistakes": sum(selection.num_mistakes),
            "provenance": {"version": __version__, "command": gallery.command},
        },
    )


def _uris(images: Mapping[int, RenderedGalaxy]) -> dict[int, tuple[str, str]]:
    """Return the data URIs of both images by sample number, as large as ``_PAGE_BYTES`` allows; the page may show each twice."""
    uris: dict[int, tuple[str, str]] = {}
    for width in _WIDTHS:
        uris = {
            sample: (image_uri(found.image, width=width), image_uri(found.overlay, width=width))
            for sample, found in images.items()
        }
        if 2 * sum(len(one) + len(other) for one, other in uris.values()) <= _PAGE_BYTES:
            break
    return uris


def _peak(peak: float, method: str) -> str:
    if not method:
        return ""
    return f"{method}: zero everywhere" if peak == 0 else f"{method} peak {peak:.1f} × mean"


def _percent(probability: float) -> str:
    share = 100 * probability
    return f"{share:.0f} %" if share < 99.5 else ("> 99.9 %" if share > 99.9 else f"{share:.1f} %")


def make_gallery(
    run_dir: Path,
    split: str,
    environ: Mapping[str, str],
    data: EvaluationData | None = None,
    *,
    per_class: int = 4,
    page: Path | None = None,
    tta: TTA | None = None,
) -> tuple[Path, Selection]:
    """Select galaxies from the stored predictions of a run, compute saliency maps with its model, and write the gallery.

    Page, sheets and JSON are written to the folder of the predictions; see ``write_gallery_files``.

    Args:
        run_dir: the run folder.
        split: the evaluated split.
        environ: the process's environment.
        data: the evaluated data, if not the run's own.
        per_class: maximum number of galaxies per class and kind.
        page: another path for the page.
        tta: test-time augmentation of the evaluation; None for the recipe's.

    Returns:
        The path of the page, and the selection.

    Raises:
        UserError: no run, predictions or shards; the predictions are of other shards or of a deleted checkpoint.
    """
    data = data or EvaluationData()
    run = EvaluatedRun.open(run_dir, environ, data, tta)
    newest = store.read_sound(find_checkpoint(run.folder, "last"), groups=())
    evaluation_dir = find_evaluation_dir(run.folder, TrainingData.from_dict(newest.state["data"]), run.manifest)
    arguments = _arguments(run_dir, split, run.recipe.eval.tta, data)
    evaluate = f"galaxydist evaluate {arguments}"
    predictions = _open_predictions(evaluation_dir, split, run, evaluate)
    checkpoint = _open_checkpoint(run, predictions, evaluate)
    selection = choose_mistakes(predictions, per_class)
    gallery = Gallery(
        selection,
        dict(_render_galaxies(run, checkpoint, split, selection, trust_code=trusts_code(environ))),
        context=predictions.info.context,
        class_names=predictions.info.class_names,
        command=f"galaxydist gallery {arguments} --per-class {per_class}",
    )
    return write_gallery_files(evaluation_dir, gallery, page), selection


def _arguments(run_dir: Path, split: str, tta: str, data: EvaluationData) -> str:
    """Return the arguments that identify an evaluation, for the commands ``evaluate`` and ``gallery``."""
    words = [str(run_dir), "--split", split]
    words += [] if tta == "none" else ["--tta", tta]
    words += [] if data.manifest_path is None else ["--manifest", str(data.manifest_path)]
    words += [] if data.variant is None else [f"data.variant={data.variant}"]
    return shlex.join(words)


def _open_predictions(evaluation_dir: Path, split: str, run: EvaluatedRun, command: str) -> PredictionsFile:
    path, manifest = predictions_path(evaluation_dir, stem_of(split, run.recipe.eval.tta)), run.manifest
    if not path.is_file():
        raise UserError(f"there are no predictions of the {split} split at {path}: make them with `{command}`")
    predictions = read_predictions(path)
    stored = predictions.info.context.get("manifest_hash", "")
    if stored != manifest.hash or split not in manifest.splits or manifest.splits[split].num_samples != predictions.num_galaxies:
        raise UserError(
            f"the predictions in {path} are of other shards than {manifest.location} (manifest {stored[:12]}, not "
            f"{manifest.hash[:12]}): give the predictions' shards with --manifest FILE, or predict these with `{command}`"
        )
    return predictions


def _open_checkpoint(run: EvaluatedRun, predictions: PredictionsFile, command: str) -> Checkpoint:
    """Open the checkpoint that made the predictions."""
    name, step = (predictions.info.context.get(key) for key in ("checkpoint", "step"))
    checkpoints_dir = run.folder.checkpoints_dir
    path = next((path for path in store.list_checkpoints(checkpoints_dir) if path.name == name), None)
    if path is None:
        raise UserError(
            f"the predictions in {predictions.path} are of checkpoint {name} (step {step}), which is no longer in "
            f"{checkpoints_dir}: predict with the present one: `{command}`"
        )
    return store.read_sound(path, groups=MODEL_GROUPS)


def _render_galaxies(
    run: EvaluatedRun, checkpoint: Checkpoint, split: str, selection: Selection, *, trust_code: bool
) -> Iterator[tuple[int, RenderedGalaxy]]:
    """Yield sample number and images of the selected galaxies, with saliency maps of the predicted classes."""
    recipe, manifest = run.recipe, run.manifest
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(recipe, checkpoint, trust_code=trust_code).to(device).eval()
    architecture = architecture_of(recipe.model, model)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    normalise = build_augment(recipe, trained_on, threads=available_cores()).normalise
    predicted, crop = selection.predicted_classes(), recipe.data.crop
    factor = reduction(manifest.image_size, recipe.data.image_size, crop, recipe.data.augment.zoom)
    stored = read_samples(manifest, split, np.array([*predicted], np.int64), (1, factor))
    while batch := list(islice(stored, _BATCH_SIZE)):
        images_BCHW = normalise(torch.from_numpy(np.stack([decoded for _, (_, decoded) in batch])).to(device))
        targets_B = torch.tensor([predicted[sample] for sample, _ in batch], device=device)
        found = explain(model, architecture, images_BCHW, targets_B)
        for number, (sample, (image, _)) in enumerate(batch):
            if found is None:
                yield sample, RenderedGalaxy(_thumbnail(image), _thumbnail(image))
            else:
                blended = overlay(image, found.maps_BHW[number].numpy(), crop=crop)
                yield sample, RenderedGalaxy(_thumbnail(image), _thumbnail(blended), found.method, float(found.peaks_B[number]))


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.shape[1] <= THUMBNAIL:
        return image
    return np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))
