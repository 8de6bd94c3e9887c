"""Data sets for exploration: labels and positions of all galaxies, and images of a sample.

The images come from shards, an HDF5 file or a folder of images.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import hash64
from galaxydist.errors import UserError
from galaxydist.explore.features_file import FeaturesFile, read_features
from galaxydist.galaxy import MARGIN, EncodedImage, Galaxy
from galaxydist.object_store import is_url
from galaxydist.shards.catalogue import number_column, read_catalogue
from galaxydist.shards.manifest import MANIFEST_NAME, Manifest
from galaxydist.shards.remote.cache import CacheConfig, SharedFile
from galaxydist.shards.remote.open import FileReader, file_reader, open_shards
from galaxydist.shards.tar import BLOCK, header_key
from galaxydist.shards.writer.encode import decode_stored
from galaxydist.surveys.file_kinds import names_table
from galaxydist.surveys.image_files import decode_file
from galaxydist.surveys.image_folder import FolderSurvey
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.survey_sources import SourceOptions, open_survey
from galaxydist.surveys.tables.file_tree import open_tree
from galaxydist.surveys.tables.hdf5_images import Hdf5Images
from galaxydist.surveys.tables.table_files import split_hdu
from galaxydist.surveys.tables.tar_scan import names_tars

logger = logging.getLogger(__name__)

UNLABELLED = -1
# RNG stream of the choice of galaxies.
_PURPOSE = 0x6578706C6F7265  # "explore"


@dataclass(frozen=True, slots=True)
class ExploredImage:
    """Image of a requested galaxy.

    Args:
        row: index into the data set's N galaxies.
        id: name in the source.
        image: H x W x 3 uint8; None if it cannot be read.
        problem: the reason why it cannot be read.
    """

    row: int
    id: str
    image: NDArray[np.uint8] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Positions:
    """Sky positions (degrees, J2000) and redshifts of the data set's N galaxies, nan where unknown."""

    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    redshift: NDArray[np.float64]

    @property
    def known(self) -> NDArray[np.bool_]:
        """True for each galaxy with a known sky position."""
        return np.asarray(np.isfinite(self.ra) & np.isfinite(self.dec))


class ExploredImages(Protocol):
    """Source of images and positions; rows are indices into the data set's N galaxies."""

    def images(self, rows: NDArray[np.int64]) -> Iterator[ExploredImage]:
        """Yield the images of these rows (sorted), in order; an unreadable one is yielded with its problem."""

    def positions(self) -> Positions | None:
        """Return the positions of all galaxies; None if the source has no table of them."""

    def candidates(self, number: int, seed: int) -> NDArray[np.bool_] | None:
        """Return a mask of the galaxies to choose a random sample of ``number`` from; None if all are equally cheap to read."""


