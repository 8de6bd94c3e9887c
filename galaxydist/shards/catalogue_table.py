"""The .json of many galaxies as one table, column by column: what has a type, what has none, and how the tables of several shards
become those of one data set."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ID, RA, DEC = OWN = ("id", "ra", "dec")

# What the values of an extra are. Whole numbers are EXACT up to 2^53, where float64 begins to leave some out.
NOTHING, BOOLEAN, EXACT, WHOLE, FLOAT, TEXT, MIXED = "nothing", "boolean", "exact", "whole", "float", "text", "mixed"
_KIND = b"kind"
_EXACT_LIMIT, _WHOLE_LIMIT = 2**53, 2**63


def table_of(metas: Iterable[tuple[str, bytes]]) -> "pa.Table":
    """A row for each galaxy: ``id`` string, ``ra`` and ``dec`` float64 (degrees), then the extras in the order of their coming.

    A number that is not finite is null, and so is a position that is not a number. Each field's metadata has the kind of its
    values, for :func:`unite`; a column without a type is all null.

    Args:
        metas: of each galaxy the key and the contents of its .json; empty where it has none.

    Raises:
        ValueError: a .json is not JSON, or not an object.
    """
    import pyarrow as pa

    rows = [(key, _parse(meta)) for key, meta in metas]
    names = dict.fromkeys(name for _, row in rows for name in row if name not in OWN and _is_unicode(name))
    fields = [pa.field(ID, pa.string()), pa.field(RA, pa.float64()), pa.field(DEC, pa.float64())]
    columns = [
        pa.array([_name(row, key) for key, row in rows], pa.string()),
        *(pa.array([_number(row.get(name)) for _, row in rows], pa.float64()) for name in (RA, DEC)),
    ]
    for name in names:
        values = [_finite(row.get(name)) for _, row in rows]
        kind = _merge_all(map(_kind, values))
        fields.append(pa.field(name, _type(kind), metadata={_KIND: kind}))
        columns.append(_array(values, kind))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def unite(schemas: Iterable["pa.Schema"]) -> "pa.Schema":
    """The columns of all: those of :func:`table_of` whose values are of one type throughout and not null throughout. Whole
    numbers and others together are float64, if none of the whole ones is past 2^53."""
    import pyarrow as pa

    kinds: dict[str, str] = {}
    for schema in schemas:
        for field in schema:
            if field.name not in OWN:
                kinds[field.name] = _merge(kinds.get(field.name, NOTHING), field.metadata[_KIND].decode())
    fields = [pa.field(ID, pa.string()), pa.field(RA, pa.float64()), pa.field(DEC, pa.float64())]
    fields += [pa.field(name, _type(kind)) for name, kind in kinds.items() if kind not in (NOTHING, MIXED)]
    return pa.schema(fields)


def conform(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    """A table of :func:`table_of` with the columns of a united schema."""
    import pyarrow as pa

    columns = [
        table.column(field.name).cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _parse(meta: bytes) -> Mapping[str, Any]:
    content = json.loads(meta) if meta else {}
    if not isinstance(content, dict):
        raise ValueError(f"its .json is not an object but {type(content).__name__}")
    return content


def _name(row: Mapping[str, Any], key: str) -> str:
    name = row.get(ID)
    return name if isinstance(name, str) else key


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


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
    return TEXT if isinstance(value, str) and _is_unicode(value) else MIXED


def _is_unicode(text: str) -> bool:
    """JSON lets half a surrogate pair through, which no column can hold."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _merge_all(kinds: Iterable[str]) -> str:
    merged = NOTHING
    for kind in {*kinds}:
        merged = _merge(merged, kind)
    return merged


def _merge(one: str, other: str) -> str:
    """The kind of a column that has values of both; the order in which kinds are merged makes no difference."""
    kinds = {one, other} - {NOTHING}
    if len(kinds) < 2:
        return kinds.pop() if kinds else NOTHING
    if kinds == {EXACT, WHOLE}:
        return WHOLE
    return FLOAT if kinds == {EXACT, FLOAT} else MIXED


def _type(kind: str) -> "pa.DataType":
    import pyarrow as pa

    types: Mapping[str, Callable[[], pa.DataType]] = {
        BOOLEAN: pa.bool_,
        EXACT: pa.int64,
        WHOLE: pa.int64,
        FLOAT: pa.float64,
        TEXT: pa.string,
    }
    return types.get(kind, pa.null)()


def _array(values: Sequence[Any], kind: str) -> "pa.Array":
    import pyarrow as pa

    if kind == FLOAT:
        values = [None if value is None else float(value) for value in values]
    return pa.nulls(len(values)) if kind in (NOTHING, MIXED) else pa.array(values, _type(kind))
