"""Publication of a run: weights, preprocessing, ONNX, model card and reference galaxies in one folder for others.

``serving/app/published_model.py`` describes the files. ``config.json`` is written last, with the SHA-256 of the others.
"""

import dataclasses
import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save

from galaxydist.atomic_files import file_sha256, to_json, write_bytes
from galaxydist.errors import UserError
from galaxydist.evaluation.text_table import readable
from galaxydist.models.weights import describe_weights
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.published_folder import PART, PublishedRecord, is_published
from galaxydist.prediction.trained_model import ModelChoice, TrainedModel, open_trained_model
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.identity import flatten
from galaxydist.recipe.model_names import parse_model_name
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.serving.app.published_model import (
    CARD,
    CONFIG,
    EXAMPLES,
    ONNX,
    PROGRAM,
    REFERENCE,
    RESULTS,
    THUMBNAILS,
    WEIGHTS,
    AppConfig,
    PictureForm,
)
from galaxydist.serving.model_card import collect_results, model_card
from galaxydist.serving.model_export import checked_galaxies, export_onnx, export_program
from galaxydist.serving.reference_galaxies import COUNT, write_reference
from galaxydist.serving.timm_config import (
    LEAST_AGREEMENT,
    build_timm_keys,
    compare_with_timm,
    describe_agreement,
    measure_agreement,
    prepares_alike,
)
from galaxydist.serving.whole_folder import check_target, whole_folder
from galaxydist.surveys.data_origin import DataOrigin, is_non_commercial, legacy_layer, model_licence
from galaxydist.tracking.run_info import nested, without_secrets
from galaxydist.version import __version__

logger = logging.getLogger(__name__)

# All files and folders that a publication may write, and what the Hub's clients add to a copy.
WRITTEN = (CONFIG, WEIGHTS, ONNX, PROGRAM, CARD, RESULTS, REFERENCE, THUMBNAILS, EXAMPLES, ".gitattributes", ".cache")
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LIBRARIES = ("torch", "timm", "safetensors")
# Run settings on which the last bits of the logits depend.
_KEPT_RUN_FIELDS = ("train.channels_last",)
# Parts of the deviations below which the preparation divides by 0.001 (loading/augment.py).
MIN_STD = 1e-3


@dataclass(frozen=True)
class PublishOptions:
    """Options of a publication.

    Args:
        choice: checkpoint, test-time augmentation, place of the training shards, trust in code.
        title: name of the model for people; None: recipe and data set.
        onnx: write the ONNX file, which the app runs.
        program: write the archive of ``torch.export``.
        repo: ``OWNER/NAME`` on the Hub, for the commands in the model card.
        overwrite: replace a published folder.
        reference: largest number of training galaxies whose embeddings are stored; 0: none.
        quick: store fewer of them, and measure nothing on them: for the first start of the app.
        made_from: mark by which the caller knows the folder again; see ``PublishedRecord``.
    """

    choice: ModelChoice = field(default_factory=ModelChoice)
    title: str | None = None
    onnx: bool = True
    program: bool = True
    repo: str | None = None
    overwrite: bool = False
    reference: int = COUNT
    quick: bool = False
    made_from: str = ""


@dataclass(frozen=True)
class PublishReport:
    """Result of a publication.

    Args:
        folder: the published folder.
        sizes: bytes by file, folders summed.
        notes: sentences for the user: what is missing and why.
        loads_in_timm: ``timm.create_model("local-dir:DIR")`` loads it.
        needs_code: loading it runs a function of the user's own.
    """

    folder: Path
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    loads_in_timm: bool = False
    needs_code: bool = False


def publish(run: Path, out: Path, environ: Mapping[str, str], options: PublishOptions | None = None) -> PublishReport:
    """Write the published folder of a run; it appears only when it is whole.

    Args:
        run: the run folder.
        out: the folder to write.
        environ: the process's environment.
        options: parts, title and checkpoint.

    Raises:
        UserError: there is no run or no checkpoint; the folder exists; packages for ONNX are missing; the given shards are not
            those of the training; the model cannot be exported; a full disk.
    """
    options = options or PublishOptions()
    check_target(out, overwrite=options.overwrite, is_ours=is_published, names=WRITTEN)
    check_packages(options)
    trained = open_trained_model(run, environ, options.choice)
    trained.model.eval()
    if options.choice.trained_on is not None:
        trained.open_shards(environ, options.choice.trained_on)  # wrong ones are an error; none are a note
    with whole_folder(out) as folder:
        written = Publication(trained, options, folder, environ)
        written.write()
    needs_code = parse_model_name(trained.recipe.model.name).kind == "function"
    return PublishReport(out, sizes_of(out), tuple(written.notes), written.loads_in_timm, needs_code)


