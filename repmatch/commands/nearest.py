"""The command `repmatch nearest`."""

from __future__ import annotations

from typing import Any

import click

from repmatch.completion import complete_dataset
from repmatch.context import Context, device_option, ensemble_option, examples, json_option, model_option, pass_context
from repmatch.output import printable, shorten


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.argument("instances", nargs=-1, metavar="[ID]...")
@click.option("--text", help="A new text, in place of an id; of conversations also the messages' JSON text.")
@click.option("--text-pair", help="Its second text, for a dataset of pairs.")
@click.option("--label", help="Its label.  [default: each label is tried and the best counts]")
@click.option("-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@click.option("--signed", is_flag=True, help="By the cosine of the two ΔW, which sees labels, from -1 to 1.")
@click.option("--where", metavar="SQL", help="Only among instances that meet this condition.  [default: among all]")
@ensemble_option
@model_option
@device_option
@json_option
@pass_context
@examples(
    """
    repmatch nearest reviews review-17 -k 5
    repmatch nearest reviews review-17 --where "label = 'negative'"
    repmatch nearest tweets tweet-17 --ensemble tweets-2
    repmatch nearest reviews --text "a dull , endless film" --label negative
    """
)
def nearest(
    context: Context, /, dataset: str, instances: tuple[str, ...], count: int, as_json: bool, **given: Any
) -> None:
    """Find the nearest instances of DATASET to one of its own by ID, or to a new text.

    Several IDs are answered in one pass over the store; each then has hits of its own, told apart by `query`.
    """
    query = {name: given.pop(name) for name in ("text", "text_pair", "label", "signed", "where", "ensemble")}
    with context.open(as_json=as_json) as store:
        curator = context.curator(store, **given)
        if len(instances) > 1:
            found = curator.nearest_all(dataset, instances, k=count, **query)
        else:
            found = [curator.nearest(dataset, *instances, k=count, **query)]
        wanted = list(dict.fromkeys(name for neighbours in found for name in neighbours.ids))
        texts = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=wanted)}
    for asked, neighbours in zip(instances or ("",), found, strict=True):
        hits = zip(neighbours.ids, neighbours.scores.tolist(), strict=True)
        rows = [(rank, name, score) for rank, (name, score) in enumerate(hits, 1)]
        if as_json:
            more = {"query": asked} if len(instances) > 1 else {}
            for rank, name, score in rows:
                context.output.json({**more, "rank": rank, "id": name, "score": score})
            continue
        if len(instances) > 1:
            context.output.line(f"nearest to {printable(asked)}")
        header = ["rank", "id", "cosine" if neighbours.signed else "score", "label", "text"]
        context.output.table(header, [(*row, texts[row[1]].label, shorten(texts[row[1]].text)) for row in rows])
        context.output.line(f"unrelated directions would score {neighbours.chance:.4f}")
