"""What can still be read of a damaged catalog: DuckDB keeps a checksum a block, so one bad block is one bad column."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from repmatch.errors import StoreCorruptError
from repmatch.store import migrations
from repmatch.store.catalog import _gate
from repmatch.store.database import attach, confine, connect, first, hide_progress
from repmatch.store.meta import check_objects, read_meta
from repmatch.store.records import SPENT_INSTANCES

logger = logging.getLogger(__name__)

CORE = ("spaces", "datasets", "instances", "segments", "batches", "factors", "dropped")
_OTHERS = ("adapters", "scores", "subsets", "members", "coresets", "picks", "represented", "runs", "quarantine")
# Columns by which instances, datasets and adapters of the damaged catalog are found again in a rebuilt one.
_NAMES = {"instances": {"pk", "dataset_pk", "id"}, "datasets": {"pk", "name"}, "adapters": {"pk", "id"}}
_NEW_PK = "(SELECT n.pk, o.pk AS old FROM registry.{0} n JOIN old.registry.{0} o ON n.{1} = o.{1})"
_SET_PARTS = {"subsets": ("members",), "coresets": ("picks", "represented")}


class Salvage:
    """A damaged catalog that is read as far as it goes.

    Args:
        path: the database, not in use by anybody.

    Attributes:
        uuid: the store's UUID, None where it cannot be read.
        spent: the largest key that an instance is known to have had; 0 where that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uuid: str | None = None
        self.spent = 0
        self._schema = 0
        self._whole: set[str] = set()
        with _gate(path).lock:
            self._columns = self._probe()

    def _probe(self) -> dict[str, set[str]]:
        """Read every column of every table once; return those whose blocks are sound."""
        import duckdb

        sound: dict[str, set[str]] = {}
        conn = self._connect()
        if conn is None:
            return sound
        try:
            meta = read_meta(conn)
            self.uuid, self._schema = meta["uuid"], int(meta["schema"])
            self.spent = max(0, int(meta.get(SPENT_INSTANCES, "0")))
            columns = conn.execute(
                "SELECT table_name, column_name FROM duckdb_columns() WHERE schema_name = 'registry' AND NOT internal"
            ).fetchall()
        except (duckdb.Error, StoreCorruptError, ValueError):
            conn.close()
            return sound
        for table, column in columns:
            sound.setdefault(table, set())
            try:
                conn.execute(f'SELECT bit_xor(hash("{column}")) FROM registry.{table}').fetchall()
                sound[table].add(column)
            except duckdb.Error:
                conn.close()  # an error may have invalidated the whole connection
                conn = self._connect()
                if conn is None:
                    return sound
        wanted: dict[str, set[str]] = {}
        for table, column in columns:
            wanted.setdefault(table, set()).add(column)
        self._whole = {table for table, names in wanted.items() if sound[table] == names}
        if "pk" in sound.get("instances", ()):
            self.spent = max(self.spent, first(conn.execute("SELECT coalesce(max(pk), 0) FROM registry.instances"))[0])
        conn.close()
        return sound

    def _connect(self) -> Any:
        import duckdb

        with suppress(duckdb.Error, StoreCorruptError):
            conn = connect(self.path, read_only=True)
            hide_progress(conn)
            confine(conn)
            check_objects(conn, self.path)
            return conn
        return None

    def _is_whole(self, *tables: str) -> bool:
        return bool(self._columns) and self._whole.issuperset(tables)

    @property
    def has_core(self) -> bool:
        """Whether every instance, batch and factor can be read: then nothing needs the journals."""
        return self._schema == migrations.schema() and self._is_whole(*CORE)

    def keep_spent(self, conn: Any) -> None:
        """Keep a new catalog from keys that instances had in this one: a reader may still hold them.

        Args:
            conn: a connection for writing to a catalog without rows.
        """
        if self.spent:
            conn.execute("INSERT INTO registry.meta VALUES (?, ?)", [SPENT_INSTANCES, str(self.spent)])

    def fill(self, conn: Any) -> None:
        """Copy every sound table into a new catalog as it is.

        Args:
            conn: a connection for writing to a catalog without rows.
        """
        self.keep_spent(conn)
        with _attached(conn, self.path):
            for table in (*CORE, *_OTHERS):
                if self._is_whole(table):
                    conn.execute(f"INSERT INTO registry.{table} SELECT * FROM old.registry.{table}")

    def enter(self, conn: Any) -> None:
        """Enter what a catalog rebuilt from the journals lacks: subsets, coresets, scores, runs, the quarantine list.

        Args:
            conn: a connection for writing, outside of a transaction.
        """
        import duckdb

        if self._schema != migrations.schema():
            return
        with _attached(conn, self.path):
            conn.begin()
            try:
                for table in ("runs", "quarantine"):
                    if self._is_whole(table):
                        conn.execute(f"INSERT INTO registry.{table} SELECT * FROM old.registry.{table}")
                if all(_NAMES[table] <= self._columns.get(table, set()) for table in ("datasets", "instances")):
                    self._enter_named(conn)
                conn.commit()
            except BaseException:
                with suppress(duckdb.Error):
                    conn.rollback()
                raise

    def _enter_named(self, conn: Any) -> None:
        conn.execute(f"CREATE OR REPLACE TEMP TABLE d AS SELECT * FROM {_NEW_PK.format('datasets', 'name')}")
        conn.execute(
            "CREATE OR REPLACE TEMP TABLE i AS SELECT n.pk, o.pk AS old FROM old.registry.instances o "
            "JOIN d ON d.old = o.dataset_pk JOIN registry.instances n ON n.dataset_pk = d.pk AND n.id = o.id"
        )
        for kind, parts in _SET_PARTS.items():
            if not self._is_whole(kind, *parts):
                continue
            conn.execute(
                f"INSERT INTO registry.{kind} SELECT s.* REPLACE (d.pk AS dataset_pk) FROM old.registry.{kind} s "
                "JOIN d ON d.old = s.dataset_pk"
            )
            for part in parts:
                conn.execute(
                    f"INSERT INTO registry.{part} SELECT p.* REPLACE (i.pk AS instance_pk) FROM old.registry.{part} p "
                    "JOIN i ON i.old = p.instance_pk"
                )
        if self._is_whole("scores") and _NAMES["adapters"] <= self._columns.get("adapters", set()):
            conn.execute(
                "INSERT INTO registry.scores SELECT s.* REPLACE (d.pk AS dataset_pk, a.pk AS adapter_pk, "
                "i.pk AS instance_pk) FROM old.registry.scores s JOIN d ON d.old = s.dataset_pk "
                f"JOIN i ON i.old = s.instance_pk JOIN {_NEW_PK.format('adapters', 'id')} a ON a.old = s.adapter_pk"
            )
        for kind, parts in _SET_PARTS.items():
            if self._is_whole(kind, *parts):
                _drop_short(conn, kind, parts)


