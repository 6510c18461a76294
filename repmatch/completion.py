"""Shell completion of the names that a store holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

DEFAULT_STORE = "repmatch-store"


def _names(context: click.Context, kinds: tuple[str, ...], incomplete: str) -> list[CompletionItem]:
    """List names in the store; whatever goes wrong, a completion says nothing."""
    root = context.find_root().params
    path = root.get("store") or os.environ.get("REPMATCH_STORE") or DEFAULT_STORE
    try:
        from repmatch.store import open as open_store

        with open_store(Path(path), mode="r") as store:
            found = {kind: getattr(store, f"{kind}s")()["name"].to_list() for kind in kinds}
    except Exception:
        return []
    return [
        CompletionItem(name, help=kind)
        for kind, names in found.items()
        for name in names
        if name.startswith(incomplete)
    ]


def _completer(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[Any]]:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
        return _names(context, kinds, incomplete)

    return complete


complete_dataset = _completer("dataset")
complete_subset = _completer("dataset", "subset", "coreset")
