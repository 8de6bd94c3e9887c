"""One sample of images in every form in which a survey comes: class folders with a table, and tables of the same rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from galaxydist.galaxy import Survey
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.writer.writer import write_shards

SPLIT_OF_ROW = ("train", "train", "train", "train", "val", "test")


def sample_rows(sample: Path, per_class: int = 6) -> list[dict[str, Any]]:
    """Rows of the first images of each class of the Galaxy10 sample, with made-up properties; the classes are mixed."""
    rows = [
        {"file": f"{label}/{path.name}", "label": label, "number": int(path.stem), "split": SPLIT_OF_ROW[place % 6]}
        for label in range(10)
        for place, path in enumerate(sorted((sample / str(label)).iterdir())[:per_class])
    ]
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]
    for place, row in enumerate(rows):
        row["objid"] = str(587739505552785605 + row.pop("number"))
        row |= {"ra": 10.0 + place, "dec": -5.5 + place / 7, "redshift": None if place % 9 == 0 else 0.01 * place + 0.005}
        row |= {"votes": 30 + place % 11, "note": ("SDSS J1", "two words", "a,b")[place % 3], "is_nearby": place % 4 == 0}
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    """A CSV table as spreadsheets and pandas write it."""
    import csv

    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A Parquet table as pandas writes it, with a categorical column and large strings."""
    table = pa.Table.from_pylist(rows)
    note = table.column("note").cast(pa.large_string()).dictionary_encode()
    table = table.set_column(table.column_names.index("note"), "note", note)
    pq.write_table(table, path)
    return path


def write_fits(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A FITS table: big-endian, masked floats, padded strings."""
    from astropy.table import Table

    table = Table({name: [row[name] for row in rows] for name in rows[0] if name != "redshift"})
    masked = [row["redshift"] for row in rows]
    is_missing = [value is None for value in masked]
    table["redshift"] = np.ma.masked_array([value or 0.0 for value in masked], is_missing)
    table = table[list(rows[0])]
    table.write(path, overwrite=True)
    return path


def contents(survey: Survey, folder: Path) -> dict[str, Any]:
    """Ids, labels, storage order, pixels (the bytes of all tars) and catalogue columns of a survey, as its shards hold them."""
    manifest = write_shards(survey, folder, encoding="raw", workers=1)
    found: dict[str, Any] = {"classes": manifest.class_names}
    found["tars"] = {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
    assert found["tars"]
    for split in manifest.splits:
        catalogue = read_catalogue(manifest, split)
        found[split] = {name: catalogue.column(name).to_pylist() for name in sorted(catalogue.column_names)}
        found[split]["labels"] = manifest.labels(split).tolist()
    return found
