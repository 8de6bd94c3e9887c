"""Job (JSON on the command line) and answer (last line of output) of a process that measures a loader."""

import dataclasses
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Self

from galaxydist.shards.tar import parse_index

if TYPE_CHECKING:  # the command that starts these processes needs neither
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TASKS = ("decode", "train", "resume", "memory")
BATCH_SIZE = 64
# Width of the random crops as a fraction of the image's: from this to the whole of it.
SMALLEST_CROP = 0.8

Action = Literal["prepare", "check", "measure", "limit", "resume", "memory"]
Task = Literal["decode", "train"]


@dataclass(frozen=True)
class LoaderJob:
    """Work of one process.

    Args:
        action: ``prepare`` the loader's own form of the images; ``check`` that one epoch has every image once, with our
            pixels; ``measure``; and for our loader alone ``limit``, ``resume``, ``memory``.
        task: ``decode`` to uint8 or ``train``: augmented and normalised.
        shards_dir: the images, as our shards.
        form_dir: the images in the loader's own form.
        ours: decode with our decoder in the loader's decode hook, instead of its own.
        cores: usable by the process.
        workers: number of processes or threads that decode.
        warmup: number of batches before the clock starts, in addition to the probed ones.
        batches: number of timed batches.
        image_size: width of the views that ``train`` makes, in pixels.
        mean, std: of all pixels, R G B, with full scale 1.
        shard_size: images in a shard or chunk of the loader's own form.
        step: start of ``resume``.
        device: where the batches end, if the loader has the choice: ``cpu`` or ``cuda``.
    """

    action: Action
    task: Task
    shards_dir: str
    form_dir: str
    ours: bool
    cores: tuple[int, ...]
    workers: int
    warmup: int
    batches: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shard_size: int
    step: int = 0
    batch_size: int = BATCH_SIZE
    device: str = "cpu"

    @property
    def shards(self) -> Path:
        return Path(self.shards_dir)

    @property
    def form(self) -> Path:
        return Path(self.form_dir)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        found: dict[str, Any] = json.loads(text)
        for key in ("cores", "mean", "std"):
            found[key] = tuple(found[key])
        return cls(**found)


@dataclass(frozen=True, slots=True)
class StoredJPEG:
    """One image: key of its galaxy, class number, and bytes of its file."""

    key: str
    label: int
    data: bytes


def stored_jpegs(shards_dir: Path, split: str = "train") -> Iterator[StoredJPEG]:
    """Yield the JPEGs of a split in the order of the shards, read through their indexes."""
    for path in sorted(shards_dir.glob(f"{split}-*.tar")):
        tar = path.read_bytes()
        for members in parse_index(path.with_suffix(".idx").read_text("ascii")):
            parts = {member.extension: tar[member.offset : member.offset + member.size] for member in members}
            yield StoredJPEG(members[0].name.partition(".")[0], int(parts.get("cls", b"-1")), parts["jpg"])


# Functions of the loaders' processes.

# Batches whose pixels are averaged before any is timed.
NUM_PROBED = 3
# Images (B x 3 x H x W or B x H x W x 3), labels, and the galaxies' keys.
LoaderBatch = tuple["Tensor", "Tensor", list[str]]
Loader = Iterable[LoaderBatch]
Answer = dict[str, Any]


def run(prepare: Callable[[LoaderJob], None], build_loader: Callable[[LoaderJob], Loader]) -> None:
    """Do the job of the command line with a peer's functions, and print the answer."""
    job = open_job()
    if job.action == "prepare":
        prepare(job)
        answer({})
    else:
        found = (check if job.action == "check" else measure)(build_loader(job), job)
        # Workers stop with their loader. Killed at the end of the process, they would leave shared memory behind.
        gc.collect()
        answer(found)


def open_job() -> LoaderJob:
    """Return the job of the command line, and bind the process to its cores."""
    job = LoaderJob.from_json(sys.argv[1])
    os.sched_setaffinity(0, job.cores)
    return job


def answer(found: Answer) -> None:
    """Print the answer as the last line of the output, which the parent reads."""
    sys.stdout.write(f"{json.dumps(found)}\n")
    sys.stdout.flush()


def measure(loader: Loader, job: LoaderJob) -> Answer:
    """Measure the images per second over batches in the middle of an epoch, and mean and deviation of the pixels before.

    The queues are as full at the end as at the start.
    """
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    probed = [(images.float().mean().item(), images.float().std().item()) for images, _, _ in islice(batches, NUM_PROBED)]
    for _ in islice(batches, job.warmup):
        pass
    _finish_on_device()
    started = time.perf_counter()
    num_images = 0
    for images, _, _ in islice(batches, job.batches):
        num_images += len(images)
    _finish_on_device()
    seconds = time.perf_counter() - started
    means, deviations = zip(*probed, strict=True)
    return {
        "images_per_s": num_images / seconds,
        "shape": sorted(images.shape),
        "dtype": str(images.dtype).removeprefix("torch."),
        "mean": fmean(means),
        "std": fmean(deviations),
    }


def _finish_on_device() -> None:
    """Wait for a GPU, if one is in use: its batches are handed over before they are complete."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def check(loader: Loader, job: LoaderJob) -> Answer:
    """Compare the pixels of one epoch with those of our decoder.

    Returns:
        ``num_images``; the numbers of galaxies that were ``missing`` or came more than once (``repeated``); the greatest
        difference in grey levels (``worst``) and its galaxy (``worst_key``).
    """
    import simplejpeg

    expected = {stored.key: stored.data for stored in stored_jpegs(job.shards)}
    times = dict.fromkeys(expected, 0)
    worst, worst_key = -1, ""
    for images, _, keys in loader:
        for image, key in zip(images.cpu().numpy(), keys, strict=True):
            times[key] += 1
            difference = _difference(image, simplejpeg.decode_jpeg(expected[key], "RGB"))
            if difference > worst:
                worst, worst_key = difference, key
    missing = sum(count == 0 for count in times.values())
    repeated = sum(count > 1 for count in times.values())
    return {"num_images": sum(times.values()), "missing": missing, "repeated": repeated, "worst": worst, "worst_key": worst_key}


def _difference(image: "NDArray[np.uint8]", expected_HWC: "NDArray[np.uint8]") -> int:
    import numpy as np

    image_HWC = image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
    if image_HWC.shape != expected_HWC.shape or image_HWC.dtype != np.uint8:
        return 255
    return int(np.abs(image_HWC.astype(np.int16) - expected_HWC).max())
