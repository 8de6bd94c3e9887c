"""Train, validation and test splits as pure functions of labels, sky positions and a seed.

A split code is 0 train, 1 val, 2 test (the order of ``galaxy.SPLITS``), 3 for the margin between them on the sky
(``sky_cells.py``), or -1 for a galaxy in no split. Galaxies that appear in each other's images, or have equal images, form a
group; no group is divided between splits.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import hash64, uniform
from galaxydist.errors import UserError
from galaxydist.galaxy import SPLITS, STORED_SPLITS

# Sky positions: groups of neighbours, and positions with two labels.

CUTOUT_ARCSEC = 256 * 0.262  # width of a Galaxy10 cutout: closer galaxies appear in each other's images
SAME_POSITION_ARCSEC = 1.0


@dataclass(frozen=True, slots=True)
class Sky:
    """Neighbours among N galaxies.

    Args:
        groups: (N,) int64, equal for galaxies whose images overlap (directly or through others); -1 for an isolated galaxy.
        conflicting: (N,) bool, True where a galaxy of another label has the same position.
    """

    groups: NDArray[np.int64]
    conflicting: NDArray[np.bool_]


def read_sky(labels: NDArray[np.integer], ra: NDArray[np.float64], dec: NDArray[np.float64]) -> Sky:
    """Find groups of galaxies closer than one cutout width, and positions with two labels.

    Args:
        labels: (N,) class numbers.
        ra, dec: (N,) degrees, nan where unknown.
    """
    conflicting = np.zeros(len(labels), np.bool_)
    same = close_pairs(ra, dec, SAME_POSITION_ARCSEC)
    conflicting[same[labels[same[:, 0]] != labels[same[:, 1]]]] = True
    return Sky(_connect(close_pairs(ra, dec, CUTOUT_ARCSEC), len(labels)), conflicting)


def check_positions(ra: NDArray[np.float64], dec: NDArray[np.float64], *, name: Callable[[int], str]) -> None:
    """Check that positions are valid sky coordinates.

    Args:
        ra, dec: (N,) degrees, nan where unknown.
        name: returns the name of a row for the message.

    Raises:
        UserError: a declination outside -90 ... 90, or a right ascension outside -180 ... 360.
    """
    wrong = np.flatnonzero((np.abs(dec) > 90) | (ra < -180) | (ra > 360))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{name(row)}: ra={ra[row]:g}, dec={dec[row]:g} is not a sky position ({len(wrong)} of {len(ra)} are invalid): ra "
            "and dec are degrees, from 0 to 360 and from -90 to 90, nan (or empty) if unknown"
        )


def join_groups(sky: Sky, equal: NDArray[np.int64], labels: NDArray[np.integer]) -> Sky:
    """Merge groups of galaxies with equal images into the groups of ``sky``, conflicting if they have two labels.

    Args:
        sky: groups and conflicts by position.
        equal: (N,) group numbers of equal images; -1 for a unique image.
        labels: (N,) class numbers.
    """
    if not (equal >= 0).any():
        return sky
    pairs = _pairs_of_group(equal)
    two_labels = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
    is_conflicting = np.zeros(int(equal.max()) + 1, np.bool_)
    is_conflicting[equal[two_labels[:, 0]]] = True
    groups = _connect(np.concatenate([_pairs_of_group(sky.groups), pairs]), len(labels))
    return Sky(groups, sky.conflicting | ((equal >= 0) & is_conflicting[equal]))


def close_pairs(ra: NDArray[np.float64], dec: NDArray[np.float64], arcsec: float) -> NDArray[np.int64]:
    """Return the (P, 2) rows of all pairs within ``arcsec`` on the sky, sorted, the smaller row first.

    Args:
        ra, dec: (N,) degrees; a galaxy whose position is nan has no pair.
    """
    from scipy.spatial import cKDTree

    known = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    tree = cKDTree(unit_vectors(ra[known], dec[known]))
    pairs = known[tree.query_pairs(chord(arcsec), output_type="ndarray")].reshape(-1, 2)
    pairs.sort(axis=1)
    return np.asarray(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], np.int64)


def unit_vectors(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert ``ra``, ``dec`` (degrees) to (N, 3) unit vectors, which need no special case at 360 degrees or the poles."""
    lon, lat = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def chord(arcsec: float) -> float:
    """Return the chord length on the unit sphere of an angle in arcsec."""
    return float(2 * np.sin(np.radians(arcsec / 3600) / 2))


