"""Rows of the catalog to and from the dataclasses of the words, and the one transaction that enters a batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any, get_args

import numpy as np

from repmatch.datamodels import Dataset, Encoding, Fields, Row, Space, canonical_json
from repmatch.errors import InputError, StoreCorruptError, UsageError
from repmatch.store.database import first
from repmatch.store.journal import BatchEntry

_RESTORE = "Restore the store from a backup."
ROW_COLUMNS = "id, json, text, text_pair, label, row_hash, task_hash, source, line"
_TEXT_NAMES = ("id", "json", "text", "text_pair", "label", "row_hash", "task_hash", "source")
_TEXTS = attrgetter(*_TEXT_NAMES)


def dataset_value(dataset: Dataset) -> dict[str, Any]:
    """Return a dataset as plain JSON values.

    Args:
        dataset: the dataset.

    Returns:
        What `dataset_of` takes.
    """
    value = asdict(dataset)
    value["labels"] = list(dataset.labels)
    value["columns"] = dict(dataset.columns)
    return value


def dataset_of(value: Mapping[str, Any]) -> Dataset:
    """Rebuild a dataset from plain JSON values.

    Args:
        value: what `dataset_value` returned.

    Returns:
        The dataset.

    Raises:
        StoreCorruptError: the values are not those of a dataset.
    """
    try:
        fields = dict(value)
        fields["fields"] = Fields(**fields["fields"])
        fields["labels"] = tuple(fields["labels"])
        dataset = Dataset(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise StoreCorruptError(f"the record of a dataset cannot be read ({error}). {_RESTORE}") from error
    columns = dataset.columns
    texts = [dataset.name, *dataset.labels, *asdict(dataset.fields).values()]
    if isinstance(columns, dict):
        texts += [*columns, *columns.values()]
    known = dataset.encoding in get_args(Encoding) and isinstance(columns, dict)
    if (
        not known
        or not isinstance(dataset.name, str)
        or not all(text is None or isinstance(text, str) for text in texts)
    ):
        raise StoreCorruptError(f"the record of dataset {dataset.name!r} cannot be read. {_RESTORE}")
    return dataset


def stored_json(text: str, what: str) -> Any:
    """Parse JSON that a store keeps.

    Args:
        text: the JSON.
        what: what it is, for the message.

    Returns:
        Its value.

    Raises:
        StoreCorruptError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreCorruptError(f"{what} cannot be read ({error}). {_RESTORE}") from error


