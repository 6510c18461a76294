"""The command `repmatch completion`."""

from __future__ import annotations

import click

from repmatch.context import Context, examples, pass_context


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_context
@click.pass_context
@examples(
    """
    eval "$(repmatch completion bash)"
    repmatch completion fish > ~/.config/fish/completions/repmatch.fish
    """
)
def completion(click_context: click.Context, context: Context, /, shell: str) -> None:
    """Print a script that completes commands, options and names of datasets and coresets in your shell.

    Put the first example's line into ~/.bashrc (or ~/.zshrc, with zsh) to have it in every shell.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click_context.find_root().command
    context.output.line(kind(root, {}, "repmatch", "_REPMATCH_COMPLETE").source())
