"""Coresets: ordered selections with gains and representatives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.datamodels import Coreset
from repmatch.errors import UnknownNameError, UsageError
from repmatch.store.adapters import Adapters
from repmatch.store.database import first
from repmatch.store.datasets import check_name
from repmatch.store.records import next_key, stored_object

if TYPE_CHECKING:
    import polars as pl


class Coresets(Adapters):
    """Coresets."""

    def save_coreset(self, coreset: Coreset, replace: bool = False) -> None:
        """Keep a coreset.

        Args:
            coreset: the coreset.
            replace: whether it may take the place of one of the same name.

        Raises:
            UsageError: the name is taken, or the arrays do not fit.
            UnknownNameError: an id is not in the dataset.
        """
        _check_shapes(coreset)
        with self.writing():
            picked = self._keys(coreset.dataset, coreset.ids)
            everyone = self._keys(coreset.dataset, coreset.all_ids)
            with self._transaction() as conn:
                check_name(conn, coreset.name, "coreset")
                dataset_pk, _ = self._dataset(conn, coreset.dataset)
                old = first(conn.execute("SELECT pk FROM registry.coresets WHERE name = ?", [coreset.name]))
                if old and not replace:
                    raise UsageError(f"there is a coreset {coreset.name!r} already. Choose another name or replace it.")
                if old:
                    for table in ("picks", "represented"):
                        conn.execute(f"DELETE FROM registry.{table} WHERE coreset_pk = ?", [old[0]])
                    conn.execute("DELETE FROM registry.coresets WHERE pk = ?", [old[0]])
                pk = next_key(conn, "coresets")
                conn.execute(
                    "INSERT INTO registry.coresets VALUES (?, ?, ?, ?, ?, now()::TIMESTAMP)",
                    [pk, coreset.name, dataset_pk, coreset.strategy, json.dumps(dict(coreset.arguments))],
                )
                _insert(conn, "picks", pk, {"key": picked, "gain": coreset.gains})
                _insert(
                    conn,
                    "represented",
                    pk,
                    {"key": everyone, "representative": coreset.representative, "similarity": coreset.similarity},
                )

    def coreset(self, name: str) -> Coreset:
        """Return a coreset.

        Args:
            name: its name.

        Returns:
            The coreset.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._reading() as conn:
            found = first(
                conn.execute(
                    "SELECT c.pk, d.name, c.strategy, c.arguments FROM registry.coresets c "
                    "JOIN registry.datasets d ON d.pk = c.dataset_pk WHERE c.name = ?",
                    [name],
                )
            )
            if not found:
                known = [row[0] for row in conn.execute("SELECT name FROM registry.coresets").fetchall()]
                raise UnknownNameError.of(
                    "coreset", name, known, "make one with: repmatch select DATASET -k N --name NAME"
                )
            picks = _fetch(conn, "i.id, t.gain", "picks", "rank", found[0])
            others = _fetch(conn, "i.id, t.representative, t.similarity", "represented", "position", found[0])
        return Coreset(
            name=name,
            dataset=found[1],
            strategy=found[2],
            arguments=stored_object(found[3], f"the record of coreset {name!r}"),
            ids=tuple(picks["id"]),
            gains=np.asarray(picks["gain"], np.float64),
            all_ids=tuple(others["id"]),
            representative=np.asarray(others["representative"], np.int64),
            similarity=np.asarray(others["similarity"], np.float32),
        )

    def coresets(self) -> pl.DataFrame:
        """Return every coreset: name, dataset, strategy, arguments, picks, created."""
        return self._frame(
            "SELECT c.name, d.name AS dataset, c.strategy, c.arguments, count(p.rank) AS picks, c.created "
            "FROM registry.coresets c JOIN registry.datasets d ON d.pk = c.dataset_pk "
            "LEFT JOIN registry.picks p ON p.coreset_pk = c.pk GROUP BY ALL ORDER BY c.name"
        )


def _check_shapes(coreset: Coreset) -> None:
    k, n = len(coreset.ids), len(coreset.all_ids)
    expected = {"gains": (k,), "representative": (n,), "similarity": (n,)}
    for name, shape in expected.items():
        got = getattr(coreset, name).shape
        if got != shape:
            raise UsageError(f"the coreset's {name} have shape {got}; {k} picks from {n} instances need {shape}.")
    if len(set(coreset.ids)) != k:
        raise UsageError(f"coreset {coreset.name!r} picks an instance twice.")
    if n and (coreset.representative.min() < -1 or coreset.representative.max() >= k):
        raise UsageError(f"a representative lies outside of the {k} picks (-1: none).")


def _insert(conn: Any, table: str, pk: int, columns: dict[str, Any]) -> None:
    import pyarrow as pa

    conn.register("chosen", pa.table({"pos": range(len(columns["key"])), **columns}))
    names = ", ".join(columns)
    conn.execute(f"INSERT INTO registry.{table} SELECT ?, pos, {names} FROM chosen ORDER BY pos", [pk])
    conn.unregister("chosen")


def _fetch(conn: Any, columns: str, table: str, order: str, pk: int) -> dict[str, Any]:
    query = (
        f"SELECT {columns} FROM registry.{table} t JOIN registry.instances i ON i.pk = t.instance_pk "
        f"WHERE t.coreset_pk = ? ORDER BY t.{order}"
    )
    return dict(conn.sql(query, params=[pk]).to_arrow_table().to_pydict())
