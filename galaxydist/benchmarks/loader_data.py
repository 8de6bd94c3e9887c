"""The pictures that loaders are compared on: as our shards, repeated under distinct keys, and as one long epoch."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.benchmarks.loader_pictures import StoredPicture, stored_pictures
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.shards.manifest import COLUMNS, SHARD_ROW, Manifest, Split, column_name, manifest_json, read_manifest, shard_name
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.surveys.simulate.survey import SIMULATOR_VERSION, simulate_survey
from galaxydist.surveys.survey_sources import open_survey

SIMULATED = 1000
# As many galaxies as GZ DESI has (Walmsley et al. 2023), for the epoch that is resumed.
LONG_EPOCH = 8_700_000


@dataclass(frozen=True)
class RepeatedShards:
    """The first ``count`` training pictures of some shards, ``times`` over, each time with keys of its own."""

    shards_dir: Path
    name: str
    class_names: tuple[str, ...]
    shards_hash: str
    count: int
    times: int
    variant: str = "original"
    slab_length: int = 256

    @cached_property
    def _pictures(self) -> list[StoredPicture]:
        return list(islice(stored_pictures(self.shards_dir), self.count))

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.tile(np.array([picture.label for picture in self._pictures], np.int64), self.times)

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {"train": np.arange(self.count * self.times)}

    @property
    def source_hash(self) -> str:
        return hashlib.sha256(f"{self.shards_hash} {self.count} {self.times}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        for row in range(start, stop):
            copy, number = divmod(row, self.count)
            picture = self._pictures[number]
            yield Galaxy(f"{picture.key}-{copy}", EncodedImage(picture.data, "jpg"), picture.label)


def find_source(root: Path, *, data: Path | None, real: Path | None, workers: int) -> Manifest:
    """The shards that the pictures are taken from.

    Args:
        root: folder of the benchmark's files.
        data: a manifest.
        real: a folder of pictures, ``<class>/<name>.jpg``.
        workers: processes that write.

    Raises:
        UserError: nothing there, or pictures that are not JPEG.
    """
    if data is not None:
        manifest = read_manifest(data)
        if manifest.encoding != "jpeg":
            raise UserError(
                f"{manifest.path} holds {manifest.encoding} pictures, and loaders are compared on JPEG: "
                "make shards with: galaxydist data shard --encoding jpeg"
            )
        return manifest
    if real is not None:
        if not real.is_dir():
            raise UserError(f"--real {real}: there is no such folder")
        survey = open_image_folder(real, name="real", fold=(0, 2))
        whole = dataclasses.replace(survey, splits={"train": np.arange(len(survey.labels))})
        return write_shards(whole, root / f"real-{whole.source_hash[:8]}", workers=workers)
    path = root / f"simulated-{SIMULATOR_VERSION}-{SIMULATED}.h5"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        simulate_survey(path, SIMULATED, seed=1, workers=workers, balanced=True)
    return write_shards(open_survey(path), path.with_suffix(""), workers=workers)


def repeat_source(source: Manifest, root: Path, *, num_images: int, least: int, shard_size: int, workers: int) -> Manifest:
    """Shards of about ``num_images`` training pictures of a source, each repeated as often as that takes, and of the ``least``
    number in any case; in a folder of their own for each source and number."""
    count = min(source.split("train").num_samples, num_images)
    times = max(round(num_images / count), -(-least // count))
    survey = RepeatedShards(source.dir, source.dataset, source.class_names, source.hash, count, times)
    out_dir = root / f"{source.dataset}-{survey.source_hash[:8]}" / "shards"
    return write_shards(survey, out_dir, shard_size=shard_size, workers=workers, overwrite=True)


def lengthen(manifest: Manifest, out_dir: Path, num_samples: int) -> Manifest:
    """Shards of the same pictures over and over, in hard links to the same tars: an epoch of about ``num_samples``.

    Args:
        manifest: whose train split holds the pictures.
        out_dir: replaced, unless it was made from these shards.
        num_samples: at least as many are listed.
    """
    split = manifest.split("train")
    inside = 32
    links = -(-num_samples // (split.num_samples * inside))
    num_shards, total = split.num_shards * links, split.num_samples * inside * links
    counts = tuple(count * inside * links for count in split.class_counts)
    totals = {"train": Split(total, num_shards, split.num_bytes * links, counts)}
    long = dataclasses.replace(manifest, dir=out_dir, splits=totals, source_hash=manifest.hash, catalogues={})
    text = manifest_json(long)
    if long.path.exists() and long.path.read_bytes() == text:
        return read_manifest(out_dir)
    shutil.rmtree(out_dir, ignore_errors=True)
    (out_dir / "columns").mkdir(parents=True)
    table = np.tile(np.asarray(manifest.shards("train"), SHARD_ROW), links)
    parts = np.split(np.arange(split.num_samples), np.cumsum(table["samples"][: split.num_shards])[:-1])
    rows = np.tile(np.concatenate([np.tile(part, inside) for part in parts]), links)
    table["samples"] *= inside
    np.save(out_dir / column_name("train", "shards"), table)
    for column in COLUMNS:
        np.save(out_dir / column_name("train", column), getattr(manifest, column)("train")[rows])
    for number in range(num_shards):
        os.link(manifest.shard_path("train", number % split.num_shards), out_dir / shard_name("train", number))
    long.path.write_bytes(text)
    return read_manifest(out_dir)
