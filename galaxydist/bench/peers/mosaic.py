"""Process that measures Mosaic Streaming: MDS shards, StreamingDataset and torch's DataLoader."""

import io
from typing import Any

import streaming
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from galaxydist.bench.loader_worker import Loader, LoaderJob, run, stored_jpegs
from galaxydist.bench.peers.transforms import our_decoder, train_transform


class StreamedGalaxies(streaming.StreamingDataset):  # type: ignore[misc]  # streaming is not typed
    """StreamingDataset that decodes in ``__getitem__``, as in Mosaic's documentation."""

    def __init__(self, job: LoaderJob) -> None:
        super().__init__(local=str(job.form), shuffle=True, batch_size=job.batch_size)
        self._ours = job.ours
        self._transform = train_transform(job) if job.task == "train" else (None if job.ours else v2.PILToTensor())

    def __getitem__(self, at: Any) -> tuple[Any, int, str]:
        sample = super().__getitem__(at)
        image = our_decoder(sample["image"]) if self._ours else Image.open(io.BytesIO(sample["image"])).convert("RGB")
        return self._transform(image) if self._transform else image, sample["label"], sample["key"]


def prepare(job: LoaderJob) -> None:
    """Write shards with the bytes of the files."""
    columns = {"image": "bytes", "label": "int", "key": "str"}
    images = list(stored_jpegs(job.shards))
    mean_bytes = sum(len(image.data) for image in images) // len(images)
    with streaming.MDSWriter(out=str(job.form), columns=columns, size_limit=job.shard_size * mean_bytes) as writer:
        for image in images:
            writer.write({"image": image.data, "label": image.label, "key": image.key})


def build_loader(job: LoaderJob) -> Loader:
    """Return a loader of single epochs, shuffled, as in Mosaic's documentation."""
    return DataLoader(StreamedGalaxies(job), batch_size=job.batch_size, num_workers=job.workers, persistent_workers=True)


if __name__ == "__main__":
    run(prepare, build_loader)
