"""Manifest of a folder of shards: a small manifest.json, and columns that are memory-mapped.

<dir>/manifest.json                 format version, data set, splits, class counts, encoding, pixel statistics, hashes
<dir>/train-000000.tar, .idx ...    plain WebDataset tars, and DALI's index of each
<dir>/columns/train.shards.npy      one row per shard: samples, bytes, SHA-256 of the tar
<dir>/columns/train.labels.npy      one row per sample, in storage order: class number (-1: unlabelled)
<dir>/columns/train.offsets.npy     offset of the sample's image in its tar, in bytes
<dir>/columns/train.lengths.npy     size of the image, in bytes
<dir>/columns/train.catalogue.parquet   id, position and extras of each sample (``catalogue.py``)

The shards of ``tar_index.py`` are tars that others wrote, in a folder of their own (``tars``):

<dir>/columns/train.tars.npy        one row per shard: name of the tar in that folder, and its version

A split then holds some of a tar's samples, so that a tar may be a shard of several splits.
"""

import hashlib
import json
import os
import posixpath
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.object_store import Store, is_url
from galaxydist.shards.remote.cache import SHARD_ENDING, Cache, CacheConfig, RemoteFolder
from galaxydist.surveys.data_origin import DataOrigin, known_origin

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# Characters of the manifest's hash that name a data set's folder in a cache.
HASH_LENGTH = 16
COLUMNS: dict[str, np.dtype[Any]] = {"labels": np.dtype("<i4"), "offsets": np.dtype("<i8"), "lengths": np.dtype("<i4")}
SHARD_ROW = np.dtype([("samples", "<i8"), ("bytes", "<i8"), ("sha256", "u1", (32,))])
EXTENSIONS = {"jpeg": "jpg", "png": "png", "raw": "npy"}
# Encoding of images of any format and size, which are resampled while they are read.
ANY_FILE = "file"
TARS = "tars"


@dataclass(frozen=True)
class Split:
    """Totals of one split: samples, shards, bytes of all tars, galaxies per class."""

    num_samples: int
    num_shards: int
    num_bytes: int
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class Remote:
    """Location of shards in a remote store.

    Args:
        url: URL of their folder.
        location: URL of the manifest without secrets, for messages.
        cache: cache for the shards on this machine.
    """

    url: str
    location: str
    cache: CacheConfig


