"""What a run was trained on, for whoever judges it: no galaxy of that may be among those that it is judged on."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation.overlap import COLUMNS, Galaxies, check_overlap
from galaxydist.loading.dataset import TrainingData, has_split
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.writer.encode import PIXEL_HASH

_log = logging.getLogger(__name__)

# The split whose galaxies no model may have seen.
JUDGED_SPLIT = "test"
FLAG = "--trained-on"

# From what a checkpoint says of its training data to the shards.
FindTrained = Callable[[TrainingData], Manifest]


def open_trained(trained_on: TrainingData, known: str, given: str | Path | None, cache: CacheConfig) -> Manifest:
    """The shards that a run was trained on.

    Args:
        trained_on: what its checkpoint says of them.
        known: their path or URL as the run's recipe has it.
        given: by the user, instead; taken on their word where it is another manifest, such as that of shards made anew.
        cache: where files of a URL are kept.

    Raises:
        UserError: they are no longer there, or others stand in their place.
    """
    if given is not None:
        manifest = open_shards(given, cache)
        if manifest.class_names != trained_on.class_names:
            raise UserError(
                f"{FLAG} {manifest.location} has the classes {', '.join(manifest.class_names)}, the run was trained on "
                f"{', '.join(trained_on.class_names)}: give the manifest of the shards that it was trained on"
            )
        if manifest.hash != trained_on.manifest_hash:
            _log.warning(
                "%s %s is not the manifest that the run was trained on (%s there, %s in its checkpoint): its galaxies are taken "
                "for those of the run",
                FLAG,
                manifest.location,
                manifest.hash[:12],
                trained_on.manifest_hash[:12],
            )
        return manifest
    why = (
        f"A run is judged on test galaxies only if none of them was in its training set, and the shards that it was trained on "
        f"(manifest {trained_on.manifest_hash[:12]})"
    )
    remedy = f"Say where they are with {FLAG} MANIFEST"
    try:
        manifest = open_shards(known, cache)
    except UserError as error:
        raise UserError(f"{why} cannot be opened: {error}. {remedy}.") from error
    if manifest.hash != trained_on.manifest_hash:
        raise UserError(
            f"{why} are no longer at {manifest.location}: others stand there (manifest {manifest.hash[:12]}). {remedy}, or, if "
            f"these hold the same galaxies in the same splits, {FLAG} {manifest.location}"
        )
    return manifest


def find_validation(
    manifest: Manifest, split: str, trained_on: TrainingData, find_trained: FindTrained
) -> NDArray[np.bool_] | None:
    """See that a run may be judged on a split.

    Args:
        manifest, split: what it is to be judged on.
        trained_on: what its checkpoint says of its training data.
        find_trained: called where that is another data set.

    Returns:
        Which of the split's samples were in the run's validation set; None for a split that is not there to judge by.

    Raises:
        UserError: some were in its training set, or that cannot be told.
    """
    if split != JUDGED_SPLIT:
        return None
    trained = manifest if manifest.hash == trained_on.manifest_hash else find_trained(trained_on)
    validation = _galaxies(trained, "val") if has_split(trained, "val") else None
    train, test = _galaxies(trained, "train"), _galaxies(manifest, split)
    are_one_set = manifest.hash == trained_on.manifest_hash
    if not are_one_set:
        _say_without_hashes(train, test)
    return check_overlap(train, validation, test, are_one_set=are_one_set)


def check_before_training(trained: Manifest, judged: Manifest) -> None:
    """Tell before hours of training what would be refused after it. Shards without catalogues are looked at only then: where they
    lie in a store, all of them would have to be fetched.

    Args:
        trained: what is going to be trained on.
        judged: what the run will be judged on.

    Raises:
        UserError: test galaxies are in the training set.
    """
    if has_split(judged, JUDGED_SPLIT) and trained.catalogues and judged.catalogues:
        train, test = _galaxies(trained, "train"), _galaxies(judged, JUDGED_SPLIT)
        check_overlap(train, None, test, are_one_set=judged.hash == trained.hash)


def _say_without_hashes(*both: Galaxies) -> None:
    """Shards of an earlier version have no hashes of their pictures."""
    for galaxies in both:
        if PIXEL_HASH not in galaxies.table.column_names:
            _log.warning(
                "%s has no hashes of its pictures (an earlier version made these shards): galaxies are compared by id and place "
                "alone, and equal pictures under other names are not found; make the shards anew to have them compared",
                galaxies.what,
            )


def _galaxies(manifest: Manifest, split: str) -> Galaxies:
    what = f"the {split} split of {manifest.location}"
    return Galaxies(read_catalogue(manifest, split, COLUMNS), manifest.dataset, what)
