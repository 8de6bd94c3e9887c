"""Split of a folder or a table: the given one, completed, or a new one; the user's options for it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError, name_some
from galaxydist.galaxy import SPLITS, STORED_SPLITS
from galaxydist.surveys.folder_scan import known_split
from galaxydist.surveys.official_split import SPLIT_SEED
from galaxydist.surveys.sky_cells import is_spread, split_by_cell, split_by_id
from galaxydist.surveys.split import (
    IN_MARGIN,
    MIN_PER_CLASS,
    NONE,
    TEST,
    TRAIN,
    VAL,
    Codes,
    SplitCandidates,
    build_candidates,
    cut,
    id_keys,
    join_groups,
    split_balanced,
    split_fold,
    split_original,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """The user's options for the split of a folder or a table.

    Args:
        variant: ``original``, or ``balanced``: every class undersampled to the smallest.
        conflicting: ``keep`` or ``drop`` galaxies with two labels, by position, equal files or a mark in the metadata.
        fold: ``(k, n)``: instead of the split, fold k (0 ... n-1) of an n-fold cross-validation.
        has_val: False for no validation split; its galaxies stay in train.
    """

    variant: str = "original"
    conflicting: str = "keep"
    fold: tuple[int, int] | None = None
    has_val: bool = True


def choose_split(
    location: object,
    galaxies: SplitCandidates,
    given: Codes | None,
    options: SplitOptions,
    new_split: Callable[[], Codes] | None = None,
) -> Codes:
    """Return the (N,) split codes of a source: the given ones, completed, or new ones.

    A class without training images is an error of a folder; of a table it is a warning.

    Args:
        location: the folder or table, for messages.
        galaxies: the N galaxies.
        given: the codes that the source gives, -1 for a galaxy in no split; None if it gives none.
        options: the user's options; its ``conflicting`` concerns the galaxies that ``galaxies`` marks so.
        new_split: makes and reports the split of a table that gives none; None for a folder: stratified by class.

    Raises:
        UserError: a fold of a source with a split of its own, or classes that are too small.
    """
    if options.fold is not None:
        if given is not None:
            raise UserError(
                f"{location} has a split of its own (split folders or a split column), and a cross-validation makes another: "
                "remove --fold, or give the images without that split (--split none for a table)"
            )
        codes = split_fold(galaxies, *options.fold)
    else:
        codes = _complete(location, galaxies, given, options, new_split)
    if options.variant == "balanced":
        codes = split_balanced(galaxies, codes)
    if not options.has_val:
        codes = np.where(codes == VAL, TRAIN, codes).astype(np.int8)
    if options.conflicting == "drop":
        codes = np.where(galaxies.sky.conflicting, NONE, codes).astype(np.int8)
    return codes


@dataclass(frozen=True)
class RowsToSplit:
    """The rows of a table that are to be split.

    Args:
        location: the table, for messages.
        class_names: of the numbers in ``labels``.
        ids: N ids.
        labels: (N,) class numbers.
        ra, dec: (N,) degrees, nan where unknown.
    """

    location: str
    class_names: tuple[str, ...]
    ids: Sequence[str]
    labels: NDArray[np.int64]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]

    def split(self, given: Codes | None, equal: NDArray[np.int64], marked: NDArray[np.bool_], options: SplitOptions) -> Codes:
        """Return the split codes.

        Args:
            given: codes that the table gives, or None.
            equal: group numbers of equal images, -1 for an image without a copy.
            marked: True for galaxies that the table calls conflicting.
            options: the user's options.
        """
        seed = SPLIT_SEED
        galaxies = build_candidates(
            self.labels, self.ra, self.dec, class_names=self.class_names, seed=seed, keys=id_keys(self.ids)
        )
        sky = join_groups(galaxies.sky, equal, self.labels)
        galaxies = replace(galaxies, sky=replace(sky, conflicting=sky.conflicting | marked))
        return choose_split(
            self.location, galaxies, given, options, lambda: self._new_split(galaxies, equal, has_val=options.has_val)
        )

    def _new_split(self, galaxies: SplitCandidates, equal: NDArray[np.int64], *, has_val: bool) -> Codes:
        """Return the codes of a table that gives none; equal images have one code, those with two labels are not evaluated on."""
        has_positions = bool(np.isfinite(self.ra).any())
        if has_positions and not is_spread(self.ra, self.dec):
            report_new_split(self.location, "by class, neighbours on the sky together", has_val=has_val)
            return split_common_classes(galaxies)
        if has_positions:
            report_new_split(self.location, "by cells of the sky", has_val=has_val)
            codes, apart = split_by_cell(self.ra, self.dec, self.ids), IN_MARGIN
        else:
            report_new_split(self.location, "by a hash of the ids", has_val=has_val)
            codes, apart = split_by_id(self.ids), TRAIN
        # Equal images follow the one with the smallest key; where that would put a galaxy among its neighbours of another split,
        # it goes to the margin. So do galaxies with two labels, which are not evaluated on.
        grouped = np.flatnonzero(equal >= 0)
        grouped = grouped[np.lexsort((galaxies.keys[grouped], equal[grouped]))]
        _, first, group = np.unique(equal[grouped], return_index=True, return_inverse=True)
        leading = codes[grouped[first]][group]
        codes[grouped] = np.where(codes[grouped] == leading, leading, IN_MARGIN) if has_positions else leading
        codes[galaxies.sky.conflicting & (codes != TRAIN)] = apart
        return self._fill_train(galaxies, codes)

    def _fill_train(self, galaxies: SplitCandidates, codes: Codes) -> Codes:
        """Return the codes with classes that would have no training galaxy in train, but for those with neighbours on the sky."""
        absent = np.flatnonzero(
            (galaxies.counts(codes == TRAIN) == 0) & (np.bincount(self.labels, minlength=len(self.class_names)) > 0)
        )
        is_moved = np.isin(self.labels, absent) & ((galaxies.sky.groups < 0) | ~np.isfinite(self.ra))
        if is_moved.any():
            text = "%s: %d galaxies are in train, since their %d classes would have no training galaxy"
            logger.warning(text, self.location, int(is_moved.sum()), len(np.unique(self.labels[is_moved])))
        return np.where(is_moved, TRAIN, codes).astype(np.int8)


def is_complete(location: object, given: Codes | None, *, has_val: bool) -> bool:
    """Return True if a source itself has all wanted splits, so that none must be cut from train."""
    found = set() if given is None else set(given.tolist())
    if VAL in found and not has_val:
        raise UserError(f"{location} has a validation split of its own; --val 0 is for a folder without one")
    return found.issuperset((TRAIN, VAL, TEST) if has_val else (TRAIN, TEST))


def split_code(name: str) -> int | None:
    """Return the code of the split that a folder or table calls ``name``, or None if it is not known."""
    split = known_split(name)
    return None if split is None else STORED_SPLITS.index(split)


def split_common_classes(galaxies: SplitCandidates) -> Codes:
    """Split as ``split_original`` does, with the galaxies of classes that are too small to split all in train."""
    counts = np.bincount(galaxies.labels, minlength=galaxies.num_classes)
    common = np.flatnonzero(counts >= MIN_PER_CLASS)
    rows = np.flatnonzero(np.isin(galaxies.labels, common))
    codes = np.full(len(galaxies.labels), TRAIN, np.int8)
    if len(common):
        codes[rows] = split_original(galaxies.subset(rows, common))
    return codes


@cache
def report_new_split(location: object, how: str, *, has_val: bool) -> None:
    """Log once for each source how its images are split: a command may open it several times."""
    shares = "80/10/10" if has_val else "90/10 into train and test"
    logger.warning("%s gives no train, val and test splits: its images are split %s %s", location, shares, how)


def _complete(
    location: object,
    galaxies: SplitCandidates,
    codes: Codes | None,
    options: SplitOptions,
    new_split: Callable[[], Codes] | None,
) -> Codes:
    """Return new codes, or cut the wanted splits that the source lacks from train, with a warning."""
    if codes is None:
        if new_split is not None:
            return _warn_of_absent(location, galaxies, new_split(), options, is_error=False)
        report_new_split(location, "by class", has_val=options.has_val)
        return split_original(galaxies)
    for target, split in ((TEST, "test"), *(((VAL, "val"),) if options.has_val else ())):
        if not (codes == target).any():
            logger.warning("%s has no %s split: a tenth of each class of train is used for it", location, split)
            counts = galaxies.counts(codes == TRAIN)
            before, codes = codes, cut(galaxies, codes, target)
            if new_split is not None:  # the only galaxy of a class stays in train
                codes = np.where((counts == 1)[galaxies.labels], before, codes).astype(np.int8)
    return _warn_of_absent(location, galaxies, codes, options, is_error=new_split is None)


def _warn_of_absent(location: object, galaxies: SplitCandidates, codes: Codes, options: SplitOptions, *, is_error: bool) -> Codes:
    """Warn about classes without images in a split, and return the codes; such a class of train may be an error."""
    for code, split in enumerate(SPLITS):
        absent = [galaxies.class_names[label] for label in np.flatnonzero(galaxies.counts(codes == code) == 0).tolist()]
        if absent and code == TRAIN and is_error:
            raise UserError(f"{location}: class {absent[0]!r} has no training images; add some or remove the class everywhere")
        if absent and (options.has_val or code != VAL):
            share = f"{len(absent)} of {galaxies.num_classes} classes: " if len(absent) > 1 else ""
            logger.warning("%s: %s has no images of %s%s", location, split, share, name_some(absent, 10))
    return codes
