"""A trial store: what storing some rows takes in memory and on disk, found by doing it in a scratch folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repmatch.curator.warm_choice import keep
from repmatch.datamodels import Dataset, FactorBatch, Row
from repmatch.store import open as open_store

if TYPE_CHECKING:
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Store

# Factors that are stored to see what that takes, in bytes of float32.
_MOST_BYTES = 1 << 26
_NAME = "trial"


class TrialStore:
    """A store in a scratch folder.

    Args:
        store: the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def stage(self, rows: Sequence[Row]) -> list[Row]:
        """Take rows in as an ingest does.

        Args:
            rows: the rows.

        Returns:
            Each id's first row, in order.
        """
        with self._store.stage(_NAME) as stage:
            stage.add(rows)
            stage.resolve(None)
            return [row for chunk in stage.accepted() for row in chunk]

    def fill(self, bench: Workbench, record: Dataset, rows: Sequence[Row], batch: FactorBatch, *, several: bool) -> int:
        """Store rows as an ingest does, with the factors of some of them for all.

        Args:
            bench: its space and warm start are stored too.
            record: the dataset as it would be.
            rows: the rows.
            batch: factors of one row or more.
            several: whether the ingest commits more than once.

        Returns:
            How many rows were stored: all, but for large factors.
        """
        count: int = max(1, min(len(rows), _MOST_BYTES // (4 * batch.values.shape[1])))
        with self._store.run("ingest", {}):
            keep(self._store, bench)
            self._store.save_dataset(replace(record, name=_NAME, space_id=bench.space.id))
            # A catalog takes room by transaction too: blocks of the first can't be used again before the second.
            for part in (slice(0, count // 2), slice(count // 2, count)) if several else (slice(0, count),):
                at = np.arange(count)[part] % len(batch.rows)
                many = FactorBatch(
                    rows=tuple(rows[part]),
                    values=batch.values[at],
                    cores=None if batch.cores is None else batch.cores[at],
                    norms=batch.norms[at],
                    losses=batch.losses[at],
                    tokens=batch.tokens[at],
                    truncated=batch.truncated[at],
                )
                self._store.append(_NAME, bench.space.id, record.encoding, many)
        return count

    def close(self) -> int:
        """Close the store, and return the bytes of all its files."""
        self._store.close()
        files = [path for path in Path(self._store.path).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)


@contextmanager
def trial_store() -> Iterator[TrialStore]:
    """Make a store in a scratch folder, and remove it afterwards.

    Yields:
        The store.
    """
    with tempfile.TemporaryDirectory(prefix="repmatch-plan-") as folder, open_store(Path(folder) / "store") as store:
        yield TrialStore(store)
