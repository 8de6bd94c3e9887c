"""Process that measures SPDL on our own tars: a pipeline of threads in one process, with a shuffle buffer of 1,000."""

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import spdl.io
import torch
from spdl.pipeline import PipelineBuilder
from torch import Tensor
from torchvision.io import decode_jpeg

from galaxydist.bench.loader_worker import Loader, LoaderBatch, LoaderJob, run
from galaxydist.bench.peers.transforms import our_decoder, train_transform

SHUFFLED = 1000
# Batches that wait at the end of the pipeline, as many for each thread as torch's DataLoader has.
AHEAD = 2

Sample = tuple[memoryview, int, str]


@dataclass
class SPDLLoader:
    """Makes single epochs, as in SPDL's documentation: threads decode, another one makes batches.

    SPDL decodes with FFmpeg's libraries, which its wheels do not contain, and whose pixels are not those of libjpeg; its own
    decoder here is torchvision's, which releases the GIL, as LitData's.
    """

    job: LoaderJob
    generator: random.Random = field(default_factory=random.Random)

    def __iter__(self) -> Iterator[LoaderBatch]:
        job = self.job
        decode = our_decoder if job.ours else _decode
        transform = train_transform(job) if job.task == "train" else None

        def load(sample: Sample) -> tuple[Tensor, int, str]:
            image, label, key = sample
            pixels = decode(image)
            return transform(pixels) if transform else pixels, label, key

        pipeline = (
            PipelineBuilder()
            .add_source(self._samples())
            .pipe(load, concurrency=job.workers, output_order="completion")
            .aggregate(job.batch_size)
            .pipe(_collate)
            .add_sink(AHEAD * job.workers)
            .build(num_threads=job.workers)
        )
        with pipeline.auto_stop():
            yield from pipeline

    def _samples(self) -> Iterator[Sample]:
        """Yield the stored images of an epoch, from shuffled shards through a shuffle buffer."""
        paths = sorted(self.job.shards.glob("train-*.tar"))
        self.generator.shuffle(paths)
        waiting: list[Sample] = []
        for path in paths:
            for sample in _members(path):
                if len(waiting) < SHUFFLED:
                    waiting.append(sample)
                    continue
                place = self.generator.randrange(SHUFFLED)
                chosen, waiting[place] = waiting[place], sample
                yield chosen
        self.generator.shuffle(waiting)
        yield from waiting


def _members(path: Path) -> Iterator[Sample]:
    """Yield the samples of a tar, whose members stand together."""
    found: dict[str, Any] = {}
    for name, content in spdl.io.iter_tarfile(path.read_bytes()):
        key, _, extension = name.partition(".")
        if found.setdefault("key", key) != key:
            yield found["jpg"], int(bytes(found["cls"])), found["key"]
            found = {"key": key}
        found[extension] = content
    yield found["jpg"], int(bytes(found["cls"])), found["key"]


def _decode(data: bytes | memoryview) -> Tensor:
    image: Tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8))
    return image


def _collate(samples: list[tuple[Tensor, int, str]]) -> LoaderBatch:
    images, labels, keys = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [*keys]


def prepare(job: LoaderJob) -> None:
    """Do nothing: SPDL reads our shards."""


def build_loader(job: LoaderJob) -> Loader:
    """Return a loader of single epochs."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # torch.frombuffer's; nothing writes to it
    torch.set_num_threads(1)  # the threads of the pipeline use the cores
    return SPDLLoader(job)


if __name__ == "__main__":
    run(prepare, build_loader)
