"""``galaxydist bench loader``: our loader against others and the bare decoder, on the same images.

Each measurement runs in its own process. All of them run in turn for several rounds, and the medians are reported. Before the
measurements, each loader's pixels are compared with ours.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.bench.common import show, show_json, spread
from galaxydist.bench.loader_processes import GALAXYDIST, OURS, PEERS, Loader, Processes, check, prepare
from galaxydist.bench.loader_worker import BATCH_SIZE, NUM_PROBED, TASKS, LoaderJob, StoredJPEG, stored_jpegs
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.shards.manifest import (
    ANY_FILE,
    COLUMNS,
    SHARD_ROW,
    Manifest,
    Split,
    column_name,
    manifest_json,
    read_manifest,
    shard_name,
)
from galaxydist.shards.order import steps_per_epoch
from galaxydist.shards.tar_index import IndexOptions, index_tars
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.surveys.image_table import TableOptions
from galaxydist.surveys.simulate.survey import SIMULATOR_VERSION, simulate_survey
from galaxydist.surveys.survey_sources import open_survey
from galaxydist.surveys.tables.tar_scan import find_tars

# Images on which the loaders are compared: as our shards, repeated under distinct keys, and as one long epoch.

SIMULATED = 1000
# Number of galaxies in GZ DESI (Walmsley et al. 2023), for the epoch that is resumed.
LONG_EPOCH = 8_700_000


@dataclass(frozen=True)
class RepeatedShards:
    """Survey of the first ``count`` training images of some shards, repeated ``times`` times with distinct keys."""

    shards_dir: Path
    name: str
    class_names: tuple[str, ...]
    shards_hash: str
    count: int
    times: int
    variant: str = "original"
    slab_length: int = 256

    @cached_property
    def _images(self) -> list[StoredJPEG]:
        return list(islice(stored_jpegs(self.shards_dir), self.count))

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.tile(np.array([image.label for image in self._images], np.int64), self.times)

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {"train": np.arange(self.count * self.times)}

    @property
    def source_hash(self) -> str:
        return hashlib.sha256(f"{self.shards_hash} {self.count} {self.times}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row in range(start, stop):
            copy, number = divmod(row, self.count)
            image = self._images[number]
            yield Galaxy(f"{image.key}-{copy}", EncodedImage(image.data, "jpg"), image.label)


def simulated_shards(root: Path, num_galaxies: int, *, workers: int | None = None) -> Manifest:
    """Simulate a class-balanced survey, unless its file exists, and write its shards beside it."""
    path = root / f"simulated-{SIMULATOR_VERSION}-{num_galaxies}.h5"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        simulate_survey(path, num_galaxies, seed=1, workers=workers, balanced=True)
    return write_shards(open_survey(path), path.with_suffix(""), workers=workers)


def find_source(root: Path, *, data: Path | None, real: Path | None, workers: int) -> Manifest:
    """Return the shards that the images are taken from.

    Args:
        root: folder of the benchmark's files.
        data: a manifest.
        real: a folder of images, ``<class>/<name>.jpg``.
        workers: number of processes that write.

    Raises:
        UserError: the source does not exist, or its images are not JPEG.
    """
    if data is not None:
        manifest = read_manifest(data)
        if manifest.encoding != "jpeg":
            raise UserError(
                f"{manifest.path} holds {manifest.encoding} images, and loaders are compared on JPEG: "
                "make shards with: galaxydist data shard --encoding jpeg"
            )
        return manifest
    if real is None:
        return simulated_shards(root, SIMULATED, workers=workers)
    survey = open_image_folder(real, name="real", fold=(0, 2))
    whole = dataclasses.replace(survey, splits={"train": np.arange(len(survey.labels))})
    return write_shards(whole, root / f"real-{whole.source_hash[:8]}", workers=workers)


def repeat_source(source: Manifest, root: Path, *, num_images: int, least: int, shard_size: int, workers: int) -> Manifest:
    """Write shards of about ``num_images`` training images of a source, each repeated as often as needed.

    Args:
        source: the shards to take images from.
        root: each source and number gets its own folder in it.
        num_images: number of images.
        least: lower limit of this number.
        shard_size: images in a shard.
        workers: number of processes that write.
    """
    count = min(source.split("train").num_samples, num_images)
    times = max(round(num_images / count), -(-least // count))
    survey = RepeatedShards(source.dir, source.dataset, source.class_names, source.hash, count, times)
    out_dir = root / f"{source.dataset}-{survey.source_hash[:8]}" / "shards"
    return write_shards(survey, out_dir, shard_size=shard_size, workers=workers, overwrite=True)


def lengthen(manifest: Manifest, out_dir: Path, num_samples: int) -> Manifest:
    """Return shards that list the same images many times, as hard links to the same tars.

    Args:
        manifest: its train split holds the images.
        out_dir: replaced, unless it was made from these shards.
        num_samples: lower limit of the listed samples.
    """
    split = manifest.split("train")
    inside = 32
    links = -(-num_samples // (split.num_samples * inside))
    num_shards, total = split.num_shards * links, split.num_samples * inside * links
    counts = tuple(count * inside * links for count in split.class_counts)
    totals = {"train": Split(total, num_shards, split.num_bytes * links, counts)}
    long = dataclasses.replace(manifest, dir=out_dir, splits=totals, source_hash=manifest.hash, catalogues={})
    text = manifest_json(long)
    if long.path.exists() and long.path.read_bytes() == text:
        return read_manifest(out_dir)
    shutil.rmtree(out_dir, ignore_errors=True)
    (out_dir / "columns").mkdir(parents=True)
    table = np.tile(np.asarray(manifest.shards("train"), SHARD_ROW), links)
    parts = np.split(np.arange(split.num_samples), np.cumsum(table["samples"][: split.num_shards])[:-1])
    rows = np.tile(np.concatenate([np.tile(part, inside) for part in parts]), links)
    table["samples"] *= inside
    np.save(out_dir / column_name("train", "shards"), table)
    for column in COLUMNS:
        np.save(out_dir / column_name("train", column), getattr(manifest, column)("train")[rows])
    for number in range(num_shards):
        os.link(manifest.shard_path("train", number % split.num_shards), out_dir / shard_name("train", number))
    long.path.write_bytes(text)
    return read_manifest(out_dir)


# Images in an epoch.
IMAGES_PER_WORKER = 2000
SHARDS_PER_WORKER = 8
# Batches ahead in a peer's queue for each worker (torch's DataLoader): none of them may be among the timed ones. At least
# LEAST_TIMED batches are timed.
AHEAD, LEAST_TIMED = 2, 12
# Timed batches for each worker: more for the faster loaders; at most the number in an epoch.
OURS_TIMED, TRAIN_TIMED = 100, 8
TRAIN_SIZE = 224
RESUMES = 5
IN_PLACE, ON_GPU = "tars in place", "galaxydist on the GPU"
INSTALL = "`make bench` does, `make dali` for DALI"
QUICK_EPOCH = 100_000
# Tolerance of mean and deviation between normalised batches of different galaxies with different augmentation.
PIXEL_TOLERANCE = 0.15


@dataclass(frozen=True)
class Bench:
    """Subject of the measurements: the images, the processes, the installed loaders."""

    manifest: Manifest
    job: LoaderJob
    processes: Processes
    peers: tuple[Loader, ...]
    rounds: int = 1
    quick: bool = False
    in_place: bool = False

    @property
    def steps(self) -> int:
        return steps_per_epoch(self.manifest.split("train").num_samples, BATCH_SIZE)

    def job_of(self, loader: Loader, **changes: Any) -> LoaderJob:
        device = "cuda" if loader.needs_gpu else "cpu"
        return replace(self.job, form_dir=str(self.manifest.dir.parent / loader.name), device=device, **changes)


@dataclass(frozen=True)
class LoaderOptions:
    """Options of ``measure_loader``.

    Args:
        environments: folder with the peers' virtual environments.
        data, real: a manifest, or a folder ``<class>/<name>.jpg``; neither: simulated galaxies.
        workers: threads or processes that decode, on as many cores; None: one for each core that this process may use.
        num_images: in an epoch.
        rounds: of all measurements.
        tasks: of ``TASKS``.
        peers: names; None: all that are installed.
        quick: few images and one round, as a test of the benchmark; the figures are not representative.
        in_place: measure our loader also on the tars indexed as foreign ones, as images of one size and of any size.
    """

    environments: Path
    data: Path | None = None
    real: Path | None = None
    workers: int | None = None
    num_images: int | None = None
    rounds: int = 3
    tasks: Sequence[str] = TASKS
    peers: Sequence[str] | None = None
    quick: bool = False
    in_place: bool = False


def measure_loader(root: Path, environ: Mapping[str, str], options: LoaderOptions) -> list[dict[str, Any]]:
    """Print tables, and last a line of JSON for each task.

    Args:
        root: folder for the images in the form of each loader; kept for the next time.
        environ: environment variables of the processes.
        options: settings of the measurement.

    Returns:
        The content of the lines of JSON.

    Raises:
        UserError: the data do not exist; a loader fails, or gives other images than ours.
    """
    bench = _open_bench(root, environ, options)
    _prepare_and_check(bench)
    results = []
    for task in options.tasks:
        measure = {"resume": _measure_resume, "memory": _measure_memory}.get(task, _measure_speed)
        result: dict[str, Any] = {
            "task": task,
            "ours": None,
            "peers": {},
            "limit": None,
            "ratio_best_peer": None,
            "ratio_limit": None,
        }
        result |= measure(bench, task)
        results.append(result | {"data": bench.manifest.dataset, "workers": bench.job.workers, "rounds": bench.rounds})
    show_json(*results)
    return results


def _open_bench(root: Path, environ: Mapping[str, str], options: LoaderOptions) -> Bench:
    """Check the options, and write the images as our shards."""
    cores = sorted(os.sched_getaffinity(0))
    workers = options.workers or len(cores)
    if workers > len(cores):
        raise UserError(f"--workers {workers} is more than the {len(cores)} cores that this process may use")
    least = BATCH_SIZE * (NUM_PROBED + 2 * AHEAD * workers + LEAST_TIMED)
    num_images = options.num_images or (least if options.quick else IMAGES_PER_WORKER * workers)
    if num_images < least:
        raise UserError(f"--images {num_images} is too few to time with {workers} workers: give {least} or more")
    wanted = [peer for peer in PEERS if options.peers is None or peer.name in options.peers]
    if any(peer.needs_gpu for peer in wanted):
        wanted = _without_gpu_peers(wanted, options.peers is not None)
    source = find_source(root, data=options.data, real=options.real, workers=workers)
    shard_size = max(1, num_images // (SHARDS_PER_WORKER * workers))
    manifest = repeat_source(source, root, num_images=num_images, least=least, shard_size=shard_size, workers=workers)
    processes = Processes(options.environments, environ)
    if missing := [peer for peer in wanted if processes.python(peer) is None]:
        titles = ", ".join(peer.title for peer in missing)
        show(f"not measured, since not installed in {processes.environments.resolve()} ({INSTALL}): {titles}")
    job = LoaderJob(
        action="measure",
        task="decode",
        shards_dir=str(manifest.dir),
        form_dir="",
        ours=False,
        cores=tuple(cores[:workers]),
        workers=workers,
        warmup=0,
        batches=0,
        image_size=min(TRAIN_SIZE, manifest.image_size),
        mean=manifest.channel_mean,
        std=manifest.channel_std,
        shard_size=shard_size,
    )
    peers = tuple(peer for peer in wanted if peer not in missing)
    return Bench(manifest, job, processes, peers, 1 if options.quick else options.rounds, options.quick, options.in_place)


def _without_gpu_peers(wanted: list[Loader], are_named: bool) -> list[Loader]:
    """Leave the loaders that decode on a GPU out where there is none.

    Raises:
        UserError: the user named one of them.
    """
    import torch

    if torch.cuda.is_available():
        return wanted
    titles = ", ".join(peer.title for peer in wanted if peer.needs_gpu)
    if are_named:
        raise UserError(f"{titles} needs a GPU, and torch finds none: name other loaders with --peers, or none for all of them")
    show(f"not measured, since torch finds no GPU: {titles}")
    return [peer for peer in wanted if not peer.needs_gpu]


def _prepare_and_check(bench: Bench) -> None:
    num_images, size = bench.manifest.split("train").num_samples, bench.manifest.image_size
    show(
        f"{num_images:,} {bench.manifest.dataset} galaxies an epoch, {size} x {size} JPEG; batches of {BATCH_SIZE}, "
        f"{bench.job.workers} workers on {bench.job.workers} cores, shuffled, default queue lengths, memory not pinned"
    )
    for peer in bench.peers:
        prepare(bench.processes, peer, bench.job_of(peer), f"{bench.manifest.hash} {bench.job.shard_size}")
    worst = 0
    for loader, ours in [(GALAXYDIST, False), *((peer, ours) for peer in bench.peers for ours in _decoders(peer))]:
        worst = max(worst, check(bench.processes, loader, bench.job_of(loader, ours=ours), num_images))
    others = f", equal to ours within {worst} grey levels for all" if bench.peers else ""
    show(f"checked: every loader gives each galaxy once an epoch{others}")


def _decoders(peer: Loader) -> tuple[bool, ...]:
    """Return False for the peer's own decoder and True for ours, if that can be used."""
    return (False, True) if peer.takes_decoder else (False,)


