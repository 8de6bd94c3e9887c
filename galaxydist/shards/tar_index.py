"""Index of tars that others wrote: a manifest, columns and catalogues for tars that stay where they are.

Each tar is read once, by threads; a local one completely, so that its images are decoded, hashed and measured. The index lies in
a folder of its own, written to a folder beside it that is renamed last. A killed call leaves only that folder, with the scans of
the tars that were finished; the next call with the same tars and settings continues from them.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galaxydist.atomic_files import whole_file
from galaxydist.counter_rng import Stream, hash64
from galaxydist.cpus import available_cores
from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import EncodedImage
from galaxydist.object_store import is_url
from galaxydist.shards.catalogue import DEC, ID, RA, write_catalogue
from galaxydist.shards.manifest import (
    ANY_FILE,
    COLUMNS,
    EXTENSIONS,
    SHARD_ROW,
    TARS,
    Manifest,
    Split,
    catalogue_name,
    read_manifest,
)
from galaxydist.shards.writer.damaged import (
    LEFT_OUT_NAME,
    DamagedImage,
    check_classes_left,
    check_damaged,
    rows_left_out,
    rows_of,
    write_left_out,
)
from galaxydist.shards.writer.encode import PIXEL_HASH, decode_any_file, decode_image, hash_pixels, resize_square
from galaxydist.shards.writer.stages import channel_statistics, pixel_sums
from galaxydist.shards.writer.writer import publish, read_existing, with_origin, work_folder, write_columns, write_manifest
from galaxydist.surveys.data_origin import DataOrigin, origin_of
from galaxydist.surveys.image_files import parse_image, read_header
from galaxydist.surveys.image_table import TableOptions, TableSurvey
from galaxydist.surveys.tables.tar_images import TarImages, TarTable, read_tar_table
from galaxydist.surveys.tables.tar_scan import FACTS, ScannedTar, ScanOptions, TarLocation, common_folder, scan_tars, tar_identity

logger = logging.getLogger(__name__)

# Images, and tars that they come from, for the pixel statistics of tars that were not read completely.
SAMPLE_IMAGES, SAMPLE_TARS = 20_000, 16
_SCANS = "scans"
# Version of the scans in a work folder; scans of another version are made again.
_SCAN_VERSION = 1


@dataclass(frozen=True)
class IndexOptions:
    """Options of an index.

    Args:
        image: extension of the image in samples with several (``image.jpg``); None: the only one.
        image_size: width and height of the images as they are read, in pixels; None: that of all images.
        is_hashed: read all of remote tars, too, for their SHA-256 and those of the images.
        max_errors: largest number of damaged images to leave out; None: none.
        overwrite: replace an index of other tars or with other settings.
    """

    image: str | None = None
    image_size: int | None = None
    is_hashed: bool = False
    max_errors: int | None = None
    overwrite: bool = False


def index_tars(
    locations: Sequence[TarLocation],
    out_dir: Path,
    table: TableOptions,
    options: IndexOptions,
    origin: DataOrigin | None = None,
) -> Manifest:
    """Write a manifest, columns and catalogues for tars that stay where they are; do nothing if they exist already.

    Args:
        locations: the tars, all local or all remote.
        out_dir: the folder to create.
        table: name of the data set, and how labels, ids, splits and positions are read (``open_table``).
        options: of the index.
        origin: the user's statement on licence and source.

    Raises:
        UserError: tars that cannot be read (``scan_tar``), wrong keys or labels (``open_table``), images of several sizes without
            ``image_size``, damaged images, or another index in ``out_dir``.
    """
    out_dir = Path(out_dir)
    settings = _settings(locations, table, options)
    if existing := _existing(out_dir, settings, overwrite=options.overwrite):
        return with_origin(existing, origin, overwrite=options.overwrite)
    work_dir = out_dir.with_name(out_dir.name + ".partial")
    with work_folder(work_dir, out_dir):
        (work_dir / _SCANS).mkdir(parents=True, exist_ok=True)
        (work_dir / "columns").mkdir(exist_ok=True)
        scans = _checked_sizes(_scans(work_dir / _SCANS, locations, options), options)
        samples = read_tar_table(scans, locations, table.columns, is_labelled=table.is_labelled)
        survey = samples.survey(table)
        folder, names = _relative(locations, out_dir)
        manifest = _write_columns(work_dir, samples, survey, names, options)
        write_manifest(replace(manifest, settings=settings, tars=folder))
        shutil.rmtree(work_dir / _SCANS)
        with_origin(read_manifest(work_dir), origin, overwrite=True)
        publish(work_dir, out_dir)
    return read_manifest(out_dir)


def _write_columns(
    work_dir: Path, samples: TarTable, survey: TableSurvey, names: Sequence[str], options: IndexOptions
) -> Manifest:
    """Write the columns and catalogues of a survey of tars, and return its manifest.

    Args:
        work_dir: the folder to write to.
        samples, survey: the samples of the tars, and the same as a survey.
        names: names of the tars in their folder.
        options: of the index.
    """
    facts, damaged = samples.facts, _damaged(survey, samples.facts)
    check_damaged(damaged, sum(rows.size for rows in survey.splits.values()), options.max_errors)
    check_classes_left(survey, damaged)
    splits = {name: np.setdiff1d(rows, rows_of(damaged)) for name, rows in survey.splits.items()}
    image_size, encoding, sides = _form(
        facts.take(np.sort(np.concatenate([*splits.values()]))), options.image_size, survey.location
    )
    columns: dict[str, str] = {}
    catalogues: dict[str, str] = {}
    totals: dict[str, Split] = {}
    for split, rows in splits.items():
        tars, counts = np.unique(samples.images.tar[rows], return_counts=True)
        table = _shard_table(samples.tars, tars, counts)
        arrays = {
            "shards": table,
            TARS: _name_table(samples.tars, names, tars),
            "labels": survey.labels[rows].astype(COLUMNS["labels"]),
            "offsets": samples.images.offset[rows].astype(COLUMNS["offsets"]),
            "lengths": samples.images.length[rows].astype(COLUMNS["lengths"]),
        }
        columns |= write_columns(work_dir, split, arrays)
        catalogue = _catalogue(survey, facts, rows)
        catalogues[catalogue_name(split)] = write_catalogue(work_dir / catalogue_name(split), catalogue.schema, [catalogue])
        labels = survey.labels[rows]
        counts_K = np.bincount(labels[labels >= 0], minlength=len(survey.class_names))
        totals[split] = Split(rows.size, len(tars), int(table["bytes"].sum()), tuple(counts_K.tolist()))
    if damaged or rows_left_out(survey):
        write_left_out(work_dir / LEFT_OUT_NAME, survey, damaged)
    mean, std = _statistics(samples.images, facts, splits["train"], image_size)
    return Manifest(
        dir=work_dir,
        hash="",
        dataset=survey.name,
        variant=survey.variant,
        class_names=tuple(survey.class_names),
        encoding=encoding,
        image_size=image_size,
        splits=totals,
        channel_mean=mean,
        channel_std=std,
        source_hash=survey.source_hash,
        columns=columns,
        settings={},
        catalogues=catalogues,
        source_sides=None if sides == (image_size, image_size) else sides,
        origin=origin_of(survey),
    )


def _existing(out_dir: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Manifest | None:
    """Return the manifest of a finished index of these tars with these settings; None if there is nothing to keep."""
    manifest = read_existing(out_dir, "index", overwrite=overwrite)
    if manifest is None or dict(manifest.settings) == settings:
        return manifest
    if overwrite:
        return None
    if manifest.tars is None:
        raise UserError(f"{out_dir} holds shards, not an index: choose another folder, or give --overwrite")
    differences = ", ".join(
        "other tars, or tars that have changed"
        if key == "in_place"
        else f"{key}={manifest.settings.get(key)} (now {settings[key]})"
        for key in settings
        if manifest.settings.get(key) != settings[key]
    )
    raise UserError(f"{out_dir} was indexed with {differences}. Choose another folder, or give --overwrite")


def _settings(locations: Sequence[TarLocation], table: TableOptions, options: IndexOptions) -> dict[str, Any]:
    """Return what determines the index: the tars with their sizes and versions, and the user's options."""
    with ThreadPoolExecutor(16) as executor:
        identities = list(executor.map(lambda location: tar_identity(location.path), locations))
    paths = [location.path if is_url(location.path) else os.path.abspath(location.path) for location in locations]  # noqa: PTH100
    splits = [location.split for location in locations]
    tars = [[path, split, *identity] for path, split, identity in zip(paths, splits, identities, strict=True)]
    own = {"image": options.image, "image_size": options.image_size, "is_hashed": options.is_hashed}
    settings = {"in_place": hashlib.sha256(json.dumps(tars).encode()).hexdigest(), **own, **asdict(table)}
    return dict(json.loads(json.dumps(settings)))  # as it is read from the manifest


