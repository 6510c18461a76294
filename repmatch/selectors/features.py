"""Features of instances, such as words, and the objective that all of them are present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.compiled import in_chunks
from repmatch.errors import SelectionError
from repmatch.selectors.greedy import Objective
from repmatch.selectors.kernels import Kernel

Concave: TypeAlias = Literal["sqrt", "log", "sigmoid"] | Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x / (1.0 + x), np.float64)


CONCAVE: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "sqrt": np.sqrt,
    "log": np.log1p,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True, eq=False)
class Features:
    """Features of n instances that are mostly 0: only the others are kept, by row.

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


class FeatureCoverage(Objective):
    """Every feature is present, with falling returns: Σ_f w_f · g(Σ_{j ∈ S} x_jf), g concave (Wei et al. 2014)."""

    def __init__(
        self,
        features: Features | ArrayLike,
        *,
        weights: ArrayLike | None = None,
        concave: Concave = "sqrt",
        kernel: Kernel | None = None,
    ) -> None:
        """Take features.

        Args:
            features: (n, f) floats of at least 0, a sparse matrix of scipy's kind, or `Features`.
            weights: (f,) floats of at least 0; those of the features, or 1 each, by default.
            concave: g: "sqrt", "log" (of 1 + x), "sigmoid" (x / (1 + x)), or a function of an array, entry by entry,
                that is 0 at 0, rises, and rises less and less.
            kernel: for the representatives only.
        """
        x: Features | NDArray[np.float64]
        if isinstance(features, Features) or hasattr(features, "tocsr"):
            x = features if isinstance(features, Features) else Features.of_matrix(features)
            width, weights = x.width, x.weights if weights is None else weights
        else:
            x = np.ascontiguousarray(features, np.float64)
            if x.ndim != 2 or not np.isfinite(x).all() or (x < 0).any():
                raise SelectionError(f"features {x.shape} can't be used: expected (n, f) finite numbers of at least 0")
            width = x.shape[1]
        w = np.ones(width) if weights is None else np.asarray(weights, np.float64)
        if w.shape != (width,) or not (w >= 0).all():
            raise SelectionError(f"weights have shape {w.shape}: expected ({width},) numbers of at least 0")
        if not callable(concave) and concave not in CONCAVE:
            raise SelectionError(f"there is no concave function {concave!r}: expected one of {', '.join(CONCAVE)}")
        self.features, self.weights, self.kernel, self.n = x, w, kernel, len(x)
        self.total = np.zeros(width)
        self.concave = concave if callable(concave) else CONCAVE[concave]

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        from repmatch.selectors import _loops

        out, x = np.empty(len(indices)), self.features
        if self.concave is not np.sqrt:
            return self._sparse_gains(x, indices) if isinstance(x, Features) else self._dense_gains(x, indices)

        def part(lo: int, hi: int) -> None:
            if isinstance(x, Features):
                entries = (x.starts, x.columns, x.values)
                _loops.sparse_gains(*entries, indices, self.total, self.weights, lo, hi, out)
            else:
                _loops.root_gains(x, indices, self.total, self.weights, lo, hi, out)

        in_chunks(part, len(indices), least=64)
        return out

    def _dense_gains(self, x: NDArray[np.float64], indices: NDArray[np.int64]) -> NDArray[np.float64]:
        out, before = np.empty(len(indices)), self.concave(self.total)
        step = max(1, (8 << 20) // max(1, 8 * len(self.weights)))
        for lo in range(0, len(indices), step):
            after = self.concave(self.total + x[indices[lo : lo + step]])
            out[lo : lo + step] = ((after - before) * self.weights).sum(axis=1)
        return out

    def _sparse_gains(self, x: Features, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        lengths = x.starts[indices + 1] - x.starts[indices]
        entries = np.repeat(x.starts[indices] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        columns = x.columns[entries]
        before = self.total[columns]
        gained = (self.concave(before + x.values[entries]) - self.concave(before)) * self.weights[columns]
        return np.bincount(np.repeat(np.arange(len(indices)), lengths), gained, len(indices)).astype(np.float64)

    def add(self, index: int) -> None:
        """Note a pick."""
        if isinstance(self.features, Features):
            here = slice(*self.features.starts[index : index + 2].tolist())
            self.total[self.features.columns[here]] += self.features.values[here]
        else:
            self.total = self.total + self.features[index]

    def noise(self) -> float:
        """Return how far rounding may put a gain off: few features with few values make many gains equal."""
        reached = float((np.abs(self.concave(self.total)) * self.weights).sum())
        return 8.0 * float(np.finfo(np.float64).eps) * (1.0 + reached)

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        x = self.features
        return float((self.concave(x.totals if isinstance(x, Features) else x.sum(axis=0)) * self.weights).sum())