def stored_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object that a store keeps.

    Args:
        text: the JSON.
        what: what it is, for the message.

    Returns:
        The object.

    Raises:
        StoreCorruptError: it is no JSON object.
    """
    value = stored_json(text, what)
    if not isinstance(value, dict):
        raise StoreCorruptError(f"{what} cannot be read (no object). {_RESTORE}")
    return value


def space_of(text: str) -> Space:
    """Rebuild a space that a store keeps.

    Args:
        text: what `Space.to_json` returned.

    Returns:
        The space.

    Raises:
        StoreCorruptError: it is not the JSON of a space.
    """
    stored_object(text, "the record of a space")
    try:
        space = Space.from_json(text)
        numbers = [space.rank, *(n for m in space.matrices for n in (m.d_out, m.d_in))]
        sound = bool(space.matrices) and all(type(n) is int and 0 < n < 1 << 31 for n in numbers)
        sound = sound and type(space.max_length) is int and 0 <= space.max_length < 1 << 31  # 0: no tokens are counted
        sound = sound and all(isinstance(m.name, str) for m in space.matrices) and isinstance(space.optimizer, dict)
        sound = sound and isinstance(space.model, str) and isinstance(space.alpha, float | int) and bool(space.id)
    except (TypeError, KeyError, ValueError) as error:
        raise StoreCorruptError(f"the record of a space cannot be read ({error}). {_RESTORE}") from error
    if not sound:
        raise StoreCorruptError(f"the record of a space cannot be read (a value of another kind). {_RESTORE}")
    return space


def put_dataset(conn: Any, dataset: Dataset) -> int:
    """Insert or update a dataset's record.

    Args:
        conn: a connection in a transaction.
        dataset: the dataset.

    Returns:
        Its key.
    """
    value = dataset_value(dataset)
    body: list[str | None] = [
        canonical_json(value["fields"]),
        json.dumps(value["labels"]),
        json.dumps(value["columns"]),
    ]
    body += [dataset.space_id, dataset.encoding]
    found = first(conn.execute("SELECT pk FROM registry.datasets WHERE name = ?", [dataset.name]))
    if found:
        conn.execute(
            "UPDATE registry.datasets SET fields = ?, labels = ?, columns = ?, space_id = ?, encoding = ?, "
            "updated = now()::TIMESTAMP WHERE pk = ?",
            [*body, found[0]],
        )
        return int(found[0])
    key = next_key(conn, "datasets")
    conn.execute(
        "INSERT INTO registry.datasets VALUES (?, ?, ?, ?, ?, ?, ?, now()::TIMESTAMP, now()::TIMESTAMP)",
        [key, dataset.name, *body],
    )
    return key


def put_space(conn: Any, space: Space) -> int:
    """Insert a space's record where there is none.

    Args:
        conn: a connection in a transaction.
        space: the space.

    Returns:
        Its key.
    """
    found = first(conn.execute("SELECT pk FROM registry.spaces WHERE id = ?", [space.id]))
    if found:
        return int(found[0])
    key = next_key(conn, "spaces")
    conn.execute("INSERT INTO registry.spaces VALUES (?, ?, ?, now()::TIMESTAMP)", [key, space.id, space.to_json()])
    return key


def united_columns(mine: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of a dataset that more rows came to.

    Args:
        mine: name -> kind, as they were.
        theirs: of the rows that came.

    Returns:
        Name -> kind of all; "json" where the kinds differ.
    """
    return {**mine, **theirs, **{name: "json" for name, kind in mine.items() if theirs.get(name, kind) != kind}}


SPENT_INSTANCES = "spent_instances"  # in the table of meta: the largest key that an instance had at the last deletion


def next_key(conn: Any, table: str) -> int:
    """Return the next free key of a table.

    Args:
        conn: a connection in a transaction.
        table: its name in `registry`.

    Returns:
        One more than the largest key, from 1; keys of instances that were deleted, and of segments and batches that
        were dropped, are not used again: a reader may still hold them.
    """
    spent = {"segments": "segment_pk", "batches": "last_batch"}.get(table)
    query = f"SELECT coalesce(max(pk), 0) AS pk FROM registry.{table}"
    if spent:
        query += f" UNION ALL SELECT coalesce(max({spent}), 0) FROM registry.dropped"
    if table == "instances":
        query += f" UNION ALL SELECT coalesce(max(value::BIGINT), 0) FROM registry.meta WHERE key = '{SPENT_INSTANCES}'"
    return int(first(conn.execute(f"SELECT max(pk) + 1 FROM ({query})"))[0])


def rows_table(rows: Sequence[Row]) -> Any:
    """Turn rows into an Arrow table with a column `pos`.

    Args:
        rows: the rows.

    Returns:
        A `pyarrow.Table`: pos int64, then the fields of `Row`.

    Raises:
        InputError: a text that UTF-8 cannot hold (half of a surrogate pair).
    """
    import pyarrow as pa

    text = pa.large_string()
    columns: dict[str, Any] = {"pos": pa.array(np.arange(len(rows)))}
    values = zip(*map(_TEXTS, rows), strict=True) if rows else ((),) * len(_TEXT_NAMES)
    for name, column in zip(_TEXT_NAMES, values, strict=True):
        try:
            columns[name] = pa.array(column, text)
        except UnicodeEncodeError as error:
            bad = next(row for row in rows if not encodable(getattr(row, name)))
            raise InputError(
                f"{bad.source}, line {bad.line}: {name} of instance {bad.id!r} holds half of a surrogate pair, which "
                "UTF-8 cannot hold. Repair that text."
            ) from error
    columns["line"] = pa.array([row.line for row in rows], pa.int64())
    return pa.table(columns)


