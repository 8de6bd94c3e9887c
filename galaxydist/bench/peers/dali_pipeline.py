"""Process that measures NVIDIA DALI on our own tars and their indexes, on the CPU or with its mixed decoder on a GPU."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from galaxydist.bench.loader_worker import SMALLEST_CROP, Loader, LoaderBatch, LoaderJob, run
from galaxydist.errors import UserError

READER = "galaxies"
SHUFFLED = 1000
# Texts of a batch are filled up with spaces, since a tensor has one length.
SPACE = 32


@dataclass
class DALILoader:
    """Makes single epochs, as in DALI's documentation; the labels' texts stay on the CPU."""

    job: LoaderJob
    batches: Any

    def __iter__(self) -> Iterator[LoaderBatch]:
        for (batch,) in self.batches:
            labels = torch.tensor([int(text) for text in _texts(batch["label"])])
            keys = [json.loads(text)["id"] for text in _texts(batch["json"])] if "json" in batch else []
            yield batch["image"], labels, keys


def _texts(rows_BN: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows_BN.numpy()]


def _build_pipeline(job: LoaderJob, extensions: list[str]) -> Any:
    # mixed: Huffman codes on the CPU, and the rest on the GPU.
    decoder, device_id = ("cpu", None) if job.device == "cpu" else ("mixed", torch.cuda.current_device())

    @pipeline_def  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[Any, ...]:
        tars = sorted(job.shards.glob("train-*.tar"))
        files, *texts = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=extensions,
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=SHUFFLED,
            name=READER,
        )
        # As libjpeg-turbo: its chroma is upsampled with a triangle filter.
        images = fn.decoders.image(files, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
        if job.task == "train":
            images = fn.random_resized_crop(
                images, size=job.image_size, random_area=[SMALLEST_CROP**2, 1.0], random_aspect_ratio=[1.0, 1.0]
            )
            images = fn.flip(images, horizontal=0, vertical=fn.random.coin_flip())
            images = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * mean for mean in job.mean],
                std=[255 * std for std in job.std],
                mirror=fn.random.coin_flip(),
            )
        return images, *(fn.pad(text, fill_value=SPACE) for text in texts)

    return pipeline(batch_size=job.batch_size, num_threads=job.workers, device_id=device_id)


def prepare(job: LoaderJob) -> None:
    """Do nothing: DALI reads our shards."""


def build_loader(job: LoaderJob) -> Loader:
    """Return a loader of single epochs.

    Raises:
        UserError: the job is for a GPU, and there is none.
    """
    if job.device != "cpu" and not torch.cuda.is_available():
        raise UserError("DALI's mixed decoder needs a GPU, and torch finds none: measure the other loaders with --peers")
    names = {"jpg": "image", "cls": "label"} | ({"json": "json"} if job.action == "check" else {})
    batches = DALIGenericIterator(
        _build_pipeline(job, [*names]),
        [*names.values()],
        reader_name=READER,
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
        dynamic_shape=True,
    )
    return DALILoader(job, batches)


if __name__ == "__main__":
    run(prepare, build_loader)
