"""The command `repmatch info`."""

from __future__ import annotations

import click

from repmatch.context import Context, examples, json_option, pass_context


@click.command()
@json_option
@pass_context
@examples("repmatch info --json")
def info(context: Context, /, as_json: bool) -> None:
    """Show versions, devices, and what the store holds."""
    from repmatch.curator.overview import overview, render

    context.output.as_json = as_json
    found = overview(context.path)
    if as_json:
        context.output.json(found)
    else:
        render(found, context.output)
