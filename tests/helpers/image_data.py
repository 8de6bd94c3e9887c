"""The rows of ``table_sources`` with their images inside: Parquet of the Hub, HATS, HDF5, the Multimodal Universe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

Rows = Sequence[dict[str, Any]]


def pixels_of(rows: Rows, root: Path) -> NDArray[np.uint8]:
    """N x H x W x 3 decoded images."""
    return np.stack([np.asarray(Image.open(root / row["file"])) for row in rows])


def image_table(rows: Rows, root: Path, image: str = "image") -> pa.Table:
    """The rows with a column of image files as the library `datasets` stores them, and the columns of the rows but ``file``."""
    files = [{"bytes": (root / row["file"]).read_bytes(), "path": row["file"]} for row in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0] if name != "file"}
    return pa.table({image: pa.array(files, kind), **columns})


def write_hub(folder: Path, rows: Rows, root: Path, class_names: Sequence[str]) -> Path:
    """A data set of the Hub as `datasets` writes it: two files in ``data/``, labels as ClassLabel, small row groups."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    table = image_table(rows, root)
    features = Features(
        {
            "image": Image(),
            **{name: Value(str(table.schema.field(name).type)) for name in table.column_names[1:]},
            "label": ClassLabel(names=list(class_names)),
        }
    )
    half = len(table) // 2
    (folder / "data").mkdir(parents=True)
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        data = Dataset.from_dict(part.to_pydict(), features=features)
        data.to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet", batch_size=7)
    return folder


def write_hats(folder: Path, rows: Rows, root: Path, image: str = "image") -> Path:
    """A HATS catalogue in a collection: partitions of two orders, in the order of the rows, and a margin that is not read."""
    table = image_table(rows, root, image) if image else pa.Table.from_pylist(list(rows))
    table = table.add_column(0, "_healpix_29", pa.array(range(10, 10 + len(table)), pa.int64()))
    main, margin = folder / "galaxies", folder / "galaxies_margin"
    cuts = [0, len(table) // 3, len(table) // 2, len(table)]
    cells = ("Norder=1/Dir=0/Npix=9", "Norder=1/Dir=0/Npix=40", "Norder=2/Dir=0/Npix=5")
    for start, stop, cell in zip(cuts[:-1], cuts[1:], cells, strict=True):
        for place, rows_of in ((main, table.slice(start, stop - start)), (margin, table.slice(0, 1))):
            path = place / "dataset" / f"{cell}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows_of, path, row_group_size=11)
    pq.write_metadata(table.schema, main / "dataset" / "_common_metadata")
    text = f"#HATS catalog\nobs_collection=galaxies\ndataproduct_type=object\nhats_nrows={len(table)}\n"
    text += "hats_col_ra=ra\nhats_col_dec=dec\n"
    (main / "hats.properties").write_text(text + "hats_col_healpix=_healpix_29\nhats_builder=test v1\\:0\n")
    (margin / "hats.properties").write_text(text.replace("type=object", "type=margin"))
    (folder / "collection.properties").write_text("obs_collection=galaxies\nhats_primary_table_url=galaxies\n")
    return folder


def write_hdf5(path: Path, rows: Rows, images: NDArray[Any], name: str = "images", **layout: Any) -> Path:
    """An HDF5 file with a data set of images and one for each column; text as variable strings, missing numbers as nan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", track_order=True) as h5:  # columns in the order of the rows
        h5.create_dataset(name, data=images, **layout)
        for column in rows[0]:
            values = [row[column] for row in rows]
            if isinstance(values[0], str):
                h5.create_dataset(column, data=values, dtype=h5py.string_dtype())
            else:
                h5[column] = np.array([np.nan if value is None else value for value in values])
    return path


def write_universe(folder: Path, rows: Rows, images: NDArray[Any], name: str = "rgb_image") -> Path:
    """The folders of the Multimodal Universe, with the rows in the order of their pixels' numbers."""
    third = len(rows) // 3
    for start, stop, cell in ((0, third, 7), (third, 2 * third, 85), (2 * third, len(rows), 1012)):
        write_hdf5(folder / "gz10" / f"healpix={cell}" / "001-of-001.hdf5", rows[start:stop], images[start:stop], name)
    return folder
