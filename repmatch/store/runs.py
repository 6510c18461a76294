"""Runs: what was done to the store, when, and how it ended."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repmatch.errors import StoreCorruptError
from repmatch.store.coresets import Coresets
from repmatch.store.records import next_key
from repmatch.store.values import beyond

if TYPE_CHECKING:
    import polars as pl


@dataclass
class Run:
    """A run under way.

    Attributes:
        id: its number; None where the store is only read.
        detail: what to remember of it, plain JSON values; filled while it goes on.
    """

    id: int | None
    detail: dict[str, Any] = field(default_factory=dict)


class Runs(Coresets):
    """Runs."""

    @contextmanager
    def run(self, command: str, arguments: Mapping[str, Any]) -> Iterator[Run]:
        """Record a run: when it started and ended, and whether it failed or was interrupted.

        Args:
            command: what is run.
            arguments: everything that repeats it, plain JSON values.

        Yields:
            The run, whose `detail` is recorded at the end.
        """
        from repmatch import __version__

        if self.mode == "r":
            yield Run(None)
            return
        with self._transaction() as conn:
            run = Run(next_key(conn, "runs"))
            conn.execute(
                "INSERT INTO registry.runs VALUES (?, ?, ?, now()::TIMESTAMP, NULL, 'running', ?, '{}', ?, ?)",
                [run.id, command, _json(arguments), __version__, os.getpid(), socket.gethostname()],
            )
        status = "failed"
        try:
            yield run
            status = "ok"
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            status = "interrupted"
            raise
        except Exception as error:
            run.detail.setdefault("error", f"{type(error).__name__}: {error}"[:2000])
            raise
        finally:
            with self._transaction() as conn:
                conn.execute(
                    "UPDATE registry.runs SET ended = now()::TIMESTAMP, status = ?, detail = ? WHERE pk = ?",
                    [status, _json(run.detail), run.id],
                )

    def runs(self) -> pl.DataFrame:
        """Return every run: run, command, arguments, started, ended, status, version, detail.

        Raises:
            StoreCorruptError: one began or ended at a time that is none, `infinity` for instance.
        """
        import polars as pl

        found = self._frame("SELECT * FROM main.runs ORDER BY run")
        for name in ("started", "ended"):
            if found[name].dtype == pl.String:
                wrong = beyond(self.arrow(f"SELECT {name} FROM runs"))
                if wrong:
                    raise StoreCorruptError(
                        f"the record of a run cannot be right: {wrong}, and a time has a year from 1 to 9999. See it "
                        'with: repmatch sql "SELECT run, started, ended FROM runs". Restore the store from a backup.'
                    )
        return found


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), default=str)
