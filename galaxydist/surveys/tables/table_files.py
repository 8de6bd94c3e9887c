"""Tables of galaxies in files: CSV, FITS and JSON lines, read as Arrow tables."""

import csv
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.errors import UserError, name_some
from galaxydist.surveys.file_kinds import CSV, FITS, JSON_LINES, file_kind, refuse_kind
from galaxydist.surveys.table_columns import arrow_column

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_EXPECTED = "a table (CSV, Parquet, FITS or JSON lines)"
_HDU = re.compile(r"(?P<file>.+)\[(?P<hdu>[^\[\]]+)\]")
# Cells without a value in columns of numbers.
_NO_VALUE = ["", "na", "n/a", "nan", "null", "none", "--", "#n/a"]
_WHOLE = r"^[+-]?(0|[1-9][0-9]*)$"
_LEADING_ZERO = r"^[+-]?0[0-9]"
_DECIMAL_COMMA = r"^[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?$"


def split_hdu(path: str) -> tuple[str, str | None]:
    """Return the file and the extension of ``TABLE.fits[2]`` or ``TABLE.fits[NAME]``; None for a path without an extension."""
    match = _HDU.fullmatch(path)
    return (path, None) if match is None or Path(path).exists() else (match["file"], match["hdu"])


def read_table(
    path: Path, hdu: str | None = None, texts: Callable[[list[str]], set[str]] = lambda _: set(), location: str = ""
) -> "pa.Table":
    """Return the rows of a CSV or FITS table or of JSON lines, known by its content; columns of arrays are left out.

    Columns of a FITS table whose unit is one of angles or hours have ``degrees`` in their fields' metadata: the factor that turns
    their values into degrees.

    Args:
        path: the file; it may be compressed with gzip.
        hdu: number or name of a FITS extension; None: the first table with rows.
        texts: returns those of a CSV table's columns that stay text, even if all their cells are numbers.
        location: the table in messages; empty: its path.

    Raises:
        UserError: another kind of file, or one that is damaged.
    """
    kind, location = file_kind(path), location or str(path)
    if hdu is not None and kind != FITS:
        raise UserError(f"{location} is no FITS table, so that it has no extension [{hdu}]: leave that out")
    if kind == CSV:
        return _read_csv(path, location, texts)
    if kind == JSON_LINES:
        return _read_json_lines(path, location)
    if kind == FITS:
        return _read_fits(path, location, hdu)
    raise refuse_kind(location, kind, _EXPECTED)


def _read_csv(path: Path, location: str, texts: Callable[[list[str]], set[str]]) -> "pa.Table":
    """Read text with ``,``, ``;`` or tabs between the cells; the types of columns are found from all their values."""
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    try:
        data = _read_bytes(path)
        head = data[: min(len(data), 1 << 20)].to_pybytes().decode("utf-8-sig", "ignore")
        lines = head.splitlines()
        # SkyServer writes `#Table1` above the header.
        skipped = next((number for number, line in enumerate(lines) if line.strip() and not _is_comment(line)), None)
        if skipped is None:
            raise UserError(f"{location} has no header line; the first line of a table names its columns")
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
            raise UserError(f'{location} is not UTF-8 text ({error}); save it as "CSV UTF-8"') from error
        raise UserError(
            f"{location} is not a table of comma-, semicolon- or tab-separated cells ({error}); save it again"
        ) from error
    is_text = texts(names)
    columns = [
        column if name in is_text else _typed(column, decimal_comma=delimiter == ";")
        for name, column in zip(names, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=names)


def _read_json_lines(path: Path, location: str) -> "pa.Table":
    """Read a JSON object for each row, as in Hugging Face's ``metadata.jsonl``."""
    import pyarrow as pa
    import pyarrow.json as arrow_json

    try:
        data = _read_bytes(path)
        return arrow_json.read_json(pa.BufferReader(data), arrow_json.ReadOptions(block_size=min(len(data) + 1, 1 << 30)))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{location} is not a table of JSON lines, one object for each row ({error}); write it again") from error


def _read_bytes(path: Path) -> "pa.Buffer":
    import pyarrow as pa

    with pa.input_stream(str(path), compression=None) as plain:
        is_gzip = plain.read(2) == b"\x1f\x8b"
    with pa.input_stream(str(path), compression="gzip" if is_gzip else None) as stream:
        return stream.read_buffer()


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


def _read_fits(path: Path, location: str, hdu: str | None) -> "pa.Table":
    """Read a table extension: native byte order, text without padding, null for masked values."""
    import pyarrow as pa
    from astropy.io import fits
    from astropy.table import Table

    try:
        # Astropy's warnings about padding, units and the like concern nothing that is read here.
        with warnings.catch_warnings(action="ignore"), fits.open(path) as hdus:
            tables = [number for number, one in enumerate(hdus) if isinstance(one, fits.BinTableHDU | fits.TableHDU)]
            if not tables:
                raise refuse_kind(location, "FITS image", _EXPECTED)
            number = _choose_hdu(location, hdus, tables, hdu)
            table = Table.read(hdus[number], character_as_bytes=True)
            columns = {name: _fits_column(table[name]) for name in table.colnames}
            fields = {name: _degrees(table[name].unit) for name in table.colnames}
    except UserError:
        raise
    except (OSError, ValueError, TypeError, EOFError, KeyError) as error:
        raise UserError(f"{location} is a truncated or damaged FITS file ({error}); copy or write it again") from error
    if left_out := [name for name, column in columns.items() if column is None]:
        logger.warning(
            "%s: columns of lists, structures or bytes are not in the catalogue: %s", location, name_some(left_out, 20)
        )
    found = {name: column for name, column in columns.items() if column is not None}
    return pa.table(found, pa.schema([pa.field(name, column.type, metadata=fields[name]) for name, column in found.items()]))


def _degrees(unit: Any) -> dict[str, str] | None:
    """Return the metadata of a column with a unit of angles or hours."""
    from astropy import units

    try:
        known = units.Unit(str(unit))  # FITS itself has no hour angles
        return {"degrees": str(float(15 if known in (units.hour, units.hourangle) else known.to(units.deg)))}
    except (TypeError, ValueError):  # no unit, another one, or one that is not known
        return None


def _choose_hdu(location: str, hdus: Any, tables: list[int], hdu: str | None) -> int:
    listed = ", ".join(f"{number} ({hdus[number].name or 'unnamed'}, {hdus[number].header['NAXIS2']} rows)" for number in tables)
    if hdu is None:
        with_rows = [number for number in tables if hdus[number].header["NAXIS2"]]
        return (with_rows or tables)[0]
    chosen = [number for number in tables if hdu == str(number) or hdu.lower() == hdus[number].name.lower()]
    if not chosen:
        raise UserError(f"{location} has no table extension [{hdu}]; its tables are {listed}")
    return chosen[0]


def _fits_column(column: Any) -> "pa.Array | None":
    """Return a column of a FITS table, or None for arrays and other values that are not single numbers or text."""
    import numpy as np

    mask = np.ma.getmaskarray(column) if isinstance(column, np.ma.MaskedArray) else None
    return arrow_column(np.ma.getdata(getattr(column, "value", column)), mask)
