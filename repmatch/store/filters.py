"""Conditions that users write in SQL, and the view of a dataset's rows that they see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from repmatch.errors import UsageError
from repmatch.store.database import first

_OWN = ("id", "label")
_EMPTY = ("where_clause", "having", "qualify", "sample")


def visible_columns(columns: Mapping[str, str]) -> dict[str, str | None]:
    """Return the columns that a condition can use.

    Args:
        columns: column of the user's rows -> "string", "number", "boolean" or "json".

    Returns:
        Column as it is written in SQL -> column of the user's rows; None for the store's own `id` and `label`, which
        win over columns of that name. SQL takes no notice of case: of two columns that differ by nothing else the
        later one is called `NAME_2`.
    """
    out: dict[str, str | None] = dict.fromkeys(_OWN)
    taken = {*_OWN, "repmatch_pk"}
    for name in columns:
        if name in _OWN:
            continue
        shown, count = name, 1
        while shown.lower() in taken:
            count += 1
            shown = f"{name}_{count}"
        if shown:
            taken.add(shown.lower())
            out[shown] = name
    return out


def quote_name(name: str) -> str:
    """Quote an SQL identifier.

    Args:
        name: any text.

    Returns:
        The identifier.
    """
    return '"' + name.replace('"', '""') + '"'


def column_sql(name: str | None, kind: str) -> str:
    """Return the SQL expression that reads a column from the raw row, alias `i`.

    Args:
        name: the column in the user's rows.
        kind: "string", "number", "boolean" or "json".

    Returns:
        The expression; NULL where a row lacks the column or DuckDB cannot read it.
    """
    pointer = "/" + (name or "").replace("~", "~0").replace("/", "~1")
    quoted = "'" + pointer.replace("'", "''") + "'"
    if kind == "json":
        return f"TRY(json_extract(i.json, {quoted}))"
    text = f"TRY(json_extract_string(i.json, {quoted}))"
    return {"number": f"TRY_CAST({text} AS DOUBLE)", "boolean": f"TRY_CAST({text} AS BOOLEAN)"}.get(kind, text)


def rows_view(dataset_pk: int, columns: Mapping[str, str]) -> str:
    """Return the rows of a dataset as a subquery that a condition can be put to.

    Args:
        dataset_pk: key of the dataset.
        columns: its columns.

    Returns:
        SQL; the key of the instance is `repmatch_pk`.
    """
    parts = ["i.pk AS repmatch_pk", "i.id AS id", "i.label AS label"]
    for shown, name in visible_columns(columns).items():
        if name is not None:
            parts.append(f"{column_sql(name, columns[name])} AS {quote_name(shown)}")
    return f"(SELECT {', '.join(parts)} FROM registry.instances i WHERE i.dataset_pk = {int(dataset_pk)}) AS rows"


def check_expression(conn: Any, text: str, columns: Mapping[str, str]) -> None:
    """Make sure that a condition is one SQL expression, in and out of parentheses.

    Args:
        conn: an open connection.
        text: what the user wrote.
        columns: the dataset's columns, for the message.

    Raises:
        UsageError: it is not.
    """
    reason = "" if text.strip() else "it is empty"
    if "\0" in text:
        reason = "it holds a NUL character"
    for query in (f"SELECT (\n{text}\n)", f"SELECT \n{text}\n"):
        reason = reason or _not_an_expression(conn, query)
    if reason:
        raise UsageError(
            f"the condition {text!r} is not one SQL expression: {reason}. Write for example: label = 'positive' AND "
            f"score > 3. Columns: {', '.join(visible_columns(columns))}."
        )


def _not_an_expression(conn: Any, query: str) -> str:
    """Say why the query is anything but SELECT and one expression; empty where it is just that."""
    import duckdb

    try:
        parsed = json.loads(first(conn.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]))[0])
    except duckdb.Error as error:
        return str(error)
    if parsed["error"]:
        return str(parsed.get("error_message", "it cannot be parsed"))
    if len(parsed["statements"]) != 1:
        return "it holds more than one statement"
    node = parsed["statements"][0]["node"]
    plain = (
        node["type"] == "SELECT_NODE"
        and len(node["select_list"]) == 1
        and node["from_table"]["type"] == "EMPTY"
        and not any(node.get(key) for key in (*_EMPTY, "modifiers", "group_expressions"))
        and not node["cte_map"]["map"]
    )
    return "" if plain else "it is more than an expression"
