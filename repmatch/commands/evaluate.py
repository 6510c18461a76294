"""The command `repmatch evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from repmatch.context import Context, device_option, examples, json_option, model_option, pass_context, wait_option


@click.command()
@click.argument("dataset")
@click.option("--test", "tests", multiple=True, required=True, metavar="FILE", help="Held-out rows; may be repeated.")
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    metavar="S",
    help="NAME, or NAME+RULE+...; may be repeated.  [default: facility-location]",
)
@click.option("--coreset", "coresets", multiple=True, metavar="NAME", help="A stored coreset; may be repeated.")
@click.option("--sizes", default="50,100,200", show_default=True, help="Rows or shares such as 5%, comma between.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Trainings of each selection.")
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True, help="Optimiser steps of each.")
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Adapt this many of the last layers; those below run once a row, which is faster.  [default: all]",
)
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curves: .png, .svg.")
@click.option("--force", is_flag=True, help="Let --plot replace a file that is no earlier plot too.")
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch evaluate reviews --test held-out.jsonl --seeds 3
    repmatch evaluate reviews --test held-out.jsonl --strategy facility-location+balance=label --plot curves.png
    """
)
def evaluate(
    context: Context, /, dataset: str, picture: Path | None, force: bool, as_json: bool, wait: float, **given: Any
) -> None:
    """Train on selections of DATASET and test them on held-out rows: does the choice beat chance?

    Random rows, the full dataset, the longest rows and mean-pooled embeddings of the same model are always compared
    too. Every training has the same number of steps. Each is kept in the store, so that an interrupted evaluation goes
    on where it was. Test rows that stand in DATASET, to the letter or nearly, are left out and counted.

    \b
    Baselines by name, beside the strategies of select:
      random, full, longest, embeddings, embeddings-k-means, joined, loss-high, loss-low, loss-middle
    \b
    Rules, with + between:
      balance=FIELD, stratify=FIELD; for strategies of select also signed, kernel=NAME,
      matrices=PATTERN, represent=NAME
    """  # noqa: D301 -- click reads the backspace: keep these lines apart
    from repmatch.curator.evaluate.evaluation import EvaluateOptions, recipe_of
    from repmatch.curator.evaluate.evaluation import evaluate as run

    options = EvaluateOptions(
        candidates=given.pop("strategies") or ("facility-location",),
        coresets=given.pop("coresets"),
        sizes=tuple(part.strip() for part in given.pop("sizes").split(",") if part.strip()),
        seeds=given.pop("seeds"),
        recipe=recipe_of(steps=given.pop("steps"), layers=given.pop("layers")),
    )
    tests = given.pop("tests")
    if picture is not None:
        from repmatch.curator.evaluate.plot import check_plot, plot

        check_plot(picture, force=force)
    with context.open(as_json=as_json, wait=wait) as store:
        if picture is not None:
            check_plot(picture, store, force=force)
        found = run(context.curator(store, **given), dataset, tests, options)
    output = context.output
    output.close()
    for note in found.notes:
        output.warn(note)
    if picture is not None:
        plot(found, picture, force=force)
        output.hint(f"curves in {picture}")
    if as_json:
        for line in found.lines:
            output.json(line.as_json())
        return
    output.line(f"{dataset}: accuracy on {found.test_rows} held-out rows, {found.lines[0].steps} steps each")
    output.table(found.header, found.cells())
    for said in found.verdict():
        output.line(said)
    if found.reused:
        output.hint(f"{found.reused} trainings were in the store already")
