"""From a recipe's data section to shards, readers and the way from pixels to the model's input."""

from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.models.build import input_statistics
from galaxydist.recipe.paths import manifest_path
from galaxydist.recipe.schema import DataConfig, Recipe
from galaxydist.shards.augment import Augment
from galaxydist.shards.manifest import Manifest, read_manifest

# What makes a data set's HDF5 file, for the message where it is missing.
SOURCES = {"galaxy10_decals": "galaxydist data fetch", "simulated": "galaxydist data simulate"}


def find_manifest(config: DataConfig, root: Path) -> Path:
    """The manifest of the recipe's data set; whether it is there is not looked at."""
    return config.manifest or manifest_path(root, config.dataset, config.variant, conflicting=config.conflicting)


def open_manifest(path: Path, recipe: Recipe, world_size: int) -> Manifest:
    """Open the recipe's shards and see that the recipe can be trained on them by so many processes.

    Raises:
        UserError: no shards there (with the commands that make them), or the batch does not fit the data or the world.
    """
    config = recipe.data
    if not path.exists() and config.manifest is None:
        make = [SOURCES.get(config.dataset), _shard_command(config)]
        raise UserError(
            f"There are no shards of {config.dataset} ({config.variant}) at {path}. Make them with:\n"
            + "\n".join(f"  {command}" for command in make if command)
            + "\nor give other ones with data.manifest=FILE, or another data root with data.dir=FOLDER or GALAXYDIST_DATA."
        )
    manifest = read_manifest(path)
    num_train = manifest.split("train").num_samples
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


def has_split(manifest: Manifest, name: str) -> bool:
    """Whether a split has any galaxy."""
    return name in manifest.splits and manifest.splits[name].num_samples > 0


def build_augment(recipe: Recipe, manifest: Manifest) -> Augment:
    """Pixels to model input: with the statistics that the model's weights were trained with, or the data set's own."""
    mean, std = input_statistics(recipe.model) or (manifest.channel_mean, manifest.channel_std)
    return Augment(
        recipe.data.augment,
        recipe.seed,
        channel_mean=mean,
        channel_std=std,
        image_size=recipe.data.image_size,
        crop=recipe.data.crop,
    )


def _shard_command(config: DataConfig) -> str:
    command = f"galaxydist data shard --dataset {config.dataset} --variant {config.variant}"
    return command if config.conflicting == "keep" else f"{command} --conflicting drop"