def _measure_speed(bench: Bench, task: str) -> dict[str, Any]:
    """Measure the images per second of our loader, of the peers, and of the bare decoder."""
    ahead = AHEAD * bench.job.workers
    job = bench.job_of(GALAXYDIST, task=task, warmup=ahead, batches=min(OURS_TIMED * bench.job.workers, 4 * bench.steps))
    jobs: dict[str, tuple[Loader, LoaderJob, str]] = {OURS: (GALAXYDIST, job, GALAXYDIST.title)}
    timed = bench.steps - NUM_PROBED - 2 * ahead
    if task == "train":
        timed = min(timed, TRAIN_TIMED * bench.job.workers)
    else:
        jobs["limit"] = GALAXYDIST, replace(job, action="limit"), "limit: the decoder over bytes in memory"
    if any(peer.needs_gpu for peer in bench.peers):
        jobs[ON_GPU] = GALAXYDIST, replace(job, device="cuda"), "galaxydist, batches on the GPU"
    for name, index in (_index_in_place(bench.manifest) if bench.in_place else {}).items():
        jobs[name] = GALAXYDIST, replace(job, shards_dir=str(index.dir)), f"galaxydist, {name}"
    for peer in bench.peers:
        job = bench.job_of(peer, task=task, warmup=ahead, batches=timed)
        jobs[peer.name] = peer, job, peer.title
        if task == "decode" and peer.takes_decoder:
            jobs[f"{peer.name}+decoder"] = peer, replace(job, ours=True), f"{peer.title}, with our decoder"
    answers = _in_turn(bench, jobs)
    if task == "train":
        _compare_pixels(jobs, answers)
    speeds = {name: [answer["images_per_s"] for answer in given] for name, given in answers.items()}
    _show_speeds(bench, task, speeds, {name: title for name, (_, _, title) in jobs.items()})
    medians = {name: median(values) for name, values in speeds.items()}
    on_gpu = [peer.name for peer in bench.peers if peer.needs_gpu]
    peers = {peer.name: medians[peer.name] for peer in bench.peers if not peer.needs_gpu}
    result = {"ours": medians[OURS], "peers": peers}
    result["on_gpu"] = {name: value for name, value in medians.items() if name in (ON_GPU, *on_gpu)}
    result["ratio_best_peer"] = medians[OURS] / max(peers.values()) if peers else None
    result["in_place"] = {name: value for name, value in medians.items() if name.startswith(IN_PLACE)}
    if task == "decode":
        result |= {"limit": medians["limit"], "ratio_limit": medians[OURS] / medians["limit"]}
        hooks = [peer.name for peer in bench.peers if peer.takes_decoder]
        result["peers_with_our_decoder"] = {name: medians[f"{name}+decoder"] for name in hooks}
    return result


