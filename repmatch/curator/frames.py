"""Frames in and out: polars, pandas, Arrow and datasets.Dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from repmatch.curator.export import export_lines
from repmatch.curator.sources import Source
from repmatch.curator.tables import class_names, named
from repmatch.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    import polars as pl

    from repmatch.store import Store

_ROWS = 10_000


@contextmanager
def as_sources(source: Any) -> Iterator[list[str | Source]]:
    """Make sources of what a user of Python gives.

    Args:
        source: the name of a source, several of them, or a frame (see `as_file`).

    Yields:
        The sources.

    Raises:
        UsageError: it is a dictionary of splits, or a frame without rows.
    """
    if _is_frame(source):
        with as_file(source) as file:
            yield [file]
    else:
        yield [str(name) for name in ([source] if isinstance(source, str | Path) else source)]


def _is_frame(source: object) -> bool:
    """Whether something has Arrow's C stream, or is a frame of pandas or a `datasets.Dataset`."""
    return hasattr(source, "__arrow_c_stream__") or _library(source) in ("pandas", "datasets")


@contextmanager
def as_file(frame: object) -> Iterator[Source]:
    """Write a frame to a Parquet file of its own for as long as it is read.

    Args:
        frame: polars, pandas, Arrow or `datasets.Dataset`; an index of pandas is left out.

    Yields:
        The file under the name `frame.parquet`, by which bad rows are named, though it lies in a temporary folder;
        relative paths in it start at the working directory.

    Raises:
        UsageError: it is a dictionary of splits.
    """
    import pyarrow.parquet as pq

    with TemporaryDirectory(prefix="repmatch-") as folder:
        path = Path(folder) / "frame.parquet"
        writer = None
        try:
            for table in _tables(frame):
                if writer is None:
                    writer = pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise UsageError("the frame has no rows; expected one or more.")
        yield Source("frame.parquet", "parquet", path)


def _library(source: object) -> str:
    return type(source).__module__.partition(".")[0]


def _tables(frame: Any) -> Iterator[Any]:
    import pyarrow as pa

    library = _library(frame)
    if library == "datasets":
        if not hasattr(frame, "features") or isinstance(frame, dict):
            raise UsageError("this is several splits; ingest one of them, such as dataset['train'].")
        labels = class_names(frame.features)
        for batch in frame.with_format("arrow").iter(batch_size=_ROWS):
            for column, names in labels.items():
                values = pa.array([named(names, value) for value in batch[column].to_pylist()], pa.string())
                batch = batch.set_column(batch.schema.get_field_index(column), column, values)
            yield batch
        return
    if library == "polars" and hasattr(frame, "to_arrow"):
        import polars as pl

        # Parquet is not written of views of strings within lists of objects, which messages are.
        frame = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    table = pa.Table.from_pandas(frame, preserve_index=False) if library == "pandas" else pa.table(frame)
    for lo in range(0, table.num_rows, _ROWS):
        yield table.slice(lo, _ROWS)


def frame_of(store: Store, name: str, *, with_scores: bool = False) -> pl.DataFrame:
    """Return the user's rows of a coreset (best pick first), a subset or a dataset as a polars frame.

    Args:
        store: the store.
        name: a coreset, a dataset, a subset or DATASET[SQL].
        with_scores: add a column "repmatch", as in an export.

    Returns:
        Every column as it came; a row that lacks a column has null there.
    """
    import polars as pl

    rows = [json.loads(line) for line in export_lines(store, name, with_scores=with_scores)]
    return pl.DataFrame(rows, infer_schema_length=None, strict=False)


def dataset_of(store: Store, name: str, *, with_scores: bool = False) -> Any:
    """Return the same as a `datasets.Dataset`.

    Args:
        store: the store.
        name: a coreset, a dataset, a subset or DATASET[SQL].
        with_scores: as in `frame_of`.

    Returns:
        The dataset.

    Raises:
        MissingExtraError: the library datasets is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError("a datasets.Dataset", "hub") from error
    return Dataset.from_polars(frame_of(store, name, with_scores=with_scores))
