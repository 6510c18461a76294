"""Reading instances: ids, raw rows, task fields, columns, filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import Row
from repmatch.errors import UnknownNameError, UsageError
from repmatch.store.database import first
from repmatch.store.datasets import Datasets
from repmatch.store.filters import check_expression, column_sql, rows_view, visible_columns
from repmatch.store.records import ROW_COLUMNS, encodable
from repmatch.store.values import beyond, distinct_names, holdable

if TYPE_CHECKING:
    import polars as pl

CHUNK = 4096


class Instances(Datasets):
    """Instances of a dataset, in the order in which they were first stored."""

    def ids(self, dataset: str, *, where: str | None = None) -> list[str]:
        """Return the ids of a dataset.

        Args:
            dataset: its name.
            where: a SQL condition over `id`, `label` and the columns of the user's rows.

        Returns:
            The ids in the dataset's order.

        Raises:
            UsageError: the condition is not one SQL expression over these columns.
        """
        keys = self._filtered(dataset, where)
        return [row[0] for rows in self._chunks(keys, "i.id", 65536) for row in rows]

    def fingerprint(self, dataset: str) -> str:
        """Return a digest of a dataset's instances, their order, and the fields that the task reads of each.

        Args:
            dataset: its name.

        Returns:
            Text that changes whenever one of these does.
        """
        with self._reading() as conn:
            pk, _ = self._dataset(conn, dataset)
            count, mixed = first(
                conn.execute(
                    "SELECT count(*), bit_xor(md5_number(concat(pk, ':', task_hash)))::VARCHAR FROM registry.instances "
                    "WHERE dataset_pk = ?",
                    [pk],
                )
            )
        return f"{count}:{mixed}"

    def column(self, dataset: str, name: str) -> list[str | None]:
        """Return the values of one column as text.

        Args:
            dataset: the dataset.
            name: `id`, `label` or a column of the user's rows.

        Returns:
            One value an instance in the dataset's order; None where the row has none.

        Raises:
            UnknownNameError: there is no such column.
        """
        with self._reading() as conn:
            pk, record = self._dataset(conn, dataset)
            sources = visible_columns(record.columns)
            if name not in sources:
                raise UnknownNameError.of("column", name, sources, f"columns are those of the rows of {dataset!r}")
            text = column_sql(sources[name], "string") if sources[name] is not None else f"i.{name}"
            found = conn.execute(
                f"SELECT {text} FROM registry.instances i WHERE i.dataset_pk = ? ORDER BY i.pk", [pk]
            ).fetchall()
        return [row[0] for row in found]

    def rows(self, dataset: str, *, ids: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        """Stream the rows as they came.

        Args:
            dataset: the dataset.
            ids: which, in which order; None: all in the dataset's order.

        Returns:
            An iterator over (id, JSON text).

        Raises:
            UnknownNameError: an id is not in the dataset.
        """
        keys = self._filtered(dataset, None) if ids is None else self._keys(dataset, ids)
        return (row for rows in self._chunks(keys, "i.id, i.json") for row in rows)

    def tasks(self, dataset: str, *, ids: Sequence[str] | None = None, where: str | None = None) -> Iterator[Row]:
        """Stream the rows with the fields that the task reads.

        Args:
            dataset: the dataset.
            ids: which, in which order; None: all in the dataset's order.
            where: a SQL condition instead of `ids`.

        Returns:
            An iterator over rows.

        Raises:
            UnknownNameError: an id is not in the dataset.
            UsageError: both `ids` and `where` are given, or the condition is wrong.
        """
        if ids is not None and where is not None:
            raise UsageError("give ids or where, not both.")
        keys = self._filtered(dataset, where) if ids is None else self._keys(dataset, ids)
        columns = ", ".join(f"i.{name}" for name in ROW_COLUMNS.split(", "))
        return (Row(*row) for rows in self._chunks(keys, columns) for row in rows)

    def sql(self, query: str, parameters: Sequence[object] = ()) -> pl.DataFrame:
        """Run a query of the user's over the documented views, read-only and without access to files.

        Args:
            query: one SELECT over instances, datasets, spaces, scores, coresets, picks, subsets, factors, segments,
                runs, adapters, quarantine; docs/store.md describes them.
            parameters: values for the question marks in it.

        Returns:
            The result. Repeated names of columns are told apart as `id`, `id_1`, `id_2`; types that polars does not
            have (intervals, unions, times with a zone, bits, numbers beyond 128 bits) are DuckDB's text.

        Raises:
            UsageError: it is not one SELECT, or DuckDB refuses it, or a value has no place in its column's type:
                `infinity`, a year beyond 1 to 9999, 24:00:00, an integer of more than 38 digits.
        """
        import polars as pl

        table = self._query(query, parameters, holdable)
        wrong = beyond(table)
        if wrong:
            raise UsageError(
                f"{wrong}, which polars cannot give to Python. Ask for the column as text, with ::VARCHAR, or for all "
                "with Store.arrow or `repmatch sql`."
            )
        out = pl.from_arrow(table)
        return out if isinstance(out, pl.DataFrame) else out.to_frame()

    def arrow(self, query: str, parameters: Sequence[object] = (), *, plain: bool = False) -> Any:
        """Run a query as `sql` does.

        Args:
            query: one SELECT over the documented views.
            parameters: values for the question marks in it.
            plain: give numbers, truth values and texts, and lists, structs and maps of these: all else, times and bytes
                for instance, as DuckDB's text; keys of maps are texts.

        Returns:
            The result as a `pyarrow.Table`. Repeated names of columns are told apart as `id`, `id_1`, `id_2`.

        Raises:
            UsageError: it is not one SELECT, or DuckDB refuses it.
        """
        return self._query(query, parameters, (lambda found: holdable(found, plain=True)) if plain else None)

    def _query(self, query: str, parameters: Sequence[object], shape: Callable[[Any], Any] | None) -> Any:
        """Run one SELECT of the user's as `shape` makes it of a relation, and tell its columns apart."""
        import duckdb

        self._ready()
        with self._catalog.guarded() as conn:
            try:
                statements = conn.extract_statements(query)
                if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                    raise UsageError("the store takes one SELECT at a time, and nothing that writes.")
                found = conn.sql(query, params=list(parameters) or None)
                table = (shape(found) if shape is not None else found).to_arrow_table()
                return table.rename_columns(distinct_names(table.column_names))
            except duckdb.Error as error:
                raise UsageError(f"the query cannot be run: {error}") from error

    def _filtered(self, dataset: str, where: str | None) -> NDArray[np.int64]:
        """Return the keys of the instances that pass a condition, in the dataset's order."""
        import duckdb

        with self._reading() as conn:
            pk, record = self._dataset(conn, dataset)
            if where is None:
                query = "SELECT pk FROM registry.instances WHERE dataset_pk = ? ORDER BY pk"
                return _keys_of(conn.execute(query, [pk]))
        view = rows_view(pk, record.columns)
        with self._catalog.guarded() as conn:
            check_expression(conn, where, record.columns)
            try:
                return _keys_of(conn.execute(f"SELECT repmatch_pk FROM {view} WHERE (\n{where}\n) ORDER BY 1"))
            except duckdb.Error as error:
                raise UsageError(
                    f"the condition {where!r} cannot be applied to {dataset!r}: {error}\n"
                    f"Columns: {', '.join(visible_columns(record.columns))}."
                ) from error

    def _keys(self, dataset: str, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the keys of instances in the order of their ids."""
        import pyarrow as pa

        for wanted in ids:
            if not isinstance(wanted, str) or not encodable(wanted):
                raise UnknownNameError(f"there is no instance {wanted!r} in dataset {dataset!r}; an id is a text.")
        with self._reading() as conn:
            pk, _ = self._dataset(conn, dataset)
            wanted_ids = pa.table({"pos": range(len(ids)), "id": pa.array(ids, pa.large_string())})
            conn.register("wanted", wanted_ids)
            found = conn.execute(
                "SELECT coalesce(i.pk, -1) AS pk FROM wanted w LEFT JOIN registry.instances i "
                "ON i.id = w.id AND i.dataset_pk = ? ORDER BY w.pos",
                [pk],
            )
            keys = _keys_of(found)
            conn.unregister("wanted")
            if len(keys) and keys.min() < 0:
                missing = ids[int(np.argmin(keys))]
                raise self._unknown_id(conn, pk, dataset, missing)
        return keys

    def _unknown_id(self, conn: Any, pk: int, dataset: str, missing: str) -> UnknownNameError:
        near = conn.execute(
            "SELECT id FROM registry.instances WHERE dataset_pk = ? AND length(id) < 200 "
            "ORDER BY jaro_winkler_similarity(id, ?) DESC, id LIMIT 3",
            [pk, missing[:200]],
        ).fetchall()
        hint = "; the nearest are " + ", ".join(repr(row[0]) for row in near) if near else "; it is empty"
        return UnknownNameError(f"there is no instance {missing!r} in dataset {dataset!r}{hint}.")

    def _chunks(self, keys: NDArray[np.int64], columns: str, size: int = CHUNK) -> Iterator[list[tuple[Any, ...]]]:
        """Fetch instances by key, in the order of the keys, a few at a time."""
        import pyarrow as pa

        for lo in range(0, len(keys), size):
            part = keys[lo : lo + size]
            with self._reading() as conn:
                conn.register("wanted", pa.table({"pos": range(len(part)), "pk": part}))
                rows = conn.execute(
                    f"SELECT {columns} FROM wanted w JOIN registry.instances i ON i.pk = w.pk "
                    "WHERE i.pk BETWEEN ? AND ? ORDER BY w.pos",
                    [int(part.min()), int(part.max())],
                ).fetchall()
                conn.unregister("wanted")
            yield rows


def _keys_of(result: Any) -> NDArray[np.int64]:
    columns = result.fetchnumpy()
    return np.asarray(next(iter(columns.values())), np.int64)
