"""The command `repmatch compact`."""

from __future__ import annotations

from dataclasses import asdict

import click

from repmatch.context import Context, examples, json_option, pass_context, wait_option


@click.command()
@wait_option
@json_option
@pass_context
@examples("repmatch compact")
def compact(context: Context, /, wait: float, as_json: bool) -> None:
    """Give back the space of instances that were deleted or replaced.

    Their bytes leave the disk now. Readers go on meanwhile; a compaction that is interrupted is finished by the next.
    """
    with context.open(as_json=as_json, wait=wait) as store:
        done = store.compact()
    if as_json:
        context.output.json(asdict(done))
        return
    context.output.line(
        f"{done.before / 1e6:.1f} MB before, {done.after / 1e6:.1f} MB after: {done.moved} factors moved, "
        f"{done.segments} segments removed"
    )
