"""Values of a query's result that Arrow or polars has no type for: as DuckDB's text, or named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

_PLAIN = frozenset(
    (
        *("boolean", "varchar", "uuid", "enum", "null", "float", "double", "decimal"),
        *("tinyint", "smallint", "integer", "bigint", "hugeint", "utinyint", "usmallint", "uinteger", "ubigint"),
    )
)
_HELD = _PLAIN | {
    *("date", "time", "time_ns", "timestamp", "timestamp_s", "timestamp_ms", "timestamp_ns", "timestamptz_ns"),
    *("timestamp with time zone", "blob"),
}
_BUILT = frozenset(("list", "array", "struct", "tuple", "map"))
_NO_KEYS = _BUILT | {"union", "variant"}  # Python has no hash of them
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY = 86_400
_YEAR_1, _YEAR_10000 = -719_162, 2_932_897  # days since 1970; Python's times lie between
_DIGITS = Decimal(10) ** 38


def distinct_names(names: Sequence[str]) -> list[str]:
    """Tell repeated names of columns apart as DuckDB's clients do: `id`, `id_1`, `id_2`, whatever their case.

    Args:
        names: of a result's columns.

    Returns:
        As many names, no two alike.
    """
    seen: dict[str, int] = {}
    out = []
    for name in names:
        low, new = name.lower(), name
        if low in seen:
            while (new := f"{name}_{seen[low]}").lower() in seen:
                seen[low] += 1
            seen[low] += 1
        seen[new.lower()] = 1
        out.append(new)
    return out


def holdable(relation: Any, *, plain: bool = False) -> Any:
    """Cast the columns of a query that have no type in polars, or none in JSON and CSV, to DuckDB's text of them.

    In lists, structs and maps it is the values in them that are cast.

    Args:
        relation: a `duckdb.DuckDBPyRelation`; it is run once, later.
        plain: keep numbers, truth values and texts alone, and give maps keys of text; False: what polars holds.

    Returns:
        The relation with the same columns.
    """
    kinds = list(relation.types)
    wanted = [_holding(kind, plain) for kind in kinds]
    if wanted == [str(kind) for kind in kinds]:
        return relation
    columns = []
    for i, (name, kind, new) in enumerate(zip(relation.columns, kinds, wanted, strict=True), 1):
        columns.append(f"{f'CAST(#{i} AS {new})' if new != str(kind) else f'#{i}'} AS {_quoted(name)}")
    return relation.project(", ".join(columns))


def beyond(table: Any) -> str:
    """Say which value of a table polars or Python has no number or time for.

    Args:
        table: a `pyarrow.Table`.

    Returns:
        The column and the value, "" where all can be held.
    """
    for name, column in zip(table.column_names, table.columns, strict=True):
        for chunk in column.chunks:
            for leaf in _leaves(chunk):
                found = _unheld(leaf)
                if found is not None:
                    return f"column {name!r} holds {_text(found)}"
    return ""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _holding(kind: Any, plain: bool) -> str:
    """Return the SQL type that holds a type's values: itself, or one with VARCHAR in the place of others."""
    name = kind.id
    if name in (_PLAIN if plain else _HELD):
        return str(kind)
    if name not in _BUILT:
        return "VARCHAR"
    children = list(kind.children)
    if name == "array":
        size = children.pop()[1]
    parts = [_holding(child, plain) for _, child in children]
    if name == "map" and (plain or children[0][1].id in _NO_KEYS):
        parts[0] = "VARCHAR"  # what a dictionary and JSON have for a key
    if parts == [str(child) for _, child in children]:
        return str(kind)
    if name == "map":
        return f"MAP({', '.join(parts)})"
    if name == "list":
        return f"{parts[0]}[]"
    if name == "array":
        return f"{parts[0]}[{size}]"
    fields = [_quoted(field or f"element{i}") for i, (field, _) in enumerate(children, 1)]
    return f"STRUCT({', '.join(f'{field} {part}' for field, part in zip(fields, parts, strict=True))})"


def _leaves(array: Any) -> Iterator[Any]:
    import pyarrow as pa

    kind = array.type
    if pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pa.types.is_struct(kind):
        for part in array.flatten():
            yield from _leaves(part)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _leaves(array.flatten())
    else:
        yield array


def _unheld(array: Any) -> Any:
    """Return the scalar of an array that lies outside of what polars gives to Python, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_decimal(kind):
        low, high, values = 1 - _DIGITS, _DIGITS - 1, array
    elif pa.types.is_date32(kind):
        low, high, values = Decimal(_YEAR_1), Decimal(_YEAR_10000 - 1), array.cast(pa.int32())
    elif pa.types.is_timestamp(kind):
        second, away = _UNITS[kind.unit], 0 if kind.tz is None else _DAY  # a day for whatever zone it is shown in
        low, high = Decimal((_YEAR_1 * _DAY + away) * second), Decimal((_YEAR_10000 * _DAY - away) * second - 1)
        values = array.cast(pa.int64())
    elif pa.types.is_time64(kind):
        low, high, values = Decimal(0), Decimal(_DAY * _UNITS[kind.unit] - 1), array.cast(pa.int64())
    else:
        return None
    ends = pc.min_max(values)
    for found in (ends["min"], ends["max"]):
        if found.is_valid and not low <= Decimal(found.as_py()) <= high:
            return found if pa.types.is_decimal(kind) else found.cast(kind)
    return None


def _text(value: Any) -> str:
    import duckdb
    import pyarrow as pa

    if pa.types.is_decimal(value.type):
        return str(value.as_py())
    with duckdb.connect() as conn:
        return str(conn.from_arrow(pa.table({"value": pa.array([value])})).project("#1::VARCHAR").fetchall()[0][0])