def encodable(text: str | None) -> bool:
    """Whether UTF-8 can hold a text.

    Args:
        text: the text or None.

    Returns:
        False where it holds half of a surrogate pair.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unique(rows: Sequence[Row]) -> None:
    """Refuse a batch that holds an id twice.

    Args:
        rows: the batch.

    Raises:
        UsageError: an id comes twice.
    """
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise UsageError(f"the batch holds instance {row.id!r} twice; an id is one instance of a dataset.")
        seen.add(row.id)


def enter_batch(conn: Any, entry: BatchEntry, segment_pk: int, journal_end: int, table: Any = None) -> None:
    """Enter a batch whose factors lie in a segment: instances, batch record, locations of the factors.

    Args:
        conn: a connection in a transaction.
        entry: the batch.
        segment_pk: key of the segment.
        journal_end: end of its frame in the segment's journal.
        table: `rows_table(entry.rows)` where it was made already.
    """
    import pyarrow as pa

    dataset_pk = first(conn.execute("SELECT pk FROM registry.datasets WHERE name = ?", [entry.dataset["name"]]))[0]
    table = rows_table(entry.rows) if table is None else table
    table = table.append_column("loss", pa.array(entry.losses, pa.float32()))
    table = table.append_column("tokens", pa.array(entry.tokens, pa.int32()))
    table = table.append_column("truncated", pa.array(entry.truncated, pa.bool_()))
    conn.register("incoming", table)
    conn.execute(
        "CREATE OR REPLACE TEMP TABLE entering AS SELECT n.*, i.pk, i.row_hash AS old_row, i.task_hash AS old_task "
        "FROM incoming n LEFT JOIN registry.instances i ON i.id = n.id AND i.dataset_pk = ?",
        [dataset_pk],
    )
    conn.unregister("incoming")
    known = first(conn.execute("SELECT count(pk) FROM entering"))[0]
    if known:
        _replace_known(conn, segment_pk)
    base = next_key(conn, "instances")
    conn.execute(
        "UPDATE entering SET pk = n.pk FROM (SELECT pos, ? + row_number() OVER (ORDER BY pos) - 1 AS pk FROM entering "
        "WHERE pk IS NULL) n WHERE entering.pos = n.pos",
        [base],
    )
    conn.execute(
        f"INSERT INTO registry.instances SELECT pk, ?, {ROW_COLUMNS} FROM entering WHERE old_row IS NULL ORDER BY pos",
        [dataset_pk],
    )
    conn.execute(
        "INSERT INTO registry.batches VALUES (?, ?, ?, ?, ?, ?, now()::TIMESTAMP)",
        [entry.number, segment_pk, entry.first, len(entry.rows), entry.crc32, journal_end],
    )
    conn.execute(
        "INSERT INTO registry.factors SELECT pk, ?, ? + pos, loss, tokens, truncated FROM entering ORDER BY pos",
        [segment_pk, entry.first],
    )
    conn.execute("DROP TABLE entering")


def _replace_known(conn: Any, segment_pk: int) -> None:
    """Update instances that were there: what rested on an older task (factors, scores) goes."""
    changed = "(SELECT pk FROM entering WHERE old_task <> task_hash)"
    conn.execute(f"DELETE FROM registry.scores WHERE instance_pk IN {changed}")
    conn.execute(f"DELETE FROM registry.factors WHERE instance_pk IN {changed}")
    conn.execute(
        "DELETE FROM registry.factors WHERE instance_pk IN (SELECT pk FROM entering WHERE pk IS NOT NULL) "
        "AND segment_pk IN (SELECT s.pk FROM registry.segments s JOIN registry.segments t "
        "ON s.space_pk = t.space_pk AND s.encoding = t.encoding WHERE t.pk = ?)",
        [segment_pk],
    )
    replace_rows(conn, "entering")


def replace_rows(conn: Any, table: str) -> None:
    """Replace the stored rows of instances by others.

    Args:
        conn: a connection in a transaction.
        table: a table with the fields of a row, `pk` of the instance (or NULL) and `old_row`.
    """
    names = [name for name in ROW_COLUMNS.split(", ") if name != "id"]
    sets = ", ".join(f"{name} = n.{name}" for name in names)
    conn.execute(
        f"UPDATE registry.instances i SET {sets} FROM {table} n "
        "WHERE n.pk = i.pk AND (n.old_row <> n.row_hash OR n.task_hash <> i.task_hash)"
    )
