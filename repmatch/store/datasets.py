"""Spaces, datasets and the one namespace of datasets, subsets and coresets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repmatch.datamodels import Dataset, Space
from repmatch.errors import StoreCorruptError, UnknownNameError, UsageError
from repmatch.store.base import Base
from repmatch.store.database import first
from repmatch.store.records import dataset_of, encodable, next_key, put_dataset, put_space, space_of, stored_json

if TYPE_CHECKING:
    import polars as pl

_KINDS = (("dataset", "datasets"), ("subset", "subsets"), ("coreset", "coresets"))


@dataclass(frozen=True, slots=True)
class Subset:
    """What a name stands for.

    Attributes:
        name: the name as it was given.
        dataset: the dataset.
        where: a filter over it, or None.
        ids: its members in order, or None: all that pass the filter.
    """

    name: str
    dataset: str
    where: str | None = None
    ids: tuple[str, ...] | None = None


_JSON = ("fields", "labels", "columns")


class Datasets(Base):
    """Spaces, datasets and names."""

    def save_space(self, space: Space) -> None:
        """Keep a space.

        Args:
            space: the space; nothing happens when it is there.
        """
        with self._transaction() as conn:
            put_space(conn, space)

    def space(self, space_id: str) -> Space:
        """Return a space.

        Args:
            space_id: its id.

        Returns:
            The space.

        Raises:
            UnknownNameError: there is none of that id.
        """
        with self._reading() as conn:
            found = first(conn.execute("SELECT json FROM registry.spaces WHERE id = ?", [space_id]))
            if not found:
                known = [row[0] for row in conn.execute("SELECT id FROM registry.spaces").fetchall()]
                raise UnknownNameError.of("space", space_id, known)
        space = space_of(found[0])
        if space.id != space_id:
            raise StoreCorruptError(
                f"the record of space {space_id} is that of another one, {space.id}. Restore the store from a backup."
            )
        return space

    def spaces(self) -> pl.DataFrame:
        """Return every space: id, json, created."""
        return self._frame("SELECT id, json, created FROM registry.spaces ORDER BY pk")

    def save_dataset(self, dataset: Dataset) -> None:
        """Insert or update a dataset's record; its instances stay.

        Args:
            dataset: the dataset.

        Raises:
            UsageError: the name is taken by a subset or coreset, or cannot be a name.
        """
        with self._transaction() as conn:
            check_name(conn, dataset.name, "dataset")
            put_dataset(conn, dataset)

    def has_dataset(self, name: str) -> bool:
        """Whether there is a dataset of that name; False where there is no store yet.

        Args:
            name: the name.

        Returns:
            True or False.
        """
        if not self._catalog.exists():
            return False
        with self._reading() as conn:
            return bool(first(conn.execute("SELECT 1 FROM registry.datasets WHERE name = ?", [name])))

    def dataset(self, name: str) -> Dataset:
        """Return a dataset's record.

        Args:
            name: its name.

        Returns:
            The record.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._reading() as conn:
            return self._dataset(conn, name)[1]

    def datasets(self) -> pl.DataFrame:
        """Return every dataset: name, rows, factors, labels, encoding, space_id, columns, created, updated."""
        return self._frame(
            "SELECT d.name, count(i.pk) AS rows, count(f.instance_pk) AS factors, "
            "coalesce(try(from_json(d.labels, '[\"VARCHAR\"]')), []) AS labels, "
            "d.encoding, d.space_id, d.columns, d.created, d.updated "
            "FROM registry.datasets d LEFT JOIN registry.instances i ON i.dataset_pk = d.pk "
            "LEFT JOIN (SELECT f.instance_pk, p.id AS space_id, s.encoding FROM registry.factors f "
            "JOIN registry.segments s ON s.pk = f.segment_pk JOIN registry.spaces p ON p.pk = s.space_pk) f "
            "ON f.instance_pk = i.pk AND f.space_id = d.space_id AND f.encoding = d.encoding "
            "GROUP BY ALL ORDER BY min(d.pk)"
        )

    def _dataset(self, conn: Any, name: str) -> tuple[int, Dataset]:
        found = first(
            conn.execute(
                "SELECT pk, fields, labels, columns, space_id, encoding FROM registry.datasets WHERE name = ?", [name]
            )
        )
        if not found:
            known = [row[0] for row in conn.execute("SELECT name FROM registry.datasets").fetchall()]
            raise UnknownNameError.of("dataset", name, known, "make it with: repmatch ingest FILE --dataset NAME")
        value: dict[str, Any] = {"name": name, "space_id": found[4], "encoding": found[5]}
        value |= {
            key: stored_json(found[at], f"the record of dataset {name!r}")
            for at, key in ((1, "fields"), (2, "labels"), (3, "columns"))
        }
        return int(found[0]), dataset_of(value)

    def save_subset(self, name: str, dataset: str, ids: Sequence[str]) -> None:
        """Keep a list of instances under a name; an older subset of that name is replaced.

        Args:
            name: the name.
            dataset: the dataset.
            ids: its members in order.

        Raises:
            UsageError: the name is taken by a dataset or coreset, or cannot be a name.
            UnknownNameError: an id is not in the dataset.
        """
        import pyarrow as pa

        with self.writing():
            keys = self._keys(dataset, ids)
            with self._transaction() as conn:
                check_name(conn, name, "subset")
                pk = next_key(conn, "subsets")
                old = "(SELECT pk FROM registry.subsets WHERE name = ?)"
                conn.execute(f"DELETE FROM registry.members WHERE subset_pk IN {old}", [name])
                conn.execute("DELETE FROM registry.subsets WHERE name = ?", [name])
                conn.execute(
                    "INSERT INTO registry.subsets SELECT ?, ?, pk, now()::TIMESTAMP FROM registry.datasets "
                    "WHERE name = ?",
                    [pk, name, dataset],
                )
                conn.register("chosen", pa.table({"pos": range(len(keys)), "pk": keys}))
                conn.execute("INSERT INTO registry.members SELECT ?, pos, pk FROM chosen ORDER BY pos", [pk])
                conn.unregister("chosen")

    def subsets(self) -> pl.DataFrame:
        """Return every named subset: name, dataset, rows, created."""
        return self._frame(
            "SELECT s.name, d.name AS dataset, count(m.position) AS rows, s.created FROM registry.subsets s "
            "JOIN registry.datasets d ON d.pk = s.dataset_pk LEFT JOIN registry.members m ON m.subset_pk = s.pk "
            "GROUP BY ALL ORDER BY s.name"
        )

    def resolve(self, name: str) -> Subset:
        """Return what a name stands for.

        Args:
            name: a dataset, a named subset, a coreset, or `DATASET[SQL]`, such as `sst2[label = 'positive']`.

        Returns:
            The subset; a filter is not evaluated yet.

        Raises:
            UnknownNameError: nothing has that name.
        """
        with self._reading() as conn:
            kind = find_name(conn, name)
            if kind == "dataset":
                return Subset(name, name)
            if kind in ("subset", "coreset"):
                return self._listed(conn, name, kind)
            head, bracket, rest = name.partition("[")
            if bracket and rest.endswith("]") and find_name(conn, head.strip()) == "dataset":
                return Subset(name, head.strip(), rest[:-1])
            looked = head.strip() if bracket else name
            raise UnknownNameError.of(
                "dataset, subset or coreset", looked, _names(conn), "name one of them, or DATASET[SQL]"
            )

    def _listed(self, conn: Any, name: str, kind: str) -> Subset:
        table, members, key, order = {
            "subset": ("subsets", "members", "subset_pk", "position"),
            "coreset": ("coresets", "picks", "coreset_pk", "rank"),
        }[kind]
        dataset = first(
            conn.execute(
                f"SELECT d.name FROM registry.{table} s JOIN registry.datasets d ON d.pk = s.dataset_pk "
                "WHERE s.name = ?",
                [name],
            )
        )[0]
        rows = conn.execute(
            f"SELECT i.id FROM registry.{table} s JOIN registry.{members} m ON m.{key} = s.pk "
            f"JOIN registry.instances i ON i.pk = m.instance_pk WHERE s.name = ? ORDER BY m.{order}",
            [name],
        ).fetchall()
        return Subset(name, dataset, None, tuple(row[0] for row in rows))

    def _keys(self, dataset: str, ids: Sequence[str]) -> Any:
        raise NotImplementedError


