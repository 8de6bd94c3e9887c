"""A survey to shards: plain WebDataset tars in a seeded random order, an index of each, columns and a manifest.

Two stages over all cores, in a folder beside the place asked for, which gets its name last: rows to encoded parts (``parts``),
parts to tars (``pack``). A call that was killed leaves only that folder; the next call with the same source and settings goes on
from its finished parts and shards, and the result is byte-equal to an undisturbed one's.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.chance import hash64
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage, Survey
from galaxydist.shards.encode import Encoding, decode_picture
from galaxydist.shards.manifest import (
    COLUMNS,
    EXTENSIONS,
    MANIFEST_NAME,
    SHARD_ROW,
    Manifest,
    Split,
    column_name,
    manifest_json,
    read_manifest,
    shard_name,
)
from galaxydist.shards.pack import PackTask, Shard, pack_shards, read_packed
from galaxydist.shards.parts import PartTask, PixelSums, read_part_sums, write_part
from galaxydist.shards.purposes import Purpose

PART_BYTES = 64 * 1024 * 1024
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Below this many galaxies, starting processes costs more than they save.
FEW_GALAXIES = 4000

Task = TypeVar("Task")


@dataclass(frozen=True)
class Settings:
    """What the user asked for; together with the source's hash it decides every byte."""

    encoding: str
    quality: int
    image_size: int | None
    shard_size: int | None
    seed: int


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
) -> Manifest:
    """Write a survey's splits as shards; does nothing where they already stand.

    Args:
        survey: where the galaxies come from; rows in no split are left out.
        out_dir: the folder to make.
        encoding: ``jpeg``, ``png`` (lossless) or ``raw`` (uint8 .npy: largest, fastest to read).
        quality: of JPEG; a JPEG source of the right size is copied byte for byte.
        image_size: pixels of the stored square; None: the source's own size, which must then be one square for all.
        shard_size: galaxies in a shard; None: 64 to 1,024, so that a small split still has several shards.
        seed: of the random order in which they are stored.
        workers: processes; None: one for each core that this process may use.
        overwrite: replace shards that were made from another source or with other settings.

    Raises:
        UserError: for such shards without ``overwrite``, a picture that does not decode, a full disk, two galaxies of one id.
    """
    if encoding not in EXTENSIONS:
        raise UserError(f"encoding {encoding!r} is not one of {', '.join(EXTENSIONS)}")
    out_dir = Path(out_dir)
    settings = Settings(encoding, quality, image_size, shard_size, seed)
    existing = _existing(out_dir, survey, settings, overwrite)
    if existing:
        return existing
    if len(survey.splits.get("train", ())) == 0:
        raise UserError(f"{survey.name} has no training galaxies, so there is nothing to make shards of")
    work_dir = out_dir.with_name(out_dir.name + ".partial")
    with _alone(work_dir):
        try:
            manifest = _write(survey, work_dir, settings, workers or len(os.sched_getaffinity(0)))
            _put_in_place(work_dir, out_dir)
        except OSError as error:
            shutil.rmtree(work_dir, ignore_errors=True)
            if error.errno in DISK_FULL:
                raise UserError(
                    f"no space left while writing shards to {out_dir} ({error.strerror}); what was written is removed. "
                    "Free some space, or write elsewhere, and give the same command again"
                ) from None
            raise
        except BrokenExecutor:
            raise UserError(
                f"a process that wrote shards to {out_dir} was killed, perhaps for want of memory; "
                "the same command goes on from there: try it with fewer workers"
            ) from None
        except Exception:
            shutil.rmtree(work_dir, ignore_errors=True)
            raise
    del manifest
    return read_manifest(out_dir)