def check_packages(options: PublishOptions) -> None:
    """Refuse to write ONNX without the packages for it.

    Raises:
        UserError: packages are missing; the text has the command that installs them.
    """
    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if options.onnx and missing:
        raise UserError(
            f"the ONNX file needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'galaxydist[export]', or publish without it: --no-onnx"
        )


class Publication:
    """Writes the files of one published folder.

    Args:
        trained: the run's model, in evaluation mode.
        options: parts and title.
        folder: an empty folder.
        environ: names the data root of the run's shards.
    """

    def __init__(self, trained: TrainedModel, options: PublishOptions, folder: Path, environ: Mapping[str, str]) -> None:
        self.trained, self.options, self.folder, self.environ = trained, options, folder, environ
        self.notes = list(trained.notes)
        self.loads_in_timm = False
        self._app = describe_app(trained, options.title)

    def write(self) -> None:
        """Write all files, ``config.json`` last."""
        self._write_weights()
        self._export()
        results = self._collect_results()
        keys = self._timm_keys(results)
        record = self._record()
        write_bytes(self.folder / RESULTS, to_json(results).encode())
        record = dataclasses.replace(record, files=hash_files(self.folder))
        config = {**keys, PART: record.to_dict(), "app": self._app.to_dict()}
        write_bytes(self.folder / CARD, model_card(config, results).encode())
        write_bytes(self.folder / CONFIG, to_json(config).encode())

    def _write_weights(self) -> None:
        trained = self.trained
        # Copies, because a file cannot hold one memory under two names.
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in trained.model.state_dict().items()}
        metadata = describe_weights(trained.trained_on.statistics, trained.recipe.model, trained.recipe.data)
        write_bytes(self.folder / WEIGHTS, save(tensors, metadata))

    def _export(self) -> None:
        if not (self.options.onnx or self.options.program):
            return
        trained, choice = self.trained, self.options.choice
        images_BCHW = checked_galaxies(trained, self.environ, choice.trained_on)
        if self.options.onnx:
            logger.info("writing %s", ONNX)
            found = export_onnx(trained, self.folder / ONNX, describe_onnx(self._app), images_BCHW)
            self._app = dataclasses.replace(self._app, saliency=found.saliency)
        if self.options.program:
            logger.info("writing %s", PROGRAM)
            export_program(trained, self.folder / PROGRAM, images_BCHW)

    def _collect_results(self) -> dict[str, Any]:
        options = self.options
        results = collect_results(RunFolder(self.trained.path), self.trained)
        if not options.reference:
            return results
        logger.info("storing training galaxies")
        place, count = options.choice.trained_on, options.reference
        try:
            return results | write_reference(
                self.trained, self.folder, self.environ, count=count, manifest=place, quick=options.quick
            )
        except UserError as error:
            self.notes.append(f"no training galaxies are stored, so that neither similar nor unlike ones are found: {error}")
        (self.folder / REFERENCE).unlink(missing_ok=True)
        for name in (THUMBNAILS, EXAMPLES):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return results

    def _timm_keys(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return timm's keys if it loads the model, and its transform gives the run's classes; add the measurement to results."""
        keys = build_timm_keys(self.trained, self._app.form, licence_of(self.trained))
        if keys is None:
            return {}
        reason = compare_with_timm(self.trained, keys, self.folder / WEIGHTS)
        if reason is not None:
            self.notes.append(f"timm does not load the folder: {reason}")
            return {}
        if not prepares_alike(self._app.form):
            measured = self._measure_agreement(keys)
            self.notes.append(
                f"{describe_agreement(measured)} Use galaxydist.load_predictor or the ONNX file for the run's numbers"
            )
            results |= {"timm": measured} if measured else {}
            if measured and measured["same_class"] < LEAST_AGREEMENT * measured["galaxies"]:
                self.notes.append(
                    f"timm's keys are left out of config.json: they need the same class for {LEAST_AGREEMENT:.0%} of these "
                    "galaxies"
                )
                return {}
        self.loads_in_timm = True
        return keys

    def _measure_agreement(self, keys: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.options.quick:
            return None
        try:
            shards = self.trained.open_shards(self.environ, self.options.choice.trained_on)
            return measure_agreement(self.trained, keys, shards)
        except UserError as error:
            logger.debug("timm's transform is not compared: %s", error)
            return None

    def _record(self) -> PublishedRecord:
        trained = self.trained
        return PublishedRecord(
            version=__version__,
            run=trained.path.absolute().name,
            recipe=plain_recipe(trained.recipe, trained.stored.dataset),
            seed=trained.recipe.seed,
            data=dataclasses.replace(trained.trained_on, stored=trained.stored).to_dict(),
            model=_without_paths(trained.started_from.to_dict()),
            checkpoint=trained.checkpoint,
            step=trained.step,
            temperature=trained.temperature,
            libraries={name: version(name) for name in LIBRARIES},
            repo=self.options.repo,
            made_from=self.options.made_from,
        )


def describe_app(trained: TrainedModel, title: str | None) -> AppConfig:
    """Return the part ``app`` of ``config.json``, without the method of the saliency maps."""
    recipe, stored = trained.recipe, trained.stored
    form = ImageForm.of(stored, recipe.data)
    origin = stored.origin or DataOrigin()
    red, green, blue = (max(std, MIN_STD) for std in trained.trained_on.channel_std)
    return AppConfig(
        title=title or f"{recipe.name} on {stored.dataset}",
        classes=tuple(map(readable, trained.class_names)),
        form=PictureForm(
            image_size=recipe.data.image_size,
            stored_size=stored.image_size,
            factor=form.factor,
            crop=recipe.data.crop,
            mean=trained.trained_on.channel_mean,
            std=(red, green, blue),
            source_sides=stored.source_sides,
            pixel_scale=stored.pxscale,
        ),
        temperature=trained.temperature,
        tta=recipe.eval.tta,
        dataset=stored.dataset,
        licence=origin.licence,
        citation=origin.citation,
        is_non_commercial=is_non_commercial(licence_of(trained)),
        layer=legacy_layer(stored.dataset),
    )


def licence_of(trained: TrainedModel) -> str | None:
    """Return the strictest of the licences of a model's training data and of the weights that it started from."""
    data = None if trained.stored.origin is None else trained.stored.origin.licence
    record = trained.started_from
    return model_licence([data, *([record.licence] if record.source is not None else [])])


def describe_onnx(app: AppConfig) -> dict[str, str]:
    """Return the metadata of the ONNX file: all that a program needs to prepare a picture and to name a class."""
    form = app.form
    values = {
        "title": app.title,
        "classes": list(app.classes),
        "mean": list(form.mean),
        "std": list(form.std),
        "image_size": form.image_size,
        "stored_size": form.stored_size,
        "factor": form.factor,
        "crop": form.crop,
        "pixel_scale": None if form.pixel_scale is None else list(form.pixel_scale),
        "source_sides": None if form.source_sides is None else list(form.source_sides),
        "temperature": app.temperature,
        "licence": app.licence,
        "galaxydist": __version__,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items() if value is not None}


def plain_recipe(recipe: Recipe, dataset: str) -> dict[str, Any]:
    """Return the recipe as nested plain values that ``from_dict`` reads, without secrets and without paths of this machine.

    Settings that change the execution of a run only, and not its numbers, are left out.

    Args:
        recipe: of the run.
        dataset: name of the data set in the shards, which counts if the recipe names shards by their place.
    """
    values = {
        key: value for key, value in flatten(recipe).items() if RECIPE.fields[key].kind == "result" or key in _KEPT_RUN_FIELDS
    }
    if values.get("model.weights"):
        values["model.weights"] = Path(values["model.weights"]).name
    if values["data.manifest"] is not None:
        values["data.dataset"] = dataset
        values["data.manifest"] = values["data.manifest"] if "://" in values["data.manifest"] else None
    values["model.name"] = _without_path(values["model.name"])
    return nested(values)


def _without_path(name: str) -> str:
    """Return a model's name or source; of a local folder, the last part only."""
    try:
        reference = parse_model_name(name)
    except ValueError:
        return name
    return f"local-dir:{Path(reference.name).name}" if reference.kind == "local-dir" else name


def _without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    source = record.get("source")
    return {**without_secrets(record), "source": None if source is None else _without_path(str(source))}


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files of a folder but its model card, by their paths."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: file_sha256(path) for path in files if (name := path.relative_to(folder).as_posix()) not in (CARD, CONFIG)}


def sizes_of(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder, and of each of its folders."""
    found: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
        found[path.name] = sum(file.stat().st_size for file in files)
    return found
