"""Writer of shards: WebDataset tars in a seeded random order, their indexes, columns and a manifest.

Two stages use all cores: encode rows to parts, then pack parts into tars (``stages.py``). They write to a folder beside the
target, which is renamed last. A killed call leaves only that folder; the next call with the same source and settings continues
from its finished parts and shards, and the result is byte-identical to an uninterrupted one.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.atomic_files import NO_SPACE, file_sha256, rename, whole_file
from galaxydist.cpus import available_cores, start_workers
from galaxydist.errors import UserError
from galaxydist.galaxy import Survey
from galaxydist.shards.catalogue import unite, write_catalogue
from galaxydist.shards.manifest import (
    COLUMNS,
    EXTENSIONS,
    MANIFEST_NAME,
    SHARD_ROW,
    Manifest,
    Split,
    catalogue_name,
    column_name,
    manifest_json,
    read_manifest,
)
from galaxydist.shards.remote.cache import NO_LOCKS
from galaxydist.shards.writer.damaged import (
    LEFT_OUT_NAME,
    NAMED,
    TooManyDamagedError,
    check_classes_left,
    check_damaged,
    first_image,
    rows_left_out,
    rows_of,
    write_left_out,
)
from galaxydist.shards.writer.encode import Encoding
from galaxydist.shards.writer.layout import Layout, Settings, pack_tasks, part_tasks, shard_layout, storage_order
from galaxydist.shards.writer.stages import (
    channel_statistics,
    pack_shards,
    read_damaged,
    read_packed,
    read_packed_catalogue,
    read_part_sums,
    read_source_sides,
    write_array,
    write_json,
    write_part,
)
from galaxydist.surveys.data_origin import DataOrigin, origin_of
from galaxydist.surveys.tables.json_columns import is_unicode


def finish_manifest(
    survey: Survey, work_dir: Path, settings: Settings, layout: Layout, *, image_size: int, parts: Sequence[Path]
) -> None:
    """Write the columns, the catalogues and then the manifest into the work folder, once all shards are finished."""
    splits: dict[str, Split] = {}
    columns: dict[str, str] = {}
    catalogues: dict[str, str] = {}
    for split, shards in layout.items():
        table = np.zeros(len(shards), SHARD_ROW)
        num_samples = shards[-1].stop - shards[0].start if shards else 0
        rows = {name: np.zeros(num_samples, dtype) for name, dtype in COLUMNS.items()}
        for number, shard in enumerate(shards):
            table[number : number + 1], packed = read_packed(work_dir / "packed", shard)
            own = slice(shard.start - shards[0].start, shard.stop - shards[0].start)
            for name, field in (("labels", "label"), ("offsets", "offset"), ("lengths", "length")):
                rows[name][own] = packed[field]
        columns |= write_columns(work_dir, split, {"shards": table, **rows})
        # Two passes over the shards, the first for the schema, so that memory holds one at a time.
        schema = unite(read_packed_catalogue(work_dir / "packed", shard).schema for shard in shards)
        tables = (read_packed_catalogue(work_dir / "packed", shard) for shard in shards)
        catalogues[catalogue_name(split)] = write_catalogue(work_dir / catalogue_name(split), schema, tables)
        labelled = rows["labels"][rows["labels"] >= 0]
        counts = np.bincount(labelled, minlength=len(survey.class_names))
        splits[split] = Split(num_samples, len(shards), int(table["bytes"].sum()), tuple(counts.tolist()))
    mean, std = channel_statistics(np.sum([read_part_sums(path) for path in parts], axis=0))
    sides = read_source_sides(parts)
    manifest = Manifest(
        dir=work_dir,
        hash="",
        dataset=survey.name,
        variant=survey.variant,
        class_names=tuple(survey.class_names),
        encoding=settings.encoding,
        image_size=image_size,
        splits=splits,
        channel_mean=mean,
        channel_std=std,
        source_hash=survey.source_hash,
        columns=columns,
        settings=asdict(settings),
        catalogues=catalogues,
        source_sides=None if sides == (image_size, image_size) else sides,
        origin=origin_of(survey),
    )
    write_manifest(manifest)


def write_columns(work_dir: Path, split: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write the columns of a split, and return the SHA-256 (hex) of each file by its name in the folder."""
    paths = {column_name(split, name): array for name, array in arrays.items()}
    for name, array in paths.items():
        write_array(work_dir / name, array)
    return {name: file_sha256(work_dir / name) for name in paths}


