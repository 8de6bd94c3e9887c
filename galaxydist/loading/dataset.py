"""From a recipe's data section to shards, readers and the way from pixels to the model's input."""

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
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.surveys.folder_scan import mirrored_classes

if TYPE_CHECKING:  # checks on a login node need no torch
    from galaxydist.loading.augment import Augment
    from galaxydist.models.weights import Statistics

# What makes a data set's HDF5 file, for the message where it is missing.
SOURCES = {"galaxy10_decals": "galaxydist data fetch", "simulated": "galaxydist data simulate"}


def find_manifest(config: DataConfig, root: Path) -> str:
    """The manifest of the recipe's data set, a path or a URL; whether it is there is not looked at."""
    return config.manifest or str(manifest_path(root, config.dataset, config.variant, conflicting=config.conflicting))


def find_variant(config: DataConfig, root: Path, variant: Variant) -> str:
    """The manifest of another data set of the same survey: under the data root, or beside the folder that data.manifest names.

    Raises:
        UserError: data.manifest does not lie in a folder named by its variant, so the other cannot be found.
    """
    if config.manifest is None:
        return find_manifest(config.model_copy(update={"variant": variant}), root)
    folder, _, name = str(config.manifest).rpartition("/")
    above, _, own = folder.rpartition("/")
    if own not in get_args(Variant):
        raise UserError(
            f"eval.variants={variant}: where its shards are cannot be told from data.manifest={config.manifest}, which is not in "
            f"a folder named {' or '.join(get_args(Variant))}. Take eval.variants out, or use the shards of the data root."
        )
    return f"{above}/{variant}/{name}"


def find_cache(config: DataConfig, root: Path) -> CacheConfig:
    """Where and how files of a URL are kept."""
    return CacheConfig(config.cache_dir or cache_dir(root), int(config.cache_size * 1e9), config.fetch_threads)


def open_manifest(path: str, cache: CacheConfig, recipe: Recipe, world_size: int) -> Manifest:
    """Open the recipe's shards and see that the recipe can be trained on them by so many processes.

    Args:
        path: the manifest's path or URL.
        cache: where files of a URL are kept.
        recipe, world_size: what they must do for.

    Raises:
        UserError: no shards there (with the commands that make them), or the batch does not fit the data or the world.
    """
    config = recipe.data
    if config.manifest is None and not Path(path).exists():
        raise UserError(_no_shards(config, Path(path)))
    manifest = open_shards(path, cache)
    path = manifest.location
    num_train = manifest.split("train").num_samples
    empty = [name for name, count in zip(manifest.class_names, manifest.splits["train"].class_counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"{path} has no training galaxies of {', '.join(empty)}: a model cannot learn such a class. "
            "Add some, or make the shards from a folder without it (galaxydist data shard)."
        )
    batch_size = recipe.train.batch_size
    if world_size > batch_size:
        raise UserError(
            f"{world_size} processes are more than the global batch holds (train.batch_size={batch_size}). "
            f"Start at most {batch_size} processes, or raise train.batch_size."
        )
    if batch_size > num_train:
        raise UserError(
            f"train.batch_size={batch_size} is more than the {num_train} training galaxies in {path}. Lower train.batch_size."
        )
    if not has_split(manifest, "val"):
        if recipe.eval.checkpoint == "best":
            raise UserError(
                f"{path} has no validation split, so no checkpoint can be chosen as the best. Use eval.checkpoint=last, "
                "or make shards with a validation split (galaxydist data shard)."
            )
        if recipe.train.patience:
            raise UserError(f"{path} has no validation split to stop early by. Use train.patience=0.")
    return manifest


def mirror_warning(manifest: Manifest, recipe: Recipe) -> str:
    """A line where classes are mirror images of one another and the recipe takes an image and its mirror image for one."""
    mirrored = mirrored_classes(manifest.class_names)
    blind = {"data.augment.flip=true": recipe.data.augment.flip, "model.name=d4_cnn": recipe.model.name == "d4_cnn"}
    blind["eval.tta=d4"] = recipe.eval.tta == "d4"
    if not mirrored or not any(blind.values()):
        return ""
    keys = ", ".join(key for key, is_set in blind.items() if is_set)
    return f"the classes {', '.join(mirrored)} are mirror images of one another, which a model cannot tell apart with {keys}"


def has_split(manifest: Manifest, name: str) -> bool:
    """Whether a split has any galaxy."""
    return name in manifest.splits and manifest.splits[name].num_samples > 0


@dataclass(frozen=True)
class TrainingData:
    """What a checkpoint must know of the data that its model was trained on, to be used on other data.

    Args:
        manifest_hash: of the shards.
        class_names: by label.
        channel_mean, channel_std: that the model's input is normalised with, R G B, full scale being 1.
    """

    manifest_hash: str
    class_names: tuple[str, ...]
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]

    @classmethod
    def of(cls, manifest: Manifest, recipe: Recipe) -> Self:
        """With the statistics that the model's weights were published with, or the data set's own."""
        from galaxydist.models.build import input_statistics

        mean, std = input_statistics(recipe.model) or (manifest.channel_mean, manifest.channel_std)
        return cls(manifest.hash, manifest.class_names, mean, std)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        return cls(plain["manifest_hash"], *(tuple(plain[name]) for name in ("class_names", "channel_mean", "channel_std")))

    @property
    def statistics(self) -> "Statistics":
        return self.channel_mean, self.channel_std


def build_augment(recipe: Recipe, trained_on: TrainingData, *, threads: int) -> "Augment":
    """Stored pixels to model input; on a CPU by so many threads."""
    from galaxydist.loading.augment import Augment

    data = recipe.data
    mean, std = trained_on.channel_mean, trained_on.channel_std
    return Augment(data.augment, recipe.seed, mean, std, data.image_size, crop=data.crop, threads=threads)


def shard_commands(config: DataConfig) -> list[str]:
    """The commands that make the shards of a data set."""
    options = f"--variant {config.variant}" + ("" if config.conflicting == "keep" else " --conflicting drop")
    if config.dataset in SOURCES:
        return [SOURCES[config.dataset], f"galaxydist data shard --dataset {config.dataset} {options}"]
    return [f"galaxydist data shard --from FOLDER_OR_FILE --name {config.dataset} {options}"]


def _no_shards(config: DataConfig, path: Path) -> str:
    there = find_shards(path.parents[3])
    named = [f"{name} ({', '.join(manifest.parent.name for manifest in found)})" for name, found in there.items()]
    close = get_close_matches(config.dataset, list(there), n=1)
    is_other = bool(close) and close[0] != config.dataset
    return (
        f"There are no shards of {config.dataset} ({config.variant}) at {path}; there are "
        + (", ".join(named) or "none of any data set")
        + (f"; did you mean data.dataset={close[0]}?" if is_other else ".")
        + " Make them with:\n"
        + "\n".join(f"  {command}" for command in shard_commands(config))
        + "\nor give other ones with data.manifest=FILE, or another data root with data.dir=FOLDER or GALAXYDIST_DATA."
    )
