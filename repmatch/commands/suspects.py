"""The command `repmatch suspects`."""

from __future__ import annotations

import click

from repmatch.context import Context, examples, json_option, pass_context
from repmatch.output import shorten


@click.command()
@click.argument("dataset")
@click.option("-k", "count", type=click.IntRange(min=1), default=20, show_default=True, help="How many.")
@json_option
@pass_context
@examples(
    """
    repmatch suspects reviews -k 50
    repmatch suspects reviews --json > look-at-these.jsonl
    """
)
def suspects(context: Context, /, dataset: str, count: int, as_json: bool) -> None:
    """Find instances of DATASET whose gradients oppose all others': likely label errors and conflicts.

    Agreement is the mean signed cosine of an instance's ΔW with those of all other instances; the worst come first,
    each with the instance it conflicts with most. Factors from a cold start hardly see single labels: ingest with a
    warm one.
    """
    from repmatch.curator.suspects import suspects as find

    with context.open(as_json=as_json) as store:
        found = find(store, dataset, k=count)
        wanted = {*found.ids, *(name for name in found.conflicts if name is not None)}
        rows = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=sorted(wanted))}
    output = context.output
    if not found.warm:
        output.warn("these factors come from a cold start, which hardly shows label errors; see ingest --warm-start.")
    table = found.to_polars().iter_rows()
    if as_json:
        for rank, name, agreed, conflict, cosine in table:
            record = {"rank": rank, "id": name, "agreement": agreed, "conflict": conflict, "opposition": cosine}
            output.json(record)
        return
    shown = [
        (
            *(rank, name, agreed, rows[name].label, shorten(rows[name].text, 44)),
            *(("", "") if conflict is None else (conflict, rows[conflict].label)),
        )
        for rank, name, agreed, conflict, _ in table
    ]
    output.table(["rank", "id", "agreement", "label", "text", "conflicts with", "its label"], shown)
    output.line(f"the dataset's mean agreement is {found.mean:.4f}")
