"""A kernel of some entries only: memory and work of the entries kept in place of n²."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks
from repmatch.errors import SelectionError
from repmatch.selectors.kernels import Kernel, report
from repmatch.similarity.pairs import Floats

BLOCK_BYTES = 128 << 20


class SparseKernel:
    """For each represented instance the candidates that are kept; every other similarity counts as 0.

    Attributes:
        starts: (rows + 1,) int64, where each row's entries start.
        neighbours: (e,) int32 candidates, in rising order within a row.
        values: (e,) float32 or float64 their similarities.
        n: candidates.
        symmetric: False: a candidate can be among an instance's nearest without the reverse.
        resolution: as of the kernel it was made from.
        left_out: (rows,) float64, what no entry that was left out exceeds; None where those count as 0.
    """

    symmetric = False
    left_out: NDArray[np.float64] | None = None

    def __init__(
        self,
        starts: NDArray[np.int64],
        neighbours: NDArray[np.int32],
        values: Floats,
        n: int,
        *,
        resolution: float = 0.0,
    ) -> None:
        """Take over the entries.

        Args:
            starts: (rows + 1,) int64, where each row's entries start; the last is their number.
            neighbours: (e,) int32 candidates, none twice in a row.
            values: (e,) float32 or float64 their similarities.
            n: candidates.
            resolution: relative rounding error of an entry.

        Raises:
            SelectionError: shapes that don't fit, a candidate out of range, a value that is not finite.
        """
        if neighbours.shape != values.shape or neighbours.ndim != 1 or not len(starts) or starts[-1] != len(values):
            raise SelectionError(
                f"starts {starts.shape}, neighbours {neighbours.shape} and values {values.shape}: expected (rows + 1,) "
                "and twice as many as the last start says"
            )
        if neighbours.size and not 0 <= neighbours.min() <= neighbours.max() < n:
            raise SelectionError(f"neighbours hold a position outside 0 to {n - 1}")
        if not np.isfinite(values).all():
            raise SelectionError("the values hold something that is not finite")
        self.starts, self.neighbours, self.values = starts, neighbours, values
        self.n, self.resolution = n, resolution

    @classmethod
    def nearest(cls, kernel: Kernel, m: int) -> SparseKernel:
        """Keep the m nearest candidates of each represented instance.

        Args:
            kernel: any kernel; it is read once, a block at a time.
            m: candidates kept; all where there are fewer.

        Returns:
            The sparse kernel.
        """
        rows, n = kernel.shape
        m = min(m, n)
        neighbours = np.empty((rows, m), np.int32)
        values = np.empty((rows, m), kernel.columns(np.empty(0, np.int64)).dtype)
        step = max(1, min(1024, BLOCK_BYTES // (4 * max(1, n))))
        everyone = np.arange(n)
        for lo in range(0, rows, step):
            wanted = np.arange(lo, min(rows, lo + step))
            block = kernel.columns(wanted).T if kernel.symmetric else kernel.rows(wanted).columns(everyone)
            _keep(block, m, neighbours[lo : lo + step], values[lo : lo + step])
            report(kernel, "comparing", min(rows, lo + step), rows)
        starts = np.arange(rows + 1, dtype=np.int64) * m
        out = cls(starts, neighbours.ravel(), values.ravel(), n, resolution=kernel.resolution)
        if m < n:
            out.left_out = np.maximum(values.min(axis=1), 0.0).astype(np.float64)
        return out

    @classmethod
    def of_matrix(cls, matrix: Any) -> SparseKernel:
        """Take a sparse matrix of scipy's kind, (rows, n); entries that are not stored count as 0.

        Args:
            matrix: anything with `tocsr`; scipy itself is not needed.

        Returns:
            The sparse kernel.
        """
        rows = matrix.tocsr().copy()
        rows.sum_duplicates()
        starts, neighbours = np.asarray(rows.indptr, np.int64), np.asarray(rows.indices, np.int32)
        return cls(
            starts,
            neighbours,
            np.asarray(rows.data, np.float32 if rows.dtype == np.float32 else np.float64),
            int(rows.shape[1]),
        )

    @property
    def nonnegative(self) -> bool:
        """Whether no similarity is below 0."""
        return bool(self.values.min(initial=0.0) >= 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """Represented instances and candidates."""
        return len(self.starts) - 1, self.n

    @cached_property
    def _turned(self) -> tuple[NDArray[np.int64], NDArray[np.int32], Floats]:
        from repmatch.selectors import _loops

        counts = np.bincount(self.neighbours, minlength=self.n) if self.neighbours.size else np.zeros(self.n, np.int64)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        rows, values = np.empty(len(self.values), np.int32), np.empty(len(self.values), self.values.dtype)
        _loops.turn_sparse(self.starts, self.neighbours, self.values, starts[:-1].copy(), rows, values)
        return starts, rows, values

    def column(self, index: int) -> tuple[NDArray[np.int32], Floats]:
        """Return one candidate's column.

        Args:
            index: its position.

        Returns:
            (c,) int32 rows that keep it, and (c,) similarities.
        """
        starts, rows, values = self._turned
        lo, hi = starts[index : index + 2]
        return rows[lo:hi], values[lo:hi]

    def columns(self, indices: NDArray[np.int64]) -> Floats:
        """Return (rows, c): the similarities of all represented instances with some candidates, 0 where not kept."""
        out = np.zeros((self.shape[0], len(indices)), self.values.dtype)
        for c, j in enumerate(indices):
            rows, values = self.column(int(j))
            out[rows, c] = values
        return out

    def dense(self) -> Floats | None:
        """Return None: it is sparse because the whole would be too large."""
        return None

    def sums(self) -> NDArray[np.float64]:
        """Return (n,) sums of each column's positive entries, a little above for rounding."""
        out = np.bincount(self.neighbours, np.maximum(self.values, 0.0).astype(np.float64), minlength=self.n)
        return np.asarray(out * (1.0 + 1e-12), np.float64)

    def rows(self, indices: NDArray[np.int64]) -> Kernel:
        """Return the kernel of some represented instances only."""
        counts = np.diff(self.starts)[indices]
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        kept = np.arange(starts[-1]) - np.repeat(starts[:-1] - self.starts[indices], counts)
        return SparseKernel(starts, self.neighbours[kept], self.values[kept], self.n, resolution=self.resolution)

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the similarity of each instance with itself."""
        if self.shape[0] != self.n:
            raise SelectionError("this objective compares candidates with each other: it can't use a represented set")
        rows = np.repeat(np.arange(self.n), np.diff(self.starts))
        own = rows == self.neighbours
        out = np.zeros(self.n)
        out[rows[own]] = self.values[own]
        return out

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances, 0 where not kept."""
        total = np.bincount(self.neighbours, self.values.astype(np.float64), minlength=self.n)
        return np.asarray(total / max(1, self.shape[0]), np.float64)


def enough_neighbours(n: int, k: int) -> int:
    """Return how many neighbours to keep: k picks can only cover n instances if each is near n/k of them.

    Args:
        n: instances.
        k: picks.

    Returns:
        4 n/k, at least 64, at most n.
    """
    return min(n, max(64, -(-4 * n // max(1, k))))


def _keep(block: Floats, m: int, neighbours: NDArray[np.int32], values: Floats) -> None:
    """Write each row's m largest entries, in order of position."""

    def rows(lo: int, hi: int) -> None:
        part = np.ascontiguousarray(block[lo:hi])
        if m < part.shape[1]:
            best = np.sort(np.argpartition(part, part.shape[1] - m, axis=1)[:, part.shape[1] - m :], axis=1)
        else:
            best = np.broadcast_to(np.arange(m), (len(part), m))
        neighbours[lo:hi] = best
        values[lo:hi] = np.take_along_axis(part, best, axis=1)

    in_chunks(rows, len(block), least=16)
