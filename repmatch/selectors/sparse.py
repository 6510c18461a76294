"""A kernel of nearest candidates only: memory and work of n·m in place of n²."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks
from repmatch.errors import SelectionError
from repmatch.selectors.kernels import Floats, Kernel

BLOCK_BYTES = 128 << 20


class SparseKernel:
    """Each represented instance's m most similar candidates; every other similarity counts as 0.

    Attributes:
        neighbours: (rows, m) int32 candidates.
        values: (rows, m) float32 their similarities.
        symmetric: False: a candidate can be among an instance's nearest without the reverse.
        resolution: as of the kernel it was made from.
    """

    symmetric = False

    def __init__(
        self, neighbours: NDArray[np.int32], values: NDArray[np.float32], n: int, *, resolution: float = 0.0
    ) -> None:
        """Take over the nearest candidates.

        Args:
            neighbours: (rows, m) int32 candidates, none twice in a row.
            values: (rows, m) float32 their similarities.
            n: candidates.
            resolution: relative rounding error of an entry.

        Raises:
            SelectionError: shapes that differ, a candidate out of range, a value that is not finite.
        """
        if neighbours.shape != values.shape or neighbours.ndim != 2:
            raise SelectionError(
                f"neighbours {neighbours.shape} and values {values.shape}: expected one (rows, m) each"
            )
        if neighbours.size and not 0 <= neighbours.min() <= neighbours.max() < n:
            raise SelectionError(f"neighbours hold a position outside 0 to {n - 1}")
        if not np.isfinite(values).all():
            raise SelectionError("the values hold something that is not finite")
        self.neighbours, self.values, self.n, self.resolution = neighbours, values, n, resolution
        flat = neighbours.ravel()
        order = np.argsort(flat, kind="stable")
        self._rows = (order // max(1, neighbours.shape[1])).astype(np.int64)
        self._column_values = values.ravel()[order]
        self._starts = np.concatenate(([0], np.cumsum(np.bincount(flat, minlength=n))))

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
        neighbours, values = np.empty((rows, m), np.int32), np.empty((rows, m), np.float32)
        step = max(1, min(1024, BLOCK_BYTES // (4 * max(1, n))))
        everyone = np.arange(n)
        for lo in range(0, rows, step):
            wanted = np.arange(lo, min(rows, lo + step))
            block = kernel.columns(wanted).T if kernel.symmetric else kernel.rows(wanted).columns(everyone)
            _keep(block, m, neighbours[lo : lo + step], values[lo : lo + step])
        return cls(neighbours, values, n, resolution=kernel.resolution)

    @property
    def shape(self) -> tuple[int, int]:
        """Represented instances and candidates."""
        return len(self.neighbours), self.n

    def column(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return one candidate's column.

        Args:
            index: its position.

        Returns:
            (c,) int64 rows that keep it, and (c,) float32 similarities.
        """
        lo, hi = self._starts[index : index + 2]
        return self._rows[lo:hi], self._column_values[lo:hi]

    def columns(self, indices: NDArray[np.int64]) -> Floats:
        """Return (rows, c): the similarities of all represented instances with some candidates, 0 where not kept."""
        out = np.zeros((self.shape[0], len(indices)), np.float32)
        for c, j in enumerate(indices):
            rows, values = self.column(int(j))
            out[rows, c] = values
        return out

    def dense(self) -> Floats | None:
        """Return None: it is sparse because the whole would be too large."""
        return None

    def sums(self) -> NDArray[np.float64]:
        """Return (n,) sums of each column's positive entries, a little above for rounding."""
        flat = np.maximum(self.values, 0.0).ravel().astype(np.float64)
        return np.asarray(np.bincount(self.neighbours.ravel(), flat, minlength=self.n) * (1.0 + 1e-12), np.float64)

    def rows(self, indices: NDArray[np.int64]) -> Kernel:
        """Return the kernel of some represented instances only."""
        return SparseKernel(self.neighbours[indices], self.values[indices], self.n, resolution=self.resolution)

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the similarity of each instance with itself."""
        if self.shape[0] != self.n:
            raise SelectionError("this objective compares candidates with each other: it can't use a represented set")
        own = self.neighbours == np.arange(self.n)[:, None]
        return np.asarray((self.values * own).sum(axis=1), np.float64)

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances, 0 where not kept."""
        flat = self.values.ravel().astype(np.float64)
        return np.bincount(self.neighbours.ravel(), flat, minlength=self.n) / max(1, self.shape[0])


def enough_neighbours(n: int, k: int) -> int:
    """Return how many neighbours to keep: k picks can only cover n instances if each is near n/k of them.

    Args:
        n: instances.
        k: picks.

    Returns:
        4 n/k, at least 64, at most n.
    """
    return min(n, max(64, -(-4 * n // max(1, k))))


def _keep(block: Floats, m: int, neighbours: NDArray[np.int32], values: NDArray[np.float32]) -> None:
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
