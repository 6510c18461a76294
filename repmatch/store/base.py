"""What every part of the store rests on: the folder, the writer's lock, connections, the chunked reading of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repmatch.errors import StoreCorruptError, StoreError, StoreNotFoundError
from repmatch.store.cache import FOLDER
from repmatch.store.catalog import NAME, PATIENCE, REBUILT, Catalog
from repmatch.store.files import check_plain, sync_folder, writing_to
from repmatch.store.lock import WriterLock
from repmatch.store.meta import read_meta
from repmatch.store.recovery import recover
from repmatch.store.turn import NAME as TURN
from repmatch.store.values import beyond, holdable

if TYPE_CHECKING:
    import polars as pl

    from repmatch.datamodels import Space

Mode = Literal["r", "w"]
_OURS = ("store.lock", TURN, "staging", NAME + ".new", NAME + ".new.wal", REBUILT)
SEGMENT_BYTES = 256 << 20


class Base:
    """A store's folder and the ways into it.

    Args:
        path: the folder.
        mode: None: read and write, the lock is taken for as long as something is written; "r": never write; "w": take
            the lock at once and hold it until `close`.
        wait: seconds to wait for another writer.

    Attributes:
        path: the folder.
        mode: as given.
        segment_bytes: size at which a segment is sealed and the next one started.
    """

    def __init__(self, path: Path, mode: Mode | None, wait: float) -> None:
        self.path = path
        self.mode = mode
        self.segment_bytes = SEGMENT_BYTES
        self._wait = wait
        self._catalog = Catalog(path, max(PATIENCE, wait))
        self._lock = WriterLock(path / "store.lock")
        self._depth = 0
        self._mutex = threading.RLock()
        self._closed = False
        self._spaces: dict[str, Space] = {}
        check_plain(path)
        if mode is not None or not self._catalog_is_lost():  # a lost catalog can be rebuilt by `repair`
            self._check_folder()
        if mode == "r" and not self._catalog.exists():
            raise self._missing()
        if mode == "w":
            self._enter_writing()

    def close(self) -> None:
        """Release the writer's lock if it is held; the store is not used after that."""
        self._closed = True
        self._lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer for a while. Re-entrant; every method that writes does this by itself.

        Yields:
            Nothing.

        Raises:
            StoreLockedError: another process writes.
        """
        self._enter_writing()
        try:
            yield
        finally:
            with self._mutex:
                self._depth -= 1
                if self._depth == 0:
                    self._lock.release()

    def _enter_writing(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.path} was closed; open it again.")
        if self.mode == "r":
            raise StoreError(f"the store {self.path} was opened with mode='r'; open it without a mode to write.")
        with self._mutex:
            if self._depth == 0:
                self._begin_writing()
            self._depth += 1

    def _begin_writing(self) -> None:
        self._check_folder()
        with writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(self._wait)
        try:
            if not self._catalog.exists():
                self._check_folder()
                self._catalog.create()
            for name in ("segments", "adapters"):
                if not (self.path / name).is_dir():
                    with writing_to(self.path / name):
                        (self.path / name).mkdir()
                        sync_folder(self.path)
            self._catalog.migrate()
            recover(self._catalog, self.path)
        except BaseException:
            self._lock.release()
            raise

    def _check_folder(self) -> None:
        if self._catalog.exists() or not self.path.exists():
            return
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is a file; a store is a folder. Name another with --store.")
        names = sorted(entry.name for entry in self.path.iterdir())
        if self._catalog_is_lost():
            raise self._missing()
        strange = [name for name in names if name not in (*_OURS, "segments", "adapters", FOLDER)]
        if strange:
            raise StoreError(
                f"{self.path} is not empty and is no store of repmatch (it holds {strange[0]!r}); nothing in it was "
                "touched. Name another folder with --store."
            )

    def _catalog_is_lost(self) -> bool:
        if self._catalog.exists() or not (self.path / "segments").is_dir():
            return False
        return any((self.path / "segments").glob("[0-9]*.bin"))

    def _missing(self) -> StoreError:
        if self._catalog_is_lost():
            return StoreCorruptError(
                f"the store {self.path} has factors but its catalog {NAME} is gone. Restore that file from a backup, "
                "or rebuild what the segments hold with: repmatch repair"
            )
        return StoreNotFoundError(
            f"there is no store at {self.path}. Make one with: repmatch ingest FILE --dataset NAME, or name another "
            "with --store (or REPMATCH_STORE)."
        )

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        self._ready()
        with self._catalog.reading() as conn:
            yield conn

    def _ready(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.path} was closed; open it again.")
        if not self._catalog.exists():
            raise self._missing()

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self.writing(), self._catalog.transaction() as conn:
            yield conn

    def _frame(self, query: str, parameters: list[Any] | None = None) -> pl.DataFrame:
        with self._reading() as conn:
            return frame(conn, query, parameters)

    def _meta(self) -> dict[str, str]:
        with self._reading() as conn:
            return read_meta(conn)


def frame(conn: Any, query: str, parameters: list[Any] | None = None) -> pl.DataFrame:
    """Run a query and return a polars frame.

    Args:
        conn: an open connection.
        query: one SELECT.
        parameters: values of its `?`.

    Returns:
        The rows; where one has a time beyond the years 1 to 9999, times are DuckDB's text.
    """
    import polars as pl

    def run() -> Any:
        return conn.sql(query, params=parameters) if parameters else conn.sql(query)

    table = run().to_arrow_table()
    if beyond(table):
        table = holdable(run(), plain=True).to_arrow_table()
    out = pl.from_arrow(table)
    return out if isinstance(out, pl.DataFrame) else out.to_frame()
