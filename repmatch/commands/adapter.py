"""The commands `repmatch adapter`: subset adapters out as peft checkpoints, LoRA checkpoints in."""

from __future__ import annotations

from pathlib import Path
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


@click.group()
@examples(
    """
    repmatch adapter export reviews -o reviews-lora
    repmatch adapter import path/to/lora --name theirs
    """
)
def adapter() -> None:
    """Exchange adapters with peft: a subset's out, any LoRA checkpoint in."""


@adapter.command("export")
@click.argument("name", metavar="SUBSET", shell_complete=complete_subset)
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--replace", is_flag=True, help="Replace a folder that this command wrote earlier.")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples("repmatch adapter export \"reviews[label = 'positive']\" -o positive-lora")
def export(
    context: Context, /, name: str, folder: Path, replace: bool, as_json: bool, wait: float, **given: Any
) -> None:
    """Write a subset's adapter as a peft checkpoint, trained on demand.

    SUBSET is a dataset, subset, coreset or 'DATASET[SQL]'. `PeftModel.from_pretrained` loads the folder onto the base
    model to the very logits it had here: the random head it was trained under is in the checkpoint, and the pooler. The
    folder's README.md has the lines that load it.
    """
    from repmatch.curator.adapter_files import export_adapter

    with context.open(as_json=as_json, wait=wait) as store:
        found = export_adapter(context.curator(store, **given).trainer, name, folder, replace=replace)
    if as_json:
        kept = {"folder": str(found.folder), "base": found.base, "labels": list(found.labels), "bytes": found.bytes}
        context.output.json(kept | {"modules_to_save": list(found.saved_modules)})
        return
    context.output.line(f"{name} in {found.folder}: {found.bytes:,} bytes, for the base model {found.base}")
    context.output.hint(f"it brings {', '.join(found.saved_modules)}; how to load it is in {found.folder}/README.md")


@adapter.command("import")
@click.argument("path", metavar="PATH")
@click.option("--name", required=True, help="Name to keep it under.")
@click.option(
    "--dataset",
    shell_complete=complete_dataset,
    help="Dataset of the same base model, whose matrices' names it is matched with.",
)
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch adapter import path/to/lora --name theirs --dataset reviews
    repmatch score reviews --against theirs
    """
)
def import_(context: Context, /, path: str, name: str, dataset: str | None, wait: float, as_json: bool) -> None:
    """Keep a LoRA checkpoint in the store, so that instances can be scored against it.

    PATH is a folder as peft writes it, or a safetensors file of any tool. Any rank, any targets.
    """
    from repmatch.curator.adapter_files import import_adapter

    with context.open(as_json=as_json, wait=wait) as store:
        found = import_adapter(store, path, name, dataset=dataset)
    record = found.record
    if as_json:
        context.output.json({"name": name, "id": found.id, "layers": record["layers"], "ranks": record["ranks"]})
        return
    for note in record["notes"]:
        context.output.warn(note)
    ranks = ", ".join(str(rank) for rank in record["ranks"])
    context.output.line(f"{path} kept as {name}: {record['layers']} matrices of rank {ranks}")


@adapter.command("list")
@json_option
@pass_context
@examples("repmatch adapter list --json")
def list_(context: Context, /, as_json: bool) -> None:
    """List the adapters that the store holds, trained and imported."""
    from repmatch.store.records import stored_object

    with context.open(as_json=as_json) as store:
        rows = store.adapters().to_dicts()
    shown = []
    for row in rows:
        record = stored_object(row["record"], "the record of an adapter")
        origin = "imported" if row["space_id"] == "imported" else f"{record.get('instances')} instances"
        shown.append((row["subset"], row["id"], origin, record.get("steps"), row["bytes"], str(row["created"])[:19]))
    names = ["subset", "id", "from", "steps", "bytes", "created"]
    if as_json:
        for values in shown:
            context.output.json(dict(zip(names, values, strict=True)))
        return
    context.output.table(names, shown)
