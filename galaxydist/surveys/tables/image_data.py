"""Data that hold their images themselves, Parquet and HDF5, as a table with an image source."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.object_store import TransientError
from galaxydist.surveys.data_origin import DataOrigin, spdx
from galaxydist.surveys.file_kinds import HDF5, PARQUET
from galaxydist.surveys.folder_scan import natural_key, safe_name
from galaxydist.surveys.image_arrays import ArrayOptions
from galaxydist.surveys.image_files import EXTENSIONS
from galaxydist.surveys.image_table import ImageSource, TableOptions
from galaxydist.surveys.table_columns import USUAL_NAMES, find_columns
from galaxydist.surveys.tables.file_tree import FileTree, open_tree
from galaxydist.surveys.tables.hdf5_images import find_hdf5, read_hdf5
from galaxydist.surveys.tables.parquet_columns import read_parquet
from galaxydist.surveys.tables.parquet_folders import ParquetFolder, find_parquet

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# Files that only a HATS catalogue, and a folder of `datasets.save_to_disk`, have.
_DATA_MARKS = {"hats.properties", "collection.properties", "dataset_dict.json", "dataset_info.json"}
# Folders of a folder that are looked into to know its kind, and images that may lie beside data.
_NUM_LOOKED_INTO, _FEW_IMAGES = 50, 20


@dataclass(frozen=True)
class ImageData:
    """A table of galaxies beside their images.

    Args:
        location: path or URL, for messages.
        name: of the data set, unless the user gives one.
        table: a row for each galaxy, without image bytes.
        images: its images; None if the table only names image files.
        root: folder of these image files.
        has_image: (N,) False for rows without an image; None: all have one.
        class_names: by label column; "" for any.
        columns: columns of the position and of an id of last resort, if the data name them.
        origin: licence, citation and revision that the data state.
    """

    location: str
    name: str
    table: "pa.Table" = field(repr=False)
    images: ImageSource | None
    root: str
    has_image: NDArray[np.bool_] | None = field(default=None, repr=False)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    origin: DataOrigin | None = None

    def options(self, given: TableOptions) -> TableOptions:
        """Return the user's options, completed by what the data say about their columns and classes."""
        names = self.table.column_names
        wanted = given.columns
        if wanted.ra is None and wanted.dec is None and {self.columns.get("ra"), self.columns.get("dec")} <= {*names}:
            wanted = replace(wanted, ra=self.columns.get("ra"), dec=self.columns.get("dec"))
        found = find_columns(names, wanted, self.location, is_labelled=given.is_labelled)
        last_resort = self.columns.get("id")
        if found.id is None and wanted.id is None and last_resort in names and _is_unique(self.table, str(last_resort)):
            wanted = replace(wanted, id=last_resort)
        class_names = given.class_names
        if given.classes is None and class_names is None and found.label is not None:
            class_names = self.class_names.get(found.label, self.class_names.get(""))
        return replace(given, columns=wanted, class_names=class_names)

    def without_index(self, columns: Collection[str]) -> "ImageData":
        """Return the data without the index column of last resort, unless it is among the columns that are used."""
        index = self.columns.get("id")
        if index is None or index in columns or index not in self.table.column_names:
            return self
        return replace(self, table=self.table.drop_columns([index]))


def folder_kind(folder: Path) -> str | None:
    """Return ``Parquet`` or ``HDF5`` for a folder of such data, None for a folder of images; a few folders are looked into.

    Some images beside the data do not make it a folder of images, and neither does a table beside many images make it data.
    """
    has_parquet, num_images = False, 0
    for number, (_, folders, files) in enumerate(os.walk(folder)):
        folders.sort(key=natural_key)
        if {*files} & _DATA_MARKS:
            return PARQUET
        if any(name.startswith("healpix=") for name in folders):
            return HDF5
        has_parquet = has_parquet or any(name.endswith(".parquet") for name in files)
        num_images += sum(f".{name.rpartition('.')[2].lower()}" in EXTENSIONS for name in files)
        if num_images > _FEW_IMAGES or number == _NUM_LOOKED_INTO:
            break
    return PARQUET if has_parquet and num_images <= _FEW_IMAGES else None


