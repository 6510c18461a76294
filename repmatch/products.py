"""Products of many rows with one vector, compiled: BLAS's own threads get in each other's way inside of ours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import compiled


@compiled
def row_products(rows: NDArray[np.float32], vector: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Fill in the product of each row with a vector.

    Args:
        rows: (n, d) float32.
        vector: (d,) float32.
        out: (n,) float32, filled.
    """
    for i in range(rows.shape[0]):
        row, total = rows[i], np.float32(0.0)
        for j in range(vector.shape[0]):
            total += row[j] * vector[j]
        out[i] = total
