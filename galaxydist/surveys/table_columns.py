"""Columns of a table of galaxies: their usual names, and their values as text, labels and positions."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError, name_some
from galaxydist.surveys.folder_scan import label_classes

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# Usual names of the columns, in lower case, the most specific first. `file_loc` and `id_str` are Zoobot's, `file_name` is that of
# Hugging Face, `iauname`, `png_loc`, `dr8_id`, `dr7objid`, `asset_id`, `gz2_class` and `summary` are Galaxy Zoo's, `RAJ2000` is
# VizieR's.
USUAL_NAMES = {
    "file": (
        *("file", "file_name", "filename", "file_path", "filepath", "path", "file_loc", "image_path", "image_file", "image_name"),
        *("img_path", "image", "img", "jpg_loc", "png_loc", "jpeg", "png", "url", "image_url", "img_url", "jpeg_url"),
        "cutout_url",
    ),
    "id": (
        *("id", "id_str", "galaxy_id", "galaxyid", "object_id", "objectid", "obj_id", "iauname", "iau_name", "dr8_id"),
        *("dr7objid", "dr8objid", "objid", "targetid", "source_id", "asset_id", "image_id"),
    ),
    "label": (
        *("label", "labels", "class", "class_name", "classname", "class_label", "category", "morphology", "target", "y", "ans"),
        *("gz10_label", "gz2_class", "gz2class", "summary"),
    ),
    "split": ("split", "subset", "partition", "data_split"),
    "ra": ("ra", "ra_deg", "radeg", "raj2000", "ra_j2000", "right_ascension", "target_ra", "_raj2000"),
    "dec": ("dec", "dec_deg", "decdeg", "dej2000", "decj2000", "dec_j2000", "declination", "target_dec", "_dej2000"),
}
# A column option with this value (unless a column has that name) stands for no column.
NO_COLUMN = "none"
_EMPTY_TEXT = ("", "nan", "null")


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """The columns of a table; None: the usual names are looked for, ``none``: there is no such column."""

    file: str | None = None
    label: str | None = None
    id: str | None = None
    split: str | None = None
    ra: str | None = None
    dec: str | None = None

    def used(self) -> set[str]:
        """Return the names of all columns that are found."""
        return {name for field in fields(self) if (name := getattr(self, field.name)) is not None}


def column_names(columns: Mapping[str, str]) -> ColumnNames:
    """Return the columns that a mapping such as ``{"label": "gz2_class"}`` names; raises a UserError for another key."""
    if wrong := [kind for kind in columns if kind not in USUAL_NAMES]:
        raise UserError(f"columns: there is no {wrong[0]!r}; choose from {', '.join(USUAL_NAMES)}")
    return ColumnNames(**columns)


def find_columns(names: Sequence[str], wanted: ColumnNames, location: object, *, is_labelled: bool = True) -> ColumnNames:
    """Return the columns of a table, those that the user names and those with usual names; these are logged once.

    Args:
        names: all columns of the table.
        wanted: the user's choice.
        location: the table, for messages.
        is_labelled: False for a table whose labels are not wanted.

    Returns:
        The columns' names, None for a column that the table lacks.

    Raises:
        UserError: a column that does not exist, one name for two columns, or several columns that may hold the label.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise UserError(f"{location}: two columns are named {twice[0]!r}; rename one")
    found: dict[str, str | None] = {}
    guessed: dict[str, str] = {}
    for kind, usual in USUAL_NAMES.items():
        given = getattr(wanted, kind)
        if given is not None:
            found[kind] = None if given == NO_COLUMN and given not in names else _named(names, given, kind, location)
            continue
        candidates = [name for known in usual for name in names if name.strip().lower().replace(" ", "_") == known]
        candidates = [name for name in candidates if name not in wanted.used()]
        if kind == "label" and not is_labelled:
            candidates = []
        if kind == "label" and len(candidates) > 1:
            raise UserError(
                f"{location}: {len(candidates)} columns may hold the label, {', '.join(candidates)}: choose one with "
                f"--label, for example --label {candidates[0]}"
            )
        found[kind] = candidates[0] if candidates else None
        if candidates:
            guessed[kind] = candidates[0]
    if (found["ra"] is None) != (found["dec"] is None):
        if missing := next((kind for kind in ("ra", "dec") if found[kind] is None and getattr(wanted, kind) is None), None):
            other = "ra" if missing == "dec" else "dec"
            if getattr(wanted, other) is not None:
                raise UserError(f"{location}: --{other} {found[other]} names one coordinate; name the other with --{missing}")
        found["ra"] = found["dec"] = None
    if named := ", ".join(f"{kind}={name}" for kind, name in guessed.items() if found[kind] is not None):
        log_once(f"{location}: columns by their usual names: {named} (options such as --label name others)", logging.INFO)
    return replace(ColumnNames(), **found)