def read_parquet_data(location: str | Path, options: ArrayOptions) -> ImageData:
    """Read Parquet files with images, local or remote: a file, a data set of the Hugging Face Hub, a HATS catalogue, any folder.

    Args:
        location: path or URL.
        options: the user's choices for the images.

    Raises:
        UserError: no Parquet files, no access, damaged or unfit files.
    """
    try:
        tree = open_tree(location)
        folder = find_parquet(tree)
        if folder is None:
            raise UserError(f"{tree.location} has no Parquet files; give a data set of Parquet files, or a folder of images")
        found = read_parquet(tree, folder.files, options, folder.left_out)
    except TransientError as error:
        raise UserError(f"{location} cannot be read now ({error}); give the command again") from error
    table = found.table
    if folder.num_rows is not None and folder.num_rows != len(table):
        raise UserError(
            f"{tree.location}: its properties state {folder.num_rows:,} rows, its partitions have {len(table):,}: some are "
            "missing or old; copy the whole catalogue again"
        )
    if folder.splits and not any(name.lower() in USUAL_NAMES["split"] for name in table.column_names):
        table = table.append_column("split", _split_column(folder, found.num_rows))
    return ImageData(
        tree.location,
        _data_name(tree),
        table,
        found.images,
        tree.root if not tree.inside else tree.path(tree.inside).rpartition("/")[0],
        found.has_image,
        found.class_names,
        folder.columns,
        tree_origin(tree, folder.card),
    )


def read_hdf5_data(path: Path, options: ArrayOptions, label: str | None) -> ImageData:
    """Read an HDF5 file with images in any schema, or a folder of the Multimodal Universe.

    Args:
        path: file or folder.
        options: the user's choices for the images.
        label: the label column that the user names.

    Raises:
        UserError: no HDF5 files, or damaged or unfit ones.
    """
    files = find_hdf5(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has folders healpix=*, but no .hdf5 or .h5 files in them; copy the data again")
    found = read_hdf5(files, options, label)
    name = path.resolve().name if path.is_dir() else path.stem
    return ImageData(str(path), safe_name(name), found.table, found.images, str(path), class_names=found.class_names)


def _data_name(tree: FileTree) -> str:
    """Return the repository's name on the Hub, else the name of the file or folder."""
    if tree.protocol == "hf":
        return safe_name(tree.root.partition("@")[0].rpartition("/")[2])
    last = PurePosixPath(tree.inside or (str(Path(tree.root).resolve()) if tree.is_local else tree.root))
    return safe_name(last.stem if last.suffix == ".parquet" else last.name)


def _split_column(folder: ParquetFolder, num_rows: Sequence[int]) -> "pa.Array":
    import pyarrow as pa

    parts = [pa.array([split or None] * rows, pa.string()) for split, rows in zip(folder.splits, num_rows, strict=True)]
    return pa.chunked_array(parts)


def tree_origin(tree: FileTree, card: Mapping[str, Any]) -> DataOrigin | None:
    """Return what the card of a data set states, with its commit and address; None if nothing is known."""
    licence, citation = card.get("license_name") or card.get("license"), card.get("citation")
    is_known = isinstance(licence, str) and licence.lower() not in ("other", "unknown")
    origin = DataOrigin(
        licence=spdx(str(licence)) if is_known else None,
        citation=citation if isinstance(citation, str) else None,
        revision=tree.revision,
        url=f"https://huggingface.co/{tree.root.partition('@')[0]}" if tree.protocol == "hf" else None,
    )
    return origin if origin.is_known else None


def _is_unique(table: "pa.Table", name: str) -> bool:
    import pyarrow.compute as pc

    return bool(pc.count_distinct(table.column(name)).as_py() == len(table))
