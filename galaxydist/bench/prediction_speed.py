"""``galaxydist bench predict``: predictions of a source against the bare forward pass behind the same loader."""

import tarfile
import tempfile
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from galaxydist.bench.common import Lap, show, show_json, spread
from galaxydist.bench.loader_speed import find_source, repeat_source
from galaxydist.bench.trainer_speed import read_clocks
from galaxydist.cpus import available_cores
from galaxydist.distributed import World, open_world
from galaxydist.evaluation.inference import ForwardPass
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.loading.loader import DecodeOptions, EvalLoader
from galaxydist.loading.training_data import StoredImages, TrainingData
from galaxydist.models.build import build_model
from galaxydist.prediction.label_source import Labelling, LabelOptions
from galaxydist.prediction.open_source import open_images
from galaxydist.prediction.sources import PredictionSource, ShardsToLabel, SurveyToLabel
from galaxydist.prediction.trained_model import TrainedModel
from galaxydist.recipe.resolve import load_recipe
from galaxydist.shards.manifest import Manifest

SHARD_SIZE = 500
# Image width that the model sees, by device.
IMAGE_SIZES = {"cpu": 64, "cuda": 224}
# Rounds of warm-up before the timed ones.
WARM_ROUNDS = 1
# Difference of the logits of the files, whose last batch is not padded.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class PredictionConditions:
    """Conditions of the measurement.

    Args:
        recipe: name of a recipe; its model has random weights.
        num_images: images in the source.
        rounds: timed turns of each way.
        image_size: width that the model sees; None: the default of the device.
        data: shards to take the images from; ``real``: instead, a folder of images, ``<class>/<name>.jpg``. Neither: simulated.
    """

    recipe: str = "resnet18"
    num_images: int = 4000
    rounds: int = 5
    image_size: int | None = None
    data: Path | None = None
    real: Path | None = None


def measure_prediction(root: Path, environ: MutableMapping[str, str], conditions: PredictionConditions) -> list[dict[str, Any]]:
    """Label shards and a folder of the same images, and run the bare forward pass, in turn; print a line and JSON for each.

    Returns:
        The content of the lines of JSON.

    Raises:
        UserError: the data do not exist, or there is no such recipe.
        AssertionError: the logits differ.
    """
    workers = available_cores()
    source = find_source(root, data=conditions.data, real=conditions.real, workers=workers)
    number = conditions.num_images
    manifest = repeat_source(source, root, num_images=number, least=number, shard_size=SHARD_SIZE, workers=workers)
    with open_world("auto", environ) as world:
        results = _measure(world, manifest, conditions)
    show_json(*results)
    return results


def _measure(world: World, manifest: Manifest, conditions: PredictionConditions) -> list[dict[str, Any]]:
    trained = random_model(manifest, conditions.recipe, conditions.image_size or IMAGE_SIZES[world.device.type])
    forward = trained.forward_on(world.device, world.precision, threads=world.cores)
    with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name:
        folder = Path(name)
        files = extract_images(manifest, folder / "images")
        sources: dict[str, PredictionSource] = {
            "shards": ShardsToLabel(manifest, ("train",)),
            "files": SurveyToLabel(open_images([files]), str(files)),
        }

        def bare() -> NDArray[np.float32]:
            return run_bare(world, manifest, trained, forward)

        def label(kind: str) -> NDArray[np.float32]:
            out = folder / f"{kind}.parquet"
            Labelling(world, trained, sources[kind], out, LabelOptions(logits=True, overwrite=True)).run()
            return read_logits(out, trained.class_names)

        ways = {"bare": bare, "shards": lambda: label("shards"), "files": lambda: label("files")}
        laps = _in_turn(world, ways, conditions.rounds)
    facts = {
        "images": manifest.split("train").num_samples,
        "image_size": trained.recipe.data.image_size,
        "batch_size": trained.recipe.eval.batch_size,
        "rounds": conditions.rounds,
        "device": world.device.type,
        "precision": world.precision,
        "threads": world.cores,
    }
    return [_result(trained.recipe.name, kind, laps, facts) for kind in sources]