def _existing(out_dir: Path, survey: Survey, settings: Settings, overwrite: bool) -> Manifest | None:
    """The manifest of finished shards of this source and these settings; None where there is nothing to keep."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / MANIFEST_NAME).exists():
        raise UserError(f"{out_dir} exists and holds no shards: give another folder, or remove it")
    if overwrite:
        try:
            manifest = read_manifest(out_dir)
        except UserError:
            return None
    else:
        manifest = read_manifest(out_dir)
    if manifest.source_hash == survey.source_hash and dict(manifest.settings) == asdict(settings):
        if _all_there(manifest):
            return manifest
        difference = "some of its shards are missing or cut short"
    elif manifest.source_hash != survey.source_hash:
        difference = f"its shards were made from another source ({manifest.dataset}, {manifest.source_hash[:12]})"
    else:
        asked = asdict(settings)
        difference = "its shards were made with " + ", ".join(
            f"{key}={value} (now {asked.get(key)})" for key, value in manifest.settings.items() if asked.get(key) != value
        )
    if overwrite:
        return None
    raise UserError(f"{out_dir}: {difference}. Remove the folder, give another one, or say --overwrite")


def _all_there(manifest: Manifest) -> bool:
    for split in manifest.splits:
        for number, size in enumerate(manifest.shards(split)["bytes"].tolist()):
            try:
                if manifest.shard_path(split, number).stat().st_size != size:
                    return False
            except FileNotFoundError:
                return False
    return True


@contextmanager
def _alone(work_dir: Path) -> Iterator[None]:
    """Keep a second writer of the same shards out. The lock goes with the process, however it ends."""
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = work_dir.with_name(work_dir.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"another process is writing {work_dir}; wait for it") from None
            # A file system without locks: go on without.
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _write(survey: Survey, work_dir: Path, settings: Settings, workers: int) -> Manifest:
    started = time.monotonic()
    encoding = _resolve(survey, settings)
    layout = _layout(survey, settings)
    _open_work_dir(work_dir, survey, settings, encoding)
    order = _storage_order(survey, settings.seed)
    parts = _part_tasks(survey, encoding, order, work_dir / "parts", workers)
    total = sum(split.size for split in survey.splits.values())
    with _executor(workers, total) as executor:
        _run(executor, write_part, parts, "encoding galaxies", len(survey.labels))
        _refuse_twins([task.path for task in parts])
        packs = _pack_tasks(layout, [task.path for task in parts], settings.encoding, work_dir)
        _run(executor, pack_shards, packs, "writing shards", total)
    sums = PixelSums()
    for task in parts:
        sums.merge(read_part_sums(task.path))
    manifest = _finish(survey, work_dir, settings, encoding, layout, sums)
    shutil.rmtree(work_dir / "parts")
    shutil.rmtree(work_dir / "packed")
    (work_dir / "settings.json").unlink()
    seconds = time.monotonic() - started
    tqdm.write(f"{total} galaxies to shards in {seconds:.1f} s ({total / seconds:.0f} img/s)", file=sys.stderr)
    return manifest


def _resolve(survey: Survey, settings: Settings) -> Encoding:
    """The stored size: what was asked for, else the first galaxy's."""
    if settings.image_size is not None:
        return Encoding(settings.encoding, settings.quality, settings.image_size, resize=True)
    first = next(iter(survey.read(0, 1)))
    image = first.image
    pixels = decode_picture(image, first.id) if isinstance(image, EncodedImage) else np.asarray(image)
    height, width = pixels.shape[:2]
    if height != width:
        raise UserError(
            f"galaxy {first.id} is {width} x {height} pixels, not a square: "
            f"give an image size (--image-size {min(height, width)}) so that all are cut to a square and resampled"
        )
    return Encoding(settings.encoding, settings.quality, height, resize=False)


