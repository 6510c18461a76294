"""Deleting instances and datasets: at once for every reader, their bytes with the next compaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import UsageError, quote_list
from repmatch.store.cache import forget_others
from repmatch.store.compaction import Compaction
from repmatch.store.database import first
from repmatch.store.records import SPENT_INSTANCES, next_key

_LEAN = ("scores", "factors", "members", "represented", "picks")


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion took.

    Attributes:
        rows: instances deleted.
        coresets: coresets deleted with them.
    """

    rows: int
    coresets: tuple[str, ...]


class Removal(Compaction):
    """Deletes instances."""

    def delete(
        self, dataset: str, *, ids: Sequence[str] | None = None, where: str | None = None, coresets: bool = False
    ) -> Deleted:
        """Delete instances with their factors and scores; subsets lose them, every other instance stays as it is.

        Args:
            dataset: the dataset.
            ids: the instances, by id.
            where: the instances, by a SQL condition.
            coresets: delete the coresets that picked one of them too; without this they are in the way.

        Returns:
            What went.

        Raises:
            UsageError: neither or both of `ids` and `where` are given, or a coreset picked one of them.
            UnknownNameError: an id is not in the dataset.
        """
        if (ids is None) == (where is None):
            raise UsageError("give the instances to delete by ids or by where, one of the two.")
        self._ready()
        with self.writing():
            keys = self._filtered(dataset, where) if ids is None else np.unique(self._keys(dataset, ids))
            if not len(keys):
                return Deleted(0, ())
            with self._transaction() as conn:
                taken = self._delete(conn, keys, coresets)
            self._catalog.checkpoint()  # a deletion must not be undone by a lost write-ahead log
        return Deleted(len(keys), taken)

    def delete_dataset(self, dataset: str, *, coresets: bool = False) -> Deleted:
        """Delete a dataset: its instances, subsets, quarantine list and record.

        Args:
            dataset: the dataset.
            coresets: delete its coresets too; without this they are in the way.

        Returns:
            What went.

        Raises:
            UsageError: it has coresets.
            UnknownNameError: there is no such dataset.
        """
        self._ready()
        with self.writing():
            keys = self._filtered(dataset, None)
            with self._transaction() as conn:
                pk, _ = self._dataset(conn, dataset)
                names = _names(conn, "SELECT name FROM registry.coresets WHERE dataset_pk = ? ORDER BY name", [pk])
                _refuse(names, coresets, f"dataset {dataset!r}")
                _drop_coresets(conn, names)
                self._delete(conn, keys, coresets)
                conn.execute(
                    "DELETE FROM registry.members WHERE subset_pk IN (SELECT pk FROM registry.subsets WHERE "
                    "dataset_pk = ?)",
                    [pk],
                )
                for table in ("subsets", "scores"):
                    conn.execute(f"DELETE FROM registry.{table} WHERE dataset_pk = ?", [pk])
                conn.execute("DELETE FROM registry.quarantine WHERE dataset = ?", [dataset])
                conn.execute("DELETE FROM registry.datasets WHERE pk = ?", [pk])
            self._catalog.checkpoint()
            forget_others(self.path, self.datasets()["name"].to_list())
        return Deleted(len(keys), names)

    def _delete(self, conn: Any, keys: NDArray[np.int64], coresets: bool) -> tuple[str, ...]:
        import pyarrow as pa

        conn.register("chosen", pa.table({"pk": keys}))
        conn.execute("CREATE OR REPLACE TEMP TABLE going AS SELECT pk FROM chosen")
        conn.unregister("chosen")
        names = _names(
            conn,
            "SELECT DISTINCT c.name FROM registry.picks p JOIN registry.coresets c ON c.pk = p.coreset_pk "
            "WHERE p.instance_pk IN (SELECT pk FROM going) ORDER BY c.name",
            [],
        )
        _refuse(names, coresets, "an instance to be deleted")
        _drop_coresets(conn, names)
        for table in _LEAN:
            conn.execute(f"DELETE FROM registry.{table} WHERE instance_pk IN (SELECT pk FROM going)")
        spent = next_key(conn, "instances") - 1
        conn.execute("DELETE FROM registry.meta WHERE key = ?", [SPENT_INSTANCES])
        conn.execute("INSERT INTO registry.meta VALUES (?, ?)", [SPENT_INSTANCES, str(spent)])
        conn.execute("DELETE FROM registry.instances WHERE pk IN (SELECT pk FROM going)")
        conn.execute("DROP TABLE going")
        return names


def _names(conn: Any, query: str, parameters: list[Any]) -> tuple[str, ...]:
    return tuple(row[0] for row in conn.execute(query, parameters).fetchall())


def _refuse(names: tuple[str, ...], allowed: bool, what: str) -> None:
    if names and not allowed:
        raise UsageError(
            f"{what} is in use by coreset {quote_list(names)}; nothing was deleted. Delete those too with --coresets "
            "(coresets=True), or export them first."
        )


def _drop_coresets(conn: Any, names: tuple[str, ...]) -> None:
    for name in names:
        pk = first(conn.execute("SELECT pk FROM registry.coresets WHERE name = ?", [name]))[0]
        for table in ("picks", "represented"):
            conn.execute(f"DELETE FROM registry.{table} WHERE coreset_pk = ?", [pk])
        conn.execute("DELETE FROM registry.coresets WHERE pk = ?", [pk])
