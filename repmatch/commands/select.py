"""The command `repmatch select`."""

from __future__ import annotations

from typing import Any

import click

from repmatch.completion import complete_dataset
from repmatch.context import Context, device_option, examples, json_option, model_option, pass_context, wait_option
from repmatch.output import shorten


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("-k", "size", required=True, metavar="N|P%", help="Picks, or a share of the dataset such as 5%.")
@click.option("--strategy", default="facility-location", show_default=True, help="How to choose; see below.")
@click.option("--balance", metavar="FIELD", help="Equal counts for every value of this column.")
@click.option("--stratify", metavar="FIELD", help="Keep the dataset's proportions of this column.")
@click.option("--name", help="Name of the coreset.  [default: made from the arguments]")
@click.option("--replace", is_flag=True, help="Replace a coreset of that name.")
@click.option("--seed", type=int, default=0, show_default=True, help="For strategies that draw.")
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch select reviews -k 100 --balance label --name core
    repmatch select reviews -k 5% --strategy random --seed 7
    """
)
def select(context: Context, /, dataset: str, size: str, as_json: bool, wait: float, **given: Any) -> None:
    """Choose a coreset of DATASET and keep it under a name.

    \b
    Strategies:
      facility-location   picks that together resemble every instance (exact greedy, with a certificate)
      k-medoids           the same, improved by swaps
      partitioned         the same in parts, for very many instances; without --balance or --stratify
      graph-cut           picks that resemble all and differ from each other
      saturated-coverage  all picks together cover every instance up to a limit
      herding             picks whose mean is that of all
      k-center            no instance is far from a pick
      dpp                 picks that span a large volume
      top                 highest score against the whole dataset's adapter, trained on demand
      random              by chance
    """  # noqa: D301 -- click reads the backspace: keep these lines apart
    from repmatch.curator.selection import composition

    settings = {name: given.pop(name) for name in ("model", "device")}
    output = context.output
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **settings).select(dataset, size, **given)
        labels = composition(store, dataset, found.ids)
        rows = list(found.to_polars().iter_rows())
        texts = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=[row[1] for row in rows[:10]])}
    for note in found.selection.notes:
        output.warn(note)
    if as_json:
        for rank, name, gain, _ in rows:
            output.json({"rank": rank, "id": name, "gain": gain})
        return
    shown = [(*row, texts[row[1]].label, shorten(texts[row[1]].text, 48)) for row in rows[:10]]
    output.table(["rank", "id", "gain", "represents", "label", "text"], shown)
    if len(rows) > 10:
        output.line(f"and {len(rows) - 10} more")
    output.line("labels: " + ", ".join(f"{label} {picked} of {whole}" for label, (picked, whole) in labels.items()))
    certainty = found.selection.certainty
    if certainty is not None:
        output.line(f"objective {found.selection.value:.4f}: at least {certainty:.1%} of the best possible")
    output.line(f"kept as {found.name}")
    output.hint(f"next: repmatch export {found.name} -o {found.name}.jsonl")
