"""A recipe's data set: its manifest, the checks before a run, its normalisation and augmentation."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from galaxydist.errors import UserError
from galaxydist.galaxy import Variant
from galaxydist.paths import cache_dir, find_shards, manifest_path
from galaxydist.recipe.schema import DataConfig, Recipe
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.order import rank_offsets, steps_per_epoch
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.surveys.data_origin import DataOrigin
from galaxydist.surveys.folder_scan import mirrored_classes

if TYPE_CHECKING:  # checks on a login node need no torch
    from torch import nn

    from galaxydist.loading.augment import Augment
    from galaxydist.models.weights import Statistics

# Commands that make the HDF5 files of the known data sets, for the error about missing shards.
SOURCES = {"galaxy10_decals": "galaxydist data fetch", "simulated": "galaxydist data simulate"}


def find_manifest(config: DataConfig, root: Path) -> str:
    """Return the path or URL of the recipe's manifest, which need not exist."""
    return config.manifest or str(manifest_path(root, config.dataset, config.variant, conflicting=config.conflicting))


def find_variant(config: DataConfig, root: Path, variant: Variant) -> str:
    """Return the manifest of another variant of the survey: under the data root, or beside the folder of data.manifest.

    Raises:
        UserError: data.manifest is not in a folder named by its variant.
    """
    if config.manifest is None:
        return find_manifest(config.model_copy(update={"variant": variant}), root)
    folder, _, name = str(config.manifest).rpartition("/")
    above, _, own = folder.rpartition("/")
    if own not in get_args(Variant):
        raise UserError(
            f"eval.variants={variant}: its shards cannot be found from data.manifest={config.manifest}, which is not in a folder "
            f"named {' or '.join(get_args(Variant))}. Remove eval.variants, or use the shards of the data root."
        )
    return f"{above}/{variant}/{name}"


def find_cache(config: DataConfig, root: Path) -> CacheConfig:
    """Return the settings of the cache for remote files."""
    return CacheConfig(config.cache_dir or cache_dir(root), int(config.cache_size * 1e9), config.fetch_threads)