def _pairs_of_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (P, 2) consecutive rows of each group: enough pairs to connect it."""
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    return np.asarray(np.stack([rows[:-1], rows[1:]], axis=1)[groups[rows[:-1]] == groups[rows[1:]]])


def _connect(pairs: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return (length,) group numbers of the rows that pairs connect; -1 for a row in no pair."""
    groups = np.full(length, -1, np.int64)
    if len(pairs):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        links = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(length, length))
        component = connected_components(links, directed=False)[1]
        grouped = np.unique(pairs)
        # Components are numbered by their first row, so that the numbers do not depend on scipy.
        _, first, inverse = np.unique(component[grouped], return_index=True, return_inverse=True)
        groups[grouped] = np.argsort(np.argsort(first))[inverse]
    return groups


Rows = NDArray[np.int64]
Codes = NDArray[np.int8]

NONE, TRAIN, VAL, TEST, IN_MARGIN = -1, 0, 1, 2, 3
MIN_PER_CLASS = 3  # one for each split

# Streams of the counter-based RNG. The numbers are part of every frozen split: never reuse one.
_TIES, _GROUPS, _SINGLES, _BALANCED_TEST, _BALANCED_TRAIN, _CUT_VAL, _CUT_TEST, _FOLDS = range(1, 9)


@dataclass(frozen=True, slots=True)
class SplitCandidates:
    """The galaxies to split.

    Args:
        labels: (N,) class numbers.
        class_names: K names.
        sky: groups of neighbours and conflicting positions.
        keys: (N,) uint64 hash keys: rows, or numbers that stay the same when galaxies are added or removed.
        seed: seed of every random choice.
    """

    labels: NDArray[np.integer]
    class_names: Sequence[str]
    sky: Sky
    keys: NDArray[np.uint64]
    seed: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def counts(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the (K,) number of galaxies of each class among ``rows``."""
        return np.bincount(self.labels[rows], minlength=self.num_classes)

    def subset(self, rows: Rows, classes: NDArray[np.int64]) -> "SplitCandidates":
        """Return the galaxies of ``rows``, which all have one of ``classes`` (sorted class numbers), numbered anew."""
        groups, conflicting = self.sky.groups[rows], self.sky.conflicting[rows]
        names = [self.class_names[label] for label in classes.tolist()]
        labels = np.searchsorted(classes, self.labels[rows])
        return SplitCandidates(labels, names, Sky(groups, conflicting), self.keys[rows], self.seed)

    def hash_sorted(self, rows: NDArray[np.bool_] | Rows, stream: int) -> Rows:
        """Return ``rows`` (numbers or a mask) sorted by their hashes in the RNG stream ``stream``."""
        chosen = np.flatnonzero(rows) if rows.dtype == np.bool_ else np.asarray(rows, np.int64)
        return chosen[np.argsort(hash64(self.seed, stream, self.keys[chosen]), kind="stable")]

    def groups_in_hash_order(self) -> Iterator[Rows]:
        """Yield the rows of each group of neighbours: groups in hash order, rows of a group by key."""
        grouped = np.flatnonzero(self.sky.groups >= 0)
        if not len(grouped):
            return
        grouped = grouped[np.lexsort((self.keys[grouped], self.sky.groups[grouped]))]
        members = np.split(grouped, np.flatnonzero(np.diff(self.sky.groups[grouped])) + 1)
        first = self.keys[[rows[0] for rows in members]]
        for number in np.argsort(hash64(self.seed, _GROUPS, 0, first), kind="stable"):
            yield members[number]


def build_candidates(
    labels: NDArray[np.integer],
    ra: NDArray[np.float64],
    dec: NDArray[np.float64],
    *,
    class_names: Sequence[str],
    seed: int,
    keys: NDArray[np.uint64] | None = None,
) -> SplitCandidates:
    """Find the neighbours of galaxies that are to be split.

    Args:
        labels: (N,) class numbers.
        ra, dec: (N,) degrees, nan where unknown.
        class_names, seed: as in :class:`SplitCandidates`.
        keys: (N,) uint64 hash keys; None for the row numbers.
    """
    keys = np.arange(len(labels), dtype=np.uint64) if keys is None else keys
    return SplitCandidates(labels, class_names, read_sky(labels, ra, dec), keys, seed)


def id_keys(ids: Iterable[str]) -> NDArray[np.uint64]:
    """Return a hash key of each id: the first 8 bytes of its SHA-256. It stays the same when galaxies are added or removed."""
    digests = (hashlib.sha256(name.encode()).digest() for name in ids)
    return np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64)


def check_classes(galaxies: SplitCandidates, at_least: int = MIN_PER_CLASS) -> None:
    """Raise a UserError that names every class with fewer galaxies than ``at_least``."""
    counts = np.bincount(galaxies.labels, minlength=galaxies.num_classes)
    small = [f"{name!r} has {count}" for name, count in zip(galaxies.class_names, counts, strict=True) if count < at_least]
    if small:
        kind = "an empty class" if counts.min() == 0 else "a class too small to split"
        raise UserError(
            f"{kind}: {', '.join(small)} of {len(galaxies.labels)} galaxies; at least {at_least} galaxies of each class are "
            "needed: add some or remove the class"
        )


def split_original(galaxies: SplitCandidates) -> Codes:
    """Return (N,) codes of the 80/10/10 split: whole groups first, then single galaxies up to each class's exact counts.

    Raises:
        UserError: a class is empty or too small for all three splits.
    """
    check_classes(galaxies)
    left = split_counts(np.bincount(galaxies.labels, minlength=galaxies.num_classes), galaxies.seed)
    codes = np.full(len(galaxies.labels), TRAIN, np.int8)
    for rows in galaxies.groups_in_hash_order():
        if galaxies.sky.conflicting[rows].any():
            continue  # a galaxy with two labels may train a model, but not select or test one
        draw = uniform(galaxies.seed, _GROUPS, 1, galaxies.keys[rows[0]])
        code = int(np.searchsorted([0.8, 0.9], draw, side="right"))
        need = galaxies.counts(rows)
        if code != TRAIN and (left[code] >= need).all():
            codes[rows] = code
            left[code] -= need
    for label in range(galaxies.num_classes):
        rows = galaxies.hash_sorted((galaxies.labels == label) & (galaxies.sky.groups < 0), _SINGLES)
        num_test, num_val = left[TEST, label], left[VAL, label]
        codes[rows[:num_test]] = TEST
        codes[rows[num_test : num_test + num_val]] = VAL
    _fill_empty_splits(galaxies, codes, left)
    _check_no_empty_split(galaxies, codes)
    return codes


def _fill_empty_splits(galaxies: SplitCandidates, codes: Codes, left: NDArray[np.int64]) -> None:
    """Move whole groups from train to splits that lack a class (one without single galaxies), as long as train keeps some."""
    for code in (TEST, VAL):
        for label in np.flatnonzero(galaxies.counts(codes == code) == 0).tolist():
            for rows in _movable_groups(galaxies, codes, label):
                moved = galaxies.counts(rows)
                if (galaxies.counts(codes == TRAIN) > moved)[moved > 0].all():
                    codes[rows] = code
                if galaxies.counts(codes == code)[label] >= max(1, left[code, label]):
                    break


def _movable_groups(galaxies: SplitCandidates, codes: Codes, label: int) -> Iterator[Rows]:
    """Yield, in hash order, the groups that lie in train, contain the class, and have no galaxy with a second label."""
    for rows in galaxies.groups_in_hash_order():
        in_train = rows[codes[rows] != NONE]
        is_movable = (codes[in_train] == TRAIN).all() and not galaxies.sky.conflicting[rows].any()
        if is_movable and (galaxies.labels[in_train] == label).any():
            yield in_train


def split_counts(class_counts: NDArray[np.integer], seed: int) -> NDArray[np.int64]:
    """Return (3, K) numbers of galaxies of each class in train, val and test.

    As for Galaxy10's published test set, two stratified cuts are made: a fifth is held out, and half of that is the test set,
    each by largest remainder with random ties. A class keeps at least one galaxy in each split.
    """
    num_held = -(-int(class_counts.sum()) // 5)
    held = _apportion(np.asarray(class_counts, np.int64), num_held, seed)
    test = _apportion(held, -(-num_held // 2), seed)
    val = np.maximum(held - test, 1)
    test = np.maximum(test, 1)
    return np.stack([class_counts - val - test, val, test])


def split_balanced(galaxies: SplitCandidates, original: Codes) -> Codes:
    """Return (N,) codes of the balanced variant: every class is cut to the size of the smallest.

    A fifth is test, the rest is train, of which a tenth is val. The test set is taken from original test, then from original val
    if a small class has too few; the train set from original train, then from the rest of original val. So no galaxy that trains
    one variant tests the other.
    """
    smallest = int(np.bincount(galaxies.labels, minlength=galaxies.num_classes).min())
    pools = [_balanced_pools(galaxies, original, label) for label in range(galaxies.num_classes)]
    num_test = min(smallest // 5, *(len(test_pool) for test_pool, _ in pools))
    if num_test < 1:
        raise UserError(
            f"the balanced variant needs at least 5 galaxies of each class, and some in test; the smallest has {smallest}"
        )
    codes = np.full(len(original), NONE, np.int8)
    codes[np.concatenate([test_pool[:num_test] for test_pool, _ in pools])] = TEST
    tested_groups = galaxies.sky.groups[(codes == TEST) & (galaxies.sky.groups >= 0)]
    train_pools = [pool[(codes[pool] == NONE) & ~np.isin(galaxies.sky.groups[pool], tested_groups)] for _, pool in pools]
    num_train = min(smallest - num_test, *(len(pool) for pool in train_pools))
    codes[np.concatenate([pool[:num_train] for pool in train_pools])] = TRAIN
    return cut(galaxies, codes, VAL)


def _balanced_pools(galaxies: SplitCandidates, original: Codes, label: int) -> tuple[Rows, Rows]:
    """Return the candidate rows of a class for the balanced test and train sets, in the order in which they are taken."""
    of_class = galaxies.labels == label
    val = galaxies.hash_sorted(of_class & (original == VAL), _BALANCED_TEST)
    test = galaxies.hash_sorted(of_class & (original == TEST), _BALANCED_TEST)
    train = galaxies.hash_sorted(of_class & (original == TRAIN), _BALANCED_TRAIN)
    return np.concatenate([test, val]), np.concatenate([train, val[::-1]])


def cut(galaxies: SplitCandidates, codes: Codes, target: int) -> Codes:
    """Return new codes with a tenth of each class of train (at least one galaxy) moved to ``target``, VAL or TEST.

    Only galaxies without neighbours in train and without a second label are moved, so that groups stay together. If a class has
    no such galaxies, whole groups are moved.
    """
    groups, train = galaxies.sky.groups, codes == TRAIN
    num_neighbours = np.bincount(groups[train & (groups >= 0)], minlength=int(groups.max(initial=0)) + 1)
    movable = train & ~galaxies.sky.conflicting & ((groups < 0) | (num_neighbours[np.maximum(groups, 0)] == 1))
    new_codes = codes.copy()
    for label, count in enumerate(galaxies.counts(train)):
        rows = galaxies.hash_sorted(movable & (galaxies.labels == label), _CUT_VAL if target == VAL else _CUT_TEST)
        wanted = max(1, round(0.1 * int(count)))
        new_codes[rows[:wanted]] = target
        if not len(rows) and count:  # all are copies or neighbours of one another
            for group in _movable_groups(galaxies, new_codes, label):
                if wanted > 0 and (galaxies.counts(new_codes == TRAIN) > galaxies.counts(group))[label]:
                    new_codes[group] = target
                    wanted -= len(group)
    return new_codes


def split_fold(galaxies: SplitCandidates, k: int, num_folds: int) -> Codes:
    """Return (N,) codes of a stratified cross-validation: fold ``k`` (0 ... n-1) is test, the rest is train, val is empty.

    Raises:
        UserError: no such fold, or a class has fewer galaxies than folds.
    """
    if num_folds < 2 or not 0 <= k < num_folds:
        raise UserError(f"fold {k} of {num_folds}: folds are numbered 0 to n - 1, and n is at least 2")
    check_classes(galaxies, at_least=num_folds)
    part = np.empty(len(galaxies.labels), np.int64)
    dealt = 0
    for label in range(galaxies.num_classes):
        rows = galaxies.hash_sorted(galaxies.labels == label, _FOLDS)
        part[rows] = (np.arange(len(rows)) + dealt) % num_folds
        dealt += len(rows)
    for rows in galaxies.groups_in_hash_order():
        part[rows] = part[rows[0]]
    return np.where(part == k, TEST, TRAIN).astype(np.int8)


def rows_by_split(codes: Codes) -> Mapping[str, Rows]:
    """Return the sorted rows of each split by name; the margin only if it has galaxies."""
    names = STORED_SPLITS if (codes == IN_MARGIN).any() else SPLITS
    return {name: np.flatnonzero(codes == code).astype(np.int64) for code, name in enumerate(names)}


def _apportion(counts: NDArray[np.int64], seats: int, seed: int) -> NDArray[np.int64]:
    """Distribute ``seats`` in proportion to ``counts`` by largest remainder, ties by hash."""
    share, remainder = np.divmod(counts * seats, int(counts.sum()))
    ties = hash64(seed, _TIES, np.arange(len(counts)))
    share[np.lexsort((ties, -remainder))[: seats - int(share.sum())]] += 1
    return share


def _check_no_empty_split(galaxies: SplitCandidates, codes: Codes) -> None:
    for code, split in enumerate(SPLITS):
        empty = np.flatnonzero(galaxies.counts(codes == code) == 0)
        if len(empty):
            raise UserError(
                f"class {galaxies.class_names[empty[0]]!r} cannot be split: too many of its galaxies have neighbours on the sky "
                f"or equal images, so that {split} gets none; add galaxies of this class, or leave out the positions if the "
                f"images are much narrower than {CUTOUT_ARCSEC:.0f} arcsec"
            )
