"""The command `repmatch demo`."""

from __future__ import annotations

from pathlib import Path

import click

from repmatch.context import Context, device_option, examples, pass_context


@click.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="repmatch-demo",
    show_default=True,
    help="Folder for the demo's store and files.",
)
@device_option
@pass_context
@examples("repmatch demo --dir /tmp/repmatch-demo")
def demo(context: Context, /, folder: Path, device: str) -> None:
    """Run the main job on the docstrings of Python's standard library.

    Gathers them from this Python, builds their factors, scores, compares two areas, selects a coreset, tests it against
    a random one by training on both, asks for neighbours and exports: about three minutes on two cores.
    """
    from repmatch.curator.demo import run

    run(folder, context.output, device=device)
