"""The command `repmatch ingest`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from repmatch.context import (
    Context,
    cluster_of,
    cluster_options,
    device_option,
    examples,
    json_option,
    model_option,
    pass_context,
    wait_option,
)
from repmatch.curator.forms import TASKS
from repmatch.errors import UsageError

if TYPE_CHECKING:
    from repmatch.curator.ingest import IngestOptions
    from repmatch.curator.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


_SPACE: tuple[Callable[[F], F], ...] = (
    click.option(
        "--task",
        type=click.Choice(list(TASKS)),
        help="What a model is to learn from a row.  [default: the dataset's own; sequence-classification for a new "
        "one]",
    ),
    click.option("--id-field", help="Column with the id.  [default: id, where rows have it; else a digest of the row]"),
    click.option(
        "--text-field",
        help="Column with the text.  [default: text; causal-lm: prompt, messages or conversations; images: image]",
    ),
    click.option(
        "--text-pair-field",
        help="Column with a second text.  [default: text_pair, where rows have it; causal-lm: completion]",
    ),
    click.option("--label-field", help="Column with the label.  [default: label]"),
    click.option(
        "--template",
        type=click.Choice(["plain", "chat"]),
        help="How causal-lm joins prompt and completion: end to end, or by the model's chat template.  "
        "[default: chat for messages, with their tools; else plain]",
    ),
    model_option,
    click.option("--rank", type=int, help="LoRA rank.  [default: the dataset's own; 1 for a new one]"),
    click.option(
        "--targets",
        help="Matrices to adapt: endings of module names or regular expressions, comma between.  "
        "[default: query and value of every layer]",
    ),
    click.option("--layers", help="Numbers of the layers to adapt, such as 0,8-11.  [default: all]"),
    click.option(
        "--max-length",
        type=int,
        help="Tokens kept of an instance.  [default: 256, causal-lm 1024, or what the model reads]",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "adam", "sgd"]),
        help="Of the instance step.  [default: the dataset's own; adamw for a new one]",
    ),
    click.option("--learning-rate", type=float, help="Of the instance step.  [default: 0.001; sgd 0.1]"),
    click.option("--steps", type=int, help="Steps each instance adapter is trained.  [default: 1]"),
    click.option("--batch-tokens", type=int, help="Padded tokens a batch may hold.  [default: by device]"),
    device_option,
    click.option("--seed", type=int, help="Of the head and of every A.  [default: 0]"),
)
encoding_option = click.option(
    "--encoding",
    type=click.Choice(["float16", "float32", "sign"]),
    help="How factors are kept; sign takes 1 bit a number (rank 1).  [default: float16]",
)


def space_options(function: F) -> F:
    """Add the options that say how rows are read and what space their factors are in.

    Args:
        function: a command.

    Returns:
        The command.
    """
    for option in reversed(_SPACE):
        function = option(function)
    return function


def options_of(given: dict[str, Any]) -> tuple[Settings, IngestOptions]:
    """Turn the options of `space_options` and `encoding_option` into what the library takes.

    Args:
        given: values by name.

    Returns:
        The settings and the options.
    """
    from repmatch.curator.ingest import IngestOptions
    from repmatch.curator.rows import FieldChoice
    from repmatch.curator.settings import Settings
    from repmatch.curator.shards import Shard

    rest = dict(given)
    fields = FieldChoice(**{name: rest.pop(name) for name in _FIELDS})
    shard = rest.pop("shard", None)
    options = IngestOptions(
        fields, rest.pop("encoding"), rest.pop("strict", False), None if shard is None else Shard.parse(shard)
    )
    return Settings(**{**rest, "targets": _names(rest["targets"])}), options


warm_start_option = click.option(
    "--warm-start",
    metavar="auto|N|N%|DATASET|none",
    help="Train the start on so many random instances first, or take the start of DATASET, and its model, task and "
    "other options with it; the factors then speak of the text, not only of the label. auto: a third of the rows, 640 "
    "at most, none below 1,000.  [default: the "
    "dataset's own; none for a new one]",
)


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--dataset", required=True, help="Name of the dataset to make or extend.")
@space_options
@encoding_option
@warm_start_option
@click.option(
    "--shard",
    metavar="I/N",
    help="Compute part I of N only, into a store of its own; `repmatch merge` unites them. 0/N: only what all parts "
    "share.",
)
@cluster_options
@click.option("--strict", is_flag=True, help="Refuse everything when one row is bad.")
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch ingest reviews.jsonl --dataset reviews
    repmatch ingest pairs.csv --dataset pairs --text-field premise --text-pair-field hypothesis
    cat more.jsonl | repmatch ingest - --dataset reviews
    repmatch ingest reviews.jsonl --dataset warm --warm-start auto
    repmatch ingest chats.jsonl --dataset chats --task causal-lm --model ./my-llama
    repmatch --store shard-3 ingest reviews.jsonl --dataset reviews --shard 3/8
    repmatch ingest reviews.jsonl --dataset reviews --engine ray
    """
)
def ingest(context: Context, /, files: tuple[str, ...], dataset: str, as_json: bool, **given: Any) -> None:
    """Put rows and their instance factors into the store.

    FILE is JSON lines, CSV, TSV or Parquet, '-' for JSON lines on standard input, hf:NAME for a dataset of the
    Hugging Face hub, or, for image-classification, a folder with a subfolder for each class. Run it again after an
    interruption and it goes on; unchanged rows cost nothing, changed ones are computed again, new ones are added. Bad
    rows are listed with their reasons and left out, and the exit code is 1.
    """
    wait = given.pop("wait")
    cluster = cluster_of(given, context.output)
    settings, options = options_of(given)
    with context.open(as_json=as_json, wait=wait) as store:
        curator = context.curator(store, settings)
        report = curator.ingest(
            list(files),
            dataset,
            fields=options.fields,
            encoding=options.encoding,
            strict=options.strict,
            shard=options.shard,
            cluster=cluster,
        )
    output = context.output
    output.close()
    for row in report.bad:
        output.warn(f"{row.source}:{row.line}: {row.reason}")
    if report.quarantined > len(report.bad):
        output.warn(f"and {report.quarantined - len(report.bad)} bad rows more; repmatch info lists counts")
    computed = _computed_in(report.detail)
    if computed:
        output.hint(computed)
    cost = report.detail.get("sign_error")
    if cost:
        output.hint(
            f"sign codes: squared cosine with the exact factor {cost['mean']:.4f} on average, {cost['minimum']:.3f} at "
            f"worst, on {cost['instances']} instances."
        )
    if report.truncated:
        output.hint(f"{report.truncated} instances were longer than the maximum length and cut there.")
    part = report.detail.get("shard")
    if part is not None:
        output.hint(
            f"shard {part['number']}/{part['of']}: {part['hi'] - part['lo']} of {part['total']} rows; when all are "
            "there: repmatch merge OUT IN..."
        )
    if as_json:
        output.json(report.as_json())
    else:
        output.line(
            f"{dataset}: {report.rows} rows read: {report.new} new, {report.unchanged} unchanged, {report.changed} "
            f"changed, {report.quarantined} quarantined; {report.computed} factors in {report.seconds:.1f} s"
        )
    if report.quarantined:
        raise SystemExit(1)


def _computed_in(detail: Mapping[str, Any]) -> str | None:
    """Say in what the factors were computed; None where that is float32 and nothing else was tried."""
    tried = dict(detail.get("agreement_with_float32", {}))
    if not tried:
        return None
    from repmatch.curator.precision import LEAST_AGREEMENT

    chosen = detail["precision"]
    text = f"computed in {chosen} on {detail['device']}"
    if chosen in tried:
        text += f", squared cosine with float32 {tried.pop(chosen):.5f} on the first rows"
    refused = " and ".join(f"{name} ({value:.5f})" for name, value in tried.items())
    return text + (f"; not in {refused}: below {LEAST_AGREEMENT}." if refused else ".")


_FIELDS = ("id_field", "text_field", "text_pair_field", "label_field")


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UsageError(f"--targets {text!r} names nothing; expected endings of module names such as query,value.")
    return names