def _scans(folder: Path, locations: Sequence[TarLocation], options: IndexOptions) -> Iterator[ScannedTar]:
    """Yield the contents of the tars in their order; those that an interrupted call has scanned are not read again."""
    is_hashed = options.is_hashed or not is_url(locations[0].path)
    inspect = partial(_inspect, image_size=options.image_size) if is_hashed else _inspect_header
    own = [_SCAN_VERSION, options.image, options.image_size, is_hashed]
    paths = [
        folder / f"{hashlib.sha256(json.dumps([location.path, *own]).encode()).hexdigest()[:32]}.arrow" for location in locations
    ]
    done = [_load_scan(path, location) for path, location in zip(paths, locations, strict=True)]
    missing = [location for location, scan in zip(locations, done, strict=True) if scan is None]
    fresh = scan_tars(missing, ScanOptions(options.image, is_hashed, inspect)) if missing else iter(())
    for path, known in zip(paths, done, strict=True):
        if known is not None:
            yield known
            continue
        scan = next(fresh)
        facts = {"path": scan.path, "num_bytes": scan.num_bytes, "version": scan.version, "sha256": scan.sha256}
        with whole_file(path, path.with_suffix(".tmp")) as file:
            table = scan.samples.replace_schema_metadata({"tar": json.dumps(facts)})
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        yield scan


