"""The command `repmatch suspects`."""

from __future__ import annotations

import click

from repmatch.completion import complete_dataset
from repmatch.context import Context, ensemble_option, examples, json_option, pass_context
from repmatch.output import shorten


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("-k", "count", type=click.IntRange(min=1), default=20, show_default=True, help="How many.")
@ensemble_option
@json_option
@pass_context
@examples(
    """
    repmatch suspects reviews -k 50
    repmatch suspects tweets --ensemble tweets-2
    repmatch suspects reviews --json > look-at-these.jsonl
    """
)
def suspects(context: Context, /, dataset: str, count: int, ensemble: tuple[str, ...], as_json: bool) -> None:
    """Find likely label errors and conflicts in DATASET.

    Suspect is an instance with a high loss whose weight change opposes those of its nearest neighbours. Each comes with
    the instance that opposes it most. Factors from a cold start hardly see single labels: ingest with --warm-start.
    """
    from repmatch.curator.suspects import suspects as find

    with context.open(as_json=as_json) as store:
        found = find(store, dataset, k=count, ensemble=ensemble)
        wanted = {*found.ids, *(name for name in found.conflicts if name is not None)}
        rows = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=sorted(wanted))}
    output = context.output
    if not found.warm:
        output.warn("these factors come from a cold start, which hardly shows label errors; see ingest --warm-start.")
    table = found.to_polars()
    if as_json:
        for record in table.to_dicts():
            output.json(record)
        return
    shown = [
        (
            *(rank, name, suspicion, loss, agreement, rows[name].label, shorten(rows[name].text, 44)),
            *(("", "") if conflict is None else (conflict, rows[conflict].label)),
        )
        for rank, name, suspicion, loss, agreement, conflict, _ in table.iter_rows()
    ]
    header = ["rank", "id", "suspicion", "loss", "agreement", "label", "text", "conflicts with", "its label"]
    output.table(header, shown)
