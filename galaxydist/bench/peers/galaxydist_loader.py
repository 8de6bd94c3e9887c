"""Process that measures our own loader."""

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import simplejpeg
import torch

from galaxydist.bench.loader_worker import (
    SMALLEST_CROP,
    Answer,
    LoaderBatch,
    LoaderJob,
    answer,
    check,
    measure,
    open_job,
    stored_jpegs,
)
from galaxydist.cpus import decoding_threads
from galaxydist.loading.augment import Augment
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.loading.loader import DecodeOptions, TrainLoader
from galaxydist.recipe.schema import AugmentConfig
from galaxydist.shards.manifest import read_manifest

SEED = 1
# Views show SMALLEST_CROP to 1 of the image's width, as those of the peers; in addition they are rotated.
ZOOM = SMALLEST_CROP**-0.5
AUGMENT = AugmentConfig(rotate="any", flip=True, zoom=ZOOM, shift=0.05)
MEMORY_EPOCHS = 10


def build_loader(job: LoaderJob) -> Iterator[LoaderBatch]:
    """Yield training batches as in a run, without the galaxies' keys, since a run uses their numbers."""
    manifest, device = read_manifest(job.shards), torch.device(job.device)
    threads, pin = decoding_threads(job.workers, has_gpu=device.type != "cpu"), device.type != "cpu"
    decode, augment = DecodeOptions(threads=threads, pin=pin), None
    if job.task == "train":
        decode = DecodeOptions(job.image_size, crop=1 / ZOOM, max_zoom=ZOOM, threads=threads, pin=pin)
        augment = Augment(AUGMENT, SEED, job.mean, job.std, job.image_size, crop=1 / ZOOM, threads=job.workers)
    with (
        TrainLoader(
            manifest, seed=SEED, batch_size=job.batch_size, decode=decode, draw=augment.draw if augment else None
        ) as loader,
        DevicePrefetcher(loader, device) as batches,
    ):
        for batch in batches:
            images = augment(batch.images_BHWC, batch.draws) if augment else batch.images_BHWC
            yield images, batch.labels_B, []


def one_epoch(job: LoaderJob) -> Iterator[LoaderBatch]:
    """Yield every galaxy once, with its key, in batches of a size that leaves no remainder."""
    manifest = read_manifest(job.shards)
    keys = np.array([image.key for image in stored_jpegs(job.shards)])
    batch_size = max(size for size in range(1, job.batch_size + 1) if keys.size % size == 0)
    with TrainLoader(manifest, seed=SEED, batch_size=batch_size, decode=DecodeOptions(threads=job.workers)) as loader:
        for batch in itertools.islice(loader, loader.steps_per_epoch):
            yield batch.images_BHWC, batch.labels_B, keys[batch.samples_B.numpy()].tolist()


def measure_limit(job: LoaderJob) -> Answer:
    """Measure the decoder alone on bytes in memory, without files, order and batches."""
    data = [image.data for image in stored_jpegs(job.shards)]
    size = read_manifest(job.shards).image_size
    start, stop = job.warmup * job.batch_size, (job.warmup + job.batches) * job.batch_size
    numbers = itertools.count()
    times = [0.0, 0.0]

    def decode() -> None:
        pixels_BHWC = np.empty((job.batch_size, size, size, 3), np.uint8)
        for row, number in enumerate(numbers):
            if number in (start, stop):
                times[number == stop] = time.perf_counter()
            if number >= stop:
                return
            simplejpeg.decode_jpeg(data[number % len(data)], "RGB", buffer=pixels_BHWC[row % job.batch_size])

    threads = [threading.Thread(target=decode) for _ in range(job.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"images_per_s": (stop - start) / (times[1] - times[0])}


def measure_resume(job: LoaderJob) -> Answer:
    """Measure the seconds from opening the shards to the first batch at a step."""
    started = time.perf_counter()
    with TrainLoader(
        read_manifest(job.shards),
        seed=SEED,
        batch_size=job.batch_size,
        decode=DecodeOptions(threads=job.workers),
        start_step=job.step,
    ) as loader:
        next(loader)
        return {"seconds": time.perf_counter() - started}


def measure_memory(job: LoaderJob) -> Answer:
    """Measure the resident bytes of this process and its children at the end of each of ten epochs."""
    process = psutil.Process()
    series = []
    loader = build_loader(job)
    for _ in range(MEMORY_EPOCHS):
        for _ in itertools.islice(loader, job.batches):
            pass
        series.append(sum(member.memory_info().rss for member in [process, *process.children(recursive=True)]))
    return {"resident_bytes": series}


def main() -> None:
    """Do the job of the command line, and print the answer."""
    job = open_job()
    torch.set_num_threads(job.workers)
    if job.action == "check":
        answer(check(one_epoch(job), job))
    elif job.action == "measure":
        answer(measure(build_loader(job), job))
    else:
        answer({"limit": measure_limit, "resume": measure_resume, "memory": measure_memory}[job.action](job))


if __name__ == "__main__":
    main()
