"""The command `repmatch verify`."""

from __future__ import annotations

from dataclasses import asdict

import click

from repmatch.context import Context, examples, json_option, pass_context


@click.command()
@json_option
@pass_context
@examples("repmatch verify")
def verify(context: Context, /, as_json: bool) -> None:
    """Check every checksum and every reference of the store.

    Nothing is changed. Exits with 1 where something is not as it was committed, and says which instances need computing
    again.
    """
    with context.open(as_json=as_json, mode="r") as store:
        findings = store.verify()
        for finding in findings:
            if as_json:
                context.output.json(asdict(finding))
            else:
                context.output.line(str(finding))
        damaged = store.damaged() if any(finding.factors for finding in findings) else None
    if damaged is not None and not as_json:
        for name, count in damaged.group_by("dataset", maintain_order=True).len().rows():
            context.output.line(f"{name}: {count} instances need their factors computed again")
    context.output.text("sound" if not findings else f"{len(findings)} findings")
    if findings:
        context.output.hint("drop what is damaged, and that alone, with: repmatch repair")
        raise SystemExit(1)