def _load_scan(path: Path, location: TarLocation) -> ScannedTar | None:
    """Return the scan of a tar that has not changed since; None if there is none."""
    if not path.exists():
        return None
    with pa.ipc.open_file(path) as file:
        table = file.read_all()
    facts = json.loads(table.schema.metadata[b"tar"])
    if (facts["num_bytes"], facts["version"]) != tar_identity(location.path):
        return None
    return ScannedTar(samples=table.replace_schema_metadata(None), **facts)


def _inspect(data: bytes, name: str, *, image_size: int | None) -> dict[str, Any]:
    """Return the facts about a whole image; ``sums`` are those of the image as it will be read."""
    try:
        image = parse_image(data, name)
        pixels = decode_image(image) if isinstance(image, EncodedImage) else image
    except DamagedImageError as error:
        return {"problem": error.reason}
    height, width = pixels.shape[:2]
    facts = {"width": width, "height": height, "format": image.format if isinstance(image, EncodedImage) else ""}
    facts[PIXEL_HASH] = hash_pixels(pixels)
    if image_size is not None and (height, width) != (image_size, image_size):
        pixels = resize_square(pixels, image_size)
    return {**facts, "sums": pixel_sums(pixels).tolist()}


def _inspect_header(data: bytes, _name: str) -> dict[str, Any]:
    header = read_header(data)
    return {} if header is None else dict(zip(("width", "height", "format"), header, strict=True))


def _checked_sizes(scans: Iterator[ScannedTar], options: IndexOptions) -> Iterator[ScannedTar]:
    """Pass on the scans; without an image size, a second size ends the scan, so that the user need not wait for its end."""
    sizes: Counter[tuple[int, int]] = Counter()
    for scan in scans:
        if options.image_size is None:
            facts = scan.samples[FACTS].combine_chunks()
            pairs = zip(facts.field("width").to_pylist(), facts.field("height").to_pylist(), strict=True)
            sizes.update((width, height) for width, height in pairs if width is not None)
            _check_one_size(sizes, scan.path)
        yield scan


def _check_one_size(sizes: Counter[tuple[int, int]], location: str) -> None:
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        named = [f"{width} x {height} ({count} images)" for (width, height), count in sizes.most_common()]
        kind = "of several sizes" if len(sizes) > 1 else "no squares"
        smallest = min(min(size) for size in sizes)
        raise UserError(
            f"{location}: its images are {kind}: {name_some(named)}. Give the size in which they are to be read, for example "
            f"--image-size {smallest}: each is cut to its central square and resampled"
        )


def _damaged(survey: TableSurvey, facts: pa.Table) -> list[DamagedImage]:
    """Return the damaged images of the survey's splits."""
    rows = np.concatenate([np.asarray(rows, np.int64) for rows in survey.splits.values()])
    damaged = np.flatnonzero(pc.is_valid(facts["problem"]).to_numpy())
    return [DamagedImage(row, -1, facts["problem"][row].as_py()) for row in np.intersect1d(rows, damaged).tolist()]


def _form(facts: pa.Table, image_size: int | None, location: str) -> tuple[int, str, tuple[int, int]]:
    """Return the size in which images are read, the encoding, and the smallest and largest shorter side of the images."""
    width, height = (facts[name].to_numpy() for name in ("width", "height"))
    short = np.minimum(width, height)
    is_known = np.isfinite(short)
    if image_size is None:
        if not is_known.any():
            raise UserError(f"{location}: the size of its images is not at the start of their files: give it with --image-size")
        image_size = int(short[is_known][0])
    sides = (int(short[is_known].min()), int(short[is_known].max())) if is_known.any() else (image_size, image_size)
    formats = set(facts["format"].to_pylist()) if ((width == image_size) & (height == image_size)).all() else set()
    encoding = next((name for name, ending in EXTENSIONS.items() if formats == {ending}), ANY_FILE)
    return image_size, encoding, sides


