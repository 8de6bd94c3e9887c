"""Functions of the public Python API that need the process's environment or several parts of the package.

``import galaxydist`` offers them by name. docs/api.md describes them, and the classes and functions that need no wrapper.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from galaxydist.cpus import set_up_process
from galaxydist.errors import EXIT_STOPPED
from galaxydist.paths import cache_dir as default_cache_dir
from galaxydist.paths import data_root

if TYPE_CHECKING:
    import torch

    from galaxydist.prediction.predictor import Predictor
    from galaxydist.recipe.resolve import ResolvedRecipe
    from galaxydist.shards.manifest import Manifest


def simulate_survey(
    path: str | Path, num_galaxies: int, seed: int = 0, *, balanced: bool = False, workers: int | None = None
) -> Path:
    """Write a simulated survey, an HDF5 file in Galaxy10's schema: 256 x 256 pixels, positions, redshifts, ten classes.

    The same number, seed and ``balanced`` give the same bytes with any number of workers.

    Args:
        path: the file to write or replace; it appears only once it is complete.
        num_galaxies: at least 1.
        seed: 0 to 2^63 - 1.
        balanced: an equal number of galaxies of each class instead of Galaxy10's proportions.
        workers: number of processes; None: one for each core that this process may use.

    Returns:
        The path.

    Raises:
        UserError: the number of galaxies or the seed is out of range, or the disk is full.
    """
    from galaxydist.surveys.simulate.survey import simulate_survey as simulate

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    simulate(path, num_galaxies, seed, workers, balanced)
    return path


def write_shards(
    source: str | Path,
    out_dir: str | Path,
    *,
    variant: str = "original",
    encoding: str = "jpeg",
    image_size: int | None = None,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    classes: str | Sequence[str] | None = None,
    bands: Sequence[str] = (),
    scale: tuple[float, float] | None = None,
    stretch: str = "linear",
    name: str | None = None,
    labelled: bool = True,
    overwrite: bool = False,
    workers: int | None = None,
) -> "Manifest":
    """Write the galaxies of any survey as shards; do nothing if these shards exist already.

    Args:
        source: a folder with one folder of images for each class, a table of images (CSV, Parquet, FITS), or Parquet or HDF5
            files that hold their images, as a path or URL.
        out_dir: the folder to create.
        variant: ``original``, or ``balanced`` for the same number of galaxies of each class.
        encoding: ``jpeg``, ``png`` (lossless) or ``raw`` (uint8, fastest to read).
        image_size: side of the stored square images in pixels; None keeps the size of the source.
        images: folder or URL that the file names of a table start from; None: the table's own folder.
        columns: names of a table's columns by ``file``, ``label``, ``id``, ``split``, ``ra``, ``dec``, and ``image`` (Parquet
            and HDF5 files with images); others are found by their usual names.
        classes: ``galaxy10`` if the classes are Galaxy10's, or the names of the classes 0, 1, ...; None: the source's.
        bands: bands of arrays, by name or number from 0, that become red, green and blue.
        scale: pixel values that become black and white, for arrays of other than 8 bits.
        stretch: between them: ``linear``, or ``asinh`` (Lupton et al. 2004).
        name: the data set's name; None to take it from the source.
        labelled: False for a table of galaxies without labels, which can be predicted, not trained on.
        overwrite: replace shards that were made from another source or with other settings.
        workers: number of processes; None: one for each core that this process may use.

    Returns:
        The manifest of the shards.

    Raises:
        UserError: the source is missing or damaged, a wrong column, other shards exist, or the disk is full.
    """
    from galaxydist.shards.writer.writer import write_shards as write
    from galaxydist.surveys.image_arrays import ArrayOptions, PixelScaling
    from galaxydist.surveys.survey_sources import SourceOptions, open_survey
    from galaxydist.surveys.table_columns import column_names

    cache = default_cache_dir(data_root(None, os.environ)) / "images"
    root = None if images is None else str(images)
    named = dict(columns or {})
    arrays = ArrayOptions(named.pop("image", None), tuple(bands), None if scale is None else PixelScaling(*scale, stretch))
    class_names = None if classes is None or isinstance(classes, str) else tuple(classes)
    options = SourceOptions(
        root,
        column_names(named),
        is_labelled=labelled,
        cache_dir=cache,
        arrays=arrays,
        class_names=class_names,
    )
    survey = open_survey(source, variant, name=name, classes=classes if isinstance(classes, str) else None, source=options)
    return write(survey, Path(out_dir), encoding=encoding, image_size=image_size, overwrite=overwrite, workers=workers)


def open_shards(location: str | Path, *, cache_dir: str | Path | None = None, cache_size: float = 100.0) -> "Manifest":
    """Open a folder of shards, local or at a URL.

    Args:
        location: manifest.json or its folder, as a path or a URL (``s3://``, ``gs://``, ``https://``, ``hf://``).
        cache_dir: folder for the files of a URL; None: a folder under the data root.
        cache_size: largest size of that folder in GB (10^9 bytes).

    Returns:
        The manifest: class names, totals of the splits, and labels as memory-mapped columns.

    Raises:
        UserError: no shards at the location, no access, or files that do not match the manifest.
    """
    from galaxydist.shards.remote.cache import CacheConfig
    from galaxydist.shards.remote.open import open_shards as open_manifest

    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir(data_root(None, os.environ))
    return open_manifest(location, CacheConfig(folder, int(cache_size * 1e9)))


def train(recipe: "ResolvedRecipe") -> Path:
    """Train a recipe in this process, or continue its run, and evaluate it on the test split.

    The same call continues a run that was stopped, and returns at once for a finished run. Under ``torchrun`` or ``accelerate
    launch`` every process makes the same call.

    Args:
        recipe: as ``load_recipe`` returns it.

    Returns:
        The run folder, with the checkpoints, ``metrics.jsonl``, ``result.json`` and ``evaluation/``.

    Raises:
        UserError: invalid input, such as missing shards; nothing was written.
        RunFailedError: the loss is not finite, or no memory is left.
        KeyboardInterrupt: stopped by Ctrl-C (a notebook's interrupt) after a checkpoint was saved.
        SystemExit: stopped by SIGTERM or SIGUSR2 after a checkpoint was saved; the exit code is 75.
    """
    set_up_process(os.environ)
    from galaxydist.recipe.identity import run_path
    from galaxydist.training.trainer import train as run_trainer

    stop_signal = run_trainer(recipe, os.environ)
    if stop_signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop_signal:
        raise SystemExit(EXIT_STOPPED)
    return run_path(recipe.recipe)


def load_predictor(
    run: str | Path,
    *,
    device: "str | torch.device | None" = None,
    tta: Literal["none", "d4"] | None = None,
    checkpoint: Literal["best", "last"] | None = None,
    trained_on: str | Path | None = None,
    trust_code: bool = False,
) -> "Predictor":
    """Open a run's model for predictions: ``load_predictor(run)(images)`` returns probabilities with class names.

    The run folder is enough: the shards of the training need not be there, except for runs of earlier versions.

    Args:
        run: the run folder.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None: a GPU if there is one, under a launcher that of this process's local rank.
        tta: ``d4`` averages the probabilities over the eight flips and quarter turns, ``none`` does not; None: as in the recipe.
        checkpoint: ``best`` or ``last``; None: as in the recipe.
        trained_on: shards that a run of an earlier version was trained on, if they were moved.
        trust_code: import the module that the run's ``model.name`` names (``package.module:function``) and run its code.

    Returns:
        The predictor; its call is described in docs/api.md.

    Raises:
        UserError: no run or checkpoint in the folder, or the device cannot be used.
    """
    set_up_process(os.environ)
    from galaxydist.prediction.predictor import load_predictor as load
    from galaxydist.prediction.trained_model import ModelChoice

    return load(run, os.environ, device=device, choice=ModelChoice(checkpoint, tta, trained_on, trust_code))


def evaluate(
    run: str | Path, split: str = "test", *, manifest: str | Path | None = None, tta: Literal["none", "d4"] | None = None
) -> dict[str, Any]:
    """Evaluate a run on a split, counting every galaxy once, and write predictions, metrics and figures into its folder.

    Args:
        run: the run folder.
        split: ``train``, ``val`` or ``test``.
        manifest: path or URL of other shards with the same classes; None: the shards that the run was trained on.
        tta: ``d4`` averages the probabilities over the eight flips and quarter turns, ``none`` does not; None: as in the recipe.

    Returns:
        The metrics, as in ``evaluation/<split>.json``.

    Raises:
        UserError: no run or checkpoint in the folder, no such split, other classes, or test galaxies that the run was trained on.
    """
    from galaxydist.evaluation.evaluator import EvaluationData, evaluate_run

    return evaluate_run(Path(run), split, os.environ, EvaluationData(manifest), tta=tta)
