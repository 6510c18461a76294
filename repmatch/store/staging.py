"""Staging: rows stream into a scratch database, are compared with the store there, and stream out again."""

from __future__ import annotations

import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import BadRow, Encoding, Row
from repmatch.errors import StoreError, UsageError
from repmatch.store.catalog import explain
from repmatch.store.database import connect, first, hide_progress
from repmatch.store.files import writing_to
from repmatch.store.records import ROW_COLUMNS, encodable, replace_rows, rows_table
from repmatch.store.scratch import remove_scratch

if TYPE_CHECKING:
    from repmatch.store.base import Base

_MEMORY = "1GB"
_SCHEMA = """
CREATE TABLE staged (seq BIGINT, id VARCHAR, json VARCHAR, text VARCHAR, text_pair VARCHAR, label VARCHAR,
  row_hash VARCHAR, task_hash VARCHAR, source VARCHAR, line BIGINT);
CREATE TABLE bad (seq BIGINT, source VARCHAR, line BIGINT, id VARCHAR, reason VARCHAR);
"""
_DUPLICATES = """
CREATE TABLE firsts AS SELECT id, min(seq) AS seq, arg_min(row_hash, seq) AS row_hash,
  arg_min(source, seq) AS source, arg_min(line, seq) AS line, count(*) AS times FROM staged GROUP BY id;
CREATE TABLE repeats AS SELECT s.seq, s.row_hash = f.row_hash AS same, s.id, s.source, s.line,
  f.source AS first_source, f.line AS first_line FROM staged s JOIN firsts f ON f.id = s.id
  WHERE f.times > 1 AND s.seq <> f.seq;
"""


@dataclass(frozen=True, slots=True)
class StageSummary:
    """What the staged rows are to the store.

    Attributes:
        rows: rows seen: new + unchanged + changed + rejected.
        new: ids that the store does not have.
        unchanged: rows as the store has them, and exact repeats within the input.
        changed: ids whose row differs from the stored one.
        rejected: rows set aside, conflicting repeats of an id included.
        todo: rows that need a factor.
        labels: the distinct labels of the accepted rows, sorted.
    """

    rows: int
    new: int
    unchanged: int
    changed: int
    rejected: int
    todo: int
    labels: tuple[str, ...]


