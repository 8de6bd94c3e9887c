"""Frozen encoders: a recipe's model, the best checkpoint of a run, or principal components of the pixels; and their features.

An encoder sees a galaxy as an evaluation does: the central crop, resized to the model's size and normalised. It computes as an
evaluation does, too: in the recipe's ``train.precision`` (``auto``: bf16 or fp16 on a GPU, float32 on a CPU) and ``train.tf32``.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galaxydist.checkpoints import store
from galaxydist.devices import autocast
from galaxydist.distributed import World
from galaxydist.evaluation.inference import TTA, tta_images
from galaxydist.evaluation.leakage import TEST_SPLIT, validation_mask
from galaxydist.evaluation.run_model import MODEL_GROUPS, find_checkpoint, load_model
from galaxydist.explore.embedding import COMPONENTS
from galaxydist.explore.features_file import EncoderInfo, FeatureRows
from galaxydist.loading.augment import Normalise
from galaxydist.loading.device_prefetch import DevicePrefetcher, HostCopy
from galaxydist.loading.loader import DecodeOptions, EvalLoader
from galaxydist.loading.training_data import TrainingData, has_split
from galaxydist.models.build import build_model, describe_model
from galaxydist.models.features import extract_features
from galaxydist.models.performance import choose_memory_format, set_memory_format, set_tf32
from galaxydist.models.registry import ARCHITECTURES, ModelRecord, architecture_of
from galaxydist.models.weights import Statistics
from galaxydist.prediction.trained_model import resolved_precision
from galaxydist.recipe.identity import from_dict
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest

PIXELS = "pixels"
# The central half of an image at this width: on real galaxies, it agrees better with the classes than the whole image.
PIXELS_WIDTH, PIXELS_CROP = 32, 0.5
# Training galaxies from which the principal components are computed.
PIXELS_SAMPLE = 5000
PIXELS_BATCH = 256


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder.

    Args:
        info: its description.
        extract: images B x 3 x T x T -> features B x D, on the device of the model.
        model: the module with the parameters, in evaluation mode.
        batch_size: images of one forward pass.
        channels_last, tf32: as in ``train``.
    """

    info: EncoderInfo
    extract: Callable[[Tensor], Tensor]
    model: nn.Module
    batch_size: int
    channels_last: Literal["auto"] | bool = "auto"
    tf32: bool = False

    def features(self, manifest: Manifest, world: World) -> Iterator[FeatureRows]:
        """Yield the features of all galaxies of a data set, split by split in the order of storage.

        Raises:
            UserError: a galaxy cannot be read.
        """
        from tqdm import tqdm

        total = sum(split.num_samples for split in manifest.splits.values())
        with tqdm(total=total, desc=f"features of {self.info.model}", unit="img", disable=None) as bar:
            for split in manifest.splits:
                if not has_split(manifest, split):
                    continue
                ids = read_catalogue(manifest, split, ("id",)).column("id").to_pylist()
                labels_N = manifest.labels(split)
                for rows, features_BD in self.batches(manifest, split, world):
                    yield FeatureRows(split, ids[rows], np.asarray(labels_N[rows]), features_BD)
                    bar.update(len(features_BD))

    def batches(self, manifest: Manifest, split: str, world: World) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield the stored samples of each batch and their features, B x D, which are read when the next batch has begun."""
        dtype = torch.float64 if self.info.precision == "fp64" else torch.float32
        memory_format = choose_memory_format(self.channels_last, self.model, world.device, dtype)
        set_memory_format(self.model.to(device=world.device, dtype=dtype), memory_format)
        set_tf32(self.tf32, world.device)
        begun: deque[tuple[slice, HostCopy]] = deque()
        for batch in self._begin_batches(manifest, split, world, dtype, memory_format):
            begun.append(batch)
            if len(begun) > 1:
                yield _read(*begun.popleft())
        yield from starmap(_read, begun)

    @torch.inference_mode()
    def _begin_batches(
        self, manifest: Manifest, split: str, world: World, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Iterator[tuple[slice, HostCopy]]:
        info = self.info
        normalise = Normalise(info.channel_mean, info.channel_std, info.image_size, info.crop, threads=world.cores)
        options = DecodeOptions(info.image_size, info.crop, threads=world.decode_threads, pin=world.device.type == "cuda")
        with (
            EvalLoader(manifest, split, batch_size=self.batch_size, decode=options) as loader,
            DevicePrefetcher(loader, world.device) as batches,
        ):
            for batch in batches:
                images_BCHW = normalise(batch.images_BHWC, memory_format=memory_format).to(dtype)
                with autocast(world.device, info.precision):
                    views = [self.extract(view_BCHW).to(dtype) for view_BCHW in tta_images(images_BCHW, info.tta)]
                mean_BD = torch.stack(views).mean(0) if len(views) > 1 else views[0]
                count = int((batch.samples_B >= 0).sum())  # the last batch is padded at its end
                start = int(batch.samples_B[0])
                yield slice(start, start + count), HostCopy(mean_BD[:count].float())


def _read(rows: slice, copied: HostCopy) -> tuple[slice, NDArray[np.float32]]:
    return rows, copied.wait().numpy()


def open_model(recipe: Recipe, manifest: Manifest, weights_dir: Path, tta: TTA, device: torch.device) -> Encoder:
    """Return the encoder of a recipe's model, with its starting weights.

    Args:
        recipe: its model, its image size, crop and seed, and its precision.
        manifest: of the data set, whose statistics normalise the images unless the weights have their own.
        weights_dir: folder of published weights.
        tta: ``d4``: average the features over the eight flips and quarter turns.
        device: on which it will compute.

    Raises:
        UserError: settings that the model cannot use, or weights that are missing or do not fit.
    """
    config = recipe.model.model_copy(update={"freeze_backbone": False})
    torch.manual_seed(recipe.seed)
    # The user has named the model in this command: a function of their own may run.
    model = build_model(config, manifest.num_classes, recipe.data.image_size, weights_dir=weights_dir, trust_code=True)
    if config.weights is not None:
        weights = config.weights.name
    else:
        known = ARCHITECTURES.get(config.name)
        kind = "shipped weights" if known is not None and known.is_shipped else "published weights"
        weights = kind if config.pretrained else f"random weights, seed {recipe.seed}"
    statistics = TrainingData.of(manifest, recipe, model).statistics
    return _encoder(recipe, model, Origin(weights, describe_model(config, weights_dir), statistics), tta, device)


def open_run(
    run_dir: Path,
    manifest: Manifest,
    find_training_shards: Callable[[Recipe, TrainingData], Manifest],
    tta: TTA,
    device: torch.device,
    *,
    trust_code: bool = False,
) -> Encoder:
    """Return the encoder of a run: its best checkpoint without the head.

    Args:
        run_dir: the run folder.
        manifest: of the data set to probe.
        find_training_shards: opens the shards of the run's training; called if they are others.
        tta, device: as in ``open_model``.
        trust_code: run the function of a module that the run's recipe names.

    Raises:
        UserError: no run, no checkpoint, or test galaxies of the data set on which the run was trained.
    """
    folder = RunFolder(run_dir)
    recipe = from_dict(folder.read_recipe().recipe, source=str(folder.recipe_path))
    checkpoint = store.read_sound(find_checkpoint(folder, recipe.eval.checkpoint), groups=MODEL_GROUPS)
    trained_on = TrainingData.from_dict(checkpoint.state["data"])
    if has_split(manifest, TEST_SPLIT):
        validation_mask(manifest, TEST_SPLIT, trained_on, lambda data: find_training_shards(recipe, data))
    model = load_model(recipe, checkpoint, trust_code=trust_code)
    weights = f"run {run_dir.resolve().name}, step {checkpoint.step}"
    record = ModelRecord.from_dict(checkpoint.state.get("model"))
    return _encoder(recipe, model, Origin(weights, record, trained_on.statistics), tta, device)


@dataclass(frozen=True)
class Origin:
    """Origin of a model's weights: a description, facts about the model, and the normalisation of its images."""

    weights: str
    record: ModelRecord
    statistics: Statistics


