"""Features of all galaxies of a data set: a Parquet file with one row per galaxy, in the order of the stored samples.

Columns: ``id``, ``split``, ``label`` (-1: unlabelled) and ``features`` (D float32). JSON in the file's metadata, under the key
``galaxydist``, describes the encoder, the preprocessing and the data, so that a file is only used for what it was made from.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import explain_full_disk, remove_stale, whole_file
from galaxydist.errors import UserError
from galaxydist.evaluation.predictions import METADATA_KEY
from galaxydist.paths import folder_name
from galaxydist.shards.manifest import Manifest
from galaxydist.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa

    from galaxydist.devices import Precision


KIND = "features"
FORMAT_VERSION = 1
# Rows per row group: some MB.
ROW_GROUP = 2048


@dataclass(frozen=True)
class EncoderInfo:
    """Encoder and preprocessing of a file of features.

    Args:
        model: name of the model, or ``pixels`` for principal components.
        weights: origin of the weights, for people.
        weights_sha256: of the encoder's parameters and buffers.
        num_features: D.
        image_size, crop: width of the encoder's input in pixels; central fraction of the stored width that it sees.
        channel_mean, channel_std: normalisation of the input, R G B, full scale 1.
        tta: ``d4`` if features are the mean over the eight flips and quarter turns, else ``none``.
        licence: of the weights, if known.
        precision: of the forward pass; float32 (``no``) for files that do not say.
    """

    model: str
    weights: str
    weights_sha256: str
    num_features: int
    image_size: int
    crop: float
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]
    tta: Literal["none", "d4"]
    licence: str | None = None
    precision: "Precision" = "no"

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        values = dict(plain)
        return cls(**values | {name: tuple(values[name]) for name in ("channel_mean", "channel_std")})

    @property
    def title(self) -> str:
        """Model and origin of its weights."""
        return f"{self.model} ({self.weights})"

    @property
    def identity(self) -> dict[str, Any]:
        """Values that the numbers depend on; float32 is left out, so that files of earlier versions keep their names."""
        left_out = ("weights", "licence", *(("precision",) if self.precision == "no" else ()))
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class FeaturesInfo:
    """Metadata of a file of features.

    Args:
        encoder: the encoder.
        dataset, variant, manifest_hash, class_names: of the shards.
        origin: licence, citation and revision of the data, as far as the manifest has them.
    """

    encoder: EncoderInfo
    dataset: str
    variant: str
    manifest_hash: str
    class_names: tuple[str, ...]
    origin: Mapping[str, Any]

    @classmethod
    def of(cls, encoder: EncoderInfo, manifest: Manifest) -> Self:
        """Return the metadata of an encoder's features of a data set."""
        origin = {} if manifest.origin is None else manifest.origin.to_dict()
        return cls(encoder, manifest.dataset, manifest.variant, manifest.hash, manifest.class_names, origin)

    def differences(self, other: "FeaturesInfo") -> list[str]:
        """Return how another file's galaxies or numbers differ, in words; empty if they are the same."""
        mine, theirs = ({**info.encoder.identity, "manifest": info.manifest_hash[:12]} for info in (self, other))
        names = [*mine, *(name for name in theirs if name not in mine)]
        pairs = [(name, theirs.get(name, "no"), mine.get(name, "no")) for name in names]
        return [f"{name} is {_short(other)}, not {_short(own)}" for name, other, own in pairs if own != other]


def _short(value: object) -> str:
    return str(value)[:40]


@dataclass(frozen=True)
class FeatureRows:
    """Features of B galaxies of one split.

    Args:
        split: its name.
        ids: B.
        labels_B: int, -1 if unlabelled.
        features_BD: float32.
    """

    split: str
    ids: Sequence[str]
    labels_B: NDArray[np.int32]
    features_BD: NDArray[np.float32]


def features_path(folder: Path, info: FeaturesInfo) -> Path:
    """Return the file of these features in a folder: its name has the model, and a hash of all that the numbers depend on."""
    import hashlib

    text = json.dumps([info.encoder.identity, info.manifest_hash], sort_keys=True)
    name = re.sub(r"[^\w.+-]+", "_", folder_name(info.encoder.model)).strip("_") or "model"
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.parquet"


