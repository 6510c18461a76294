"""Subset adapters and the scores of instances against them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import Adapter
from repmatch.errors import StoreCorruptError, UnknownNameError, UsageError
from repmatch.store.adapter_file import adapter_bytes, parse_adapter, put_adapter
from repmatch.store.database import first
from repmatch.store.factors import FactorTables
from repmatch.store.files import write_file, writing_to

if TYPE_CHECKING:
    import polars as pl


class Adapters(FactorTables):
    """Subset adapters and scores."""

    def save_adapter(self, adapter: Adapter) -> None:
        """Keep an adapter: its file first, durably, then its row. One that is there and sound is left alone.

        Args:
            adapter: the adapter.
        """
        path = self._adapter_path(adapter.id)
        with self.writing():
            with suppress(StoreCorruptError):  # a damaged file is replaced by a sound one
                if self.adapter(adapter.id) is not None:
                    return
            data = adapter_bytes(adapter)
            with writing_to(path):
                write_file(path, data)
            with self._transaction() as conn:
                put_adapter(conn, adapter, data)

    def adapter(self, adapter_id: str) -> Adapter | None:
        """Return an adapter.

        Args:
            adapter_id: its id.

        Returns:
            The adapter, or None where there is none of that id.

        Raises:
            StoreCorruptError: its file is gone or not what was saved.
        """
        with self._reading() as conn:
            found = first(conn.execute("SELECT sha256 FROM registry.adapters WHERE id = ?", [adapter_id]))
        if not found:
            return None
        path = self._adapter_path(adapter_id)
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != found[0]:
            what = "is gone" if not path.exists() else f"has another SHA-256 than when it was saved ({found[0]})"
            raise StoreCorruptError(
                f"the adapter file {path} {what}. Restore it from a backup, or train the adapter again."
            )
        return parse_adapter(data, path)

    def adapters(self) -> pl.DataFrame:
        """Return every adapter: id, space_id, subset, members, recipe, record, bytes, created."""
        return self._frame(
            "SELECT id, space_id, subset, members, recipe, record, bytes, created FROM registry.adapters ORDER BY pk"
        )

    def _adapter_path(self, adapter_id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", adapter_id):
            raise UsageError(f"{adapter_id!r} cannot be the id of an adapter; expected letters, digits, '-' and '_'.")
        return self.path / "adapters" / f"{adapter_id}.safetensors"

    def save_scores(
        self,
        dataset: str,
        adapter_id: str,
        ids: Sequence[str],
        scores: NDArray[np.floating[Any]],
        per_matrix: NDArray[np.floating[Any]],
    ) -> None:
        """Keep the scores of instances against an adapter; earlier ones of the same two are replaced.

        Args:
            dataset: the dataset.
            adapter_id: the adapter.
            ids: which instances, n of them.
            scores: (n,) floats.
            per_matrix: (n, m) float32.

        Raises:
            UsageError: shapes do not fit, or a score is NaN or infinite.
            UnknownNameError: an instance or the adapter does not exist.
        """
        import pyarrow as pa

        n = len(ids)
        if scores.shape != (n,) or per_matrix.ndim != 2 or len(per_matrix) != n:
            raise UsageError(
                f"{n} ids need scores (n,) and per_matrix (n, m); received {scores.shape} and {per_matrix.shape}."
            )
        if not (np.isfinite(scores).all() and np.isfinite(per_matrix).all()):
            raise UsageError("the scores hold NaN or infinity; they are not stored.")
        with self.writing():
            keys = self._keys(dataset, ids)
            with self._transaction() as conn:
                dataset_pk, _ = self._dataset(conn, dataset)
                adapter_pk = self._adapter_key(conn, adapter_id)
                m = per_matrix.shape[1]
                lists = pa.LargeListArray.from_arrays(
                    pa.array(np.arange(n + 1) * m, pa.int64()), pa.array(per_matrix.astype(np.float32).ravel())
                )
                table = pa.table({"pk": keys, "score": scores.astype(np.float64), "per_matrix": lists})
                conn.execute(
                    "DELETE FROM registry.scores WHERE dataset_pk = ? AND adapter_pk = ?", [dataset_pk, adapter_pk]
                )
                conn.register("scored", table)
                conn.execute(
                    "INSERT INTO registry.scores SELECT ?, ?, pk, score, per_matrix FROM scored",
                    [dataset_pk, adapter_pk],
                )
                conn.unregister("scored")

    def scores(self, dataset: str, adapter_id: str) -> pl.DataFrame:
        """Return the scores of a dataset's instances against an adapter, best first, ties by id.

        Args:
            dataset: the dataset.
            adapter_id: the adapter.

        Returns:
            id, score, per_matrix; without rows where nothing was scored. An instance whose task changed since has
            none.
        """
        return self._frame(
            "SELECT i.id, s.score, s.per_matrix FROM registry.scores s "
            "JOIN registry.datasets d ON d.pk = s.dataset_pk JOIN registry.adapters a ON a.pk = s.adapter_pk "
            "JOIN registry.instances i ON i.pk = s.instance_pk WHERE d.name = ? AND a.id = ? "
            "ORDER BY s.score DESC, i.id",
            [dataset, adapter_id],
        )

    def _adapter_key(self, conn: Any, adapter_id: str) -> int:
        found = first(conn.execute("SELECT pk FROM registry.adapters WHERE id = ?", [adapter_id]))
        if not found:
            known = [row[0] for row in conn.execute("SELECT id FROM registry.adapters").fetchall()]
            raise UnknownNameError.of("adapter", adapter_id, known)
        return int(found[0])