@dataclass(frozen=True)
class Manifest:
    """A folder of shards, as described by its manifest.json.

    Args:
        dir: the folder; for remote shards the one in the cache, with the columns and the shards fetched so far.
        hash: SHA-256 (hex) of manifest.json. It identifies every byte: manifest.json holds the hashes of the columns, and the
            columns those of the shards.
        encoding: ``jpeg``, ``png`` or ``raw``; ``file`` for image files of any format and size.
        image_size: width and height of every image, in pixels: as it is stored, or (``file``) as it is read.
        channel_mean, channel_std: of the training split's pixels, R G B, full scale 1.
        columns: SHA-256 of each column file, by its name.
        settings: settings of the writer.
        remote: the store of remote shards; None for a local folder.
        catalogues: SHA-256 of each catalogue file, by its name; empty for shards of earlier versions.
        source_sides: smallest and largest shorter side of the images that were resampled to ``image_size``, in pixels; None: none
            was resampled, or unknown (shards of earlier versions).
        origin: licence, citation and source of the data; None if nothing is known. Shards of earlier versions have what is known
            of a data set of their name.
        tars: folder of tars that others wrote: relative to the manifest's folder, absolute, or a URL. None: the manifest's own.
        cache: cache of this machine for remote tars of a local manifest.
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
    source_sides: tuple[int, int] | None = None
    origin: DataOrigin | None = None
    tars: str | None = None
    cache: CacheConfig | None = None

    @property
    def path(self) -> Path:
        return self.dir / MANIFEST_NAME

    @property
    def resampling(self) -> float | None:
        """Pixels of the images as they came per stored pixel; None if this differs between images."""
        low, high = self.source_sides or (self.image_size, self.image_size)
        return low / self.image_size if low == high else None

    @property
    def location(self) -> str:
        """Path or URL of manifest.json, for messages."""
        return str(self.path) if self.remote is None else self.remote.location

    @property
    def remedy(self) -> str:
        """Advice on damaged files, for messages."""
        if self.tars is not None:
            return "index the tars again (galaxydist data shard --in-place --overwrite)"
        return "make the shards anew" if self.remote is None else f"remove {self.dir}, which is fetched again if the check passes"

    @property
    def shard_folder(self) -> str:
        """Path or URL of the folder that the shards' names begin in."""
        own = str(self.dir) if self.remote is None else self.remote.url
        if self.tars is None or is_url(self.tars):
            return self.tars or own
        return os.path.normpath(os.path.join(own, self.tars)) if self.remote is None else _join_url(own, self.tars)  # noqa: PTH118

    @property
    def has_remote_shards(self) -> bool:
        return is_url(self.shard_folder)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def extension(self) -> str:
        return EXTENSIONS[self.encoding]

    def split(self, name: str) -> Split:
        """Return the split of that name, or raise a UserError that lists the names."""
        if name not in self.splits:
            raise UserError(f"{self.location} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def labels(self, split: str) -> NDArray[np.int32]:
        """Return the class number of each stored sample, -1 if unlabelled; memory-mapped."""
        return self._column(split, "labels")

    def offsets(self, split: str) -> NDArray[np.int64]:
        """Return the offset of each sample's image in its tar, in bytes; memory-mapped."""
        return self._column(split, "offsets")

    def lengths(self, split: str) -> NDArray[np.int32]:
        """Return the size of each sample's image, in bytes; memory-mapped."""
        return self._column(split, "lengths")

    def shards(self, split: str) -> NDArray[np.void]:
        """Return the shard table (``samples``, ``bytes``, ``sha256``); memory-mapped."""
        self.split(split)
        return self._shard_tables[split][0]

    def shard_name(self, split: str, number: int) -> str:
        """Return the name of a shard in ``shard_folder``; that of a foreign tar may have folders."""
        return shard_name(split, number) if self.tars is None else str(self._tars(split)["name"][number].decode())

    def shard_version(self, split: str, number: int) -> str:
        """Return the time of change or the ETag of a foreign tar when it was indexed; empty if unknown, and for other shards."""
        return "" if self.tars is None else str(self._tars(split)["version"][number].decode())

    def shard_sha256(self, split: str, number: int) -> bytes | None:
        """Return the SHA-256 of a shard; None for a foreign tar that was indexed without reading all of it."""
        found: bytes = self.shards(split)["sha256"][number].tobytes()
        return found if any(found) else None

    def shard_path(self, split: str, number: int) -> Path:
        """Return a shard's path on this machine, in the cache for a remote shard."""
        name = self.shard_name(split, number)
        return self._cache_dir / cached_name(name) if self.has_remote_shards else Path(self.shard_folder) / name

    def shard_location(self, split: str, number: int) -> str:
        """Return a shard's path or URL, for messages."""
        if self.remote is not None and self.tars is None:
            return f"{self.remote.location.removesuffix(f'/{MANIFEST_NAME}')}/{self.shard_name(split, number)}"
        return f"{self.shard_folder}/{self.shard_name(split, number)}"

    def remote_folder(self, stop: threading.Event) -> RemoteFolder:
        """Return the access to the files of a remote manifest; ``stop`` ends fetching when it is set."""
        assert self.remote is not None
        return self._remote_folder(self.remote.url, self.remote.cache, stop)

    def remote_shards(self, stop: threading.Event) -> RemoteFolder:
        """Return the access to remote shards; ``stop`` ends fetching when it is set."""
        return self._remote_folder(self.shard_folder, self.cache_config, stop)

    @property
    def cache_config(self) -> CacheConfig:
        """Settings of the cache for remote files.

        Raises:
            UserError: the manifest was opened without a cache.
        """
        cache = self.cache or (self.remote.cache if self.remote is not None else None)
        if cache is None:
            raise UserError(f"{self.location} names tars at {self.shard_folder}, which this command does not fetch")
        return cache

    @property
    def _cache_dir(self) -> Path:
        return self.cache_config.folder / self.hash[:HASH_LENGTH]

    def _remote_folder(self, url: str, config: CacheConfig, stop: threading.Event) -> RemoteFolder:
        return RemoteFolder(Store(url), Cache(config.folder, config.max_bytes), self.hash[:HASH_LENGTH], stop)

    def _tars(self, split: str) -> NDArray[np.void]:
        self.split(split)
        return self._shard_tables[split][1]

    @cached_property
    def _shard_tables(self) -> dict[str, tuple[NDArray[np.void], NDArray[np.void]]]:
        """Shard table and tars of each split, opened together: np.load parses headers with ``ast``.

        In several threads at once that fails on Python 3.11, and the threads of a loader look shards up.
        """
        tables = {}
        for name, split in self.splits.items():
            table = _map_column(self.dir / column_name(name, "shards"), SHARD_ROW, split.num_shards)
            tars = None if self.tars is None else _map_column(self.dir / column_name(name, TARS), None, split.num_shards)
            tables[name] = table, table if tars is None else tars
        return tables

    def check_lengths(self) -> None:
        """Check that every column exists and is as long as the manifest says.

        Raises:
            UserError: names the column.
        """
        for split in self.splits:
            self.shards(split)
            for column in COLUMNS:
                self._column(split, column)

    def _column(self, split: str, column: str) -> NDArray[Any]:
        return _map_column(self.dir / column_name(split, column), COLUMNS[column], self.split(split).num_samples)


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:06d}.tar"


