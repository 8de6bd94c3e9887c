"""What a folder of shards holds: a small manifest.json, and beside it columns that are mapped, not parsed.

<dir>/manifest.json                 format version, data set, splits, class counts, encoding, pixel statistics, hashes
<dir>/train-000000.tar, .idx ...    plain WebDataset tars, and DALI's index of each
<dir>/columns/train.shards.npy      a row a shard: samples, bytes, SHA-256 of the tar
<dir>/columns/train.labels.npy      a row a sample, in storage order: class number (-1: nobody has labelled it)
<dir>/columns/train.offsets.npy     where the sample's picture starts in its tar, in bytes
<dir>/columns/train.lengths.npy     bytes of the picture
<dir>/columns/train.catalogue.parquet   id, position and extras of each sample (``catalogue.py``)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.shards.remote.cache import CacheConfig

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
COLUMNS: dict[str, np.dtype[Any]] = {"labels": np.dtype("<i4"), "offsets": np.dtype("<i8"), "lengths": np.dtype("<i4")}
SHARD_ROW = np.dtype([("samples", "<i8"), ("bytes", "<i8"), ("sha256", "u1", (32,))])
EXTENSIONS = {"jpeg": "jpg", "png": "png", "raw": "npy"}


@dataclass(frozen=True)
class Split:
    """One split's totals: samples, shards, bytes of all tars, galaxies by class."""

    num_samples: int
    num_shards: int
    num_bytes: int
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class Remote:
    """Shards that lie in a store.

    Args:
        url: of their folder.
        location: the manifest's URL as it may be shown.
        cache: where they are kept on this machine.
    """

    url: str
    location: str
    cache: CacheConfig


