"""Columns of tables from JSON objects: one for each name, of the type of its values.

Columns are booleans, integers, floats or strings, of one type throughout. Integers mixed with floats become float64. Lists,
objects, values of several types and integers beyond 64 bits make no column. Tables that are read piece by piece get the same
columns as one read at once: each field's metadata holds the kind of its values, for :func:`unite_fields`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

# Kinds of values. EXACT: integers up to 2^53, all of which float64 can represent; WHOLE: larger integers.
NOTHING, BOOLEAN, EXACT, WHOLE, FLOAT, TEXT, MIXED = "nothing", "boolean", "exact", "whole", "float", "text", "mixed"
# Arrow's types of the kinds; all other columns are null.
TYPES = {BOOLEAN: "bool", EXACT: "int64", WHOLE: "int64", FLOAT: "float64", TEXT: "string"}
_KIND = b"kind"
_EXACT_LIMIT, _WHOLE_LIMIT = 2**53, 2**63


def parse_object(text: bytes) -> Mapping[str, Any]:
    """Return the members of a JSON object; none for an empty text.

    Raises:
        ValueError: the text is not JSON, or not an object.
    """
    content = json.loads(text) if text else {}
    if not isinstance(content, dict):
        raise ValueError(f"its .json is not an object but {type(content).__name__}")
    return content


def typed_column(name: str, values: Sequence[Any]) -> tuple[pa.Field, pa.Array]:
    """Return a column of JSON values; it is all null if they have several types. Numbers that are not finite become null."""
    values = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
    kind = _merge({*map(_kind, values)})
    field = pa.field(name, TYPES.get(kind, "null"), metadata={_KIND: kind})
    return field, pa.array(values, TYPES[kind]) if kind in TYPES else pa.nulls(len(values))


def unite_fields(pieces: Iterable[Iterable[pa.Field]]) -> list[pa.Field]:
    """Return the columns of several tables together, in order of appearance.

    Columns of several types and columns that are all null are left out. Integers mixed with floats become float64, if no integer
    is beyond 2^53.

    Args:
        pieces: the fields of each table, as :func:`typed_column` made them.
    """
    kinds: dict[str, str] = {}
    for fields in pieces:
        for field in fields:
            kinds[field.name] = _merge({kinds.get(field.name, NOTHING), field.metadata[_KIND].decode()})
    return [pa.field(name, TYPES[kind]) for name, kind in kinds.items() if kind in TYPES]


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of a united schema; columns that it lacks are null."""
    columns = [
        table.column(field.name).cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def is_unicode(text: str) -> bool:
    """Return False for text with half a surrogate pair, which JSON allows and no column can hold."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int):
        if abs(value) <= _EXACT_LIMIT:
            return EXACT
        return WHOLE if -_WHOLE_LIMIT <= value < _WHOLE_LIMIT else MIXED
    if isinstance(value, float):
        return FLOAT
    return TEXT if isinstance(value, str) and is_unicode(value) else MIXED


def _merge(kinds: set[str]) -> str:
    """Return the kind of a column that has values of all these kinds."""
    kinds = kinds - {NOTHING}
    if len(kinds) < 2:
        return kinds.pop() if kinds else NOTHING
    return {frozenset({EXACT, WHOLE}): WHOLE, frozenset({EXACT, FLOAT}): FLOAT}.get(frozenset(kinds), MIXED)