def _encoder(recipe: Recipe, model: nn.Module, origin: Origin, tta: TTA, device: torch.device) -> Encoder:
    size = recipe.data.image_size
    model.eval()
    with torch.inference_mode():
        num_features = extract_features(model, torch.zeros(1, 3, size, size)).shape[1]
    info = EncoderInfo(
        model=recipe.model.name,
        weights=origin.weights,
        weights_sha256=weights_sha256(model, architecture_of(recipe.model, model).head),
        num_features=num_features,
        image_size=size,
        crop=recipe.data.crop,
        channel_mean=origin.statistics[0],
        channel_std=origin.statistics[1],
        tta=tta,
        licence=origin.record.licence,
        precision=resolved_precision(recipe, device),
    )
    extract, config = partial(extract_features, model), recipe.train
    return Encoder(info, extract, model, recipe.eval.batch_size, config.channels_last, config.tf32)


def weights_sha256(model: nn.Module, head_names: Sequence[str] = ()) -> str:
    """Return the SHA-256 (hex) of the names, shapes, types and values of a model's parameters and buffers, without its head."""
    digest = hashlib.sha256()
    heads = tuple(f"{name}." for name in head_names)
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(heads):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pixels_info(manifest: Manifest) -> EncoderInfo:
    """Return the description of the principal components of a data set's pixels, without reading an image."""
    num_features = min(COMPONENTS, min(manifest.split("train").num_samples, PIXELS_SAMPLE) - 1)
    return EncoderInfo(
        model=PIXELS,
        weights=f"{num_features} principal components",
        weights_sha256=hashlib.sha256(f"{PIXELS} {PIXELS_SAMPLE}".encode()).hexdigest(),  # the data set decides the rest
        num_features=num_features,
        image_size=PIXELS_WIDTH,
        crop=PIXELS_CROP,
        channel_mean=(0.0, 0.0, 0.0),
        channel_std=(1.0, 1.0, 1.0),
        tta="none",
    )


def open_pixels(manifest: Manifest, world: World) -> Encoder:
    """Return principal components of the pixels as an encoder: the features of a data set without any network.

    They are those of at most ``PIXELS_SAMPLE`` training galaxies, which are stored in random order.

    Raises:
        UserError: a galaxy cannot be read.
    """
    from sklearn.decomposition import PCA

    info = pixels_info(manifest)
    pixels = Encoder(info, lambda images_BCHW: images_BCHW.flatten(1), nn.Identity(), PIXELS_BATCH)
    parts: list[NDArray[np.float32]] = []
    for _, pixels_BD in pixels.batches(manifest, "train", world):
        parts.append(pixels_BD)
        if sum(map(len, parts)) >= PIXELS_SAMPLE:
            break
    sample_ND = np.concatenate(parts)[:PIXELS_SAMPLE]
    analysis = PCA(info.num_features, svd_solver="randomized", random_state=0).fit(sample_ND)
    linear = nn.Linear(sample_ND.shape[1], info.num_features)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(analysis.components_))
        linear.bias.copy_(torch.from_numpy(-analysis.mean_ @ analysis.components_.T))
    model = nn.Sequential(nn.Flatten(), linear)
    return Encoder(info, model, model, PIXELS_BATCH)
