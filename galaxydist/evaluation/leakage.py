"""Galaxies that a model is judged on and has learnt from, or was chosen on: by id, by place on the sky, or by their images."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.loading.dataset import TrainingData, has_split
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.writer.encode import PIXEL_HASH
from galaxydist.surveys.folder_scan import same_survey
from galaxydist.surveys.split import CUTOUT_ARCSEC, chord, unit_vectors

if TYPE_CHECKING:
    import pyarrow as pa


_log = logging.getLogger(__name__)

# What is compared of a catalogue.
COLUMNS = ("id", "ra", "dec", PIXEL_HASH)
# Galaxies of either side that are compared at a time.
CHUNK = 1 << 20
# Ids that a message names.
NAMED = 5

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SplitGalaxies:
    """A split's galaxies.

    Args:
        table: N rows with ``id`` and, in degrees, ``ra`` and ``dec`` (null where unknown); ``pixel_hash`` where shards have it.
        dataset: the data set's name: an id means one galaxy only within one survey.
        what: says which these are, for messages.
    """

    table: "pa.Table"
    dataset: str
    what: str


@dataclass(frozen=True)
class Overlap:
    """Rows of a test set that are in another set.

    Args:
        by_id: (N,) the galaxy of this id is in it.
        by_position: (N,) a galaxy as close as the radius is in it.
        by_image: (N,) a galaxy whose image has the same pixels is in it.
    """

    by_id: Mask
    by_position: Mask
    by_image: Mask

    @property
    def rows(self) -> Mask:
        """(N,) any of them."""
        return self.by_id | self.by_position | self.by_image


def find_overlap(others: "pa.Table", test: "pa.Table", *, are_one_survey: bool, radius_arcsec: float = CUTOUT_ARCSEC) -> Overlap:
    """The test galaxies that are among others. Memory is bounded but for a few bytes a galaxy; 10^6 x 10^6 take seconds.

    Args:
        others, test: catalogues with ``id``, ``ra``, ``dec`` and, for the images to be compared, ``pixel_hash``. What is null
            is not compared.
        are_one_survey: compare ids too: those of different surveys, often a number in a list, mean nothing to one another.
        radius_arcsec: how close, inclusive, on the sky; by default the width of a Galaxy10 cutout, within which a galaxy shows in
            the other's image.
    """
    nothing = np.zeros(len(test), np.bool_)
    has_images = PIXEL_HASH in others.column_names and PIXEL_HASH in test.column_names
    return Overlap(
        by_id=_among(others, test, "id") if are_one_survey else nothing,
        by_position=_near(_positions(others), _positions(test), radius_arcsec),
        by_image=_among(others, test, PIXEL_HASH) if has_images else nothing,
    )


def check_overlap(
    trained: SplitGalaxies, validation: SplitGalaxies | None, test: SplitGalaxies, *, are_one_set: bool = False
) -> Mask:
    """See that no test galaxy was in a model's training set.

    Args:
        trained: what the model was trained on.
        validation: what it was chosen on, where there was anything.
        test: what it is to be judged on.
        are_one_set: these are splits of one data set, which stay as given: equal images in them are said, not refused.

    Returns:
        (N,) which test galaxies were in its validation set.

    Raises:
        UserError: naming how many were in its training set, and some of them.
    """
    found = _compare(trained, test)
    if (found.by_id | found.by_position if are_one_set else found.rows).any():
        raise UserError(_refusal(found, trained, test))
    if found.by_image.any():
        _log.warning(
            "%d of the %d galaxies of %s have the image of a training galaxy, pixel for pixel (%s): the model has learnt from "
            "them",
            int(found.by_image.sum()),
            len(test.table),
            test.what,
            _name_some(test.table, found.by_image),
        )
    if validation is None:
        return np.zeros(len(test.table), np.bool_)
    return _compare(validation, test).rows


def _refusal(found: Overlap, trained: SplitGalaxies, test: SplitGalaxies) -> str:
    close = found.by_position & ~found.by_id
    reasons = [
        f"{int(rows.sum())} {how} ({_name_some(test.table, rows)})"
        for rows, how in (
            (found.by_id, "by id"),
            (close, f"within {CUTOUT_ARCSEC:.0f} arcsec of one of them on the sky"),
            (found.by_image & ~found.by_id & ~found.by_position, "by their images, which are equal pixel for pixel"),
        )
        if rows.any()
    ]
    text = (
        f"{int(found.rows.sum())} of the {len(test.table)} galaxies of {test.what} were in the training set of this model, "
        f"{trained.what}: {'; '.join(reasons)}. A model is not judged on galaxies that it has learnt from. Judge it on another "
        "data set, or train it on shards of a split that keeps such galaxies together (galaxydist data shard makes such ones of "
        "a survey file)."
    )
    ra, dec = _positions(test.table)
    elsewhere = int((found.by_id & ~found.by_position & np.isfinite(ra) & np.isfinite(dec)).sum())
    if elsewhere and trained.table.column("ra").null_count == 0:
        text += (
            f" {elsewhere} of these lie where no galaxy of the training set does: if they are other galaxies of the same ids, "
            "make the shards of one of the two surveys anew under a name of its own (galaxydist data shard --name NAME)."
        )
    return text


def _compare(others: SplitGalaxies, test: SplitGalaxies) -> Overlap:
    return find_overlap(others.table, test.table, are_one_survey=same_survey(others.dataset, test.dataset))


def _among(others: "pa.Table", test: "pa.Table", column: str) -> Mask:
    """(N,) which test values stand among the others'."""
    import pyarrow.compute as pc

    values, found = test.column(column), np.zeros(len(test), np.bool_)
    for start in range(0, len(others), CHUNK):
        known = others.column(column).slice(start, CHUNK).combine_chunks()
        found |= pc.is_in(values, value_set=known, skip_nulls=True).to_numpy(zero_copy_only=False)
    return found


