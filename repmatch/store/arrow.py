"""Factors as Arrow record batches, for DuckDB, polars and whatever else reads Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from repmatch.datamodels import Factors
from repmatch.store.encoding import RowFormat
from repmatch.store.factors import FactorTables


class ArrowTables(FactorTables):
    """Factors out as Arrow."""

    def arrow_factors(self, dataset: str, size: int = 8192, *, space_id: str | None = None) -> Any:
        """Stream the factors of a dataset as Arrow record batches, in the dataset's order.

        Args:
            dataset: the dataset.
            size: instances a batch.
            space_id: another space than the dataset's.

        Returns:
            A `pyarrow.RecordBatchReader`: id string; norms fixed_size_list(float, m); and values
            fixed_size_list(float or halffloat, layout.width), or codes fixed_size_list(uint64, words) for sign codes.
            The schema's metadata names space, encoding and matrices.
        """
        import pyarrow as pa

        located = self._locate(dataset, space_id, None)
        layout, encoding = located.space.layout, located.encoding
        number, name, width = {
            "sign": (pa.uint64(), "codes", RowFormat(layout, encoding).value_bytes // 8),
            "float16": (pa.float16(), "values", layout.width),
            "float32": (pa.float32(), "values", layout.width),
        }[encoding]
        schema = pa.schema(
            [
                ("id", pa.large_string()),
                ("norms", pa.list_(pa.float32(), len(layout.dims))),
                (name, pa.list_(number, width)),
            ],
            metadata={"space": located.space.id, "encoding": encoding, "matrices": ",".join(layout.names)},
        )

        def parts() -> Iterator[Any]:
            for lo in range(0, len(located.keys), size):
                part = located.part(slice(lo, lo + size))
                yield _batch(self._load_named(part), schema)

        return pa.RecordBatchReader.from_batches(schema, parts())


def _batch(factors: Factors, schema: Any) -> Any:
    import pyarrow as pa

    array = factors.bits if factors.bits is not None else factors.flat
    columns = [pa.array(factors.ids, schema.field("id").type)]
    for field, values in ((schema.field(1), factors.norms), (schema.field(2), array)):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), field.type.value_type)
        columns.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
