"""Leakage checks: evaluated galaxies in a model's training or validation split, found by id, sky position or image."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.loading.training_data import TrainingData, has_split
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.writer.encode import PIXEL_HASH
from galaxydist.surveys.folder_scan import same_survey
from galaxydist.surveys.split import CUTOUT_ARCSEC, chord, unit_vectors

if TYPE_CHECKING:
    import pyarrow as pa


logger = logging.getLogger(__name__)

# The compared columns of a catalogue.
COLUMNS = ("id", "ra", "dec", PIXEL_HASH)
# Number of galaxies of either side that are compared at once.
CHUNK = 1 << 20
# Number of ids that a message names.
NAMED = 5
# The split that must not share a galaxy with a model's training split.
TEST_SPLIT = "test"
FLAG = "--trained-on"
# Walmsley et al. 2023, JOSS 8, 5312 (Zoobot) and 2024, arXiv:2404.02973: trained on Galaxy Zoo DECaLS, among others.
ZOOBOT_NOTE = (
    "zoobot: its encoders were trained on the votes of Galaxy Zoo DECaLS, which define Galaxy10's labels; test galaxies and "
    "their answers may have been among them, so that no comparison with other models is fair"
)

Mask = NDArray[np.bool_]
# Opens the shards that a checkpoint's training data describe.
FindTrainingShards = Callable[[TrainingData], Manifest]


@dataclass(frozen=True)
class SplitGalaxies:
    """Galaxies of a split.

    Args:
        table: N rows with ``id`` and, in degrees, ``ra`` and ``dec`` (null if unknown); ``pixel_hash`` if the shards have it.
        dataset: name of the data set: an id identifies a galaxy only within one survey.
        what: name of the split, for messages.
    """

    table: "pa.Table"
    dataset: str
    what: str

    @classmethod
    def read(cls, manifest: Manifest, split: str) -> "SplitGalaxies":
        what = f"the {split} split of {manifest.location}"
        return cls(read_catalogue(manifest, split, COLUMNS), manifest.dataset, what)


@dataclass(frozen=True)
class Overlap:
    """Masks (N,) of the test galaxies that are in another set.

    Args:
        by_id: a galaxy in the other set has the same id.
        by_position: a galaxy in the other set is within the radius.
        by_image: a galaxy in the other set has an image of equal pixels.
    """

    by_id: Mask
    by_position: Mask
    by_image: Mask

    @property
    def rows(self) -> Mask:
        """Union of the three."""
        return self.by_id | self.by_position | self.by_image


def find_overlap(others: "pa.Table", test: "pa.Table", *, are_one_survey: bool, radius_arcsec: float = CUTOUT_ARCSEC) -> Overlap:
    """Find the test galaxies that are among others. Memory is bounded but for a few bytes per galaxy; 10^6 x 10^6 take seconds.

    Args:
        others, test: catalogues with ``id``, ``ra``, ``dec`` and, for the comparison of images, ``pixel_hash``. Nulls are not
            compared.
        are_one_survey: also compare ids. Ids of different surveys, often a row number, are unrelated.
        radius_arcsec: inclusive; by default the width of a Galaxy10 cutout, within which a galaxy is visible in the other's
            image.
    """
    nothing = np.zeros(len(test), np.bool_)
    has_images = PIXEL_HASH in others.column_names and PIXEL_HASH in test.column_names
    return Overlap(
        by_id=_is_in(others, test, "id") if are_one_survey else nothing,
        by_position=_is_near(_positions(others), _positions(test), radius_arcsec),
        by_image=_is_in(others, test, PIXEL_HASH) if has_images else nothing,
    )


def check_overlap(
    trained: SplitGalaxies, validation: SplitGalaxies | None, test: SplitGalaxies, *, are_one_set: bool = False
) -> Mask:
    """Check that no test galaxy was in a model's training split.

    Args:
        trained: the training split.
        validation: the validation split, if there is one.
        test: the galaxies to evaluate.
        are_one_set: the splits are of one data set. They are kept as given: equal images cause a warning, not an error.

    Returns:
        Mask (N,) of the test galaxies in the validation split.

    Raises:
        UserError: with the number of test galaxies in the training split, and the ids of some.
    """
    found = _compare(trained, test)
    if (found.by_id | found.by_position if are_one_set else found.rows).any():
        raise UserError(_refusal(found, trained, test))
    if found.by_image.any():
        logger.warning(
            "%d of the %d galaxies of %s have the image of a training galaxy, pixel for pixel (%s): the model was trained on "
            "them",
            int(found.by_image.sum()),
            len(test.table),
            test.what,
            _some_ids(test.table, found.by_image),
        )
    return np.zeros(len(test.table), np.bool_) if validation is None else _compare(validation, test).rows


def _refusal(found: Overlap, trained: SplitGalaxies, test: SplitGalaxies) -> str:
    reasons = [
        f"{int(rows.sum())} {how} ({_some_ids(test.table, rows)})"
        for rows, how in (
            (found.by_id, "by id"),
            (found.by_position & ~found.by_id, f"within {CUTOUT_ARCSEC:.0f} arcsec of one of them on the sky"),
            (found.by_image & ~found.by_id & ~found.by_position, "by their images, which are equal pixel for pixel"),
        )
        if rows.any()
    ]
    text = (
        f"{int(found.rows.sum())} of the {len(test.table)} galaxies of {test.what} were in the training set of this model, "
        f"{trained.what}: {'; '.join(reasons)}. A model is not evaluated on galaxies that it was trained on. Evaluate it on "
        "another data set, or train it on shards whose splits keep such galaxies together (galaxydist data shard makes them from "
        "a survey file)."
    )
    ra, dec = _positions(test.table)
    elsewhere = int((found.by_id & ~found.by_position & np.isfinite(ra) & np.isfinite(dec)).sum())
    if elsewhere and trained.table.column("ra").null_count == 0:
        text += (
            f" {elsewhere} of these are far from every galaxy of the training set: if they are other galaxies with the same ids, "
            "make the shards of one of the two surveys again under another name (galaxydist data shard --name NAME)."
        )
    return text


def _compare(others: SplitGalaxies, test: SplitGalaxies) -> Overlap:
    return find_overlap(others.table, test.table, are_one_survey=same_survey(others.dataset, test.dataset))


def _is_in(others: "pa.Table", test: "pa.Table", column: str) -> Mask:
    """Return a mask (N,) of the test values that the other table has too."""
    import pyarrow.compute as pc

    values, found = test.column(column), np.zeros(len(test), np.bool_)
    for start in range(0, len(others), CHUNK):
        known = others.column(column).slice(start, CHUNK).combine_chunks()
        found |= pc.is_in(values, value_set=known, skip_nulls=True).to_numpy(zero_copy_only=False)
    return found


def _positions(table: "pa.Table") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ra and dec (N,) in degrees, nan if unknown."""
    ra, dec = (np.asarray(table.column(name).to_numpy(), np.float64) for name in ("ra", "dec"))
    return ra, dec