def open_manifest(path: str, cache: CacheConfig, recipe: Recipe, world_size: int) -> Manifest:
    """Open the recipe's shards and check that ``world_size`` processes can train the recipe on them.

    Args:
        path: the manifest's path or URL.
        cache: cache for the files of a URL.
        recipe, world_size: the run.

    Raises:
        UserError: no shards (with the commands that make them), a class without training galaxies, a batch size that does not
            fit the data or the processes, or no validation split for a recipe that needs one.
    """
    config = recipe.data
    if config.manifest is None and not Path(path).exists():
        raise UserError(_no_shards(config, Path(path)))
    manifest = open_shards(path, cache)
    path = manifest.location
    empty = [name for name, count in zip(manifest.class_names, manifest.splits["train"].class_counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"{path} has no training galaxies of {', '.join(empty)}, so that a model cannot learn these classes. "
            "Add some, or make the shards from a folder without these classes (galaxydist data shard)."
        )
    rank_offsets(recipe.train.batch_size, 0, world_size)
    steps_per_epoch(manifest.split("train").num_samples, recipe.train.batch_size)
    if not has_split(manifest, "val"):
        if recipe.eval.checkpoint == "best":
            raise UserError(
                f"{path} has no validation split, so no checkpoint can be chosen as the best. Use eval.checkpoint=last, "
                "or make shards with a validation split (galaxydist data shard)."
            )
        if recipe.train.patience:
            raise UserError(f"{path} has no validation split for early stopping. Use train.patience=0.")
    return manifest


def mirror_warning(manifest: Manifest, recipe: Recipe) -> str:
    """Return a warning if classes are mirror images of each other and the recipe treats mirror images alike, else ''."""
    mirrored = mirrored_classes(manifest.class_names)
    blind = {
        "data.augment.flip=true": recipe.data.augment.flip,
        "model.name=d4_cnn": recipe.model.name == "d4_cnn",
        "eval.tta=d4": recipe.eval.tta == "d4",
    }
    if not mirrored or not any(blind.values()):
        return ""
    keys = ", ".join(key for key, is_set in blind.items() if is_set)
    return f"the classes {', '.join(mirrored)} are mirror images of one another, which a model cannot tell apart with {keys}"


def has_split(manifest: Manifest, name: str) -> bool:
    """Return True if a split exists and has galaxies."""
    return name in manifest.splits and manifest.splits[name].num_samples > 0


@dataclass(frozen=True)
class StoredImages:
    """Properties of the stored images that a model was trained on: new images are brought into the same form.

    Args:
        dataset: name of the data set.
        image_size: side in pixels.
        encoding: ``jpeg``, ``png``, ``raw`` or ``file``.
        source_sides: smallest and largest shorter side of the images that they were resampled from, in pixels; None: not
            resampled.
        pxscale: smallest, median and largest pixel scale of the training galaxies before resampling, in arcsec/pixel; None:
            unknown.
        origin: licence, citation and source of the data, if known.
    """

    dataset: str
    image_size: int
    encoding: str
    source_sides: tuple[int, int] | None = None
    pxscale: tuple[float, float, float] | None = None
    origin: DataOrigin | None = None

    @property
    def stored_scales(self) -> tuple[float, float] | None:
        """Smallest and largest pixel scale of the images as they are stored, in arcsec/pixel; None: unknown."""
        if self.pxscale is None:
            return None
        low, high = self.source_sides or (self.image_size, self.image_size)
        return self.pxscale[0] * low / self.image_size, self.pxscale[2] * high / self.image_size

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Return them for the shards of a training; of a catalogue, only the pixel scales are read.

        Raises:
            UserError: the catalogue is damaged.
        """
        pxscale = _pixel_scales(manifest)
        return cls(manifest.dataset, manifest.image_size, manifest.encoding, manifest.source_sides, pxscale, manifest.origin)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        if plain.get("origin") is not None:
            values["origin"] = DataOrigin.from_dict(plain["origin"])
        return cls(**values)


def _pixel_scales(manifest: Manifest) -> tuple[float, float, float] | None:
    """Return smallest, median and largest pixel scale of the training galaxies; None if unknown, or without a catalogue."""
    import numpy as np

    from galaxydist.shards.catalogue import number_column, read_catalogue

    if not manifest.catalogues:  # shards of earlier versions: all tars would be read
        return None
    scales = number_column(read_catalogue(manifest, "train", columns=["pxscale"]), "pxscale")
    scales = scales[np.isfinite(scales) & (scales > 0)]
    if not scales.size:
        return None
    return float(scales.min()), float(np.median(scales)), float(scales.max())


@dataclass(frozen=True)
class TrainingData:
    """Properties of the training data that a checkpoint keeps, so that its model can be used on other data.

    Args:
        manifest_hash: hash of the shards' manifest.
        class_names: class names by label.
        channel_mean, channel_std: normalisation of the model's input, R G B, full scale 1.
        stored: properties of the stored images; None in checkpoints of earlier versions.
    """

    manifest_hash: str
    class_names: tuple[str, ...]
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]
    stored: StoredImages | None = None

    @classmethod
    def of(cls, manifest: Manifest, recipe: Recipe, model: "nn.Module | None" = None, stored: StoredImages | None = None) -> Self:
        """Return them with the normalisation that the recipe's model brings along, else the data set's own.

        Args:
            model: built from the recipe; needed for other models than the named ones.
            stored: how the images are stored, for predictions.
        """
        from galaxydist.models.build import input_statistics

        mean, std = input_statistics(recipe.model, model) or (manifest.channel_mean, manifest.channel_std)
        return cls(manifest.hash, manifest.class_names, mean, std, stored)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        names, mean, std = (tuple(plain[name]) for name in ("class_names", "channel_mean", "channel_std"))
        stored = StoredImages.from_dict(plain["stored"]) if plain.get("stored") else None
        return cls(plain["manifest_hash"], names, mean, std, stored)

    @property
    def statistics(self) -> "Statistics":
        return self.channel_mean, self.channel_std


def build_augment(recipe: Recipe, trained_on: TrainingData, *, threads: int) -> "Augment":
    """Build the augmentation from stored pixels to model input; ``threads`` share a batch on a CPU."""
    from galaxydist.loading.augment import Augment

    data = recipe.data
    mean, std = trained_on.channel_mean, trained_on.channel_std
    return Augment(data.augment, recipe.seed, mean, std, data.image_size, crop=data.crop, threads=threads)


def shard_commands(config: DataConfig) -> list[str]:
    """Return the commands that make the shards of a data set."""
    options = f"--variant {config.variant}" + ("" if config.conflicting == "keep" else " --conflicting drop")
    if config.dataset in SOURCES:
        return [SOURCES[config.dataset], f"galaxydist data shard --dataset {config.dataset} {options}"]
    return [f"galaxydist data shard --from FOLDER_OR_FILE --name {config.dataset} {options}"]


def _no_shards(config: DataConfig, path: Path) -> str:
    there = find_shards(path.parents[3])
    names = [f"{name} ({', '.join(manifest.parent.name for manifest in found)})" for name, found in there.items()]
    close = get_close_matches(config.dataset, list(there), n=1)
    is_other = bool(close) and close[0] != config.dataset
    return (
        f"There are no shards of {config.dataset} ({config.variant}) at {path}; the data root has shards of "
        + (", ".join(names) or "no data set")
        + (f"; did you mean data.dataset={close[0]}?" if is_other else ".")
        + " Make them with:\n"
        + "\n".join(f"  {command}" for command in shard_commands(config))
        + "\nor choose other shards with data.manifest=FILE, or another data root with data.dir=FOLDER or GALAXYDIST_DATA."
    )
