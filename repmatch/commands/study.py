"""The commands `repmatch study ...`."""

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


@click.group(short_help="Find out what the measure sees in your data.")
@examples(
    """
    repmatch study field reviews --field label
    repmatch study layers reviews
    """
)
def study() -> None:
    """Find out what the measure sees in your data: each study ends with a verdict in plain words."""


@study.command()
@click.argument("dataset")
@click.option("--field", required=True, help="A column with 2 to 100 different values.")
@click.option(
    "--embeddings/--no-embeddings", default=True, show_default=True, help="Compare with mean-pooled embeddings."
)
@model_option
@device_option
@json_option
@pass_context
@examples("repmatch study field nli --field heuristic")
def field(context: Context, /, dataset: str, field: str, embeddings: bool, as_json: bool, **given: Any) -> None:
    """Do instances of DATASET that share a column's value lie together?"""
    from repmatch.curator.study.fields import study_field

    with context.open(as_json=as_json) as store:
        embed = None
        if embeddings:
            from repmatch.curator.evaluate.embeddings import embedder

            embed = embedder(context.curator(store, **given), dataset)
        found = study_field(store, dataset, field, embed)
    output = context.output
    output.close()
    if as_json:
        output.json(found.as_json())
        return
    shown = list(zip(found.values, found.counts, found.similarity.tolist(), strict=True))
    if len(shown) <= 8:
        output.table(["value", "instances", *found.values], [(v, n, *row) for v, n, row in shown])
    else:
        output.table(["value", "instances", "within"], [(v, n, row[at]) for at, (v, n, row) in enumerate(shown)])
    for said in found.verdict():
        output.line(said)


@study.command()
@click.argument("dataset")
@click.option("--field", help="The column that neighbours should share.  [default: the label]")
@json_option
@pass_context
@examples("repmatch study layers reviews")
def layers(context: Context, /, dataset: str, field: str | None, as_json: bool) -> None:
    """Which matrices tell instances of DATASET apart, alone and left out?"""
    from repmatch.curator.study.layers import study_layers

    with context.open(as_json=as_json) as store:
        found = study_layers(store, dataset, field)
    output = context.output
    if as_json:
        output.json(found.as_json())
        return
    rows = zip(found.matrices, found.alone, found.without, found.zero, strict=True)
    output.table(
        ["matrix", "alone", "without it", "zero gradients"],
        [(name, f"{a:.1%}", f"{w:.1%}", f"{z:.1%}") for name, a, w, z in rows],
    )
    for said in found.verdict():
        output.line(said)


@study.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True, help="Orders of the rows.")
@click.option("--halves/--no-halves", default=True, show_default=True, help="Compare two random halves of each too.")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch study seeds reviews --epochs 1
    repmatch study seeds reviews tweets questions --seeds 3
    """
)
def seeds(
    context: Context, /, names: tuple[str, ...], seeds: int, halves: bool, as_json: bool, wait: float, **given: Any
) -> None:
    """How alike are datasets, in units of the noise that another order of the same rows makes?

    NAME is a dataset, subset, coreset or 'DATASET[SQL]'. Adapters are trained once for every order and kept.
    """
    from repmatch.curator.study.seeds import study_seeds

    with context.open(as_json=as_json, wait=wait) as store:
        found = study_seeds(context.curator(store, **given).trainer, names, seeds=seeds, halves=halves)
    output = context.output
    output.close()
    if as_json:
        output.json(found.as_json())
        return
    cells = [
        [name, *(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, spread, strict=True))]
        for name, mean, spread in zip(found.names, found.mean, found.spread, strict=True)
    ]
    output.table(["", *found.names], cells)
    for said in found.verdict():
        output.line(said)


@study.command()
@click.argument("names", nargs=-1, required=True, metavar="DATASET DATASET...")
@json_option
@pass_context
@examples(
    """
    repmatch study spaces reviews reviews-rank-4
    repmatch study spaces cold warm --json
    """
)
def spaces(context: Context, /, names: tuple[str, ...], as_json: bool) -> None:
    """Do several spaces see the same in the same rows? Models, ranks, starts, targets.

    Ingest one file into several datasets with other options first; rows of the same id, text and label are compared.
    """
    from repmatch.curator.study.spaces import study_spaces

    with context.open(as_json=as_json) as store:
        found = study_spaces(store, names)
    output = context.output
    if as_json:
        output.json(found.as_json())
        return
    output.line(f"centred kernel alignment on {found.rows} shared rows")
    tables = zip(found.names, found.alignment.tolist(), strict=True)
    output.table(["", *found.names], [[name, *row] for name, row in tables])
    for said in found.verdict():
        output.line(said)
