"""Process that measures torchvision's ImageFolder (a file per image) with torch's DataLoader."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from galaxydist.bench.loader_worker import Loader, LoaderJob, run, stored_jpegs
from galaxydist.bench.peers.transforms import our_decoder, train_transform


class KeyedFolder(ImageFolder):  # type: ignore[misc]  # torchvision is not typed
    """ImageFolder that also returns the galaxy's key."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        image, label = super().__getitem__(index)
        return image, label, Path(self.samples[index][0]).stem


def prepare(job: LoaderJob) -> None:
    """Write the images as ``<class>/<key>.jpg``."""
    for image in stored_jpegs(job.shards):
        folder = job.form / f"{image.label:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{image.key}.jpg").write_bytes(image.data)


def build_loader(job: LoaderJob) -> Loader:
    """Return a loader of single epochs, shuffled, as in torch's documentation."""
    options: dict[str, Any] = {"loader": lambda path: our_decoder(Path(path).read_bytes())} if job.ours else {}
    if job.task == "train":
        options["transform"] = train_transform(job)
    elif not job.ours:
        options["transform"] = v2.PILToTensor()
    return DataLoader(
        KeyedFolder(job.form, **options),
        batch_size=job.batch_size,
        shuffle=True,
        num_workers=job.workers,
        persistent_workers=True,
    )


if __name__ == "__main__":
    run(prepare, build_loader)
