"""Tables of galaxies in files: CSV and FITS, read as Arrow tables."""

import csv
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.errors import UserError, name_some
from galaxydist.surveys.file_kinds import CSV, FITS, file_kind, refuse_kind

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_EXPECTED = "a table (CSV, Parquet or FITS)"
_HDU = re.compile(r"(?P<file>.+)\[(?P<hdu>[^\[\]]+)\]")
# Cells without a value in columns of numbers.
_NO_VALUE = ["", "na", "n/a", "nan", "null", "none", "--", "#n/a"]
_WHOLE = r"^[+-]?(0|[1-9][0-9]*)$"
_LEADING_ZERO = r"^[+-]?0[0-9]"
_DECIMAL_COMMA = r"^-?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?$"


def split_hdu(path: Path) -> tuple[Path, str | None]:
    """Return the file and the extension of ``TABLE.fits[2]`` or ``TABLE.fits[NAME]``; None for a path without an extension."""
    match = _HDU.fullmatch(str(path))
    if match is None or path.exists():
        return path, None
    return Path(match["file"]), match["hdu"]


def read_table(path: Path, hdu: str | None = None, texts: Callable[[list[str]], set[str]] = lambda _: set()) -> "pa.Table":
    """Return the rows of a CSV or FITS table, known by its content; columns of arrays are left out.

    Args:
        path: the file; CSV and FITS may be compressed with gzip.
        hdu: number or name of a FITS extension; None: the first table with rows.
        texts: returns those of a CSV table's columns that stay text, even if all their cells are numbers.

    Raises:
        UserError: another kind of file, or one that is damaged.
    """
    kind = file_kind(path)
    if kind == CSV:
        return _read_csv(path, texts)
    if kind == FITS:
        return _read_fits(path, hdu)
    raise refuse_kind(path, kind, _EXPECTED)


def _read_csv(path: Path, texts: Callable[[list[str]], set[str]]) -> "pa.Table":
    """Read text with ``,``, ``;`` or tabs between the cells; the types of columns are found from all their values."""
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    try:
        with pa.input_stream(str(path), compression="gzip" if _is_gzip(path) else None) as stream:
            data = stream.read_buffer()
        head = data[: min(len(data), 1 << 20)].to_pybytes().decode("utf-8-sig", "ignore")
        lines = head.splitlines()
        # SkyServer writes `#Table1` above the header.
        skipped = next((number for number, line in enumerate(lines) if line.strip() and not _is_comment(line)), None)
        if skipped is None:
            raise UserError(f"{path} has no header line; the first line of a table names its columns")
        delimiter = max(",;\t", key=lines[skipped].count)
        names = [name.strip() for name in next(csv.reader([lines[skipped].lstrip("#")], delimiter=delimiter), [])]
        if len(lines) == skipped + 1:
            return pa.table({name: pa.nulls(0) for name in names})
        table = arrow_csv.read_csv(
            pa.BufferReader(data),
            read_options=arrow_csv.ReadOptions(column_names=names, skip_rows=skipped + 1),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, csv.Error, OSError, EOFError) as error:
        if "UTF8" in str(error):
            raise UserError(f'{path} is not UTF-8 text ({error}); save it as "CSV UTF-8"') from error
        raise UserError(f"{path} is not a table of comma-, semicolon- or tab-separated cells ({error}); save it again") from error
    is_text = texts(names)
    columns = [
        column if name in is_text else _typed(column, decimal_comma=delimiter == ";")
        for name, column in zip(names, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=names)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not any(delimiter in line for delimiter in ",;\t")


def _typed(column: "pa.ChunkedArray", *, decimal_comma: bool) -> "pa.ChunkedArray":
    """Return a column of text as integers, floats or booleans if all cells are such; numbers with leading zeros stay text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.utf8_trim_whitespace(column)
    values = pc.if_else(pc.is_in(pc.utf8_lower(text), value_set=pa.array(_NO_VALUE)), None, text)
    if values.null_count == len(values):
        return pa.chunked_array([pa.nulls(len(values))])
    if decimal_comma and pc.any(pc.match_substring_regex(values, _DECIMAL_COMMA)).as_py():
        values = pc.replace_substring(values, ",", ".")
    try:
        if pc.any(pc.match_substring_regex(values, _LEADING_ZERO)).as_py():
            pass
        elif pc.all(pc.match_substring_regex(values, _WHOLE)).as_py():
            return pc.cast(pc.utf8_ltrim(values, "+"), pa.int64())
        else:
            return pc.cast(values, pa.float64())
    except pa.ArrowInvalid:
        pass  # other text, or integers beyond 64 bits
    if pc.all(pc.is_in(pc.utf8_lower(values), value_set=pa.array(["true", "false"]))).as_py():
        return pc.equal(pc.utf8_lower(values), "true")
    return pc.if_else(pc.equal(text, ""), None, text)


def _report_left_out(path: Path, names: list[str]) -> None:
    if names:
        logger.warning("%s: columns of lists, structures or bytes are not in the catalogue: %s", path, name_some(names, 20))


def _read_fits(path: Path, hdu: str | None) -> "pa.Table":
    """Read a table extension: native byte order, text without padding, null for masked values."""
    import pyarrow as pa
    from astropy.io import fits
    from astropy.table import Table

    try:
        # Astropy's warnings about padding, units and the like concern nothing that is read here.
        with warnings.catch_warnings(action="ignore"), fits.open(path) as hdus:
            tables = [number for number, one in enumerate(hdus) if isinstance(one, fits.BinTableHDU | fits.TableHDU)]
            if not tables:
                raise refuse_kind(path, "FITS image", _EXPECTED)
            number = _choose_hdu(path, hdus, tables, hdu)
            table = Table.read(hdus[number], character_as_bytes=True)
            columns = {name: _fits_column(table[name]) for name in table.colnames}
    except UserError:
        raise
    except (OSError, ValueError, TypeError, EOFError, KeyError) as error:
        raise UserError(f"{path} is a truncated or damaged FITS file ({error}); copy or write it again") from error
    _report_left_out(path, [name for name, column in columns.items() if column is None])
    return pa.table({name: column for name, column in columns.items() if column is not None})


def _choose_hdu(path: Path, hdus: Any, tables: list[int], hdu: str | None) -> int:
    listed = ", ".join(f"{number} ({hdus[number].name or 'unnamed'}, {hdus[number].header['NAXIS2']} rows)" for number in tables)
    if hdu is None:
        with_rows = [number for number in tables if hdus[number].header["NAXIS2"]]
        return (with_rows or tables)[0]
    chosen = [number for number in tables if hdu == str(number) or hdu.lower() == hdus[number].name.lower()]
    if not chosen:
        raise UserError(f"{path} has no table extension [{hdu}]; its tables are {listed}")
    return chosen[0]


def _fits_column(column: Any) -> "pa.Array | None":
    """Return a column of a FITS table, or None for arrays and other values that are not single numbers or text."""
    import numpy as np
    import pyarrow as pa

    values = np.ma.getdata(getattr(column, "value", column))
    mask = np.ma.getmaskarray(column) if isinstance(column, np.ma.MaskedArray) else None
    if values.ndim != 1 or values.dtype.kind not in "biufSU":
        return None
    if values.dtype.kind in "SU":
        texts = values.tolist()
        texts = [text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text for text in texts]
        return pa.array([None if mask is not None and mask[row] else text.strip() for row, text in enumerate(texts)], pa.string())
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)