def _positions(table: "pa.Table") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) ra and dec in degrees, nan where unknown."""
    ra, dec = (np.asarray(table.column(name).to_numpy(), np.float64) for name in ("ra", "dec"))
    return ra, dec


def _near(
    others: tuple[NDArray[np.float64], NDArray[np.float64]], test: tuple[NDArray[np.float64], NDArray[np.float64]], arcsec: float
) -> Mask:
    """(N,) which test positions have one of the others within a distance."""
    from scipy.spatial import cKDTree

    found = np.zeros(len(test[0]), np.bool_)
    limit = chord(arcsec)
    known = np.flatnonzero(np.isfinite(others[0]) & np.isfinite(others[1]))
    for there in _chunks(known):
        tree = cKDTree(unit_vectors(others[0][there], others[1][there]), balanced_tree=False)
        for here in _chunks(np.flatnonzero(~found & np.isfinite(test[0]) & np.isfinite(test[1]))):
            # The bound is exclusive, the limit inclusive.
            distances, _ = tree.query(
                unit_vectors(test[0][here], test[1][here]), distance_upper_bound=np.nextafter(limit, np.inf)
            )
            found[here] = np.isfinite(distances)
    return found


def _chunks(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _name_some(table: "pa.Table", rows: Mask) -> str:
    import pyarrow as pa

    ids = table.column("id").filter(pa.array(rows)).to_pylist()
    return ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")


# What a run was trained on, for whoever judges it: no galaxy of that may be among those that it is judged on.

# The split whose galaxies no model may have seen.
JUDGED_SPLIT = "test"
FLAG = "--trained-on"

# From what a checkpoint says of its training data to the shards.
FindTrained = Callable[[TrainingData], Manifest]


def open_training_shards(trained_on: TrainingData, known: str, given: str | Path | None, cache: CacheConfig) -> Manifest:
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


def validation_mask(
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


def _say_without_hashes(*both: SplitGalaxies) -> None:
    """Shards of an earlier version have no hashes of their images."""
    for galaxies in both:
        if PIXEL_HASH not in galaxies.table.column_names:
            _log.warning(
                "%s has no hashes of its images (an earlier version made these shards): galaxies are compared by id and place "
                "alone, and equal images under other names are not found; make the shards anew to have them compared",
                galaxies.what,
            )


def _galaxies(manifest: Manifest, split: str) -> SplitGalaxies:
    what = f"the {split} split of {manifest.location}"
    return SplitGalaxies(read_catalogue(manifest, split, COLUMNS), manifest.dataset, what)
