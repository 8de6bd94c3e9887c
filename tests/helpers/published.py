"""A published folder for tests: a small network, trained on the blobs for a few seconds, as ``galaxydist publish`` writes it."""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from galaxydist.serving.publish import PublishOptions, publish
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, run_here


@dataclass(frozen=True)
class PublishedRun:
    """A finished run, its shards, and its published folder."""

    run_dir: Path
    manifest: Path
    folder: Path


def train_blobs(folder: Path, survey: BlobSurvey | None = None, **changes: object) -> tuple[Path, Path]:
    """Train on the blobs in a new folder, and return the run folder and the manifest of the shards."""
    manifest = write_shards(survey or BlobSurvey(), folder / "shards", encoding="png", shard_size=16, workers=1).path
    settings = quick_settings(manifest, folder / "run", **{"train__epochs": 4, "optim__lr": 0.02, **changes})
    assert run_here(settings) == 0
    return folder / "run", manifest


def publish_blobs(folder: Path, options: PublishOptions | None = None, **changes: object) -> PublishedRun:
    """Train on the blobs and publish the run, in a new folder."""
    run_dir, manifest = train_blobs(folder, **changes)
    publish(run_dir, folder / "published", {}, options)
    return PublishedRun(run_dir, manifest, folder / "published")


def galaxy_files(run: PublishedRun, target: Path) -> list[Path]:
    """The image files of the run's test galaxies."""
    files: list[Path] = []
    for shard in sorted(run.manifest.parent.glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith((".png", ".jpg"))]
            tar.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        files += [target / name for name in names]
    return files
