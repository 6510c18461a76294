"""The command `repmatch score`."""

from __future__ import annotations

from typing import Any

import click

from repmatch.completion import complete_dataset, complete_subset
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
@click.argument("dataset", shell_complete=complete_dataset)
@click.option(
    "--against",
    metavar="SUBSET",
    shell_complete=complete_subset,
    help="A dataset, subset, coreset or 'DATASET[SQL]'.  [default: DATASET]",
)
@click.option(
    "--where", metavar="SQL", help="Train the subset adapter on the rows that match, such as \"label = 'x'\"."
)
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Rows of the table.")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch score reviews
    repmatch score reviews --where "label = 'positive'" --json > scores.jsonl
    """
)
def score(context: Context, /, dataset: str, against: str | None, where: str | None, limit: int, **given: Any) -> None:
    """Score instances of DATASET against a subset adapter, best first.

    The subset adapter (the whole dataset's by default) is trained on demand, kept and used again.
    """
    as_json, wait = given.pop("as_json"), given.pop("wait")
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **given).score(dataset, against=against, where=where)
    output = context.output
    if as_json:
        for name, value in zip(found.ids, found.scores.tolist(), strict=True):
            output.json({"id": name, "score": value})
        return
    record = found.adapter.record
    output.line(f"{len(found.ids)} instances of {dataset} against {found.against}, best first")
    output.table(
        ["rank", "id", "score"],
        [(i + 1, found.ids[i], float(found.scores[i])) for i in range(min(limit, len(found.ids)))],
    )
    output.line("")
    means = found.per_matrix.mean(axis=0)
    output.table(["matrix", "mean score"], [(n, float(v)) for n, v in zip(found.matrices, means, strict=True)])
    output.line(f"mean {float(found.scores.mean()):.4f}; unrelated directions would score {found.chance:.4f}")
    if "steps" not in record:
        output.hint(f"adapter: imported, {record['layers']} matrices, of which {len(found.matrices)} are adapted here")
        return
    output.hint(
        f"adapter: {record['steps']} steps on {record['instances']} instances, loss {record['first_loss']:.3f} to "
        f"{record['last_loss']:.3f}, {record['seconds']:.0f} s when it was trained"
    )