@cache
def log_once(text: str, level: int = logging.WARNING) -> None:
    """Log a message about a source only once: a command may open it several times."""
    logger.log(level, "%s", text)


def _named(names: Sequence[str], given: str, kind: str, location: object) -> str:
    """Return the column that the user names, in any case of letters."""
    if given in names:
        return given
    same = [name for name in names if name.lower() == given.lower()]
    if len(same) == 1:
        return same[0]
    lowered = {name.lower(): name for name in names}
    close = get_close_matches(given.lower(), list(lowered), n=1)
    hint = f"; did you mean {lowered[close[0]]}?" if close else ""
    raise UserError(f"{location} has no column {given!r} (--{kind}){hint or '.'} Its columns are {name_some(list(names), 40)}")


def text_values(column: "pa.ChunkedArray") -> "pa.Array":
    """Return a column as text, null where it is null or empty; numbers without a fraction have none in the text.

    Args:
        column: N values of any type but nested ones.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = decoded(column)
    if pa.types.is_floating(array.type):
        array = pc.cast(array, pa.float64())
        whole = pc.if_else(pc.is_finite(array), array, None)
        is_whole = pc.all(pc.and_(pc.equal(whole, pc.trunc(whole)), pc.less(pc.abs(whole), 2.0**63))).as_py()
        array = pc.cast(whole, pa.int64()) if is_whole is not False else whole
    text = pc.utf8_trim_whitespace(pc.cast(array, pa.string()))
    return pc.if_else(pc.is_in(pc.utf8_lower(text), value_set=pa.array(_EMPTY_TEXT)), None, text)


def has_rounded_integers(column: "pa.ChunkedArray") -> bool:
    """Return True for a column of floats with whole numbers that may have lost digits: from 2^53 on, in float32 from 2^24 on."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = decoded(column)
    if not pa.types.is_floating(array.type):
        return False
    first = 2.0 ** (np.finfo(array.type.to_pandas_dtype()).nmant + 1)
    return bool(pc.any(pc.greater_equal(pc.abs(pc.cast(array, pa.float64())), first)).as_py())


