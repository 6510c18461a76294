"""The command `repmatch export`."""

from __future__ import annotations

from pathlib import Path

import click

from repmatch.context import Context, examples, pass_context


@click.command()
@click.argument("name", metavar="C|D")
@click.option(
    "-o", "--output", "path", type=click.Path(path_type=Path), help="File to write.  [default: standard output]"
)
@click.option("--with-scores", is_flag=True, help='Add one object, "repmatch", with rank, gain and score to each row.')
@pass_context
@examples(
    """
    repmatch export core -o core.jsonl
    repmatch export reviews > all.jsonl
    """
)
def export(context: Context, /, name: str, path: Path | None, with_scores: bool) -> None:
    """Write the user's rows of a coreset (best pick first) or a dataset as JSON lines.

    Each row has every column as it came. With -o a manifest is written beside the file: arguments, model fingerprint,
    seeds, versions, digests.
    """
    from repmatch.curator.export import export_lines, write_export

    with context.open() as store:
        if path is None or str(path) == "-":
            for line in export_lines(store, name, with_scores=with_scores):
                context.output.line(line)
            return
        manifest = write_export(store, name, path, with_scores=with_scores)
    context.output.hint(f"{manifest['file']['rows']} rows in {path}, manifest in {path}.manifest.json")