logger = logging.getLogger(__name__)

# Source and settings of an unfinished work folder; created last and removed last.
SETTINGS_FILE = "settings.json"
# Version of the work folder's contents; a folder of another version is started again.
WORK_VERSION = 6
# Below this many galaxies, starting processes costs more than it saves.
FEW_GALAXIES = 4000


def write_shards(
    survey: Survey,
    out_dir: Path,
    *,
    encoding: str = "jpeg",
    quality: int = 95,
    image_size: int | None = None,
    shard_size: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    max_errors: int | None = None,
    origin: DataOrigin | None = None,
) -> Manifest:
    """Write a survey's splits as shards; do nothing if they exist already.

    Args:
        survey: source of the galaxies; rows in no split are left out.
        out_dir: the folder to create.
        encoding: ``jpeg``, ``png`` (lossless) or ``raw`` (uint8 .npy: largest, fastest to read).
        quality: JPEG quality; a JPEG source of the right size is copied byte for byte.
        image_size: side of the stored square in pixels; None: the source's own size, which must be the same square for all.
        shard_size: galaxies per shard; None: 64 to 1,024, so that a small split still has several shards.
        seed: seed of the random storage order.
        workers: number of processes; None: one for each core that this process may use.
        overwrite: replace shards that were made from another source or with other settings.
        max_errors: largest number of damaged images to leave out and list in ``left_out.csv``; None: none.
        origin: the user's statement on licence and source; the rest is the survey's own, or known by its name.

    Raises:
        UserError: other shards exist and ``overwrite`` is not set, a class name is not valid Unicode, images do not decode, the
            disk is full, or two galaxies have the same id.
    """
    if encoding not in EXTENSIONS:
        raise UserError(f"encoding {encoding!r} is not one of {', '.join(EXTENSIONS)}")
    if invalid := [name for name in survey.class_names if not is_unicode(name)]:
        raise UserError(f"the class name {invalid[0]!r} is not valid Unicode (a folder of another encoding?); rename it")
    out_dir = Path(out_dir)
    settings = Settings(encoding, quality, image_size, shard_size, seed)
    work_dir = out_dir.with_name(out_dir.name + ".partial")
    existing = _existing(out_dir, survey, settings, overwrite)
    if existing:
        if _replaced(work_dir).exists() or _lock_path(work_dir).exists():  # a call was killed during its cleanup
            with suppress(UserError), writer_lock(work_dir):
                shutil.rmtree(_replaced(work_dir), ignore_errors=True)
        return with_origin(existing, origin, overwrite=overwrite)
    if survey.class_names and len(survey.splits.get("train", ())) == 0:
        raise UserError(f"{survey.name} has no training galaxies; shards need some in the split train")
    with work_folder(work_dir, out_dir):
        _write(survey, work_dir, settings, workers or available_cores(), max_errors)
        with_origin(read_manifest(work_dir), origin, overwrite=True)
        publish(work_dir, out_dir)
    return read_manifest(out_dir)


