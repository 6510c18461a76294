"""Uniting stores: what one holds is appended to another, byte for byte and under its own names."""

from __future__ import annotations

from pathlib import Path

from repmatch.datamodels import Dataset
from repmatch.errors import UsageError, quote_list
from repmatch.store.compaction import MOVE_ROWS
from repmatch.store.recovery import committed_segments
from repmatch.store.repair import Repair


class Union(Repair):
    """Takes in what another store holds."""

    def absorb(self, path: str | Path) -> int:
        """Append the instances, factors and adapters of another store; nothing is renumbered or computed.

        A dataset that both have must have the same columns and labels, and an id that both have the same row. Rows
        without factors, scores, subsets and coresets stay behind.

        Args:
            path: the other store, which is only read.

        Returns:
            Factors appended; those that were here already are not counted.

        Raises:
            UsageError: a dataset or an instance of the same name is another one; nothing was appended.
        """
        other = Union(Path(path), "r", 0.0)
        with other._reading() as conn:
            numbers = [record.pk for record in committed_segments(conn)]
        groups = list(other._living(numbers))
        with self.writing():
            names = list(dict.fromkeys(dataset.name for dataset, *_ in groups))
            for name in names:
                self._must_fit(other, other.dataset(name))
            taken = 0
            for dataset, space, encoding, keys in groups:
                self.save_space(space)
                if not self.has_dataset(dataset.name):
                    self.save_dataset(dataset)
                with self._reading() as conn:
                    here = {
                        row[0]
                        for row in conn.execute(
                            "SELECT id FROM main.factors WHERE dataset = ? AND space_id = ? AND encoding = ?",
                            [dataset.name, space.id, encoding],
                        ).fetchall()
                    }
                for lo in range(0, len(keys), MOVE_ROWS):
                    part = keys[lo : lo + MOVE_ROWS]
                    new = part[[name not in here for name in other._ids_of(part)]]
                    if len(new):
                        self._append_raw(dataset.name, space, encoding, other._raw(new, numbers, space, encoding))
                        taken += len(new)
            for adapter_id in other.adapters()["id"]:
                adapter = other.adapter(adapter_id)
                if adapter is not None:
                    self.save_adapter(adapter)
        return taken

    def _must_fit(self, other: Union, dataset: Dataset) -> None:
        if not self.has_dataset(dataset.name):
            return
        mine = self.dataset(dataset.name)
        if (mine.fields, mine.labels) != (dataset.fields, dataset.labels):
            raise UsageError(
                f"the dataset {dataset.name!r} is another one in {other.path}: columns {dataset.fields} and labels "
                f"{dataset.labels} against {mine.fields} and {mine.labels}. Nothing was taken in."
            )
        query = (
            "SELECT i.id, i.row_hash FROM registry.instances i JOIN registry.datasets d ON d.pk = i.dataset_pk "
            "WHERE d.name = ?"
        )
        with self._reading() as conn:
            here = dict(conn.execute(query, [dataset.name]).fetchall())
        with other._reading() as conn:
            there = dict(conn.execute(query, [dataset.name]).fetchall())
        clash = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
        if clash:
            raise UsageError(
                f"{len(clash)} instances of {dataset.name!r} have other content in {other.path}: "
                f"{quote_list(clash, 3)}. Nothing was taken in. Ingest one of the two again, or rename its dataset."
            )
