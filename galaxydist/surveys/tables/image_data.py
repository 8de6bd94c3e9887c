"""Data that hold their images themselves, Parquet and HDF5, as a table with an image source."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.surveys.data_origin import DataOrigin, spdx
from galaxydist.surveys.file_kinds import names_table
from galaxydist.surveys.folder_scan import safe_name
from galaxydist.surveys.image_arrays import ArrayOptions
from galaxydist.surveys.image_table import ImageSource, TableOptions
from galaxydist.surveys.table_columns import USUAL_NAMES, find_columns
from galaxydist.surveys.tables.file_tree import FileTree, open_tree
from galaxydist.surveys.tables.hdf5_images import find_hdf5, read_hdf5
from galaxydist.surveys.tables.parquet_columns import read_parquet
from galaxydist.surveys.tables.parquet_folders import ParquetFolder, find_parquet

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


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

    def prepared(self, given: TableOptions) -> tuple["pa.Table", TableOptions]:
        """Return the table, and the user's options completed by what the data say about their columns and classes.

        The table has no index column of last resort, unless it serves as the id.
        """
        import pyarrow.compute as pc

        names, wanted, index = self.table.column_names, given.columns, self.columns.get("id")
        if wanted.ra is None and wanted.dec is None and {self.columns.get("ra"), self.columns.get("dec")} <= {*names}:
            wanted = replace(wanted, ra=self.columns.get("ra"), dec=self.columns.get("dec"))
        found = find_columns(names, wanted, self.location, is_labelled=given.is_labelled)
        table = self.table
        if index in names and found.id is None and wanted.id is None and pc.count_distinct(table[index]).as_py() == len(table):
            wanted = replace(wanted, id=index)
        elif index in names and index not in found.used():
            table = table.drop_columns([index])
        class_names = given.class_names
        if given.classes is None and class_names is None and found.label is not None:
            class_names = self.class_names.get(found.label, self.class_names.get(""))
        return table, replace(given, columns=wanted, class_names=class_names)


def read_parquet_data(location: str | Path, options: ArrayOptions) -> ImageData:
    """Read Parquet files with images, local or remote: a file, a data set of the Hugging Face Hub, a HATS catalogue, any folder.

    Args:
        location: path or URL.
        options: the user's choices for the images.

    Raises:
        UserError: no Parquet files, no access, damaged or unfit files.
    """
    tree = open_tree(location)
    folder = find_parquet(tree)
    if folder is None:
        table = next((tree.path(file) for file in tree.files if names_table(file)), None)
        advice = f"a data set of Parquet files, or a folder of images{f', or a table of images like {table}' if table else ''}"
        raise UserError(f"{tree.location} has no Parquet files; give {advice}")
    found = read_parquet(tree, folder.files, options, folder.left_out)
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
    table, images, class_names = read_hdf5(files, options, label)
    name = path.resolve().name if path.is_dir() else path.stem
    return ImageData(str(path), safe_name(name), table, images, str(path), class_names=class_names)


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