def read_existing(out_dir: Path, kind: str, *, overwrite: bool) -> Manifest | None:
    """Return the manifest in a folder that is to be written; None if the folder is empty, or damaged and to be overwritten.

    Args:
        out_dir: the folder.
        kind: ``shards`` or ``index``, for messages.
        overwrite: a damaged manifest is no error.

    Raises:
        UserError: the folder holds other files, or a damaged manifest.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / MANIFEST_NAME).exists():
        raise UserError(f"{out_dir} exists and holds no {kind}: choose another folder, or remove it")
    try:
        return read_manifest(out_dir)
    except UserError:
        if overwrite:
            return None
        raise


def _existing(out_dir: Path, survey: Survey, settings: Settings, overwrite: bool) -> Manifest | None:
    """Return the manifest of finished shards of this source and these settings; None if there is nothing to keep."""
    manifest = read_existing(out_dir, "shards", overwrite=overwrite)
    if manifest is None:
        return None
    if _is_of(manifest, survey, settings):
        if _is_complete(manifest):
            return manifest
        difference = "some of its shards are missing or truncated"
    elif manifest.source_hash != survey.source_hash:
        difference = f"its shards were made from another source ({manifest.dataset}, {manifest.source_hash[:12]})"
    else:
        given = asdict(settings)
        difference = "its shards were made with " + ", ".join(
            f"{key}={value} (now {given.get(key)})" for key, value in manifest.settings.items() if given.get(key) != value
        )
    if overwrite:
        return None
    raise UserError(f"{out_dir}: {difference}. Remove the folder, choose another one, or give --overwrite")


def with_origin(manifest: Manifest, stated: DataOrigin | None, *, overwrite: bool) -> Manifest:
    """Return the manifest with what the user states about its origin; only manifest.json is written anew, and only if needed."""
    if stated is None or stated.over(manifest.origin) == manifest.origin:
        return manifest
    if not overwrite:
        known = manifest.origin.describe() if manifest.origin is not None else {}
        difference = ", ".join(f"{name}: {text} (in the manifest: {known.get(name)})" for name, text in stated.describe().items())
        raise UserError(
            f"{manifest.location} exists with another origin. {difference}. Give --overwrite to change it: the shards stay, but "
            "runs that were trained on them find a changed manifest"
        )
    write_manifest(replace(manifest, origin=stated.over(manifest.origin)))
    return read_manifest(manifest.path)


def write_manifest(manifest: Manifest) -> None:
    """Write manifest.json into its folder."""
    with whole_file(manifest.path, manifest.path.with_suffix(".tmp")) as file:
        file.write(manifest_json(manifest))


def _is_complete(manifest: Manifest) -> bool:
    sizes = {
        manifest.shard_path(split, number): size
        for split in manifest.splits
        for number, size in enumerate(manifest.shards(split)["bytes"].tolist())
    }
    has_shards = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    return has_shards and all((manifest.dir / name).is_file() for name in manifest.catalogues)


@contextmanager
def writer_lock(work_dir: Path) -> Iterator[None]:
    """Keep out a second writer of the same shards; the lock is released however the process ends.

    Folders that were made for it and are empty at the end are removed.
    """
    path = _lock_path(work_dir)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # raises where no file can be created: filelock would call the lock held
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is writing {work_dir}; wait until it has finished") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise  # on a file system without locks the writer continues without one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # the first that is not empty
            for folder in made:
                folder.rmdir()


@contextmanager
def work_folder(work_dir: Path, out_dir: Path) -> Iterator[None]:
    """Hold the writer's lock; an error removes the work folder, but an interruption or a killed process leaves it."""
    with writer_lock(work_dir):
        try:
            yield
        except OSError as error:
            shutil.rmtree(work_dir, ignore_errors=True)
            if error.errno in NO_SPACE:
                raise UserError(
                    f"no space left while writing to {out_dir} ({error.strerror}); what was written is removed. Free some space, "
                    "or choose another folder, and give the same command again"
                ) from None
            raise
        except BrokenExecutor:
            raise UserError(
                f"a process that wrote shards to {out_dir} was killed, perhaps because memory ran out; "
                "the same command continues from the finished parts: try it with fewer workers"
            ) from None
        except Exception:
            shutil.rmtree(work_dir, ignore_errors=True)
            raise


def _write(survey: Survey, work_dir: Path, settings: Settings, workers: int, max_errors: int | None) -> None:
    started = time.monotonic()
    total = sum(split.size for split in survey.splits.values())
    if not _is_finished(work_dir, survey, settings):
        total = _write_all(survey, work_dir, settings, workers, max_errors)
    for name in ("parts", "packed"):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    (work_dir / SETTINGS_FILE).unlink(missing_ok=True)
    seconds = time.monotonic() - started
    logger.info("%d galaxies to shards in %.1f s (%.0f img/s)", total, seconds, total / seconds)


def _write_all(survey: Survey, work_dir: Path, settings: Settings, workers: int, max_errors: int | None) -> int:
    """Write everything, the manifest last, and return the number of galaxies in the shards."""
    encoding = _resolve(survey, settings)
    _open_work_dir(work_dir, survey, settings, encoding)
    order = storage_order(survey, settings.seed)
    most_damaged = NAMED if max_errors is None else max_errors
    parts = part_tasks(survey, encoding, order, work_dir / "parts", workers, most_damaged=most_damaged)
    paths = [task.path for task in parts]
    total = sum(split.size for split in survey.splits.values())
    with _executor(workers, total) as executor:
        with suppress(TooManyDamagedError):
            _run(executor, write_part, parts, "encoding galaxies", len(survey.labels))
        damaged = [image for path in paths for image in read_damaged(path)]
        check_damaged(damaged, total, max_errors)
        check_classes_left(survey, damaged)
        _check_unique_ids(paths)
        layout = shard_layout(survey, settings, rows_of(damaged))
        gaps = np.sort(np.array([image.index for image in damaged], np.int64))
        packs = pack_tasks(layout, paths, settings.encoding, work_dir, gaps)
        _run(executor, pack_shards, packs, "writing shards", total - len(damaged))
    if damaged or rows_left_out(survey):
        write_left_out(work_dir / LEFT_OUT_NAME, survey, damaged)
    finish_manifest(survey, work_dir, settings, layout, image_size=encoding.image_size, parts=paths)
    return total - len(damaged)


