"""The command `repmatch sql`."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from repmatch.context import Context, examples, json_option, pass_context
from repmatch.errors import UsageError
from repmatch.output import shorten

if TYPE_CHECKING:
    from repmatch.store import Store

VIEWS = ("instances", "datasets", "spaces", "scores", "coresets", "picks", "runs", "adapters", "quarantine")


@click.command()
@click.argument("query", required=False)
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True, help="Rows of the table.")
@click.option("--csv", "as_csv", is_flag=True, help="Print all rows as CSV.")
@click.option("--views", is_flag=True, help="List the views and their columns.")
@json_option
@pass_context
@examples(
    """
    repmatch sql "SELECT dataset, label, count(*) AS n, avg(loss) AS loss FROM instances GROUP BY ALL ORDER BY n DESC"
    repmatch sql "SELECT id, score FROM scores WHERE score > 0.02" --json
    repmatch sql --views
    """
)
def sql(context: Context, /, query: str | None, limit: int, as_csv: bool, views: bool, as_json: bool) -> None:
    """Query the store with SQL, read-only.

    QUERY is one SELECT of DuckDB's SQL over the views instances, datasets, spaces, scores, coresets, picks, runs,
    adapters and quarantine. It cannot write, and cannot read files.
    """
    if (query is None) != views:
        raise UsageError("give one SELECT, or --views: one of the two.")
    output = context.output
    with context.open(as_json=as_json) as store:
        if query is None:
            _views(context, store)
            return
        found = store.sql(query)
    if as_json:
        for row in found.iter_rows(named=True):
            output.json({name: _plain(value) for name, value in row.items()})
        return
    if as_csv:
        for line in _csv([found.columns, *found.iter_rows()]):
            output.raw(line)
        return
    output.table(found.columns, [[_cell(value) for value in row] for row in found.head(limit).iter_rows()])
    if found.height > limit:
        output.hint(f"the first {limit} of {found.height} rows; --limit shows more")


def _views(context: Context, store: Store) -> None:
    for name in VIEWS:
        columns = {column: str(kind) for column, kind in store.sql(f"SELECT * FROM {name} LIMIT 0").schema.items()}
        if context.output.as_json:
            context.output.json({"view": name, "columns": columns})
        else:
            context.output.line(f"{name}: " + ", ".join(f"{column} {kind}" for column, kind in columns.items()))


def _plain(value: Any) -> Any:
    """Return a value as JSON takes it: times as text, NaN as null."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _cell(value: Any) -> object:
    if isinstance(value, list | dict):
        return shorten(json.dumps(_plain(value), ensure_ascii=False))
    if isinstance(value, str):
        return shorten(value)
    return value if value is None or isinstance(value, int | float | bool) else str(value)


def _csv(rows: list[Any]) -> list[str]:
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([json.dumps(_plain(v), ensure_ascii=False) if isinstance(v, list | dict) else v for v in row])
    return out.getvalue().rstrip("\n").split("\n") if rows else []
