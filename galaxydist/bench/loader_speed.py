"""``galaxydist bench loader``: our loader against others and against what decoding allows, on the same images and cores.

Every measurement is a process of its own; they run in turn, several rounds of them, and the figures are medians. Before any is
timed, each loader's pixels are compared with ours.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.bench.loader_processes import GALAXYDIST, OURS, PEERS, Loader, Processes, check, prepare
from galaxydist.bench.loader_worker import BATCH_SIZE, LOOKED_AT, TASKS, LoaderJob, StoredJPEG, stored_jpegs
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.shards.manifest import COLUMNS, SHARD_ROW, Manifest, Split, column_name, manifest_json, read_manifest, shard_name
from galaxydist.shards.order import steps_per_epoch
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.surveys.simulate.survey import SIMULATOR_VERSION, simulate_survey
from galaxydist.surveys.survey_sources import open_survey

# The images that loaders are compared on: as our shards, repeated under distinct keys, and as one long epoch.

SIMULATED = 1000
# As many galaxies as GZ DESI has (Walmsley et al. 2023), for the epoch that is resumed.
LONG_EPOCH = 8_700_000


@dataclass(frozen=True)
class RepeatedShards:
    """The first ``count`` training images of some shards, ``times`` over, each time with keys of its own."""

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


def find_source(root: Path, *, data: Path | None, real: Path | None, workers: int) -> Manifest:
    """The shards that the images are taken from.

    Args:
        root: folder of the benchmark's files.
        data: a manifest.
        real: a folder of images, ``<class>/<name>.jpg``.
        workers: processes that write.

    Raises:
        UserError: nothing there, or images that are not JPEG.
    """
    if data is not None:
        manifest = read_manifest(data)
        if manifest.encoding != "jpeg":
            raise UserError(
                f"{manifest.path} holds {manifest.encoding} images, and loaders are compared on JPEG: "
                "make shards with: galaxydist data shard --encoding jpeg"
            )
        return manifest
    if real is not None:
        if not real.is_dir():
            raise UserError(f"--real {real}: there is no such folder")
        survey = open_image_folder(real, name="real", fold=(0, 2))
        whole = dataclasses.replace(survey, splits={"train": np.arange(len(survey.labels))})
        return write_shards(whole, root / f"real-{whole.source_hash[:8]}", workers=workers)
    path = root / f"simulated-{SIMULATOR_VERSION}-{SIMULATED}.h5"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        simulate_survey(path, SIMULATED, seed=1, workers=workers, balanced=True)
    return write_shards(open_survey(path), path.with_suffix(""), workers=workers)


def repeat_source(source: Manifest, root: Path, *, num_images: int, least: int, shard_size: int, workers: int) -> Manifest:
    """Shards of about ``num_images`` training images of a source, each repeated as often as that takes, and of the ``least``
    number in any case; in a folder of their own for each source and number."""
    count = min(source.split("train").num_samples, num_images)
    times = max(round(num_images / count), -(-least // count))
    survey = RepeatedShards(source.dir, source.dataset, source.class_names, source.hash, count, times)
    out_dir = root / f"{source.dataset}-{survey.source_hash[:8]}" / "shards"
    return write_shards(survey, out_dir, shard_size=shard_size, workers=workers, overwrite=True)


def lengthen(manifest: Manifest, out_dir: Path, num_samples: int) -> Manifest:
    """Shards of the same images over and over, in hard links to the same tars: an epoch of about ``num_samples``.

    Args:
        manifest: whose train split holds the images.
        out_dir: replaced, unless it was made from these shards.
        num_samples: at least as many are listed.
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
# Batches ahead in a peer's queue for each worker (torch's DataLoader): none of them may be among those that are timed, which are
# this many at least.
AHEAD, LEAST_TIMED = 2, 12
# Batches that are timed, for each worker: more for the faster ones; at most what an epoch has.
OURS_TIMED, TRAIN_TIMED = 100, 8
TRAIN_SIZE = 224
RESUMES = 5
QUICK_EPOCH = 100_000
# Mean and deviation of normalised batches of different galaxies, differently augmented.
ALIKE = 0.15


