"""The command `repmatch export`."""

from __future__ import annotations

from pathlib import Path

import click

from repmatch.completion import complete_subset
from repmatch.context import Context, examples, pass_context
from repmatch.errors import UsageError


@click.command()
@click.argument("name", metavar="C|D", shell_complete=complete_subset)
@click.option(
    "-o", "--output", "path", type=click.Path(path_type=Path), help="File to write.  [default: standard output]"
)
@click.option("--with-scores", is_flag=True, help='Add one object, "repmatch", with rank, gain and score to each row.')
@click.option("--card", is_flag=True, help="Write a dataset card, README.md, beside the file too.")
@click.option("--force", is_flag=True, help="Replace a file that is no earlier export too.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be written; write nothing.")
@pass_context
@examples(
    """
    repmatch export core -o core.jsonl
    repmatch export reviews > all.jsonl
    repmatch export core -o release/core.jsonl --card --dry-run
    """
)
def export(context: Context, /, name: str, path: Path | None, with_scores: bool, **given: bool) -> None:
    """Write the user's rows of a coreset (best pick first) or a dataset as JSON lines.

    Each row has every column as it came. With -o a manifest is written beside the file: arguments, model fingerprint,
    seeds, versions, digests. An earlier export is replaced, another file only with --force; the store's own files,
    those that rows were read from, and a README.md that is no card never are.
    """
    from repmatch.curator.export import export_lines, write_export

    if any(given.values()) and (path is None or str(path) == "-"):
        raise UsageError("--card, --force and --dry-run go with a file: name it with -o.")
    with context.open() as store:
        if path is None or str(path) == "-":
            for line in export_lines(store, name, with_scores=with_scores):
                context.output.raw(line)
            return
        manifest = write_export(store, name, path, with_scores=with_scores, **given)
    if given["dry_run"]:
        context.output.hint(f"{manifest['file']['rows']} rows would be written to {path}; nothing was")
        return
    context.output.hint(f"{manifest['file']['rows']} rows in {path}, manifest in {path}.manifest.json")
