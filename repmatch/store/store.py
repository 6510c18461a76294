"""The store: all of its parts in one object."""

from __future__ import annotations

from pathlib import Path

from repmatch.errors import UsageError
from repmatch.store.arrow import ArrowTables
from repmatch.store.base import Mode
from repmatch.store.database import folder_of
from repmatch.store.search import Searches
from repmatch.store.staging import Stage
from repmatch.store.union import Union

DEFAULT_PATH = "repmatch-store"


class Store(Union, Searches, ArrowTables):
    """A store of datasets, factors, adapters, scores and coresets; a context manager."""

    def stage(self, dataset: str) -> Stage:
        """Return a stage for the rows of an ingest, to be used in a `with` statement.

        Args:
            dataset: name of the dataset, which may not be there yet.

        Returns:
            The stage.
        """
        return Stage(self, dataset)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        from html import escape

        kinds = {"datasets": ("name", "rows", "labels"), "coresets": ("name", "dataset", "strategy", "picks")}
        parts = [f"<p><b>Store</b> <code>{escape(str(self.path))}</code></p>"]
        for kind, columns in kinds.items():
            frame = getattr(self, kind)()
            kept = [c for c in columns if c in frame.columns]
            head = "".join(f"<th>{c}</th>" for c in kept)
            rows = "".join(
                "<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>"
                for row in frame.select(kept).iter_rows()
            )
            parts.append(f"<p>{kind}</p><table><tr>{head}</tr>{rows}</table>")
        return "".join(parts)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, mode={self.mode!r})"


def open(path: str | Path = DEFAULT_PATH, *, mode: Mode | None = None, wait: float = 0.0) -> Store:  # noqa: A001
    """Open a store.

    Args:
        path: its folder.
        mode: None: read and write, made on the first write; "r": never write; "w": be its writer until closed.
        wait: seconds to wait for another writer.

    Returns:
        The store.

    Raises:
        StoreNotFoundError: mode "r" and there is none.
        StoreLockedError: mode "w" and another process writes.
        StoreError: the folder holds something else.
    """
    if mode not in (None, "r", "w"):
        raise UsageError(f"unknown mode {mode!r}; expected None, 'r' or 'w'.")
    return Store(folder_of(path), mode, wait)
