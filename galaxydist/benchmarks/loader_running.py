"""What the processes share that run a loader each, ours and the peers': the clock, the comparison with our pixels, the answer."""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from torch import Tensor

from galaxydist.benchmarks.loader_job import Job
from galaxydist.benchmarks.loader_pictures import stored_pictures

# Batches whose pixels are looked at before any is timed.
LOOKED_AT = 3
# Images (B x 3 x H x W or B x H x W x 3), labels, and the galaxies' keys.
LoaderBatch = tuple[Tensor, Tensor, list[str]]
Loader = Iterable[LoaderBatch]
Answer = dict[str, Any]


def run(prepare: Callable[[Job], None], build_loader: Callable[[Job], Loader]) -> None:
    """Do the job of the command line with a peer's functions, and answer."""
    job = open_job()
    if job.action == "prepare":
        prepare(job)
        answer({})
    else:
        found = (check if job.action == "check" else measure)(build_loader(job), job)
        # Workers stop with their loader; at the end of the process they would be killed, and leave shared memory behind.
        gc.collect()
        answer(found)


def open_job() -> Job:
    """The job of the command line, on its cores."""
    job = Job.from_json(sys.argv[1])
    os.sched_setaffinity(0, job.cores)
    return job


def answer(found: Answer) -> None:
    """Tell whoever gave the job: the last line of the output."""
    print(json.dumps(found), flush=True)


def measure(loader: Loader, job: Job) -> Answer:
    """Images per second over batches in the middle of an epoch, while the queues are as full at the end as at the start; and the
    mean and deviation of the pixels of some batches before."""
    batches = _endless(loader)
    looks = [(images.float().mean().item(), images.float().std().item()) for images, _, _ in islice(batches, LOOKED_AT)]
    for _ in islice(batches, job.warmup):
        pass
    num_images = 0
    started = time.perf_counter()
    for images, _, _ in islice(batches, job.batches):
        num_images += len(images)
    seconds = time.perf_counter() - started
    return {
        "images_per_s": num_images / seconds,
        "shape": sorted(images.shape),
        "dtype": str(images.dtype).removeprefix("torch."),
        "mean": float(np.mean([mean for mean, _ in looks])),
        "std": float(np.mean([std for _, std in looks])),
    }


def check(loader: Loader, job: Job) -> Answer:
    """Compare one epoch's pixels with what our decoder makes of the shards' bytes.

    Returns:
        ``num_images``; how many galaxies were ``missing``, how many came more than once (``repeated``); the greatest difference
        in grey levels (``worst``) and the galaxy that has it (``worst_key``).
    """
    expected = {picture.key: picture.data for picture in stored_pictures(job.shards)}
    times = dict.fromkeys(expected, 0)
    worst, worst_key = -1, ""
    for images, _, keys in loader:
        for image, key in zip(images.numpy(), keys, strict=True):
            times[key] += 1
            difference = _difference(image, simplejpeg.decode_jpeg(expected[key], "RGB"))
            if difference > worst:
                worst, worst_key = difference, key
    missing = sum(count == 0 for count in times.values())
    repeated = sum(count > 1 for count in times.values())
    return {"num_images": sum(times.values()), "missing": missing, "repeated": repeated, "worst": worst, "worst_key": worst_key}


def _difference(image: NDArray[np.uint8], expected_HWC: NDArray[np.uint8]) -> int:
    image_HWC = image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
    if image_HWC.shape != expected_HWC.shape or image_HWC.dtype != np.uint8:
        return 255
    return int(np.abs(image_HWC.astype(np.int16) - expected_HWC).max())


def _endless(loader: Loader) -> Iterator[LoaderBatch]:
    while True:
        yield from loader