def _is_near(
    others: tuple[NDArray[np.float64], NDArray[np.float64]], test: tuple[NDArray[np.float64], NDArray[np.float64]], arcsec: float
) -> Mask:
    """Return a mask (N,) of the test positions within a distance of one of the others."""
    from scipy.spatial import cKDTree

    def chunks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))

    found = np.zeros(len(test[0]), np.bool_)
    limit = np.nextafter(chord(arcsec), np.inf)  # the tree's bound is exclusive, ours is inclusive
    for there in chunks(np.flatnonzero(np.isfinite(others[0]) & np.isfinite(others[1]))):
        tree = cKDTree(unit_vectors(others[0][there], others[1][there]), balanced_tree=False)
        for here in chunks(np.flatnonzero(~found & np.isfinite(test[0]) & np.isfinite(test[1]))):
            distances, _ = tree.query(unit_vectors(test[0][here], test[1][here]), distance_upper_bound=limit)
            found[here] = np.isfinite(distances)
    return found


def _some_ids(table: "pa.Table", rows: Mask) -> str:
    import pyarrow as pa

    ids = table.column("id").filter(pa.array(rows)).to_pylist()
    return ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")


def open_training_shards(trained_on: TrainingData, known: str, given: str | Path | None, cache: CacheConfig) -> Manifest:
    """Open the shards that a run was trained on.

    Args:
        trained_on: the training data according to the run's checkpoint.
        known: their path or URL according to the run's recipe.
        given: path or URL from the user, instead; accepted with a warning if it is another manifest, for shards made again.
        cache: cache for the files of a URL.

    Raises:
        UserError: the shards are no longer there, or were replaced by others.
    """
    if given is not None:
        manifest = open_shards(given, cache)
        if manifest.class_names != trained_on.class_names:
            raise UserError(
                f"{FLAG} {manifest.location} has the classes {', '.join(manifest.class_names)}, the run was trained on "
                f"{', '.join(trained_on.class_names)}: give the manifest of the shards that it was trained on"
            )
        if manifest.hash != trained_on.manifest_hash:
            logger.warning(
                "%s %s is not the manifest that the run was trained on (its hash is %s, the checkpoint has %s): its galaxies are "
                "used as those of the run",
                FLAG,
                manifest.location,
                manifest.hash[:12],
                trained_on.manifest_hash[:12],
            )
        return manifest
    ours = f"the shards that the run was trained on (manifest {trained_on.manifest_hash[:12]})"
    remedy = f"Give their location with {FLAG} MANIFEST"
    try:
        manifest = open_shards(known, cache)
    except UserError as error:
        raise UserError(f"{ours} cannot be opened: {error}. {remedy}.") from error
    if manifest.hash != trained_on.manifest_hash:
        raise UserError(
            f"{ours} are no longer at {manifest.location}, which has others (manifest {manifest.hash[:12]}). {remedy}, or, if "
            f"these have the same galaxies in the same splits, {FLAG} {manifest.location}"
        )
    return manifest


