"""The command `repmatch nearest`."""

from __future__ import annotations

from typing import Any

import click

from repmatch.completion import complete_dataset
from repmatch.context import Context, device_option, examples, json_option, model_option, pass_context
from repmatch.output import shorten


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.argument("instance", required=False, metavar="[ID]")
@click.option("--text", help="A new text, in place of an id.")
@click.option("--text-pair", help="Its second text, for a dataset of pairs.")
@click.option("--label", help="Its label.  [default: each label is tried and the best counts]")
@click.option("-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@click.option("--signed", is_flag=True, help="By the cosine of the two ΔW, which sees labels, from -1 to 1.")
@model_option
@device_option
@json_option
@pass_context
@examples(
    """
    repmatch nearest reviews review-17 -k 5
    repmatch nearest reviews --text "a dull , endless film" --label negative
    """
)
def nearest(context: Context, /, dataset: str, instance: str | None, count: int, as_json: bool, **given: Any) -> None:
    """Find the nearest instances of DATASET to one of its own by ID, or to a new text."""
    query = {name: given.pop(name) for name in ("text", "text_pair", "label", "signed")}
    with context.open(as_json=as_json) as store:
        found = context.curator(store, **given).nearest(dataset, instance, k=count, **query)
        texts = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=list(found.ids))}
    rows = [(i + 1, name, float(s)) for i, (name, s) in enumerate(zip(found.ids, found.scores, strict=True))]
    if as_json:
        for rank, name, value in rows:
            context.output.json({"rank": rank, "id": name, "score": value})
        return
    header = ["rank", "id", "cosine" if found.signed else "score", "label", "text"]
    context.output.table(header, [(*row, texts[row[1]].label, shorten(texts[row[1]].text)) for row in rows])
    context.output.line(f"unrelated directions would score {found.chance:.4f}")