def _drop_short(conn: Any, kind: str, parts: tuple[str, ...]) -> None:
    """Drop subsets and coresets of which a member did not come back: they would be others."""
    key = f"{kind[:-1]}_pk"
    counts = f"SELECT {key} AS set_pk, count(*) AS n FROM {{}}.{parts[0]} GROUP BY 1"
    lost = conn.execute(
        f"SELECT s.pk, s.name FROM registry.{kind} s JOIN ({counts.format('old.registry')}) o ON o.set_pk = s.pk "
        f"LEFT JOIN ({counts.format('registry')}) n ON n.set_pk = s.pk WHERE n.n IS DISTINCT FROM o.n"
    ).fetchall()
    for pk, name in lost:
        for table in parts:
            conn.execute(f"DELETE FROM registry.{table} WHERE {key} = ?", [pk])
        conn.execute(f"DELETE FROM registry.{kind} WHERE pk = ?", [pk])
        logger.warning("the %s %r had lost members and was dropped", kind[:-1], name)


class _attached:  # noqa: N801 -- reads as a function
    def __init__(self, conn: Any, path: Path) -> None:
        self._conn, self._path = conn, path

    def __enter__(self) -> None:
        attach(self._conn, self._path, "old")

    def __exit__(self, *_: object) -> None:
        self._conn.execute("DETACH old")
