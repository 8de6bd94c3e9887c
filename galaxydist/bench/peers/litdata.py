"""Process that measures LitData: optimised chunks, StreamingDataset and StreamingDataLoader."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import litdata
import torch
from litdata.streaming.serializers import JPEGSerializer
from torch import Tensor

from galaxydist.bench.loader_worker import Loader, LoaderBatch, LoaderJob, StoredJPEG, run, stored_jpegs
from galaxydist.bench.peers.transforms import our_decoder, train_transform


class OurSerializer(JPEGSerializer):  # type: ignore[misc]  # litdata is not typed
    """LitData's JPEG format, read by our decoder."""

    def deserialize(self, data: bytes) -> Tensor:
        return our_decoder(bytes(data))


def prepare(job: LoaderJob) -> None:
    """Write chunks with the bytes of the files."""
    litdata.optimize(
        fn=_sample,
        inputs=list(stored_jpegs(job.shards)),
        output_dir=str(job.form),
        chunk_size=job.shard_size,
        num_workers=job.workers,
        verbose=False,
    )


def _sample(stored: StoredJPEG) -> dict[str, Any]:
    image = litdata.Jpeg(bytes=stored.data, max_quality=None)
    return {"image": image, "label": stored.label, "key": stored.key}


def build_loader(job: LoaderJob) -> Loader:
    """Return a loader of single epochs, shuffled, as in LitData's documentation; its own decoder is torchvision's."""
    options: dict[str, Any] = {"serializers": {"jpeg": OurSerializer()}} if job.ours else {}
    if job.task == "train":
        options["transform"] = partial(_transformed, transform=train_transform(job))
    dataset = litdata.StreamingDataset(str(job.form), shuffle=True, drop_last=False, **options)
    loader: Loader = litdata.StreamingDataLoader(
        dataset, batch_size=job.batch_size, num_workers=job.workers, persistent_workers=True, collate_fn=_collate
    )
    return loader


def _transformed(sample: Mapping[str, Any], transform: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {**sample, "image": transform(sample["image"])}


def _collate(samples: list[Mapping[str, Any]]) -> LoaderBatch:
    batch = torch.utils.data.default_collate(samples)
    return batch["image"], batch["label"], batch["key"]


if __name__ == "__main__":
    run(prepare, build_loader)