def _is_finished(work_dir: Path, survey: Survey, settings: Settings) -> bool:
    """Return True if a killed call had only the cleanup left to do."""
    try:
        return _is_of(read_manifest(work_dir), survey, settings)
    except UserError:
        return False


def _is_of(manifest: Manifest, survey: Survey, settings: Settings) -> bool:
    """Return True if the shards were made from this source with these settings."""
    return manifest.source_hash == survey.source_hash and dict(manifest.settings) == asdict(settings)


def _resolve(survey: Survey, settings: Settings) -> Encoding:
    """Return the encoding with the requested image size, else with that of the first galaxy."""
    if settings.image_size is not None:
        return Encoding(settings.encoding, settings.quality, settings.image_size, resize=True)
    first, pixels = first_image(survey)
    height, width = pixels.shape[:2]
    if height != width:
        raise UserError(
            f"galaxy {first.id} is {width} x {height} pixels, not a square: "
            f"give an image size (--image-size {min(height, width)}) so that all are cut to a square and resampled"
        )
    return Encoding(settings.encoding, settings.quality, height, resize=False)


def _open_work_dir(work_dir: Path, survey: Survey, settings: Settings, encoding: Encoding) -> None:
    """Keep the work folder of a killed call with the same source and settings, else create an empty one."""
    own = [survey.source_hash, asdict(settings), asdict(encoding), WORK_VERSION]
    path = work_dir / SETTINGS_FILE
    if not path.exists() or path.read_text() != json.dumps(own):
        shutil.rmtree(work_dir, ignore_errors=True)
        for name in ("parts", "packed", "columns"):
            (work_dir / name).mkdir(parents=True)
        write_json(path, own)


def _executor(workers: int, num_galaxies: int) -> Executor:
    """Return a pool of processes, or of threads if starting processes is not worth it.

    HDF5 and decompression hold a lock that keeps threads from running in parallel.
    """
    if workers == 1 or num_galaxies < FEW_GALAXIES:
        return ThreadPoolExecutor(workers)
    return start_workers(workers)


def _run(executor: Executor, work: Callable[[Any], int], tasks: Sequence[Any], description: str, total: int) -> None:
    futures = [executor.submit(work, task) for task in tasks]
    try:
        with tqdm(total=total, desc=description, unit="img", disable=None) as bar:
            for future in as_completed(futures):
                bar.update(future.result())
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise


def _check_unique_ids(parts: Sequence[Path]) -> None:
    """Check that no two galaxies have one id; only ids with equal hashes are read and compared."""
    tables = [np.load(part.with_suffix(".npy"), mmap_mode="r" if part.stat().st_size else None) for part in parts]
    hashes, counts = np.unique(np.concatenate([table["hash"] for table in tables]), return_counts=True)
    ids: Counter[str] = Counter()
    for part, table in zip(parts, tables, strict=True):
        with part.open("rb") as file:
            for row in table[np.isin(table["hash"], hashes[counts > 1])]:
                file.seek(row["offset"])
                ids[file.read(row["key"]).decode()] += 1
    if repeated := [name for name, count in ids.items() if count > 1]:
        raise UserError(f"two galaxies have the id {repeated[0]}: ids must be unique in a data set")


def publish(work_dir: Path, out_dir: Path) -> None:
    """Put a finished work folder in place of ``out_dir``."""
    replaced = _replaced(work_dir)
    if out_dir.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out_dir.rename(replaced)
    rename(work_dir, out_dir)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(work_dir: Path) -> Path:
    """Return the path that holds the overwritten shards until the new ones are in place."""
    return work_dir.with_name(work_dir.name + ".old")


def _lock_path(work_dir: Path) -> Path:
    return work_dir.with_name(work_dir.name + ".lock")
