"""The command `repmatch report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from repmatch.completion import complete_dataset
from repmatch.context import Context, examples, json_option, pass_context


@click.command()
@click.argument("datasets", nargs=-1, metavar="[DATASET...]", shell_complete=complete_dataset)
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path),
    default="report.html",
    show_default=True,
    help="File to write.",
)
@click.option("--points", type=int, default=20_000, show_default=True, help="Instances on the map; more are sampled.")
@click.option(
    "--layout",
    type=click.Choice(["auto", "tsne", "pca"]),
    default="auto",
    show_default=True,
    help="Of the map: t-SNE, or the kernel's main directions, which takes seconds; auto: t-SNE where it is installed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample and the layout.")
@click.option("--title", help="Of the page.  [default: made from the datasets]")
@click.option("--force", is_flag=True, help="Replace a file that is no earlier report too.")
@json_option
@pass_context
@examples(
    """
    repmatch report reviews -o report.html
    repmatch report --points 5000 --layout pca
    """
)
def report(
    context: Context, /, datasets: tuple[str, ...], path: Path, force: bool, as_json: bool, **given: Any
) -> None:
    """Write one HTML file that shows datasets, scores and coresets, and opens offline in any browser.

    A map of the instances with their texts, nearest instances and picks; similarities of datasets, subsets and labels;
    the layers; scores by label; coresets; training; the manifest. It shows what the store holds and trains nothing:
    score, compare and select first. Without DATASET, all of the store. An earlier report is replaced, another file only
    with --force; the store's own files and those that rows were read from never are.
    """
    from repmatch.curator.report.gather import ReportOptions
    from repmatch.curator.report.page import write_report

    with context.open(as_json=as_json) as store:
        found = write_report(store, path, ReportOptions(datasets, **given), context.output.progress, force=force)
    output = context.output
    output.close()
    if as_json:
        output.json(found)
        return
    output.line(
        f"{path}: {', '.join(found['datasets'])}; {found['points']} of {found['instances']} instances on the map, "
        f"{found['bytes'] / 1e6:.1f} MB"
    )
    if found["layout"] == "pca" and given["layout"] == "auto":
        output.hint("a map that keeps neighbours together needs openTSNE: pip install 'repmatch[report]'")
