"""The command `repmatch sql`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from repmatch.context import Context, examples, json_option, pass_context
from repmatch.errors import UsageError
from repmatch.output import shorten

if TYPE_CHECKING:
    from repmatch.store import Store

VIEWS = ("instances", "datasets", "spaces", "scores", "coresets", "picks", "runs", "adapters", "quarantine")
BATCH = 4096


@click.command()
@click.argument("query", required=False)
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True, help="Rows of the table.")
@click.option(
    "--csv", "as_csv", is_flag=True, help="Print all rows as CSV; exact in a file or pipe, escaped on a terminal."
)
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
    adapters and quarantine. It cannot write, and cannot read files. Repeated names of columns become name_1, name_2;
    types that are neither number, text nor truth value, times for instance, are printed as DuckDB's text.
    """
    if (query is None) != views:
        raise UsageError("give one SELECT, or --views: one of the two.")
    output = context.output
    with context.open(as_json=as_json) as store:
        if query is None:
            _views(context, store)
            return
        found = store.arrow(query, plain=True)
    names = found.column_names
    if as_json:
        for row in _rows(found):
            output.json({name: _plain(value) for name, value in zip(names, row, strict=True)})
        return
    if as_csv:
        for line in _csv(itertools.chain([names], _rows(found))):
            output.raw(line)
        return
    output.table(names, [[_cell(value) for value in row] for row in _rows(found.slice(0, limit))])
    if found.num_rows > limit:
        output.hint(f"the first {limit} of {found.num_rows} rows; --limit shows more")


def _views(context: Context, store: Store) -> None:
    for name in VIEWS:
        columns = {column: str(kind) for column, kind in store.sql(f"SELECT * FROM {name} LIMIT 0").schema.items()}
        if context.output.as_json:
            context.output.json({"view": name, "columns": columns})
        else:
            context.output.line(f"{name}: " + ", ".join(f"{column} {kind}" for column, kind in columns.items()))


def _rows(table: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of an Arrow table that holds plain values."""
    for batch in table.to_batches(max_chunksize=BATCH):
        yield from zip(*(column.to_pylist(maps_as_pydicts="strict") for column in batch.columns), strict=True)


def _plain(value: Any) -> Any:
    """Return a value as JSON takes it: NaN as null, infinity as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value


def _cell(value: Any) -> object:
    if isinstance(value, list | dict):
        return shorten(json.dumps(_plain(value), ensure_ascii=False))
    return shorten(value) if isinstance(value, str) else _number(value)


def _number(value: Any) -> Any:
    """Return a decimal as its digits, anything else as it is."""
    return format(value, "f") if isinstance(value, Decimal) else value


def _csv(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield rows as CSV, without the end of their last lines."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        cells = (json.dumps(_plain(v), ensure_ascii=False) if isinstance(v, list | dict) else _number(v) for v in row)
        writer.writerow(list(cells))
        yield out.getvalue()[:-1]
        out.seek(0)
        out.truncate()
