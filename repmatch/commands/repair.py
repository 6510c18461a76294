"""The command `repmatch repair`."""

from __future__ import annotations

from dataclasses import asdict

import click

from repmatch.context import Context, examples, json_option, pass_context, wait_option


@click.command()
@wait_option
@json_option
@pass_context
@examples("repmatch repair")
def repair(context: Context, /, wait: float, as_json: bool) -> None:
    """Drop what `verify` finds damaged, and that alone; the next ingest computes it again.

    Damaged files are kept under another name (*.damaged). A catalog that is lost or cannot be read is rebuilt from the
    journals: datasets, instances, factors and adapters come back; scores, subsets, coresets and runs do not.
    """
    with context.open(as_json=as_json, wait=wait) as store:
        done = store.repair()
    if as_json:
        context.output.json(asdict(done))
    else:
        for finding in done.findings:
            context.output.line(str(finding))
        context.output.line(f"{done.factors} factors and {len(done.adapters)} adapters dropped")
        for path in done.set_aside:
            context.output.line(f"kept the damaged file as {path}")
        for finding in done.left:
            context.output.line(f"still wrong: {finding}")
    for name in done.datasets:
        context.output.hint(f"compute the dropped factors again with: repmatch ingest FILE --dataset {name}")
    if done.left:
        raise SystemExit(1)
