"""The command `repmatch merge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from repmatch.context import Context, examples, json_option, pass_context, wait_option
from repmatch.errors import quote_list

_STORE = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("out", metavar="OUT", type=_STORE)
@click.argument("stores", metavar="IN...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch --store shard-1 ingest reviews.jsonl --dataset reviews --shard 1/2
    repmatch --store shard-2 ingest reviews.jsonl --dataset reviews --shard 2/2
    repmatch merge whole shard-1 shard-2
    """
)
def merge(context: Context, /, out: Path, stores: tuple[Path, ...], wait: float, as_json: bool) -> None:
    """Take the rows, factors and adapters of the stores IN into the store OUT.

    OUT is made where there is none. Nothing is computed: factors are copied byte for byte, the shards of one input in
    their order. Stores whose factors cannot be compared, or with other content under the same id, are refused before
    anything is written. Run it again after an interruption, or with the stores that were missing. Scores, subsets and
    coresets stay where they are.
    """
    context.path = out
    with context.open(as_json=as_json, wait=wait) as store:
        done = store.merge(list(stores), progress=context.output.progress)
    output = context.output
    output.close()
    if as_json:
        output.json(asdict(done))
    else:
        output.line(
            f"{out}: {done.taken} factors taken in from {len(done.stores)} stores, {done.there} were there already; "
            + ", ".join(f"{name} has {rows} rows" for name, rows in sorted(done.rows.items()))
        )
    for name, shards in sorted(done.missing.items()):
        output.warn(
            f"{name}: shards {quote_list(shards)} are in none of the stores, or did not end; compute them and merge "
            f"them too, or run the ingest without --shard on {out}, which computes what is missing"
        )