@dataclass(frozen=True)
class ExploredDataset:
    """N galaxies of a data set, each in a split.

    Args:
        dataset, variant: names for tables and figures.
        kind: description of the source.
        location: path or URL.
        source_hash: SHA-256 (hex); empty if computing it would mean reading every image.
        class_names: by label.
        labels_N: class numbers, -1 for unlabelled galaxies.
        split_names: the splits, in order.
        split_N: indices into ``split_names``.
        source: of the images.
        features: of an encoder, for the map; None: principal components of the sample.
    """

    dataset: str
    variant: str
    kind: str
    location: str
    source_hash: str
    class_names: tuple[str, ...]
    labels_N: NDArray[np.int64]
    split_names: tuple[str, ...]
    split_N: NDArray[np.int8]
    source: ExploredImages
    features: FeaturesFile | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def groups(self) -> Mapping[int, str]:
        """Label -> class name of every class; the unlabelled last, if there are any."""
        named = dict(enumerate(self.class_names))
        return named | ({UNLABELLED: "unlabelled"} if (self.labels_N == UNLABELLED).any() else {})

    def are_across(self, first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask (P,) of the pairs of rows in different splits; the margin, which no model sees, does not count."""
        in_margin_S = np.array([name == MARGIN for name in self.split_names])
        first_split_P, second_split_P = self.split_N[first_P], self.split_N[second_P]
        return np.asarray((first_split_P != second_split_P) & ~in_margin_S[first_split_P] & ~in_margin_S[second_split_P])

    def counts(self) -> dict[str, list[int]]:
        """Return split name -> number of galaxies in each group, in the order of ``groups``, over all N galaxies."""
        return {
            name: [int(((self.labels_N == label) & (self.split_N == number)).sum()) for label in self.groups]
            for number, name in enumerate(self.split_names)
        }


def random_order(rows: NDArray[np.int64], seed: int, number: int | None = None) -> NDArray[np.int64]:
    """Return the rows (or the first ``number`` of them) in a random order given by hashes of the seed and each row."""
    hashes = hash64(seed, _PURPOSE, rows)
    if number is not None and number < len(rows):
        first = np.argpartition(hashes, number)[:number]  # avoids sorting millions of rows for a few thousand
        rows, hashes = rows[first], hashes[first]
    return rows[np.argsort(hashes, kind="stable")]


def choose_sample(population: ExploredDataset, number: int, seed: int) -> NDArray[np.int64]:
    """Choose a random sample with equal numbers of each class, as far as the classes suffice, and return its sorted rows.

    Args:
        number: largest number of galaxies.
        seed: of the choice; with the same seed, a larger sample contains the smaller one in each class.
    """
    if number >= len(population):
        return np.arange(len(population))
    allowed_N = population.source.candidates(number, seed)
    groups = [population.labels_N == label for label in population.groups]
    if allowed_N is not None:
        groups = [members_N & allowed_N for members_N in groups]
    orders = sorted((random_order(np.flatnonzero(members_N), seed, number) for members_N in groups), key=len)
    chosen, left = [], number
    for number_done, rows in enumerate(orders):
        share = min(len(rows), left // (len(orders) - number_done))
        chosen.append(rows[:share])
        left -= share
    return np.sort(np.concatenate(chosen))


# Shards: only the requested samples are read; from a remote store, only a few shards are fetched.

# Galaxies fetched from a remote store per galaxy of the sample, so that rare classes are included.
_FETCHED_PER_GALAXY = 2

# (offset, number of bytes) -> bytes of a tar.
_Fetch = Callable[[int, int], bytes]


def shard_population(manifest: Manifest) -> ExploredDataset:
    """Return the galaxies of a folder of shards, split by split in the order of storage."""
    names = tuple(name for name, split in manifest.splits.items() if split.num_samples)
    labels = [np.asarray(manifest.labels(name), np.int64) for name in names]
    return ExploredDataset(
        dataset=manifest.dataset,
        variant=manifest.variant,
        kind=f"shards ({manifest.encoding}, {manifest.image_size} pixels)",
        location=manifest.location,
        source_hash=manifest.hash,
        class_names=manifest.class_names,
        labels_N=np.concatenate([*labels, np.empty(0, np.int64)]),
        split_names=names,
        split_N=np.repeat(np.arange(len(names)), [len(part) for part in labels]).astype(np.int8),
        source=ShardImages(manifest, names),
    )


@dataclass(frozen=True)
class _Shard:
    """Split and number of a shard, and the range of the data set's rows in it."""

    split: str
    number: int
    start: int
    stop: int


class ShardImages:
    """Reads images and positions from shards."""

    def __init__(self, manifest: Manifest, splits: tuple[str, ...]) -> None:
        self._manifest, self._splits = manifest, splits
        self._read: FileReader = file_reader(manifest)
        tables = [manifest.shards(split)["samples"] for split in splits]
        self._ends = np.cumsum(np.concatenate([*tables, np.empty(0, np.int64)])).astype(np.int64)
        names = [(split, number) for split, table in zip(splits, tables, strict=True) for number in range(len(table))]
        ends = self._ends.tolist()
        sizes = [manifest.split(split).num_samples for split in splits]
        self._places = {split: (manifest.offsets(split), manifest.lengths(split)) for split in splits}
        self._split_starts = dict(zip(splits, np.cumsum([0, *sizes]).tolist(), strict=False))
        self._shards = [_Shard(*name, start, end) for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True)]

    def images(self, rows: NDArray[np.int64]) -> Iterator[ExploredImage]:
        for shard, wanted in self._by_shard(rows):
            try:
                fetch = self._open(shard)
            except UserError as error:
                for row in wanted:
                    yield ExploredImage(row, f"{shard.split} {row - self._split_starts[shard.split]}", None, str(error))
                continue
            for row in wanted:
                yield self._image(shard, row, fetch)

    def positions(self) -> Positions | None:
        """Return all positions, from the catalogues; None, with a warning, if one is damaged.

        Remote shards of earlier versions, without catalogues, would all have to be fetched: None.
        """
        if not self._manifest.catalogues and self._manifest.remote is not None:
            return None
        try:
            tables = [read_catalogue(self._manifest, split, ("ra", "dec", "redshift")) for split in self._splits]
        except UserError as error:
            logger.warning("%s (explored without positions)", error)
            return None
        return Positions(
            *(np.concatenate([number_column(table, name) for table in tables]) for name in ("ra", "dec", "redshift"))
        )

    def candidates(self, number: int, seed: int) -> NDArray[np.bool_] | None:
        """Return a mask of a few whole remote shards: galaxies are shuffled over shards, so these are a random sample."""
        if not self._manifest.has_remote_shards:
            return None
        allowed_N, left = np.zeros(int(self._ends[-1]), np.bool_), _FETCHED_PER_GALAXY * number
        for shard_number in random_order(np.arange(len(self._shards)), seed).tolist():
            if left <= 0:
                break
            shard = self._shards[shard_number]
            allowed_N[shard.start : shard.stop] = True
            left -= shard.stop - shard.start
        return allowed_N

    def _by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[_Shard, list[int]]]:
        shard_of_row = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(shard_of_row).tolist():
            yield self._shards[number], rows[shard_of_row == number].tolist()

    def _open(self, shard: _Shard) -> _Fetch:
        """Return the function that reads a shard.

        Raises:
            UserError: it cannot be read.
        """
        manifest = self._manifest
        try:
            if manifest.has_remote_shards:
                sha256 = manifest.shard_sha256(shard.split, shard.number)
                data = self._read(manifest.shard_name(shard.split, shard.number), sha256)
                return lambda offset, size: data[offset : offset + size]
            file = SharedFile(manifest.shard_path(shard.split, shard.number))
        except UserError:
            raise
        except OSError as error:
            location = manifest.shard_location(shard.split, shard.number)
            raise UserError(f"shard {location} cannot be read ({error}); {manifest.remedy}") from None
        return lambda offset, size: os.pread(file.descriptor, size, offset)

    def _image(self, shard: _Shard, row: int, fetch: _Fetch) -> ExploredImage:
        """Return the image of a row of the data set, which the shard holds."""
        manifest, sample = self._manifest, row - self._split_starts[shard.split]
        offset, size = (int(column[sample]) for column in self._places[shard.split])
        key = f"{shard.split} {sample}"
        try:
            key = header_key(fetch(offset - BLOCK, BLOCK))
            data = fetch(offset, size)
            if len(data) != size:
                raise ValueError("the shard is cut short")
            image = decode_stored(data, manifest.encoding, manifest.image_size)
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).removeprefix("galaxy image: ")
            location = manifest.shard_location(shard.split, shard.number)
            return ExploredImage(row, key, None, f"shard {location}, galaxy {key}: {reason}")
        return ExploredImage(row, key, image)