def validation_mask(
    manifest: Manifest, split: str, trained_on: TrainingData, find_training_shards: FindTrainingShards
) -> Mask | None:
    """Check that a run may be evaluated on a split.

    Args:
        manifest, split: the galaxies to evaluate.
        trained_on: the training data according to the run's checkpoint.
        find_training_shards: called if they are another data set.

    Returns:
        Mask of the split's samples in the run's validation split; None unless the split is the test split.

    Raises:
        UserError: some were in the run's training split, or this cannot be checked.
    """
    if split != TEST_SPLIT:
        return None
    are_one_set = manifest.hash == trained_on.manifest_hash
    try:
        trained = manifest if are_one_set else find_training_shards(trained_on)
    except UserError as error:
        raise UserError(f"test galaxies are evaluated only if none of them was in the training set, and {error}") from error
    validation = SplitGalaxies.read(trained, "val") if has_split(trained, "val") else None
    train, test = SplitGalaxies.read(trained, "train"), SplitGalaxies.read(manifest, split)
    for galaxies in () if are_one_set else (train, test):
        if PIXEL_HASH not in galaxies.table.column_names:
            logger.warning(
                "%s has no hashes of its images (an earlier version made these shards): galaxies are compared by id and position "
                "only, and equal images under other names are not found; make the shards again to compare them",
                galaxies.what,
            )
    return check_overlap(train, validation, test, are_one_set=are_one_set)


def check_before_training(trained: Manifest, evaluated: Manifest) -> None:
    """Check before the training that the evaluation after it will not be refused.

    Shards without catalogues are skipped here: from a remote store, all of them would have to be fetched.

    Args:
        trained: shards of the training.
        evaluated: shards of the evaluation.

    Raises:
        UserError: test galaxies are in the training split.
    """
    if has_split(evaluated, TEST_SPLIT) and trained.catalogues and evaluated.catalogues:
        train, test = SplitGalaxies.read(trained, "train"), SplitGalaxies.read(evaluated, TEST_SPLIT)
        check_overlap(train, None, test, are_one_set=evaluated.hash == trained.hash)
