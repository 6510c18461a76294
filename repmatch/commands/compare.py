"""The command `repmatch compare`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from repmatch.completion import complete_subset
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

if TYPE_CHECKING:
    from repmatch.curator.adapter_comparison import AdapterComparison
    from repmatch.output import Output


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME...", shell_complete=complete_subset)
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch compare reviews tweets
    repmatch compare "reviews[label = 'positive']" "reviews[label = 'negative']" --json
    repmatch compare path/to/lora path/to/another-lora
    """
)
def compare(context: Context, /, names: tuple[str, ...], as_json: bool, wait: float, **given: Any) -> None:
    """Compare datasets, subsets, coresets or LoRA checkpoints by the RepMatch scores of their adapters.

    NAME is a dataset, a named subset, a coreset, 'DATASET[SQL]' for the rows that match, an imported adapter, or the
    path of a LoRA checkpoint (a folder with adapter_model.safetensors, or a safetensors file). Checkpoints may be of
    any rank and partly different targets, and need neither their base model nor a store. --json adds every layer.
    """
    from repmatch.curator.lora import is_path, read_lora

    context.output.as_json = as_json
    if all(is_path(name) for name in names):
        from repmatch.curator.adapter_comparison import compare_adapters

        _show(compare_adapters([read_lora(name) for name in names]), context.output)
        return
    from repmatch.curator.scoring import Comparison

    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **given).compare(*names)
    if not isinstance(found, Comparison):
        _show(found, context.output)
        return
    if as_json:
        context.output.json(found.as_json())
        return
    rows = [[name, *map(float, row)] for name, row in zip(found.names, found.scores, strict=True)]
    context.output.table(["", *found.names], rows)
    if not found.own_start:
        context.output.hint(
            "these datasets have warm starts of their own; their adapters were trained from the cold one."
        )
    context.output.line(f"unrelated directions would score {found.chance:.4f}")


def _show(found: AdapterComparison, output: Output) -> None:
    for note in found.notes:
        output.warn(note)
    if output.as_json:
        output.json(found.as_json())
        return
    if len(found.names) == 2:
        header = ["layer", "score", "chance", "cosine", "ranks", "norm 1", "norm 2"]
        rows = []
        for layer in found.layers:
            values = [float(layer.scores[0, 1]), float(layer.chances[0, 1]), _number(layer.cosines[0, 1])]
            rows.append([layer.name, *values, f"{layer.ranks[0]} {layer.ranks[1]}", *map(float, layer.norms)])
        output.table(header, rows)
        output.line("")
        output.line(
            f"score {found.scores[0, 1]:.4f} over {len(found.layers)} matrices, {_cosine(found)}; "
            f"unrelated directions of these ranks would score {found.chance:.4f}"
        )
    else:
        rows = [[name, *map(_number, row)] for name, row in zip(found.names, found.scores, strict=True)]
        output.table(["", *found.names], rows)
        output.line(f"unrelated directions of these ranks would score {found.chance:.4f}; --json shows every layer")
    for name, layers in found.alone.items():
        if layers:
            more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
            output.line(f"only in {name}: {', '.join(layers[:3])}{more}")


def _cosine(found: AdapterComparison) -> str:
    """Say the cosine of two adapters, or which of them is zero and has none."""
    if not math.isnan(found.cosines[0, 1]):
        return f"cosine {found.cosines[0, 1]:.4f}"
    zero = [name for i, name in enumerate(found.names) if all(layer.norms[i] == 0 for layer in found.layers)]
    return f"no cosine, for {' and '.join(zero) or 'one'} {'are' if len(zero) > 1 else 'is'} zero"


def _number(value: float) -> float | str:
    return "-" if math.isnan(value) else float(value)
