"""Rows in tables: Parquet files and datasets of the Hugging Face hub, streamed."""

from __future__ import annotations

import base64
import datetime
import math
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

from repmatch.curator.records import BadRecord, Record, Records, RowProblem, shown, to_json
from repmatch.errors import InputError, MissingExtraError, UsageError, quote_list

_BATCH = 1000


def plain(value: Any, column: str = "") -> Any:
    """Turn a value of a table into what JSON can hold.

    NaN becomes null (tables use it for "missing"); dates and times become ISO 8601, durations seconds, decimals numbers
    where a float holds them exactly and text otherwise, bytes text where they are UTF-8 and a data URI otherwise.

    Args:
        value: the value.
        column: its column, for messages.

    Returns:
        None, a boolean, number, string, list or dict.

    Raises:
        RowProblem: JSON cannot hold the value.
    """
    if value is None or type(value) in (str, int, bool):
        return value
    if type(value) is float:
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): plain(inner, column) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, column) for inner in value]
    return _scalar(value, column)


def _scalar(value: Any, column: str) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return _number(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "data:;base64," + base64.b64encode(value).decode("ascii")
    if isinstance(value, uuid.UUID):
        return str(value)
    if callable(getattr(value, "tolist", None)):  # numpy
        return plain(value.tolist(), column)
    if isinstance(value, str):
        return str(value)
    raise RowProblem(
        f"column {column!r} holds a {type(value).__name__}, which JSON cannot hold; expected text, numbers, lists or "
        "objects. Leave the column out."
    )


def _number(value: Decimal) -> int | float | str | None:
    if not value.is_finite():
        return None if value.is_nan() else str(value)
    if value == value.to_integral_value() and value.adjusted() < 18:
        return int(value)
    number = float(value)
    return number if Decimal(repr(number)) == value else str(value)


def _record(number: int, row: Mapping[str, Any]) -> Record | BadRecord:
    try:
        value = {column: plain(inner, column) for column, inner in row.items()}
        return Record(number, to_json(value), value)
    except RowProblem as problem:
        return BadRecord(number, str(problem))


# ------------------------------------------------------------------------------------------------------- Parquet


def read_parquet(path: Path) -> Records:
    """Read a Parquet file batch by batch.

    Args:
        path: the file.

    Yields:
        A record a row, numbered from 1.

    Raises:
        InputError: it is not Parquet, is damaged, or has a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise InputError(f"columns come twice: {quote_list(twice)}; expected different names. Rename them.")
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in _rows(pa, batch):
                    number += 1
                    yield _record(number, row) if isinstance(row, dict) else BadRecord(number, row)
    except InputError:
        raise
    except Exception as error:  # damaged metadata shows as Unicode, key, value and memory errors too
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not the format's
        raise InputError(
            f"not readable as Parquet after row {number}: {shown(str(error))}; expected a complete "
            "Parquet file. Write it again, or name it after what it is (.jsonl, .csv, .tsv)."
        ) from None


def _rows(pa: types.ModuleType, batch: Any) -> Iterator[dict[str, Any] | str]:
    """Rows of a record batch; the reason instead of a row that Python cannot hold (a year above 9999, bad UTF-8)."""
    batch = _exact_times(pa, batch)
    try:
        yield from batch.to_pylist()
        return
    except (pa.ArrowException, ValueError, OverflowError):
        pass
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            yield f"a value cannot be read: {shown(str(error))}. Fix the row, or leave the column out."


def _exact_times(pa: types.ModuleType, batch: Any) -> Any:
    """Turn columns in nanoseconds into text: Python's own types stop at microseconds."""
    columns = list(batch.columns)
    for index, column in enumerate(columns):
        kind = column.type
        if (pa.types.is_timestamp(kind) or pa.types.is_time64(kind)) and kind.unit == "ns":
            columns[index] = column.cast(pa.string())
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


# ----------------------------------------------------------------------------------------------------------- hub


def hub_library(name: str) -> Any:
    """Import the `datasets` library.

    Args:
        name: the source, for the message.

    Returns:
        The module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module("datasets")
    except ImportError:
        raise MissingExtraError(f"Reading {name!r} from the Hugging Face hub", "hub") from None


def read_hub(name: str, config: str | None, split: str | None) -> Records:
    """Stream a dataset of the Hugging Face hub.

    Args:
        name: the dataset's name.
        config: its configuration, or None.
        split: the split; None: "train", or the only one.

    Yields:
        A record a row, numbered from 1; class labels as their names.

    Raises:
        InputError: the library cannot load or read it.
        UsageError: there is no such split.
    """
    library = hub_library(name)
    try:
        splits = library.load_dataset(name, config, streaming=True)
    except Exception as error:  # the library raises its own and its clients' errors
        raise InputError(
            f"the dataset cannot be loaded: {type(error).__name__}: {error}. Expected hf:NAME[@CONFIG][:SPLIT]; check "
            "the name on https://huggingface.co/datasets and the network."
        ) from error
    rows = splits[_split(list(splits), split)]
    features = getattr(rows, "features", None) or {}
    for column, feature in features.items():
        if type(feature).__name__ == "Image":  # as bytes and path, not as a picture of Pillow's
            rows = rows.cast_column(column, library.Image(decode=False))
    names = class_names(features)
    for number, row in enumerate(_guarded(rows), 1):
        yield _record(number, {c: named(names[c], value) if c in names else value for c, value in row.items()})


def _guarded(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for row in rows:
            number += 1
            yield row
    except Exception as error:  # network, decoding: whatever the library meets
        raise InputError(
            f"reading stopped after row {number}: {type(error).__name__}: {error}. Run the command again: what was "
            "ingested is kept."
        ) from error


def _split(known: list[str], wanted: str | None) -> str:
    if wanted is None:
        wanted = "train" if "train" in known or len(known) != 1 else known[0]
    if wanted not in known:
        raise UsageError(f"there is no split {wanted!r}; expected one of {quote_list(known)}. Name it after a colon.")
    return wanted


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of class labels.

    Args:
        features: features of a `datasets.Dataset`.

    Returns:
        Column -> names of its labels, for the columns that hold class labels.
    """
    return {
        column: list(feature.names)
        for column, feature in features.items()
        if type(feature).__name__ == "ClassLabel" and getattr(feature, "names", None)
    }


def named(names: list[str], value: Any) -> Any:
    """Return a class label's name; -1 marks a missing label in hub datasets.

    Args:
        names: the names.
        value: the label's number.

    Returns:
        The name; None for a missing label, the value itself where it is no number of a name.
    """
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return None if value == -1 else value
