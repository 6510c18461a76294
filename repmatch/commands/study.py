"""The commands `repmatch study ...`."""

from __future__ import annotations

from typing import Any

import click

from repmatch.context import (
    Context,
    device_option,
    ensemble_option,
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
@ensemble_option
@model_option
@device_option
@json_option
@pass_context
@examples(
    """
    repmatch study field nli --field heuristic
    repmatch study field nli --field heuristic --ensemble nli-2
    """
)
def field(
    context: Context,
    /,
    dataset: str,
    field: str,
    embeddings: bool,
    ensemble: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Do instances of DATASET that share a column's value lie together?"""
    from repmatch.curator.study.fields import study_field

    with context.open(as_json=as_json) as store:
        embed = None
        if embeddings:
            from repmatch.curator.embeddings import embedder

            embed = embedder(context.curator(store, **given), dataset)
        found = study_field(store, dataset, field, embed, ensemble=ensemble)
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


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        said = f"{text!r}; expected numbers with commas between, such as 1,4,16."
        raise click.BadParameter(said, param_hint=option) from None


@study.command()
@click.argument("dataset")
@click.option("--sizes", default="1,2,4,8,16,32", show_default=True, help="Instances in a batch, comma between.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw of batches.")
@model_option
@device_option
@json_option
@pass_context
@examples("repmatch study batches reviews --sizes 1,4,16")
def batches(context: Context, /, dataset: str, sizes: str, seed: int, as_json: bool, **given: Any) -> None:
    """How would the factors of DATASET's instances change if they were learned in batches?"""
    from repmatch.curator.study.batches import study_batches

    numbers = _numbers(sizes, "--sizes")
    with context.open(as_json=as_json) as store:
        found = study_batches(context.curator(store, **given).trainer, dataset, sizes=numbers, seed=seed)
    output = context.output
    output.close()
    if as_json:
        output.json(found.as_json())
        return
    named = (found.inside, found.outside, found.alike, found.mixed)
    cells = [[b, *("" if x != x else f"{x:.4f}" for x in row)] for b, *row in zip(found.sizes, *named, strict=True)]
    output.table(["batch", "holds it", "does not", "others of its label", "others of other labels"], cells)
    for said in found.verdict():
        output.line(said)


@study.command()
@click.argument("name", metavar="NAME")
@click.option("--ranks", default="1,2,4,8", show_default=True, help="Of LoRA, comma between.")
@click.option("--full-rate", type=float, default=1e-4, show_default=True, help="Learning rate of full fine-tuning.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw of held-out instances.")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples("repmatch study information reviews --ranks 1,4 --epochs 1")
def information(
    context: Context, /, name: str, ranks: str, full_rate: float, seed: int, as_json: bool, wait: float, **given: Any
) -> None:
    """Does LoRA lose what full fine-tuning of the same matrices would learn?

    A fifth of NAME (a dataset, subset, coreset or 'DATASET[SQL]') is held out; head, order and steps are the same.
    """
    from repmatch.curator.study.information import study_information

    numbers = _numbers(ranks, "--ranks")
    with context.open(as_json=as_json, wait=wait) as store:
        trainer = context.curator(store, **given).trainer
        found = study_information(trainer, name, ranks=numbers, rate=full_rate, seed=seed)
    output = context.output
    output.close()
    if as_json:
        output.json(found.as_json())
        return
    rows = zip(found.ranks, found.accuracy, found.loss, found.overlap, found.chance, found.captured, strict=True)
    cells = [
        [f"LoRA, rank {r}", f"{a:.1%}", f"{n:.3f}", f"{o:.3f}", f"{c:.3f}", f"{s:.1%}"] for r, a, n, o, c, s in rows
    ]
    full = ["full fine-tuning", f"{found.full_accuracy:.1%}", f"{found.full_loss:.3f}", "", "", ""]
    start = ["before training", f"{found.start_accuracy:.1%}", "", "", "", ""]
    output.line(f"{found.trained} instances trained on, {found.held} tested on")
    header = ["by", "accuracy", "loss", "directions shared", "chance", "of the full update"]
    output.table(header, [start, *cells, full])
    for said in found.verdict():
        output.line(said)