class Stage:
    """One ingest's rows in a scratch database.

    Args:
        store: the store.
        dataset: name of the dataset, which may not be there yet.
    """

    def __init__(self, store: Base, dataset: str) -> None:
        self._store = store
        self.dataset = dataset
        self._seq = 0
        self._conn: Any = None
        self._path: Path | None = None
        self._guard: int | None = None
        self._todo: NDArray[np.int64] | None = None
        self._range: tuple[int, int] | None = None

    def __enter__(self) -> Stage:
        """Make the scratch database."""
        import duckdb

        home = self._store.path / "staging"
        if not self._store._catalog.exists():
            home = Path(tempfile.gettempdir()) / f"repmatch-staging-{os.getuid()}"
        name = home / uuid.uuid4().hex
        with writing_to(home):
            home.mkdir(exist_ok=True)
            self._guard = os.open(name.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._path = name.with_suffix(".duckdb")
        config: Any = {"memory_limit": _MEMORY, "temp_directory": str(name.with_suffix(".spill"))}
        try:
            self._conn = connect(self._path, config=config)
            hide_progress(self._conn)
            self._conn.execute(_SCHEMA)
        except duckdb.Error as error:
            self.__exit__()
            raise explain(error, self._path) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the scratch database."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None
        if self._path is not None:
            remove_scratch(self._path)
            if self._guard is not None:
                os.close(self._guard)
                self._guard = None
            self._path.with_suffix(".lock").unlink(missing_ok=True)

    def add(self, rows: Sequence[Row]) -> None:
        """Take in rows; those that UTF-8 cannot hold are set aside.

        Args:
            rows: the next rows in input order.
        """
        good = [row for row in rows if _clean(row)]
        if len(good) < len(rows):
            self.reject(
                [
                    BadRow(
                        row.source,
                        row.line,
                        row.id if encodable(row.id) else None,
                        "holds half of a surrogate pair, which UTF-8 cannot hold. Repair that text.",
                    )
                    for row in rows
                    if not _clean(row)
                ]
            )
        if good:
            self._insert("staged", rows_table(good).rename_columns(["seq", *ROW_COLUMNS.split(", ")]))

    def reject(self, bad: Sequence[BadRow]) -> None:
        """Set rows aside.

        Args:
            bad: where they are and what is wrong with them.
        """
        import pyarrow as pa

        if not bad:
            return
        columns: dict[str, Any] = {"seq": pa.array(range(len(bad)), pa.int64())}
        for name in ("source", "id", "reason"):
            values = [getattr(row, name) for row in bad]
            safe = [None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values]
            columns[name] = pa.array(safe, pa.large_string())
        columns["line"] = pa.array([row.line for row in bad], pa.int64())
        self._insert("bad", pa.table(columns).select(["seq", "source", "line", "id", "reason"]))

    def _insert(self, table: str, rows: Any) -> None:
        import duckdb

        if self._todo is not None:
            raise StoreError("rows were added to a stage after it was resolved; open another stage.")
        try:
            self._conn.register("arriving", rows)
            names = ", ".join(rows.column_names[1:])
            self._conn.execute(f"INSERT INTO {table} SELECT seq + {self._seq}, {names} FROM arriving ORDER BY seq")
            self._conn.unregister("arriving")
        except duckdb.Error as error:
            raise explain(error, self._path or self._store.path) from error
        self._seq += rows.num_rows

    def resolve(self, space_id: str | None, encoding: Encoding | None = None) -> StageSummary:
        """Compare the staged rows with the store.

        Args:
            space_id: the space in which factors are wanted; None: only tell what is new and changed.
            encoding: how they will be kept; None: as the dataset's record says.

        Returns:
            The counts.
        """
        import duckdb

        if self._todo is not None:
            raise StoreError("a stage is resolved once; open another stage.")
        try:
            self._conn.execute(_DUPLICATES)
            self._conn.execute(
                "INSERT INTO bad SELECT seq, source, line, id, 'id ' || CASE WHEN length(id) > 200 THEN "
                "left(id, 200) || '…' ELSE id END || ' was on line ' || first_line || CASE WHEN source <> "
                "first_source THEN ' of ' || first_source ELSE '' END || ' with other content; an id is one instance "
                "of a dataset. Give one of the two another id.' FROM repeats WHERE NOT same"
            )
            known = self._store._catalog.exists()
            if known:
                with self._store._catalog.attached(self._conn):
                    self._classify("catalog.registry", space_id, encoding)
            else:
                self._classify(None, space_id, encoding)
            return self._summary()
        except duckdb.Error as error:
            raise explain(error, self._path or self._store.path) from error

    def _classify(self, registry: str | None, space_id: str | None, encoding: str | None) -> None:
        """Make the table `state`: each accepted row with what the store has of it."""
        stored = (
            "(SELECT NULL::BIGINT AS pk, NULL AS id, NULL AS row_hash, NULL AS task_hash, false AS done WHERE false)"
        )
        parameters: list[Any] = []
        if registry:
            stored = (
                f"(SELECT i.pk, i.id, i.row_hash, i.task_hash, f.instance_pk IS NOT NULL AS done "
                f"FROM {registry}.instances i JOIN {registry}.datasets d ON d.pk = i.dataset_pk "
                f"LEFT JOIN (SELECT DISTINCT f.instance_pk, g.encoding FROM {registry}.factors f "
                f"JOIN {registry}.segments g ON g.pk = f.segment_pk JOIN {registry}.spaces p ON p.pk = g.space_pk "
                "WHERE p.id = ?) f ON f.instance_pk = i.pk AND f.encoding = coalesce(?, d.encoding) "
                "WHERE d.name = ?)"
            )
            parameters = [space_id or "", encoding, self.dataset]
        # Without a space a stored row counts as done: there is nothing to make for it but a changed task.
        done = "o.done" if space_id is not None else "true"
        self._conn.execute(
            "CREATE TABLE state AS SELECT s.seq, o.pk, o.row_hash AS old_row, s.row_hash, "
            f"o.pk IS NULL OR o.task_hash <> s.task_hash OR NOT {done} AS todo, o.task_hash = s.task_hash AS same_task "
            f"FROM firsts f JOIN staged s ON s.seq = f.seq LEFT JOIN {stored} o ON o.id = s.id",
            parameters,
        )
        self._find_todo()

    def _find_todo(self) -> None:
        found = self._conn.execute("SELECT seq FROM state WHERE todo ORDER BY seq").fetchnumpy()
        self._todo = np.asarray(found["seq"], np.int64)

    def restrict(self, lo: int, hi: int) -> StageSummary:
        """Leave out all but a range of the accepted rows, and the bad rows that do not lie between them.

        Args:
            lo: place of the first row that stays among the accepted ones, in input order.
            hi: place after the last one. Ranges that cover all places cover every bad row, each once.

        Returns:
            The counts of what stays.
        """
        self._pending()
        places = np.asarray(self._conn.execute("SELECT seq FROM state ORDER BY seq").fetchnumpy()["seq"], np.int64)

        def start(place: int) -> int:  # a bad row goes with the accepted one before it
            return 0 if place == 0 else int(places[place]) if place < len(places) else self._seq + 1

        self._range = start(lo), start(hi)
        for table in ("state", "bad", "repeats"):
            self._conn.execute(f"DELETE FROM {table} WHERE seq < ? OR seq >= ?", list(self._range))
        self._find_todo()
        return self._summary()

    def _summary(self) -> StageSummary:
        def one(query: str) -> tuple[Any, ...]:
            row: tuple[Any, ...] = first(self._conn.execute(query))
            return row

        new, unchanged, changed = one(
            "SELECT count(*) FILTER (pk IS NULL), count(*) FILTER (old_row = row_hash AND same_task), "
            "count(*) FILTER (old_row <> row_hash OR NOT same_task) FROM state"
        )
        (same,) = one("SELECT count(*) FROM repeats WHERE same")
        (rejected,) = one("SELECT count(*) FROM bad")
        labels = self._conn.execute("SELECT DISTINCT label FROM staged WHERE seq IN (SELECT seq FROM state)").fetchall()
        unchanged += same
        return StageSummary(
            rows=new + unchanged + changed + rejected,
            new=new,
            unchanged=unchanged,
            changed=changed,
            rejected=rejected,
            todo=len(self._pending()),
            labels=tuple(sorted(row[0] for row in labels)),
        )

    def _pending(self) -> NDArray[np.int64]:
        if self._todo is None:
            raise UsageError("a stage must be resolved before its rows are read: call resolve(space_id).")
        return self._todo

    def todo(self, size: int = 512) -> Iterator[tuple[Row, ...]]:
        """Stream the rows that need a factor, in input order.

        Args:
            size: how many at a time.

        Yields:
            At most `size` rows.
        """
        yield from self._stream(self._pending(), "todo", size)

    def accepted(self, size: int = 512) -> Iterator[tuple[Row, ...]]:
        """Stream every accepted row, each id once, whether it needs a factor or not, in input order.

        Args:
            size: how many at a time.

        Yields:
            At most `size` rows.
        """
        self._pending()
        found = self._conn.execute("SELECT seq FROM state ORDER BY seq").fetchnumpy()
        yield from self._stream(np.asarray(found["seq"], np.int64), "true", size)

    def _stream(self, places: NDArray[np.int64], which: str, size: int) -> Iterator[tuple[Row, ...]]:
        for lo in range(0, len(places), size):
            part = places[lo : lo + size]
            rows = self._conn.execute(
                f"SELECT {ROW_COLUMNS} FROM staged WHERE seq BETWEEN ? AND ? AND seq IN "
                f"(SELECT seq FROM state WHERE {which} AND seq BETWEEN ? AND ?) ORDER BY seq",
                [int(part[0]), int(part[-1])] * 2,
            ).fetchall()
            yield tuple(Row(*row) for row in rows)

    def rejected(self, limit: int | None = None) -> list[BadRow]:
        """Return the rows set aside, by source and line.

        Args:
            limit: at most so many.

        Returns:
            The rows.
        """
        self._pending()
        rows = self._conn.execute(
            "SELECT source, line, id, reason FROM bad ORDER BY source, line, seq LIMIT ?",
            [limit if limit is not None else 2**62],
        ).fetchall()
        return [BadRow(*row) for row in rows]

    def touch(self) -> int:
        """Apply what needs no factor: rows that changed outside of the task's fields, and the quarantine list.

        Returns:
            Rows replaced.
        """
        self._pending()
        query = (
            f"SELECT t.pk, t.old_row, {', '.join('s.' + name for name in ROW_COLUMNS.split(', '))} FROM state t "
            "JOIN staged s ON s.seq = t.seq WHERE t.same_task AND t.old_row <> t.row_hash"
        )
        replaced = 0
        if self._seq == 0:
            return replaced
        with self._store._transaction() as conn:
            for batch in self._conn.sql(query).to_arrow_reader(65536):
                conn.register("touched", batch_table(batch))
                replace_rows(conn, "touched")
                conn.unregister("touched")
                replaced += batch.num_rows
            if self._range is None:
                sources = self._conn.execute("SELECT source FROM staged UNION SELECT source FROM bad").fetchall()
                conn.execute(
                    "DELETE FROM registry.quarantine WHERE dataset = ? AND source IN (SELECT unnest(?::VARCHAR[]))",
                    [self.dataset, [row[0] for row in sources]],
                )
            listing = "SELECT source, line, id, reason FROM bad ORDER BY source, line, seq"
            for batch in self._conn.sql(listing).to_arrow_reader(65536):
                conn.register("aside", batch_table(batch))
                if self._range is not None:  # what other parts of the input left there stays
                    conn.execute(
                        "DELETE FROM registry.quarantine q USING aside a WHERE q.dataset = ? AND q.source = a.source "
                        "AND q.line = a.line",
                        [self.dataset],
                    )
                conn.execute(
                    "INSERT INTO registry.quarantine SELECT ?, source, line, id, reason, now()::TIMESTAMP FROM aside",
                    [self.dataset],
                )
                conn.unregister("aside")
        return replaced


def batch_table(batch: Any) -> Any:
    """Return a record batch as a table that DuckDB can register.

    Args:
        batch: a `pyarrow.RecordBatch`.

    Returns:
        A `pyarrow.Table`.
    """
    import pyarrow as pa

    return pa.Table.from_batches([batch])


def _clean(row: Row) -> bool:
    return all(encodable(text) for text in (row.id, row.json, row.text, row.text_pair, row.label, row.source))