@dataclass(frozen=True)
class Manifest:
    """A folder of shards.

    Args:
        dir: the folder; of shards in a store the one in the cache, which has the columns and those shards that were fetched.
        hash: SHA-256 (hex) of manifest.json, which itself holds the columns' hashes, and they the shards': it names every byte.
        encoding: ``jpeg``, ``png`` or ``raw``.
        image_size: width and height of every stored picture, in pixels.
        channel_mean, channel_std: of the training split's pixels, R G B, full scale being 1.
        columns: SHA-256 of each column file, by its name.
        settings: what the writer was asked for.
        remote: the store, where they lie in one.
        catalogues: SHA-256 of each catalogue file, by its name; shards made before there were any have none.
    """

    dir: Path
    hash: str
    dataset: str
    variant: str
    class_names: tuple[str, ...]
    encoding: str
    image_size: int
    splits: Mapping[str, Split]
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]
    source_hash: str
    columns: Mapping[str, str] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)
    remote: Remote | None = None
    catalogues: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        return self.dir / MANIFEST_NAME

    @property
    def location(self) -> str:
        """Its path or URL, for messages."""
        return str(self.path) if self.remote is None else self.remote.location

    @property
    def remedy(self) -> str:
        """What to do about damage, for messages."""
        return (
            "make the shards anew" if self.remote is None else f"remove {self.dir}, which is fetched anew if the check is passed"
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def extension(self) -> str:
        return EXTENSIONS[self.encoding]

    def split(self, name: str) -> Split:
        """The split of that name, or a UserError that lists the names."""
        if name not in self.splits:
            raise UserError(f"{self.location} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def labels(self, split: str) -> NDArray[np.int32]:
        """Class number of each stored sample, mapped from its file; -1 where nobody has labelled it."""
        return self._column(split, "labels")

    def offsets(self, split: str) -> NDArray[np.int64]:
        """Where each sample's picture starts in its tar, in bytes; mapped."""
        return self._column(split, "offsets")

    def lengths(self, split: str) -> NDArray[np.int32]:
        """Bytes of each sample's picture; mapped."""
        return self._column(split, "lengths")

    def shards(self, split: str) -> NDArray[np.void]:
        """The shard table: ``samples``, ``bytes``, ``sha256``; mapped."""
        return _map_column(self.dir / column_name(split, "shards"), SHARD_ROW, self.split(split).num_shards)

    def shard_path(self, split: str, number: int) -> Path:
        return self.dir / shard_name(split, number)

    def shard_location(self, split: str, number: int) -> str:
        """A shard's path or URL, for messages."""
        folder = str(self.dir) if self.remote is None else self.remote.location.removesuffix(f"/{MANIFEST_NAME}")
        return f"{folder}/{shard_name(split, number)}"

    def check_lengths(self) -> None:
        """See that every column is there and as long as the manifest says.

        Raises:
            UserError: naming it.
        """
        for split in self.splits:
            self.shards(split)
            for column in COLUMNS:
                self._column(split, column)

    def _column(self, split: str, column: str) -> NDArray[Any]:
        return _map_column(self.dir / column_name(split, column), COLUMNS[column], self.split(split).num_samples)


def shard_name(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:06d}.tar"


def column_name(split: str, column: str) -> str:
    """The file name of a column, relative to the manifest's folder."""
    return f"columns/{split}.{column}.npy"


def catalogue_name(split: str) -> str:
    """The file name of a split's catalogue, relative to the manifest's folder."""
    return f"columns/{split}.catalogue.parquet"


def read_manifest(path: Path) -> Manifest:
    """Open a folder of shards.

    Args:
        path: manifest.json or its folder.

    Raises:
        UserError: nothing there, not a manifest, made by a newer version, or a column that is missing or too short.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no shards at {path}; make them with: galaxydist data shard") from None
    manifest = parse_manifest(text, path.parent, str(path))
    manifest.check_lengths()
    return manifest


def parse_manifest(text: bytes, folder: Path, location: str) -> Manifest:
    """The manifest that a text is.

    Args:
        text: of manifest.json.
        folder: where the columns and the shards lie.
        location: of the text, for messages.

    Raises:
        UserError: not a manifest, or made by a newer version.
    """
    try:
        content = json.loads(text)
        version = content["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{location} is not a manifest of shards; make it anew with: galaxydist data shard") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{location} has format version {version}, this galaxydist reads version {FORMAT_VERSION}: "
            "update galaxydist, or make the shards anew with: galaxydist data shard"
        )
    try:
        return Manifest(
            dir=folder,
            hash=hashlib.sha256(text).hexdigest(),
            dataset=content["dataset"],
            variant=content["variant"],
            class_names=tuple(content["class_names"]),
            encoding=content["encoding"],
            image_size=content["image_size"],
            splits={
                name: Split(s["num_samples"], s["num_shards"], s["num_bytes"], tuple(s["class_counts"]))
                for name, s in content["splits"].items()
            },
            channel_mean=tuple(content["channel_mean"]),
            channel_std=tuple(content["channel_std"]),
            source_hash=content["source_hash"],
            columns=content["columns"],
            settings=content["settings"],
            catalogues=dict(content.get("catalogues", {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{location} is damaged ({error!r}); make it anew with: galaxydist data shard") from None


def manifest_json(manifest: Manifest) -> bytes:
    """The text of manifest.json."""
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dataset": manifest.dataset,
        "variant": manifest.variant,
        "class_names": manifest.class_names,
        "splits": {
            name: {
                "num_samples": split.num_samples,
                "num_shards": split.num_shards,
                "num_bytes": split.num_bytes,
                "class_counts": split.class_counts,
            }
            for name, split in manifest.splits.items()
        },
        "encoding": manifest.encoding,
        "image_size": manifest.image_size,
        "channel_mean": manifest.channel_mean,
        "channel_std": manifest.channel_std,
        "source_hash": manifest.source_hash,
        "settings": dict(manifest.settings),
        "columns": dict(manifest.columns),
    }
    if manifest.catalogues:
        content["catalogues"] = dict(manifest.catalogues)
    return (json.dumps(content, indent=1) + "\n").encode()


def _map_column(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    try:
        column = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make the shards anew with: galaxydist data shard") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); make the shards anew with: galaxydist data shard") from None
    if column.dtype != dtype or column.shape != (length,):
        raise UserError(
            f"{path} holds {column.shape} of {column.dtype}, the manifest says {length} of {dtype}; "
            "make the shards anew with: galaxydist data shard"
        )
    plain: NDArray[Any] = column.view(np.ndarray)
    return plain