def _shard_table(tars: Sequence[ScannedTar], numbers: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.void]:
    table = np.zeros(numbers.size, SHARD_ROW)
    for row, (number, count) in enumerate(zip(numbers.tolist(), counts.tolist(), strict=True)):
        digest = np.frombuffer(bytes.fromhex(tars[number].sha256) or bytes(32), np.uint8)
        table[row] = (count, tars[number].num_bytes, digest)
    return table


def _name_table(tars: Sequence[ScannedTar], names: Sequence[str], numbers: NDArray[np.integer]) -> NDArray[np.void]:
    rows = [(names[number].encode(), tars[number].version.encode()) for number in numbers.tolist()]
    longest = [max([1, *map(len, column)]) for column in zip(*rows, strict=True)] or [1, 1]
    return np.array(rows, [("name", f"S{longest[0]}"), ("version", f"S{longest[1]}")])


def _relative(locations: Sequence[TarLocation], out_dir: Path) -> tuple[str, list[str]]:
    """Return the folder of the tars, as it stands in the manifest, and their names in it.

    A folder in or beside the index's own, or the folder above it, is relative to it, so that both can be moved together.
    """
    if is_url(locations[0].path):
        folder = common_folder([location.path for location in locations])
        return folder, [location.path.removeprefix(f"{folder}/") for location in locations]
    paths = [os.path.abspath(location.path) for location in locations]  # noqa: PTH100
    folder = common_folder(paths)
    names = [os.path.relpath(path, folder) for path in paths]
    relative = os.path.relpath(folder, os.path.abspath(out_dir))  # noqa: PTH100
    return (relative if relative.split("/").count("..") < 2 else folder), names


def _catalogue(survey: TableSurvey, facts: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """Return the catalogue of these rows; the columns that texts in tars make have the types of our own catalogues already."""
    columns = {
        ID: pa.array([survey.ids[row] for row in rows.tolist()], pa.string()),
        **{name: pa.array(values[rows], pa.float64(), from_pandas=True) for name, values in ((RA, survey.ra), (DEC, survey.dec))},
    }
    own = dict(zip(survey.extras.column_names, survey.extras.columns, strict=True)) | {PIXEL_HASH: facts[PIXEL_HASH]}
    taken = {name: column.take(pa.array(rows)) for name, column in own.items()}
    return pa.table(columns | {name: values for name, values in taken.items() if values.null_count < len(values)})


def _statistics(images: TarImages, facts: pa.Table, rows: NDArray[np.int64], size: int) -> tuple[Any, Any]:
    """Return mean and standard deviation of the training images' channels: of all, or of a sample if they were not decoded."""
    if not rows.size:
        return channel_statistics(np.array([1, 0, 0, 0, 0, 0, 0]))
    sums = facts["sums"].take(pa.array(rows))
    if sums.null_count < len(sums):
        flat = sums.combine_chunks().flatten().to_numpy()
        return channel_statistics(flat.reshape(-1, 7).sum(axis=0))
    sample = _sample(images.tar, rows)
    if sample.size < rows.size:
        logger.warning("mean and standard deviation of the pixels are those of %d training images, of %d", sample.size, rows.size)
    groups = np.split(sample, np.flatnonzero(np.diff(images.tar[sample])) + 1)

    def add_up(group: NDArray[np.int64]) -> NDArray[np.int64]:
        total = np.zeros(7, np.int64)
        for row, data in images.read_bytes(group.tolist()):
            try:
                total += pixel_sums(decode_any_file(data, size))
            except ValueError as error:
                logger.warning("%s, %s does not decode: %s", images.tars[images.tar[row]], images.names[row], error)
        return total

    with ThreadPoolExecutor(max(8, available_cores())) as executor:
        return channel_statistics(np.sum(list(executor.map(add_up, groups)), axis=0))


def _sample(tar: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return up to ``SAMPLE_IMAGES`` rows: the first ones of some tars, drawn by a fixed seed, so that few ranges are read."""
    if rows.size <= SAMPLE_IMAGES:
        return rows
    numbers = np.unique(tar[rows])
    drawn = numbers[np.argsort(hash64(0, numbers, Stream.STORAGE), kind="stable")]
    chosen: list[NDArray[np.int64]] = []
    left, share = SAMPLE_IMAGES, -(-SAMPLE_IMAGES // min(SAMPLE_TARS, drawn.size))
    for number in drawn.tolist():
        chosen.append(rows[tar[rows] == number][: min(share, left)])
        left -= chosen[-1].size
        if not left:
            break
    return np.sort(np.concatenate(chosen))
