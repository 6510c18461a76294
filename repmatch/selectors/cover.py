"""What facility location keeps of a run: how well each instance is covered, and what each candidate would still add."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks
from repmatch.selectors.greedy import State
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.sparse import SparseKernel
from repmatch.similarity.pairs import Floats

BATCH = 256  # columns computed at a time
NO_PRICES = np.empty(0)


class Cover(State):
    """How well each represented instance is covered, and what each candidate would still add.

    Attributes:
        cover: (rows,) float64, similarity with the best pick so far, at least 0.
        gains: (n,) float64, gains or upper bounds on them.
        representative: (rows,) int64, position of that pick, -1 for none or one chosen before.
        rows_read: rows or columns of the kernel that were read so far.
    """

    rows_read = 0.0

    def __init__(self, kernel: Kernel, start: Cover | None = None) -> None:
        from repmatch.selectors import _loops

        self.loops = _loops
        self.kernel: Kernel = kernel
        self.n = kernel.shape[1]
        self.cover: NDArray[np.float64] = np.zeros(kernel.shape[0]) if start is None else start.cover
        self.representative: NDArray[np.int64] = (
            np.full(kernel.shape[0], -1, np.int64) if start is None else start.representative
        )
        self.gains = np.zeros(self.n)

    def upper(self) -> NDArray[np.float64]:
        """Return upper bounds on the gains left."""
        return self.gains

    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""
        column = np.ascontiguousarray(self.kernel.columns(np.array([index], np.int64)))
        return float(self.loops.exact_gain(column, 0, False, self.cover))

    def ceiling(self) -> float:
        """Return Σ_i max_j K_ij."""
        whole = self.kernel.dense()
        if whole is not None:
            return float(np.maximum(whole.max(axis=1), 0.0).astype(np.float64).sum()) if whole.size else 0.0
        out = np.zeros(self.kernel.shape[0])
        for lo in range(0, self.n, BATCH):
            block = self.kernel.columns(np.arange(lo, min(self.n, lo + BATCH)))
            out = np.maximum(out, block.max(axis=1))
        return float(out.sum())

    def represented(self, picks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return each represented instance's pick and its similarity."""
        known = self.representative >= 0
        return self.representative, np.where(known, self.cover, 0.0).astype(np.float32)

    def raise_cover(
        self, column: Floats, position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Note a pick; return the rows that it covers better, and their cover before and after."""
        from repmatch.selectors import _whole

        raised, old, new = np.empty(len(column), np.int64), np.empty(len(column)), np.empty(len(column))
        count = _whole.rising(column, position, self.cover, self.representative, raised, old, new)
        return raised[:count], old[:count], new[:count]


class Handing(State):
    """A search that changes its way of working as it goes, and hands the cover over to the next.

    Attributes:
        inner: the way of working now.
        picks: how many were made.
    """

    def __init__(self, kernel: Kernel, start: Cover) -> None:
        self.kernel: Kernel = kernel
        self.n = kernel.shape[1]
        self.inner: Cover = start
        self.picks = 0

    def settle(self) -> None:
        """Change the way of working where that pays."""
        raise NotImplementedError

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        """Return the allowed candidate of the largest gain (with costs: gain per cost), and its gain."""
        self.settle()
        return self.inner.best(allowed, costs)

    def add(self, index: int, position: int) -> None:
        """Note a pick."""
        self.inner.add(index, position)
        self.picks += 1

    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""
        return self.inner.gain(index)

    def upper(self) -> NDArray[np.float64]:
        """Return upper bounds on the gains left."""
        return self.inner.upper()

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        return self.inner.ceiling()

    def represented(self, picks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return each represented instance's pick and its similarity."""
        return self.inner.represented(picks)


class Incremental(Cover):
    """Every gain is kept up to date: a pick raises few rows' cover, and only those rows lower the gains."""

    name = "incremental"

    def __init__(self, kernel: Kernel, whole: Floats, start: Cover | None = None, *, fresh: bool = True) -> None:
        super().__init__(kernel, start)
        self.whole = whole
        if fresh and start is None:
            in_chunks(lambda lo, hi: self.loops.add_columns(whole, lo, hi, self.gains), self.n, least=1024)
        elif fresh:
            in_chunks(self._sum, self.n, least=256)
        self.exact = np.zeros(self.n, np.bool_)
        self.scale = float(self.gains.max(initial=0.0))
        self.steps = self.cover.size

    def _sum(self, lo: int, hi: int) -> None:
        part = np.zeros(hi - lo)
        self.loops.column_gains(self.whole[:, lo:hi], self.cover, 0, hi - lo, part)
        self.gains[lo:hi] = part

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        """Return the allowed candidate of the largest gain (with costs: gain per cost), and its gain."""
        # The running gains drift by rounding, at most this much; whoever comes that close to the top is summed afresh.
        drift = 4.0 * np.finfo(np.float64).eps * self.steps * self.scale
        prices = NO_PRICES if costs is None else costs
        top = self.loops.largest(self.gains, prices, allowed)
        if self.kernel.resolution:
            drift += self.kernel.resolution * max(0.0, self.loops.largest(self.gains, NO_PRICES, allowed))
        least = 1.0 if costs is None else float(costs[allowed].min())
        leaders = self.loops.leading(self.gains, prices, allowed, drift, top - drift / least)
        price = np.ones(len(leaders)) if costs is None else costs[leaders]
        for j in leaders[~self.exact[leaders]]:
            self.gains[j] = self.gain(int(j))
            self.exact[j] = True
        rates = self.gains[leaders] / price
        winner = int(leaders[rates >= rates.max() * (1.0 - self.kernel.resolution)][0])
        return winner, float(self.gains[winner])

    def column(self, index: int) -> Floats:
        """Return the similarities of all represented instances with a candidate."""
        return self.whole[index] if self.kernel.symmetric else np.ascontiguousarray(self.whole[:, index])

    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""
        from repmatch.selectors import _whole

        return float(_whole.exact_line(self.column(index), self.cover))

    def add(self, index: int, position: int) -> None:
        """Note a pick."""
        raised, old, new = self.raise_cover(self.column(index), position)
        self.lower(raised, old, new)
        self.steps += len(raised) + 1
        self.rows_read += len(raised)

    def lower(self, raised: NDArray[np.int64], old: NDArray[np.float64], new: NDArray[np.float64]) -> None:
        """Take from all gains what the raised rows no longer give."""
        before = self.gains.copy()
        in_chunks(
            lambda lo, hi: self.loops.lower_gains(self.whole, raised, old, new, lo, hi, self.gains),
            self.gains.size,
            least=max(1024, 1_000_000 // max(1, len(raised))),
        )
        self.exact &= self.gains == before


class Neighbours(Incremental):
    """Incremental on a kernel that keeps some entries of each row only."""

    name = "sparse"

    def __init__(self, kernel: SparseKernel, start: Cover | None = None) -> None:
        super().__init__(kernel, np.zeros((0, kernel.shape[1]), np.float32), start, fresh=False)
        self.sparse = kernel
        self.loops.add_sparse(kernel.starts, kernel.neighbours, kernel.values, self.cover, self.gains)
        self.scale = float(self.gains.max(initial=0.0))

    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""
        rows, values = self.sparse.column(index)
        return float(self.loops.exact_gain(values[:, None], 0, False, self.cover[rows]))

    def add(self, index: int, position: int) -> None:
        """Note a pick."""
        rows, values = self.sparse.column(index)
        better = values > self.cover[rows]
        raised, new = rows[better].astype(np.int64), values[better].astype(np.float64)
        old, before = self.cover[raised], self.gains.copy()
        self.cover[raised], self.representative[raised] = new, position
        entries = self.sparse
        self.loops.lower_sparse(entries.starts, entries.neighbours, entries.values, raised, old, new, self.gains)
        self.exact &= self.gains == before
        self.steps += len(raised) + 1

    def beyond(self) -> float:
        """Return what entries left out could add: a row no more than the least that was kept exceeds its cover."""
        out = self.sparse.left_out
        return 0.0 if out is None else float(np.maximum(out - self.cover, 0.0).sum())

    def ceiling(self) -> float:
        """Return Σ_i max_j K_ij over the kept candidates."""
        kept = np.diff(self.sparse.starts) > 0
        best = np.maximum.reduceat(self.sparse.values, self.sparse.starts[:-1][kept]) if kept.any() else np.zeros(0)
        return float(np.maximum(best, 0.0).sum(dtype=np.float64))
