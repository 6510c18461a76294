"""Features of instances that are mostly 0, such as words: only the others are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError


@dataclass(frozen=True, eq=False)
class Features:
    """Features of n instances, by row.

    Attributes:
        starts: (n + 1,) int64, where each row's entries start and the last one's stop.
        columns: (e,) int32, which feature an entry is of, each once a row.
        values: (e,) float64, at least 0.
        width: features.
        weights: (width,) float64, what each counts; None: 1.
    """

    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.float64]
    width: int
    weights: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that no concave function is meant for."""
        wrong = ~(np.isfinite(self.values) & (self.values >= 0.0))
        if wrong.any():
            place = int(np.argmax(wrong))
            row = int(np.searchsorted(self.starts, place, side="right")) - 1
            raise SelectionError(
                f"feature {self.columns[place]} of row {row} is {self.values[place]}: expected a finite number of at "
                "least 0"
            )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def totals(self) -> NDArray[np.float64]:
        """(width,) float64, each feature's sum over all instances."""
        return np.bincount(self.columns, self.values, self.width).astype(np.float64)

    @classmethod
    def of_matrix(cls, matrix: Any, weights: ArrayLike | None = None) -> Self:
        """Take a sparse matrix of scipy's kind, (n, width).

        Args:
            matrix: anything with `tocsr`; scipy itself is not needed.
            weights: (width,) what each feature counts.

        Returns:
            The features.

        Raises:
            SelectionError: an entry that is not a finite number of at least 0.
        """
        rows = matrix.tocsr().copy()
        rows.sum_duplicates()
        return cls(
            np.asarray(rows.indptr, np.int64),
            np.asarray(rows.indices, np.int32),
            np.asarray(rows.data, np.float64),
            int(rows.shape[1]),
            None if weights is None else np.asarray(weights, np.float64),
        )
