"""Who is in a subset, and what it was when something was learned from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from repmatch.datamodels import BadRow
from repmatch.store.datasets import Subset, find_name
from repmatch.store.factors import FactorTables

if TYPE_CHECKING:
    import polars as pl

_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Members:
    """The instances of a subset.

    Attributes:
        ids: the user's ids, in the subset's order.
        labels: their labels.
        digest: BLAKE2b over ids and task hashes in order: the same digest, the same adapter.
        row_digest: BLAKE2b over ids and row hashes in order: the same digest, the same rows.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    digest: str
    row_digest: str


class MemberTables(FactorTables):
    """Membership of subsets."""

    def narrow(self, subset: Subset, where: str) -> Subset:
        """Return the members of a subset that also pass a condition.

        Args:
            subset: the subset.
            where: a SQL condition on its dataset's rows.

        Returns:
            The narrower subset, named after both.
        """
        name = f"{subset.name}[{where}]"
        if subset.ids is None:
            both = where if subset.where is None else f"({subset.where}) AND ({where})"
            return replace(subset, name=name, where=both)
        passing = set(self.ids(subset.dataset, where=where))
        return replace(subset, name=name, ids=tuple(i for i in subset.ids if i in passing))

    def members(self, subset: Subset) -> Members:
        """Return the instances of a subset.

        Args:
            subset: from `resolve` or `narrow`.

        Returns:
            Ids and labels in order, and digests of what they are.

        Raises:
            UsageError: the subset's condition is not one SQL expression over the dataset's columns.
        """
        if subset.ids is None:
            keys = self._filtered(subset.dataset, subset.where)
        else:
            keys = self._keys(subset.dataset, subset.ids)
        tasks, rows = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        ids: list[str] = []
        labels: list[str] = []
        for part in self._chunks(keys, "i.id, i.label, i.task_hash, i.row_hash", _CHUNK):
            for name, label, task, row in part:
                ids.append(name)
                labels.append(label)
                tasks.update(f"{len(name)}:{name}{task}".encode())
                rows.update(f"{len(name)}:{name}{row}".encode())
        return Members(tuple(ids), tuple(labels), tasks.hexdigest(), rows.hexdigest())

    def is_coreset(self, name: str) -> bool:
        """Whether there is a coreset of that name.

        Args:
            name: the name.

        Returns:
            True or False.
        """
        with self._reading() as conn:
            return find_name(conn, name) == "coreset"

    def latest_scores(self, dataset: str) -> pl.DataFrame:
        """Return the scores that speak for a dataset: against its own adapter, or else against the newest one.

        Args:
            dataset: the dataset.

        Returns:
            Columns id, score, against (the subset's name); empty where nothing was scored.
        """
        return self._frame(
            "WITH mine AS (SELECT s.*, a.subset FROM registry.scores s JOIN registry.adapters a ON a.pk = s.adapter_pk "
            "JOIN registry.datasets d ON d.pk = s.dataset_pk WHERE d.name = ?), "
            "best AS (SELECT adapter_pk FROM mine ORDER BY subset = ? DESC, adapter_pk DESC LIMIT 1) "
            "SELECT i.id, m.score, m.subset AS against FROM mine m JOIN registry.instances i ON i.pk = m.instance_pk "
            "WHERE m.adapter_pk = (SELECT adapter_pk FROM best) ORDER BY i.pk",
            [dataset, dataset],
        )

    def quarantine(self, dataset: str, bad: Sequence[BadRow]) -> None:
        """Add rows to a dataset's quarantine list.

        Args:
            dataset: the dataset.
            bad: the rows, with reasons.
        """
        import pyarrow as pa

        names = ("source", "line", "id", "reason")
        table = pa.table({name: [getattr(row, name) for row in bad] for name in names})
        with self._transaction() as conn:
            conn.register("aside", table)
            conn.execute(
                "INSERT INTO registry.quarantine "
                "SELECT ?, source, line, id::VARCHAR, reason, now()::TIMESTAMP FROM aside",
                [dataset],
            )
            conn.unregister("aside")