def cached_name(name: str) -> str:
    """Return the file name of a shard in the cache, which has no subfolders and knows shards by their ending."""
    plain = quote(name, safe="")
    return plain if plain.endswith(SHARD_ENDING) else plain + SHARD_ENDING


def _join_url(url: str, relative: str) -> str:
    """Return the URL of a folder relative to another one; a query is kept."""
    folder, question_mark, query = url.partition("?")
    protocol, _, path = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(path, relative))}{question_mark}{query}"


def index_name(shard: str) -> str:
    """Return the file name of a shard's index."""
    return shard.removesuffix(".tar") + ".idx"


def column_name(split: str, column: str) -> str:
    """Return the file name of a column, relative to the manifest's folder."""
    return f"columns/{split}.{column}.npy"


def catalogue_name(split: str) -> str:
    """Return the file name of a split's catalogue, relative to the manifest's folder."""
    return f"columns/{split}.catalogue.parquet"


def read_manifest(path: Path) -> Manifest:
    """Open a local folder of shards.

    Args:
        path: manifest.json or its folder.

    Raises:
        UserError: nothing there, not a manifest, another format version, or a column that is missing or of another length.
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
    """Parse manifest.json.

    Args:
        text: contents of manifest.json.
        folder: folder of the columns and the shards.
        location: path or URL of the text, for messages.

    Raises:
        UserError: not a manifest, damaged, or of another format version.
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
            source_sides=tuple(content["source_sides"]) if "source_sides" in content else None,
            origin=DataOrigin.from_dict(content["origin"]) if "origin" in content else known_origin(content["dataset"]),
            tars=content.get(TARS),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{location} is damaged ({error!r}); make it anew with: galaxydist data shard") from None


def manifest_json(manifest: Manifest) -> bytes:
    """Return the contents of manifest.json."""
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
    if manifest.source_sides is not None:
        content["source_sides"] = manifest.source_sides
    if manifest.origin is not None:
        content["origin"] = manifest.origin.to_dict()
    if manifest.tars is not None:
        content[TARS] = manifest.tars
    return (json.dumps(content, indent=1) + "\n").encode()


def _map_column(path: Path, dtype: np.dtype[Any] | None, length: int) -> NDArray[Any]:
    try:
        column = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make the shards anew with: galaxydist data shard") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); make the shards anew with: galaxydist data shard") from None
    if (dtype is not None and column.dtype != dtype) or column.shape != (length,):
        raise UserError(
            f"{path} holds {column.shape} of {column.dtype}, the manifest says {length} of {dtype}; "
            "make the shards anew with: galaxydist data shard"
        )
    return np.asarray(column)
