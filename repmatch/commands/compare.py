"""The command `repmatch compare`."""

from __future__ import annotations

from typing import Any

import click

from repmatch.context import (
    Context,
    device_option,
    epochs_option,
    examples,
    json_option,
    model_option,
    pass_context,
    wait_option,
)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME...")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch compare reviews tweets
    repmatch compare "reviews[label = 'positive']" "reviews[label = 'negative']" --json
    """
)
def compare(context: Context, /, names: tuple[str, ...], as_json: bool, wait: float, **given: Any) -> None:
    """Compare datasets, subsets or coresets by the RepMatch scores of their adapters.

    NAME is a dataset, a named subset, a coreset, or 'DATASET[SQL]' for the rows that match. --json adds every layer.
    """
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **given).compare(*names)
    if as_json:
        context.output.json(found.as_json())
        return
    rows = [[name, *map(float, row)] for name, row in zip(found.names, found.scores, strict=True)]
    context.output.table(["", *found.names], rows)
    context.output.line(f"unrelated directions would score {found.chance:.4f}")