@dataclass(frozen=True)
class Bench:
    """What is measured on: the images, the processes, the loaders that are there."""

    manifest: Manifest
    job: LoaderJob
    processes: Processes
    peers: tuple[Loader, ...]
    rounds: int = 1
    quick: bool = False

    @property
    def steps(self) -> int:
        return steps_per_epoch(self.manifest.split("train").num_samples, BATCH_SIZE)

    def job_of(self, loader: Loader, **changes: Any) -> LoaderJob:
        return replace(self.job, form_dir=str(self.manifest.dir.parent / loader.name), **changes)


def measure_loader(
    root: Path,
    environ: Mapping[str, str],
    *,
    environments: Path,
    data: Path | None = None,
    real: Path | None = None,
    workers: int | None = None,
    num_images: int | None = None,
    rounds: int = 3,
    tasks: Sequence[str] = TASKS,
    peers: Sequence[str] | None = None,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Print tables, and last a line of JSON for each task.

    Args:
        root: folder for the images in every loader's form; kept for the next time.
        environ: environment variables of the processes.
        environments: folder with the peers' virtual environments.
        data, real: a manifest, or a folder ``<class>/<name>.jpg``; neither: simulated galaxies.
        workers: threads or processes that decode, on as many cores; None: one for each core that this process may use.
        num_images: in an epoch.
        rounds: of all measurements.
        tasks: of ``TASKS``.
        peers: names; None: all that are installed.
        quick: few images, once: to see that it works, not to quote.

    Returns:
        What the lines of JSON hold.

    Raises:
        UserError: no such data; a loader that does not run, or gives other images than ours.
    """
    cores = sorted(os.sched_getaffinity(0))
    workers = workers or len(cores)
    if workers > len(cores):
        raise UserError(f"--workers {workers} is more than the {len(cores)} cores that this process may use")
    least = BATCH_SIZE * (LOOKED_AT + 2 * AHEAD * workers + LEAST_TIMED)
    num_images = num_images or (least if quick else IMAGES_PER_WORKER * workers)
    if num_images < least:
        raise UserError(f"--images {num_images} is too few to time with {workers} workers: give {least} or more")
    source = find_source(root, data=data, real=real, workers=workers)
    shard_size = max(1, num_images // (SHARDS_PER_WORKER * workers))
    manifest = repeat_source(source, root, num_images=num_images, least=least, shard_size=shard_size, workers=workers)
    bench = _open_bench(manifest, shard_size, Processes(environments, environ), cores[:workers], peers)
    bench = replace(bench, rounds=1 if quick else rounds, quick=quick)
    _prepare_and_check(bench)
    results = []
    for task in tasks:
        measure = {"resume": _measure_resume, "memory": _measure_memory}.get(task, _measure_speed)
        result = measure(bench, task)
        results.append({"task": task, **result, "data": bench.manifest.dataset, "workers": workers, "rounds": bench.rounds})
    for result in results:
        print(json.dumps(_rounded(result)))
    return results


def _open_bench(
    manifest: Manifest, shard_size: int, processes: Processes, cores: Sequence[int], peers: Sequence[str] | None
) -> Bench:
    wanted = [peer for peer in PEERS if peers is None or peer.name in peers]
    missing = [peer for peer in wanted if not processes.has(peer)]
    if missing:
        titles = ", ".join(peer.title for peer in missing)
        print(f"not measured, since not installed in {processes.environments.resolve()} (`make bench` does): {titles}")
    job = LoaderJob(
        action="measure",
        task="decode",
        shards_dir=str(manifest.dir),
        form_dir="",
        ours=False,
        cores=tuple(cores),
        workers=len(cores),
        warmup=0,
        batches=0,
        image_size=min(TRAIN_SIZE, manifest.image_size),
        mean=manifest.channel_mean,
        std=manifest.channel_std,
        shard_size=shard_size,
    )
    return Bench(manifest, job, processes, tuple(peer for peer in wanted if peer not in missing))


def _prepare_and_check(bench: Bench) -> None:
    num_images = bench.manifest.split("train").num_samples
    print(
        f"{num_images:,} {bench.manifest.dataset} galaxies an epoch, {bench.manifest.image_size} x {bench.manifest.image_size} "
        f"JPEG; batches of {BATCH_SIZE}, {bench.job.workers} workers on {bench.job.workers} cores, shuffled, queues at their "
        "defaults, memory not pinned",
        flush=True,
    )
    for peer in bench.peers:
        prepare(bench.processes, peer, bench.job_of(peer), f"{bench.manifest.hash} {bench.job.shard_size}")
    worst = 0
    for loader, ours in [(GALAXYDIST, False), *((peer, ours) for peer in bench.peers for ours in (False, True))]:
        worst = max(worst, check(bench.processes, loader, bench.job_of(loader, ours=ours), num_images))
    others = f", equal to ours within {worst} grey levels for all" if bench.peers else ""
    print(f"checked: every loader gives each galaxy once an epoch{others}", flush=True)


def _measure_speed(bench: Bench, task: str) -> dict[str, Any]:
    """Images per second of ours, the peers, and the limit."""
    jobs: dict[str, tuple[Loader, LoaderJob]] = {}
    steps, workers = bench.steps, bench.job.workers
    ahead = AHEAD * workers
    ours = bench.job_of(GALAXYDIST, task=task, warmup=ahead, batches=min(OURS_TIMED * workers, 4 * steps))
    if task == "decode":
        jobs["limit"] = GALAXYDIST, replace(ours, action="limit")
    jobs[OURS] = GALAXYDIST, ours
    timed = steps - LOOKED_AT - 2 * ahead
    if task == "train":
        timed = min(timed, TRAIN_TIMED * workers)
    for peer in bench.peers:
        jobs[peer.name] = peer, bench.job_of(peer, task=task, warmup=ahead, batches=timed)
    if task == "decode":
        for peer in bench.peers:
            jobs[_with_ours(peer)] = peer, replace(jobs[peer.name][1], ours=True)
    answers = _in_turn(bench, jobs)
    _compare_looks(jobs, answers)
    speeds = {name: [answer["images_per_s"] for answer in given] for name, given in answers.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peers = {peer.name: medians[peer.name] for peer in bench.peers}
    result = {
        "ours": medians[OURS],
        "peers": peers,
        "limit": medians.get("limit"),
        "ratio_best_peer": medians[OURS] / max(peers.values()) if peers else None,
        "ratio_limit": medians[OURS] / medians["limit"] if "limit" in medians else None,
    }
    if task == "decode":
        result["peers_with_our_decoder"] = {peer.name: medians[_with_ours(peer)] for peer in bench.peers}
    _print_speeds(bench, task, speeds)
    return result


def _with_ours(peer: Loader) -> str:
    return f"{peer.name}+decoder"


def _in_turn(bench: Bench, jobs: Mapping[str, tuple[Loader, LoaderJob]]) -> dict[str, list[dict[str, Any]]]:
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    with tqdm(total=bench.rounds * len(jobs), desc="measuring", unit="process", disable=None, leave=False) as bar:
        for _ in range(bench.rounds):
            for name, (loader, job) in jobs.items():
                answers[name].append(bench.processes.run(loader, job))
                bar.update()
    return answers


def _compare_looks(jobs: Mapping[str, tuple[Loader, LoaderJob]], answers: Mapping[str, list[dict[str, Any]]]) -> None:
    """Augmented batches differ by chance, but not in shape, type, mean and deviation."""
    ours = answers[OURS][0]
    if jobs[OURS][1].task != "train":
        return
    for name, (loader, _) in jobs.items():
        theirs = answers[name][0]
        alike = all(abs(theirs[key] - ours[key]) < ALIKE for key in ("mean", "std"))
        if (theirs["shape"], theirs["dtype"]) != (ours["shape"], ours["dtype"]) or not alike:
            raise UserError(f"{loader.title} makes batches of another kind than galaxydist: {theirs}, not {ours}")


def _print_speeds(bench: Bench, task: str, speeds: Mapping[str, Sequence[float]]) -> None:
    what = {
        "decode": f"decode: JPEG to uint8 batches of {BATCH_SIZE}",
        "train": f"train: to normalised float32 {bench.job.image_size} x {bench.job.image_size}, random zoom-crop and mirrors "
        "(galaxydist: also rotation by any angle)",
    }[task]
    print(f"\n{what}; img/s, median of {bench.rounds} (least ... greatest)")
    titles = {OURS: GALAXYDIST.title, "limit": "limit: the decoder over bytes in memory"}
    titles |= {peer.name: peer.title for peer in bench.peers}
    titles |= {_with_ours(peer): f"{peer.title}, with our decoder" for peer in bench.peers}
    ours = statistics.median(speeds[OURS])
    for name in [OURS, *(name for name in speeds if name != OURS)]:
        middle = statistics.median(speeds[name])
        ratio = "" if name == OURS else f"   ours / this: {ours / middle:.2f}"
        spread = f"({min(speeds[name]):,.0f} ... {max(speeds[name]):,.0f})"
        print(f"  {titles[name]:<44}{middle:>8,.0f}   {spread:<18}{ratio}")


def _measure_resume(bench: Bench, _task: str) -> dict[str, Any]:
    """Seconds from nothing open to the first batch, at the end of a long epoch and at its beginning."""
    num_samples, repeats = (QUICK_EPOCH, 1) if bench.quick else (LONG_EPOCH, RESUMES)
    long = lengthen(bench.manifest, bench.manifest.dir.parent / "long", num_samples)
    num_images = long.split("train").num_samples
    last = steps_per_epoch(num_images, BATCH_SIZE) - 1
    seconds: dict[str, list[float]] = {"beginning": [], "end": []}
    for _ in range(repeats):
        for place, step in (("beginning", 0), ("end", last)):
            job = replace(bench.job, action="resume", shards_dir=str(long.dir), step=step)
            seconds[place].append(bench.processes.run(GALAXYDIST, job)["seconds"])
    print(f"\nresume: seconds to the first batch in an epoch of {num_images:,}; median of {repeats} (least ... greatest)")
    for place, values in seconds.items():
        print(f"  at its {place:<12}{statistics.median(values):.3f}   ({min(values):.3f} ... {max(values):.3f})")
    end, beginning = (statistics.median(seconds[place]) for place in ("end", "beginning"))
    return {
        "ours": end,
        "peers": {},
        "limit": beginning,
        "ratio_best_peer": None,
        "ratio_limit": end / beginning,
        "num_images": num_images,
    }


def _measure_memory(bench: Bench, _task: str) -> dict[str, Any]:
    """Resident megabytes of all processes at the end of each of ten epochs."""
    job = replace(bench.job, action="memory", task="train", batches=bench.steps)
    series = [size / 1e6 for size in bench.processes.run(GALAXYDIST, job)["resident_bytes"]]
    growth = series[-1] - series[0]
    print(f"\nmemory: resident MB at the end of each of {len(series)} epochs of `train`: {_join(series)}")
    print(f"  growth after the first epoch: {growth:+.1f} MB")
    return {
        "ours": series[-1],
        "peers": {},
        "limit": None,
        "ratio_best_peer": None,
        "ratio_limit": None,
        "series_mb": series,
        "growth_mb": growth,
    }


def _rounded(value: Any) -> Any:
    """Numbers to the digits that a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _join(values: Iterable[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)
