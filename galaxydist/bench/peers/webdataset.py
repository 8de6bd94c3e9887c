"""Process that measures WebDataset on our own tars, with a shuffle buffer of 1,000."""

import webdataset
from torch import Tensor
from torchvision.transforms import v2

from galaxydist.bench.loader_worker import Loader, LoaderJob, run
from galaxydist.bench.peers.transforms import our_decoder, train_transform


def prepare(job: LoaderJob) -> None:
    """Do nothing: WebDataset reads our shards."""


def build_loader(job: LoaderJob) -> Loader:
    """Return a loader of single epochs, as in WebDataset's documentation: batches are made in the workers."""
    transform = train_transform(job) if job.task == "train" else (_same if job.ours else v2.PILToTensor())
    dataset = (
        webdataset.WebDataset([str(path) for path in sorted(job.shards.glob("train-*.tar"))], shardshuffle=100)
        .shuffle(1000)
        .decode(webdataset.handle_extension("jpg", our_decoder) if job.ours else "pil")
        .to_tuple("jpg", "cls", "__key__")
        .map_tuple(transform)
        .batched(job.batch_size)
    )
    loader: Loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=job.workers, persistent_workers=True)
    return loader


def _same(image: Tensor) -> Tensor:
    return image


if __name__ == "__main__":
    run(prepare, build_loader)
