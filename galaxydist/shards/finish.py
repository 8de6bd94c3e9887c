"""The end of writing: the columns, the catalogues and the manifest of shards that are all there."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import whole_file
from galaxydist.galaxy import Survey
from galaxydist.shards.catalogue import unite, write_catalogue
from galaxydist.shards.manifest import COLUMNS, SHARD_ROW, Manifest, Split, catalogue_name, column_name, manifest_json
from galaxydist.shards.pack import Shard, read_packed, read_packed_catalogue
from galaxydist.shards.parts import PixelSums
from galaxydist.shards.plan import Layout, Settings


def finish_manifest(
    survey: Survey, work_dir: Path, settings: Settings, layout: Layout, *, image_size: int, sums: PixelSums
) -> None:
    """Columns, then the manifest, into the folder that will be renamed."""
    splits: dict[str, Split] = {}
    columns: dict[str, str] = {}
    catalogues: dict[str, str] = {}
    for split, shards in layout.items():
        table = np.zeros(len(shards), SHARD_ROW)
        num_samples = shards[-1].stop - shards[0].start if shards else 0
        rows = {name: np.zeros(num_samples, dtype) for name, dtype in COLUMNS.items()}
        for number, shard in enumerate(shards):
            table[number : number + 1], packed = read_packed(work_dir / "packed", shard)
            here = slice(shard.start - shards[0].start, shard.stop - shards[0].start)
            rows["labels"][here], rows["offsets"][here] = packed["label"], packed["offset"]
            rows["lengths"][here] = packed["length"]
        for name, column in {"shards": table, **rows}.items():
            columns[column_name(split, name)] = _write_column(work_dir / column_name(split, name), column)
        catalogues[catalogue_name(split)] = _write_catalogue(work_dir, split, shards)
        labelled = rows["labels"][rows["labels"] >= 0]
        counts = np.bincount(labelled, minlength=len(survey.class_names))
        splits[split] = Split(num_samples, len(shards), int(table["bytes"].sum()), tuple(counts.tolist()))
    mean, std = sums.mean_std()
    manifest = Manifest(
        dir=work_dir,
        hash="",
        dataset=survey.name,
        variant=survey.variant,
        class_names=tuple(survey.class_names),
        encoding=settings.encoding,
        image_size=image_size,
        splits=splits,
        channel_mean=mean,
        channel_std=std,
        source_hash=survey.source_hash,
        columns=columns,
        settings=asdict(settings),
        catalogues=catalogues,
    )
    with whole_file(manifest.path, manifest.path.with_suffix(".tmp")) as file:
        file.write(manifest_json(manifest))


def _write_catalogue(work_dir: Path, split: str, shards: Sequence[Shard]) -> str:
    """In two passes, so that one shard is held at a time: what the columns are is known only at the end of the first."""
    schema = unite(read_packed_catalogue(work_dir / "packed", shard).schema for shard in shards)
    tables = (read_packed_catalogue(work_dir / "packed", shard) for shard in shards)
    return write_catalogue(work_dir / catalogue_name(split), schema, tables)


def _write_column(path: Path, column: NDArray[Any]) -> str:
    with whole_file(path, path.with_suffix(".tmp")) as file:
        np.save(file, column)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