def decoded(column: "pa.ChunkedArray") -> "pa.Array":
    """Return a column as one plain array: dictionaries (pandas' categories) as their values, views and large text as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_text(array.type):
        array = pc.cast(array, pa.string())
    return array


def arrow_column(values: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> "pa.Array | None":
    """Return numbers of any byte order, truth values or text (N) as a column; None for arrays and other kinds of values.

    Args:
        values: text without padding, or padded with spaces or zeros.
        mask: (N,) True where there is no value; None: nowhere.
    """
    import pyarrow as pa

    if values.ndim != 1 or values.dtype.kind not in "biufSUO":
        return None
    if values.dtype.kind in "biuf":
        is_usual = values.dtype.kind != "f" or values.dtype.itemsize in (4, 8)
        return pa.array(values.astype(values.dtype.newbyteorder("=") if is_usual else np.float64), mask=mask)
    texts = [text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text for text in values.tolist()]
    if not all(isinstance(text, str) for text in texts):
        return None
    return pa.array([text.strip() for text in texts], pa.string(), mask=mask)


def is_text(kind: Any) -> bool:
    """Return True for each of Arrow's types of text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_scalar(kind: Any) -> bool:
    """Return True for types of single numbers, times and text, of which a catalogue consists."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(is_number or is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind) or pa.types.is_null(kind))


def read_labels(
    column: "pa.ChunkedArray", name: str, location: object, *, class_names: tuple[str, ...] | None, as_galaxy10: bool
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return class names and (N,) labels, -1 where the column is null or empty, or -1 among numbers from 0.

    Names of classes are sorted in natural order, so that numbers keep their numeric order.

    Args:
        column: N class names or numbers.
        name: the column's name, for messages.
        location: the table, for messages.
        class_names: the names of the classes 0, 1, ...; None: the values are the names.
        as_galaxy10: the classes are Galaxy10's.

    Raises:
        UserError: values with fractions, a single class, a class for nearly every galaxy, or a number without a name.
    """
    import pyarrow.compute as pc

    values = text_values(column)
    found = pc.drop_null(pc.unique(values)).to_pylist()
    if "-1" in found and all(text == "-1" or text.isdecimal() for text in found):
        values = pc.if_else(pc.equal(values, "-1"), None, values)
        found.remove("-1")
    where = f"{location}, column {name!r}"
    _check_label_values(found, len(values) - values.null_count, where)
    if class_names is not None:
        wrong = [text for text in found if not text.isdecimal() or int(text) >= len(class_names)]
        if wrong and not set(found) <= set(class_names):
            raise UserError(f"{where}: {name_some(wrong)} is not a class number from 0 to {len(class_names) - 1}")
        numbers = {text: int(text) if not wrong else class_names.index(text) for text in found}
        return class_names, _lookup(values, numbers)
    names, numbers = label_classes(found, where, as_galaxy10=as_galaxy10)
    if len(names) < 2:
        raise UserError(
            f"{where} has {f'only the class {names[0]!r}' if names else 'no labels'}; a classifier needs at least two classes: "
            "name another column with --label, or give --unlabelled if the labels are not needed"
        )
    return names, _lookup(values, numbers)


def _check_label_values(found: Sequence[str], num_labelled: int, where: str) -> None:
    if found and all(map(_is_number, found)) and (fractions := [text for text in found if float(text) % 1 > 0]):
        raise UserError(
            f"{where} has numbers with fractions ({fractions[0]}), which are no classes; name another column with --label"
        )
    if len(found) > 20 and len(found) > 0.9 * num_labelled:
        raise UserError(
            f"{where} has {len(found)} different values in {num_labelled} rows, so that nearly each galaxy would be a "
            "class of its own; name another column with --label"
        )


def _lookup(values: "pa.Array", numbers: dict[str, int]) -> NDArray[np.int64]:
    """Return the number of each text, -1 for null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = list(numbers)
    index = pc.index_in(values, value_set=pa.array(keys, pa.string()))
    codes = np.array([*numbers.values(), -1], np.int64)
    return np.asarray(codes[pc.fill_null(index, -1).to_numpy(zero_copy_only=False)])


def read_degrees(column: "pa.ChunkedArray", name: str, location: object) -> NDArray[np.float64]:
    """Return (N,) decimal degrees, nan where the column is null.

    Raises:
        UserError: the column holds text; sexagesimal positions are named as such.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = decoded(column)
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_null(array.type)):
        text = text_values(column)
        try:
            array = pc.cast(text, pa.float64())
        except pa.ArrowInvalid:
            example = next((value for value in text.to_pylist() if value is not None and not _is_number(value)), "")
            kind = "sexagesimal (hours or degrees, minutes, seconds)" if _is_sexagesimal(example) else "not a number"
            raise UserError(
                f"{location}, column {name!r}: the position {example!r} is {kind}; give decimal degrees, name another column "
                "with --ra or --dec, or leave positions out with --ra none --dec none"
            ) from None
    return np.asarray(pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_sexagesimal(text: str) -> bool:
    parts = text.lower().translate(str.maketrans("hmsd°'\":", "        ")).split()
    return len(parts) in (2, 3) and all(_is_number(part) for part in parts)