def _layout(survey: Survey, settings: Settings) -> dict[str, list[Shard]]:
    """The shards of each split, of nearly equal size; places run on over the splits."""
    layout: dict[str, list[Shard]] = {}
    start = 0
    for name, rows in survey.splits.items():
        size = settings.shard_size or int(np.clip(-(-rows.size // 16), 64, 1024))
        few, more = divmod(rows.size, max(1, -(-rows.size // size)))
        layout[name] = []
        for number in range(-(-rows.size // size)):
            stop = start + few + (number < more)
            layout[name].append(Shard(shard_name(name, number), start, stop))
            start = stop
    return layout


def _storage_order(survey: Survey, seed: int) -> NDArray[np.int64]:
    """The final place of every row, -1 for rows of no split: within each split sorted by a hash."""
    places = np.full(len(survey.labels), -1, np.int64)
    start = 0
    for number, rows in enumerate(survey.splits.values()):
        order = np.argsort(hash64(seed, number, rows, Purpose.STORAGE), kind="stable")
        places[rows[order]] = start + np.arange(rows.size)
        start += rows.size
    return places


def _open_work_dir(work_dir: Path, survey: Survey, settings: Settings, encoding: Encoding) -> None:
    """Go on in a folder that a killed call left, if it was made for the same thing; else start an empty one."""
    wanted = json.dumps([survey.source_hash, asdict(settings), asdict(encoding)])
    note = work_dir / "settings.json"
    if not note.exists() or note.read_text() != wanted:
        shutil.rmtree(work_dir, ignore_errors=True)
        for name in ("parts", "packed", "columns"):
            (work_dir / name).mkdir(parents=True)
        note.write_text(wanted)


def _part_tasks(survey: Survey, encoding: Encoding, places: NDArray[np.int64], parts_dir: Path, workers: int) -> list[PartTask]:
    raw_bytes = encoding.image_size**2 * 3
    rows = PART_BYTES // (raw_bytes if encoding.name == "raw" else max(1, raw_bytes // 4))
    rows = min(rows, -(-len(places) // (4 * workers)))
    rows = max(1, -(-rows // survey.slab_length)) * survey.slab_length
    num_train = len(survey.splits["train"])
    first = next(iter(survey.splits))
    assert first == "train", "places below num_train are for training"
    return [
        PartTask(survey, encoding, start, stop, places[start:stop], num_train, parts_dir / f"{start:012d}-{stop:012d}.bin")
        for start in range(0, len(places), rows)
        for stop in [min(start + rows, len(places))]
    ]


def _pack_tasks(layout: dict[str, list[Shard]], parts: Sequence[Path], encoding: str, work_dir: Path) -> list[PackTask]:
    """Shards in groups of about a part's size, so that one worker's memory stays at that."""
    written = sum(part.stat().st_size for part in parts)
    total = sum(shard.stop - shard.start for shards in layout.values() for shard in shards)
    places = max(1, PART_BYTES * total // max(1, written))
    groups: list[list[Shard]] = []
    for shard in (shard for shards in layout.values() for shard in shards):
        if not groups or shard.stop - groups[-1][0].start > places:
            groups.append([])
        groups[-1].append(shard)
    return [PackTask(tuple(group), tuple(parts), EXTENSIONS[encoding], work_dir, work_dir / "packed") for group in groups]


def _executor(workers: int, num_galaxies: int) -> Executor:
    """Processes, since HDF5 and decompression hold a lock on threads; threads where starting processes is not worth it.
    They are spawned: a fork would copy whatever threads and devices the caller has."""
    if workers == 1 or num_galaxies < FEW_GALAXIES:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _run(executor: Executor, work: Callable[[Task], int], tasks: Sequence[Task], what: str, total: int) -> None:
    futures = [executor.submit(work, task) for task in tasks]
    try:
        with tqdm(total=total, desc=what, unit="img", disable=None) as bar:
            for future in as_completed(futures):
                bar.update(future.result())
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise


def _refuse_twins(parts: Sequence[Path]) -> None:
    tables = [np.load(part.with_suffix(".npy")) for part in parts]
    hashes = np.concatenate([table["hash"] for table in tables])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    if same.size == 0:
        return
    starts = np.cumsum([0, *(len(table) for table in tables)])
    keys = []
    for number in (order[same[0]], order[same[0] + 1]):
        part = int(np.searchsorted(starts, number, side="right")) - 1
        row = tables[part][number - starts[part]]
        with parts[part].open("rb") as file:
            file.seek(row["offset"])
            keys.append(file.read(row["key"]).decode())
    if keys[0] == keys[1]:
        raise UserError(f"two galaxies have the id {keys[0]}: ids must be unique in a data set")


def _finish(
    survey: Survey,
    work_dir: Path,
    settings: Settings,
    encoding: Encoding,
    layout: dict[str, list[Shard]],
    sums: PixelSums,
) -> Manifest:
    """Columns, then the manifest, into the folder that will be renamed."""
    splits: dict[str, Split] = {}
    columns: dict[str, str] = {}
    for split, shards in layout.items():
        table = np.zeros(len(shards), SHARD_ROW)
        num_samples = shards[-1].stop - shards[0].start if shards else 0
        rows = {name: np.zeros(num_samples, dtype) for name, dtype in COLUMNS.items()}
        for number, shard in enumerate(shards):
            table[number : number + 1], packed = read_packed(work_dir / "packed", shard)
            here = slice(shard.start - shards[0].start, shard.stop - shards[0].start)
            rows["labels"][here], rows["offsets"][here] = packed["label"], packed["offset"]
            rows["lengths"][here] = packed["length"]
        for name, column in {"shards": table, **rows}.items():
            columns[column_name(split, name)] = _write_column(work_dir / column_name(split, name), column)
        labelled = rows["labels"][rows["labels"] >= 0]
        counts = np.bincount(labelled, minlength=len(survey.class_names))
        splits[split] = Split(num_samples, len(shards), int(table["bytes"].sum()), tuple(counts.tolist()))
    mean, std = sums.mean_std()
    manifest = Manifest(
        dir=work_dir,
        hash="",
        dataset=survey.name,
        variant=survey.variant,
        class_names=tuple(survey.class_names),
        encoding=settings.encoding,
        image_size=encoding.image_size,
        splits=splits,
        channel_mean=mean,
        channel_std=std,
        source_hash=survey.source_hash,
        columns=columns,
        settings=asdict(settings),
    )
    _write_synced(manifest.path, manifest_json(manifest))
    return manifest


def _write_column(path: Path, column: NDArray[Any]) -> str:
    with path.open("wb") as file:
        np.save(file, column)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(work_dir: Path, out_dir: Path) -> None:
    if out_dir.exists():
        old = out_dir.with_name(out_dir.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        out_dir.rename(old)
        work_dir.rename(out_dir)
        shutil.rmtree(old)
    else:
        work_dir.rename(out_dir)
