"""A trained run whose images have all that predictions look at: JPEG files that are decoded smaller, and pixel scales."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from galaxydist.galaxy import Galaxy
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, run_here

SIZE = 128


@dataclass(frozen=True)
class ScaledBlobs(BlobSurvey):
    """Blobs of 128 pixels, decoded by a factor of 2 for a model of 40, with a pixel scale and names of their own."""

    size: int = SIZE

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row, galaxy in enumerate(super().read(start, stop), start):
            yield replace(galaxy, extras={"row": row, "pxscale": 0.262, "source_id": f"Blob {row}"})


@dataclass(frozen=True)
class BlobRun:
    """A finished run and the shards that it was trained on."""

    run_dir: Path
    manifest: Path


@pytest.fixture(scope="session")
def blob_run(tmp_path_factory: pytest.TempPathFactory) -> BlobRun:
    folder = tmp_path_factory.mktemp("predict")
    manifest = write_shards(ScaledBlobs(), folder / "shards", shard_size=16, workers=1).path
    settings = quick_settings(manifest, folder / "run", data__image_size=40, train__ema=0.5, train__epochs=5)
    assert run_here(settings) == 0
    return BlobRun(folder / "run", manifest)