def find_name(conn: Any, name: str) -> str | None:
    """Return what kind of thing has a name.

    Args:
        conn: an open connection.
        name: the name.

    Returns:
        "dataset", "subset", "coreset" or None.
    """
    for kind, table in _KINDS:
        if first(conn.execute(f"SELECT 1 FROM registry.{table} WHERE name = ?", [name])):
            return kind
    return None


def _names(conn: Any) -> list[str]:
    union = " UNION ALL ".join(f"SELECT name FROM registry.{table}" for _, table in _KINDS)
    return [row[0] for row in conn.execute(union).fetchall()]


def check_name(conn: Any, name: str, kind: str) -> None:
    """Refuse a name that another kind of thing has, or that cannot be one.

    Args:
        conn: an open connection.
        name: the name.
        kind: "dataset", "subset" or "coreset".

    Raises:
        UsageError: it cannot be used.
    """
    if not name.strip() or name != name.strip() or "[" in name or not name.isprintable() or not encodable(name):
        raise UsageError(
            f"{name!r} cannot name a {kind}: a name is printable, does not start or end with a space and holds no '['."
        )
    taken = find_name(conn, name)
    if taken not in (None, kind):
        raise UsageError(
            f"{name!r} is a {taken} already; datasets, subsets and coresets share their names. Choose another."
        )