# Surveys (HDF5 files and folders of images): only the slabs with requested rows are read.

# Slabs up to this length span several HDF5 chunks, so that single rows are read instead of whole slabs.
_SHORT_SLAB = 32


def survey_population(survey: TableSurvey, location: str | Path) -> ExploredDataset:
    """Return the galaxies of a survey that belong to a split, in the order of its rows."""
    names = tuple(name for name, rows in survey.splits.items() if len(rows))
    codes = np.full(len(survey.labels), -1, np.int8)
    for number, name in enumerate(names):
        codes[survey.splits[name]] = number
    numbers_N = np.flatnonzero(codes >= 0)
    kind = "HDF5 file" if isinstance(survey.images, Hdf5Images) else "table of images"
    kind = "folder of images" if isinstance(survey, FolderSurvey) else kind
    return ExploredDataset(
        dataset=survey.name,
        variant=survey.variant,
        kind=kind,
        location=str(location),
        source_hash=vars(survey).get("source_hash", ""),  # where it is known already
        class_names=survey.class_names,
        labels_N=np.asarray(survey.labels[numbers_N], np.int64),
        split_names=names,
        split_N=codes[numbers_N],
        source=SurveyImages(survey, numbers_N),
    )


@dataclass(frozen=True)
class SurveyImages:
    """Reads images and positions from a survey; ``numbers_N`` are the survey's rows of the data set's N galaxies."""

    survey: TableSurvey
    numbers_N: NDArray[np.int64]

    def images(self, rows: NDArray[np.int64]) -> Iterator[ExploredImage]:
        if not len(rows):
            return
        numbers = self.numbers_N[rows]
        # Rows are read one by one from image files, so that a damaged file affects no other, and from short slabs.
        is_single = self.survey.reads_single_files or self.survey.slab_length <= _SHORT_SLAB
        cuts = np.flatnonzero(np.diff(numbers // (1 if is_single else self.survey.slab_length))) + 1
        for slab_rows, slab_numbers in zip(np.split(rows, cuts), np.split(numbers, cuts), strict=True):
            pending = dict(zip(slab_numbers.tolist(), slab_rows.tolist(), strict=True))
            start, stop = int(slab_numbers[0]), int(slab_numbers[-1]) + 1
            try:
                for number, galaxy in enumerate(self.survey.read(start, stop), start=start):
                    if number in pending:
                        yield _image(pending.pop(number), galaxy)
            except UserError as error:
                for number, row in pending.items():
                    yield ExploredImage(row, self.survey.image_name(number), None, str(error))

    def positions(self) -> Positions:
        extras = self.survey.extras  # without columns it has no rows either
        redshift = number_column(extras, "redshift") if extras.num_columns else np.full(len(self.survey.labels), np.nan)
        return Positions(*(column[self.numbers_N] for column in (self.survey.ra, self.survey.dec, redshift)))

    def candidates(self, number: int, seed: int) -> None:
        """Return None: any row is cheap to read."""


def _image(row: int, galaxy: Galaxy) -> ExploredImage:
    image = galaxy.image
    try:
        pixels = decode_file(image.data, galaxy.id) if isinstance(image, EncodedImage) else image
    except UserError as error:
        return ExploredImage(row, galaxy.id, None, str(error))
    return ExploredImage(row, galaxy.id, pixels)


def open_population(
    location: str,
    variant: str | None,
    cache: CacheConfig,
    classes: str | None = None,
    source: SourceOptions | None = None,
) -> ExploredDataset:
    """Open a data set for exploration.

    Args:
        location: manifest.json, its folder or its URL, or anything that ``open_survey`` takes.
        variant: ``original`` or ``balanced``; None: ``original``, or that of the shards. It must match the shards' variant.
        cache: local cache for shards in a remote store.
        classes: ``galaxy10`` if the classes of a folder are Galaxy10's.
        source: options for other surveys than image folders and survey files.

    Raises:
        UserError: the location does not exist, cannot be used, or has no galaxies.
    """
    path = Path(location)
    if _is_url_of_shards(location) or path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file():
        manifest = open_shards(location, cache)
        if variant not in (None, manifest.variant):
            raise UserError(
                f"{manifest.location} has the {manifest.variant} variant, not {variant}; "
                "leave out --variant, or give the other variant's manifest"
            )
        population = shard_population(manifest)
    elif path.exists() or is_url(location) or names_tars(location) or Path(split_hdu(location)[0]).exists():
        population = survey_population(open_survey(location, variant or "original", classes=classes, source=source), location)
    else:
        raise UserError(
            f"there is no {location}; give a manifest.json of shards (or its folder or URL), a folder with a folder of images "
            "for each class, a table of images, or an HDF5 or Parquet file with images"
        )
    if not len(population):
        raise UserError(f"{location} has no galaxies in any split, so that there is nothing to explore; make the data set again")
    return population


def _is_url_of_shards(location: str) -> bool:
    """Return True for a URL, unless it is one of a table or of Parquet files: their suffix, or a data set without a manifest."""
    if not is_url(location) or location.endswith(".parquet") or names_table(split_hdu(location)[0]) or names_tars(location):
        return False
    if not location.startswith("hf://datasets/") or location.endswith(MANIFEST_NAME):
        return True
    tree = open_tree(location)
    return f"{tree.inside}/{MANIFEST_NAME}".lstrip("/") in tree.files


def add_features(population: ExploredDataset, path: Path) -> ExploredDataset:
    """Return the data set with the features of a file that `galaxydist probe` wrote.

    Raises:
        UserError: there is no such file, or its features are those of other shards.
    """
    features = read_features(path)
    info = features.info
    if info.manifest_hash != population.source_hash:
        reason = (
            f"and {population.location} is no folder of shards: explore the shards that were probed"
            if not population.kind.startswith("shards")
            else f"not of {population.location} (manifest {population.source_hash[:12]}): probe these shards, or explore those"
        )
        raise UserError(
            f"--features {path} has features of {info.dataset} ({info.variant}, manifest {info.manifest_hash[:12]}), {reason}"
        )
    return replace(population, features=features)
