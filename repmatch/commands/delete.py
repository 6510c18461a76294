"""The command `repmatch delete`."""

from __future__ import annotations

from dataclasses import asdict

import click

from repmatch.context import Context, examples, json_option, pass_context, wait_option
from repmatch.errors import UsageError


@click.command()
@click.argument("dataset")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--where", metavar="SQL", help="The instances that meet this condition.")
@click.option("--all", "everything", is_flag=True, help="The whole dataset, its subsets and quarantine list too.")
@click.option(
    "--coresets", is_flag=True, help="Coresets that picked one of them too; without this they are in the way."
)
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch delete reviews review-17 review-18
    repmatch delete reviews --where "label = 'unclear'"
    """
)
def delete(
    context: Context,
    /,
    dataset: str,
    ids: tuple[str, ...],
    where: str | None,
    everything: bool,
    coresets: bool,
    wait: float,
    as_json: bool,
) -> None:
    """Delete instances of DATASET by ID or by a condition, with their factors and scores.

    Everything else stays as it is. Their bytes leave the disk with the next `repmatch compact`.
    """
    if bool(ids) + (where is not None) + everything != 1:
        raise UsageError("name what to delete: by ids, by --where, or --all; one of the three.")
    with context.open(as_json=as_json, wait=wait) as store:
        if everything:
            done = store.delete_dataset(dataset, coresets=coresets)
        else:
            done = store.delete(dataset, ids=list(ids) or None, where=where, coresets=coresets)
    if as_json:
        context.output.json(asdict(done))
        return
    gone = f" and {len(done.coresets)} coresets" if done.coresets else ""
    context.output.line(f"{done.rows} instances{gone} deleted")
    if done.rows:
        context.output.hint("their bytes leave the disk with: repmatch compact")