def write_features(path: Path, info: FeaturesInfo, blocks: Iterable[FeatureRows]) -> None:
    """Write a file of features atomically; memory is that of a row group.

    Args:
        path: of the file; its folder exists.
        info: its metadata.
        blocks: in the order of the manifest's splits and of their stored samples.

    Raises:
        UserError: the disk is full, or features that are not finite.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schema = _schema(info)
    remove_stale(path.parent, ".*.parquet.*.tmp")  # of any killed probe: its own file may never be written again
    with (
        explain_full_disk(path),
        whole_file(path) as target,
        parquet.ParquetWriter(target, schema, compression="zstd", write_page_checksum=True, store_schema=True) as writer,
    ):
        waiting: list[pa.RecordBatch] = []
        for block in blocks:
            waiting.append(_record_batch(block, schema, info))
            if sum(map(len, waiting)) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches(waiting, schema))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))


def _schema(info: FeaturesInfo) -> "pa.Schema":
    import pyarrow as pa

    element = pa.field("element", pa.float32(), nullable=False)
    kinds = {
        "id": pa.string(),
        "split": pa.string(),
        "label": pa.int32(),
        "features": pa.list_(element, info.encoder.num_features),
    }
    content = {"kind": KIND, "format": FORMAT_VERSION, "galaxydist": __version__, **asdict(info)}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(content)})


def _record_batch(block: FeatureRows, schema: "pa.Schema", info: FeaturesInfo) -> "pa.RecordBatch":
    import pyarrow as pa

    is_finite_B = np.isfinite(block.features_BD).all(axis=1)
    if not is_finite_B.all():
        number = int(np.argmin(is_finite_B))
        raise UserError(
            f"{info.encoder.title} gives features that are not finite (nan or inf) for {int((~is_finite_B).sum())} of "
            f"{len(block.ids)} galaxies, such as {block.ids[number]}: its weights are damaged, or do not belong to this model"
        )
    values = pa.array(np.ascontiguousarray(block.features_BD, np.float32).ravel())
    columns = [
        pa.array(block.ids, pa.string()),
        pa.array([block.split] * len(block.ids), pa.string()),
        pa.array(block.labels_B, pa.int32()),
        pa.FixedSizeListArray.from_arrays(values, type=schema.field("features").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class FeaturesFile:
    """An opened file of features.

    Args:
        path: of the file.
        info: its metadata.
        num_galaxies: number of rows.
    """

    path: Path
    info: FeaturesInfo
    num_galaxies: int

    def split(self, name: str, most: int | None = None) -> FeatureRows:
        """Return the rows of a split, or the first ``most`` of them, in the order of its stored samples.

        Raises:
            UserError: the file is damaged.
        """
        table = self._read("split", [name], most)
        return FeatureRows(name, table.column("id").to_pylist(), table.column("label").to_numpy(), self._values(table))

    def find(self, ids: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the features of some galaxies.

        Args:
            ids: n names.

        Returns:
            Indices (m,) of the ids that the file has, increasing, and their features m x D.

        Raises:
            UserError: the file is damaged.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self._read("id", ids)
        row_n = pc.index_in(pa.array(list(ids), pa.string()), value_set=table.column("id").combine_chunks())
        row_n = row_n.to_numpy(zero_copy_only=False)
        indices = np.flatnonzero(np.isfinite(row_n.astype(np.float64)))
        return indices, self._values(table)[row_n[indices].astype(np.int64)]

    def _read(self, column: str, values: Sequence[str], most: int | None = None) -> "pa.Table":
        """Return the rows, or the first of them, whose column has one of these values."""
        import pyarrow as pa
        from pyarrow import dataset

        verified = dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
        try:
            file = dataset.dataset(self.path, format=dataset.ParquetFileFormat(default_fragment_scan_options=verified))
            wanted = dataset.field(column).isin(pa.array(list(values), pa.string()))
            scanner = file.scanner(filter=wanted)
            return (scanner.to_table() if most is None else scanner.head(most)).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error

    def _values(self, table: "pa.Table") -> NDArray[np.float32]:
        column = table.column("features").combine_chunks()
        values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(table), self.info.encoder.num_features)


def read_features(path: Path) -> FeaturesFile:
    """Open a file of features.

    Raises:
        UserError: there is no such file, or it is not a whole file of features.
    """
    import pyarrow as pa
    from pyarrow import parquet

    remedy = "give a file that `galaxydist probe MODEL DATA` has written"
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}; {remedy}")
    try:
        metadata = parquet.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file of features ({error}); remove it, or {remedy}") from None
    try:
        content = json.loads((schema.metadata or {})[METADATA_KEY])
        if content["kind"] != KIND:
            raise ValueError(content["kind"])
        version = content["format"]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is a Parquet file of something else than features; {remedy}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this galaxydist reads version {FORMAT_VERSION}; remove it and probe again"
        )
    try:
        info = FeaturesInfo(
            encoder=EncoderInfo.from_dict(content["encoder"]),
            class_names=tuple(content["class_names"]),
            **{name: content[name] for name in ("dataset", "variant", "manifest_hash", "origin")},
        )
        if not schema.equals(_schema(info)):
            raise ValueError("its columns are not those of features")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    return FeaturesFile(path, info, metadata.num_rows)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); remove it and probe again")
