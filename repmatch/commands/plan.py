"""The command `repmatch plan`."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import click

from repmatch.commands.ingest import encoding_option, options_of, space_options, warm_start_option
from repmatch.context import Context, examples, json_option, pass_context


def _for_a_new_dataset(command: click.Command) -> click.Command:
    """Let the help tell the defaults of a new dataset alone: a plan is for no other."""
    for option in command.params:
        if isinstance(option, click.Option) and option.help:
            option.help = re.sub(r"the dataset's own; (.+?) for a new one", r"\1", option.help)
    return command


@_for_a_new_dataset
@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@space_options
@encoding_option
@warm_start_option
@json_option
@pass_context
@examples(
    """
    repmatch plan reviews.jsonl
    repmatch plan chats.jsonl --task causal-lm --model ./my-llama --encoding sign
    """
)
def plan(context: Context, /, files: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Say what an ingest will take: instances a second, time, memory and size of the store.

    FILE and options are those of ingest into a new dataset. All rows are read and checked, and some of them are
    computed for a few seconds; nothing is stored.
    """
    from repmatch.curator.planning import human_time
    from repmatch.curator.planning import plan as make

    output = context.output
    output.as_json = as_json
    settings, options = options_of(given)
    with ExitStack() as held:
        store = None
        if settings.start_dataset is not None and context.path.exists():
            store = held.enter_context(context.open(as_json=as_json, mode="r"))
        found = make(list(files), settings, options, output.progress, store)
    output.close()
    if as_json:
        output.json(found.as_json())
        return
    bad = f", {found.bad} cannot be used" if found.bad else ""
    output.line(f"{found.rows} rows of {found.tokens:.1f} tokens{bad}; {found.matrices} matrices")
    output.line(f"{found.per_second:.1f} instances a second on {found.device}, in {found.precision}")
    if found.start_rows:
        output.line(f"a warm start on {found.start_rows} rows first, about {human_time(found.start_seconds)}")
    output.line(f"about {human_time(found.seconds)} in all")
    output.line(
        f"about {found.store_bytes / 1e6:,.0f} MB in a new store, {found.factor_bytes:,} bytes of factors a row"
    )
    output.line(f"about {found.memory_bytes / 1e6:,.0f} MB of memory")
    if found.truncated:
        output.hint(f"{found.truncated:.1%} of the rows are longer than the maximum length and would be cut there.")
