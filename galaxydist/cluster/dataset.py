"""How many galaxies, shards and bytes a plan reckons with: of the shards on this machine, of flags, or of the shipped split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, SPLITS
from galaxydist.loading.dataset import find_manifest as manifest_location
from galaxydist.loading.dataset import has_split, shard_commands
from galaxydist.recipe.schema import DataConfig
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.remote.object_store import is_url
from galaxydist.shards.writer.layout import default_shard_size
from galaxydist.surveys.official_split import NAME, read_official_split
from galaxydist.surveys.split import NONE

# A galaxy in a shard: 300 real Galaxy10 DECaLS cutouts of 256 x 256 pixels as JPEG of quality 95 took 27,700 bytes on average;
# the tar adds three headers, its padding, the class and the metadata.
BYTES_PER_GALAXY = 30_500
STORED_SIZE = 256
ESTIMATED = f"bytes estimated: {BYTES_PER_GALAXY / 1000:g} kB a galaxy ({STORED_SIZE} x {STORED_SIZE} JPEG of quality 95)"


@dataclass(frozen=True)
class PlannedData:
    """A data set as a plan sees it.

    Args:
        origin: where the numbers are from, in words.
        shard_samples, shard_bytes: of the training split, int64, in storage order.
        num_val: validation galaxies; None where nobody knows.
        num_classes: K.
        stored_size: width of the stored pictures in pixels.
        manifest: the shards, where they are on this machine.
        is_remote: whether the recipe's shards lie at a URL.
    """

    origin: str
    shard_samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    num_val: int | None
    num_classes: int
    stored_size: int
    manifest: Manifest | None = None
    is_remote: bool = False

    @property
    def num_train(self) -> int:
        return int(self.shard_samples.sum())


def find_data(config: DataConfig, root: Path, *, galaxies: int | None = None, shards: int | None = None) -> PlannedData:
    """The data set of a recipe. Only files of this machine are opened.

    Args:
        config: which data set.
        root: the data root.
        galaxies, shards: instead of what is on this machine: training galaxies, and into how many shards they are divided.

    Raises:
        UserError: flags that contradict each other, damaged shards, or a data set of which nothing is known here.
    """
    location = manifest_location(config, root)
    is_remote = is_url(location)
    if galaxies is not None:
        return _of_flags(galaxies, shards, is_remote=is_remote)
    if shards is not None:
        raise UserError(f"--shards {shards} divides --galaxies: give --galaxies N (training galaxies) too, or neither")
    if not is_remote and (config.manifest is not None or Path(location).exists()):
        return _of_manifest(read_manifest(Path(location)))
    if config.manifest is None and config.dataset == NAME:
        return _of_official(config)
    if is_remote:
        raise UserError(
            f"{location} is a URL, and nothing is fetched for a plan: give --galaxies N (training galaxies) and --shards M"
        )
    make = "`, `".join(shard_commands(config))
    raise UserError(
        f"there are no shards of {config.dataset} ({config.variant}) at {location}, and their number is not known without: give "
        f"--galaxies N (training galaxies), or make them (`{make}`)"
    )


def _of_manifest(manifest: Manifest) -> PlannedData:
    table = manifest.shards("train")
    return PlannedData(
        origin=f"{manifest.dataset}, {manifest.variant} ({manifest.location})",
        shard_samples=table["samples"].astype(np.int64),
        shard_bytes=table["bytes"].astype(np.int64),
        num_val=manifest.splits["val"].num_samples if has_split(manifest, "val") else 0,
        num_classes=manifest.num_classes,
        stored_size=manifest.image_size,
        manifest=manifest,
    )


def _of_flags(galaxies: int, shards: int | None, *, is_remote: bool) -> PlannedData:
    if shards is not None and shards > galaxies:
        raise UserError(f"--shards {shards} are more than --galaxies {galaxies}: a shard holds at least one")
    return _divided(f"--galaxies {galaxies}", galaxies, shards, num_val=None, is_remote=is_remote)


def _of_official(config: DataConfig) -> PlannedData:
    split = read_official_split()
    codes = (split.original if config.variant == "original" else split.balanced).copy()
    train, val = SPLITS.index("train"), SPLITS.index("val")
    if config.conflicting == "drop":
        codes[split.sky.conflicting] = NONE
    count = int((codes == train).sum())
    return _divided(
        f"{NAME}, {config.variant}: the shipped split (no shards here)", count, None, num_val=int((codes == val).sum())
    )


def _divided(origin: str, num_train: int, shards: int | None, *, num_val: int | None, is_remote: bool = False) -> PlannedData:
    """Shards of nearly equal size, as the writer makes them."""
    number = shards or -(-num_train // default_shard_size(num_train))
    samples = np.diff(np.arange(number + 1) * num_train // number).astype(np.int64)
    return PlannedData(
        origin=f"{origin}; {ESTIMATED}",
        shard_samples=samples,
        shard_bytes=samples * BYTES_PER_GALAXY,
        num_val=num_val,
        num_classes=len(GALAXY10_CLASSES),
        stored_size=STORED_SIZE,
        is_remote=is_remote,
    )