def _index_in_place(manifest: Manifest) -> dict[str, Manifest]:
    """Return indexes of the benchmark's own tars as foreign ones: of one size, and of files of any format and size."""
    locations = find_tars({"train": str(manifest.dir)})
    options = IndexOptions(overwrite=True)
    one_size = index_tars(locations, manifest.dir.parent / "index", TableOptions(manifest.dataset), options)
    any_size = dataclasses.replace(one_size, dir=manifest.dir.parent / "index-any-size", encoding=ANY_FILE)
    shutil.rmtree(any_size.dir, ignore_errors=True)
    shutil.copytree(one_size.dir, any_size.dir)
    any_size.path.write_bytes(manifest_json(any_size))
    return {f"{IN_PLACE}, one size": one_size, f"{IN_PLACE}, any size": any_size}


def _in_turn(bench: Bench, jobs: Mapping[str, tuple[Loader, LoaderJob, str]]) -> dict[str, list[dict[str, Any]]]:
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    with tqdm(total=bench.rounds * len(jobs), desc="measuring", unit="process", disable=None, leave=False) as bar:
        for _ in range(bench.rounds):
            for name, (loader, job, _) in jobs.items():
                answers[name].append(bench.processes.run(loader, job))
                bar.update()
    return answers


def _compare_pixels(
    jobs: Mapping[str, tuple[Loader, LoaderJob, str]], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Raise an error if a loader's augmented batches differ from ours in shape, type, mean or deviation."""
    ours = answers[OURS][0]
    for name, (loader, _, _) in jobs.items():
        other = answers[name][0]
        is_close = all(abs(other[key] - ours[key]) < PIXEL_TOLERANCE for key in ("mean", "std"))
        if (other["shape"], other["dtype"]) != (ours["shape"], ours["dtype"]) or not is_close:
            raise UserError(f"{loader.title} makes batches of another kind than galaxydist: {other}, not {ours}")


def _show_speeds(bench: Bench, task: str, speeds: Mapping[str, Sequence[float]], titles: Mapping[str, str]) -> None:
    size = bench.job.image_size
    description = {
        "decode": f"decode: JPEG to uint8 batches of {BATCH_SIZE}",
        "train": f"train: to normalised float32 {size} x {size}, random zoom-crop and mirrors (galaxydist: also any rotation)",
    }[task]
    show(f"\n{description}; img/s, median of {bench.rounds} (least ... greatest)")
    on_gpu = {peer.name for peer in bench.peers if peer.needs_gpu}
    for name, values in speeds.items():
        ours = speeds[ON_GPU if name in on_gpu else OURS]
        ratio = "" if name in (OURS, ON_GPU) else f"   ours / this: {median(ours) / median(values):.2f}"
        show(f"  {titles[name]:<44}{spread(values, 0):<30}{ratio}")


def _measure_resume(bench: Bench, _task: str) -> dict[str, Any]:
    """Measure the seconds to the first batch, at the end of a long epoch and at its beginning."""
    num_samples, repeats = (QUICK_EPOCH, 1) if bench.quick else (LONG_EPOCH, RESUMES)
    long = lengthen(bench.manifest, bench.manifest.dir.parent / "long", num_samples)
    num_images = long.split("train").num_samples
    steps = {"beginning": 0, "end": steps_per_epoch(num_images, BATCH_SIZE) - 1}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            job = replace(bench.job, action="resume", shards_dir=str(long.dir), step=step)
            seconds[name].append(bench.processes.run(GALAXYDIST, job)["seconds"])
    show(f"\nresume: seconds to the first batch in an epoch of {num_images:,}; median of {repeats} (least ... greatest)")
    for name, values in seconds.items():
        show(f"  at its {name:<12}{spread(values)}")
    end, beginning = median(seconds["end"]), median(seconds["beginning"])
    return {"ours": end, "limit": beginning, "ratio_limit": end / beginning, "num_images": num_images}


def _measure_memory(bench: Bench, _task: str) -> dict[str, Any]:
    """Measure the resident megabytes of all processes at the end of each of ten epochs."""
    job = replace(bench.job, action="memory", task="train", batches=bench.steps)
    series = [size / 1e6 for size in bench.processes.run(GALAXYDIST, job)["resident_bytes"]]
    growth = series[-1] - series[0]
    sizes = " ".join(f"{size:.0f}" for size in series)
    show(f"\nmemory: resident MB at the end of each of {len(series)} epochs of `train`: {sizes}")
    show(f"  growth after the first epoch: {growth:+.1f} MB")
    return {"ours": series[-1], "series_mb": series, "growth_mb": growth}
