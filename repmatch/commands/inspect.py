"""The command `repmatch inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from repmatch.completion import complete_dataset
from repmatch.context import Context, examples, json_option, pass_context
from repmatch.output import shorten

if TYPE_CHECKING:
    from collections.abc import Iterable

    from repmatch.curator.inspection import Inspection
    from repmatch.output import Output
    from repmatch.store import Store


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.argument("instance", metavar="ID")
@click.option("-k", "count", type=click.IntRange(min=1), default=5, show_default=True, help="How many near ones.")
@json_option
@pass_context
@examples("repmatch inspect reviews review-17")
def inspect(context: Context, /, dataset: str, instance: str, count: int, as_json: bool) -> None:
    """Explain one instance of DATASET: row, scores by layer, near and opposed ones, picks that stand for it, runs."""
    from repmatch.curator.inspection import inspect as explain

    with context.open(as_json=as_json) as store:
        found = explain(store, dataset, instance, k=count)
        if as_json:
            context.output.json(found.as_json())
            return
        _show(found, store, context.output)


def _show(found: Inspection, store: Store, output: Output) -> None:
    row, facts = found.row, found.facts
    output.line(f"{row.id}, instance {found.place[0]} of {found.place[1]} of {found.dataset}, label {row.label}")
    output.line(f"from {row.source}, line {row.line}")
    output.line("")
    output.line(row.text if row.text_pair is None else f"{row.text}\n--\n{row.text_pair}")
    output.line("")
    cut = ", cut at the maximum length" if facts["truncated"] else ""
    output.line(f"{facts['tokens']} tokens{cut}, loss {facts['loss']:.4f} at the shared start")
    output.line("")
    names = list(found.scores)
    rows = []
    for i, (matrix, norm) in enumerate(zip(found.matrices, found.gradient, strict=True)):
        rows.append([matrix, float(norm), *(found.scores[name][1][i] for name in names)])
    rows.append(["mean", "", *(found.scores[name][0] for name in names)])
    output.table(["matrix", "gradient", *(f"score against {shorten(name, 40)}" for name in names)], rows)
    output.line(f"unrelated directions would score {found.chance:.4f}")
    if not names:
        output.hint(f"for scores: repmatch score {found.dataset}")
    if found.nearest is not None:
        _near(
            "nearest by score", zip(found.nearest.ids, found.nearest.scores.tolist(), strict=True), found, store, output
        )
    if found.signed is not None:
        _near(
            "nearest by cosine", zip(found.signed.ids, found.signed.scores.tolist(), strict=True), found, store, output
        )
    _near("most opposed by cosine", found.opposed, found, store, output)
    for stand_in in found.stand_ins:
        if stand_in.rank is not None:
            output.line(
                f"coreset {stand_in.coreset}: pick {stand_in.rank}, gain {stand_in.gain:.4f}, stands for "
                f"{stand_in.represents} instances"
            )
        elif stand_in.pick is not None:
            output.line(f"coreset {stand_in.coreset}: {stand_in.pick} stands for it, score {stand_in.similarity:.4f}")
    if found.adapters:
        output.line("adapters trained on it: " + ", ".join(found.adapters))
    for number, command, started, status in found.runs[-5:]:
        output.line(f"run {number}: {command}, {started}, {status}")


def _near(title: str, pairs: Iterable[tuple[str, float]], found: Inspection, store: Store, output: Output) -> None:
    kept = list(pairs)
    if not kept:
        return
    texts = {row.id: row for row in store.tasks(found.dataset, ids=[name for name, _ in kept])}
    output.line("")
    shown = [(float(score), name, texts[name].label, shorten(texts[name].text)) for name, score in kept]
    output.table([title, "id", "label", "text"], shown)