def random_model(manifest: Manifest, recipe_name: str, image_size: int) -> TrainedModel:
    """Return a model with random weights, as if it were trained on these shards."""
    words = [f"recipe={recipe_name}", f"data.image_size={image_size}", "model.pretrained=false"]
    recipe = load_recipe(words).recipe
    torch.manual_seed(recipe.seed)
    stored = StoredImages.of(manifest)
    return TrainedModel(
        path=Path(recipe_name),
        recipe=recipe,
        model=build_model(recipe.model, manifest.num_classes, image_size),
        checkpoint="random",
        step=0,
        trained_on=TrainingData.of(manifest, recipe, stored=stored),
        stored=stored,
        temperature=1.0,
    )


@torch.inference_mode()
def run_bare(world: World, manifest: Manifest, trained: TrainedModel, forward: ForwardPass) -> NDArray[np.float32]:
    """Return the logits of all training images, from the loader and the forward pass alone."""
    recipe = trained.recipe
    decode = DecodeOptions.of(recipe.data, threads=world.decode_threads, pin=world.device.type == "cuda")
    with (
        EvalLoader(manifest, "train", batch_size=recipe.eval.batch_size, decode=decode) as loader,
        DevicePrefetcher(loader, world.device) as batches,
    ):
        logits = [forward(batch.images_BHWC).float() for batch in batches]
    return torch.cat(logits).cpu().numpy()[: manifest.split("train").num_samples]


def extract_images(manifest: Manifest, folder: Path) -> Path:
    """Write the training images as files whose natural order is that of the shards."""
    folder.mkdir()
    number = 0
    for shard in range(manifest.split("train").num_shards):
        with tarfile.open(manifest.shard_path("train", shard)) as tar:
            for member in tar:
                if member.name.endswith(f".{manifest.extension}"):
                    data = tar.extractfile(member)
                    assert data is not None
                    (folder / f"{number}.{manifest.extension}").write_bytes(data.read())
                    number += 1
    return folder


def read_logits(path: Path, class_names: Sequence[str]) -> NDArray[np.float32]:
    """Return the logits of a file of predictions, N x K."""
    table = parquet.read_table(path, columns=[f"logit_{name}" for name in class_names])
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


def _in_turn(world: World, ways: Mapping[str, Callable[[], NDArray[np.float32]]], rounds: int) -> dict[str, list[Lap]]:
    """Time each way in every round, in forward and backward order; all have to give the same logits."""
    laps: dict[str, list[Lap]] = {way: [] for way in ways}
    known: NDArray[np.float32] | None = None
    for number in range(WARM_ROUNDS + rounds):
        for way in [*ways][:: 1 if number % 2 == 0 else -1]:
            before = read_clocks(world.device)
            logits_NK = ways[way]()
            laps[way].append(read_clocks(world.device) - before)
            known = logits_NK if known is None else known
            np.testing.assert_allclose(logits_NK, known, atol=0 if way != "files" else TOLERANCE)
    return {way: found[WARM_ROUNDS:] for way, found in laps.items()}


def _result(recipe: str, kind: str, laps: Mapping[str, Sequence[Lap]], facts: Mapping[str, Any]) -> dict[str, Any]:
    number = facts["images"]
    ours, bare = (number / median(lap.wall_s for lap in laps[way]) for way in (kind, "bare"))
    pairs = list(zip(laps["bare"], laps[kind], strict=True))
    ratios = [plain.wall_s / own.wall_s for plain, own in pairs]
    ratio_cpu = median(plain.cpu_s / own.cpu_s for plain, own in pairs)
    show(
        f"{kind}: {recipe}, {facts['image_size']} px, batches of {facts['batch_size']}, {number:,} images, {facts['device']}, "
        f"{facts['threads']} threads, precision {facts['precision']}: predict {ours:,.0f} img/s, loader and forward pass alone "
        f"{bare:,.0f} img/s; ratio {spread(ratios)}, of CPU time {ratio_cpu:.3f}"
    )
    return {
        "task": f"predict.{kind}",
        "recipe": recipe,
        "ours": ours,
        "bare": bare,
        "ratio": median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "ratio_cpu": ratio_cpu,
        **facts,
    }
