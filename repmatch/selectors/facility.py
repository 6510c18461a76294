"""Facility location: every instance should have a pick that resembles it.

f(S) = Σ_i max_{j ∈ S} max(K_ij, 0) is monotone and submodular, so greedy reaches at least 1 − 1/e of the optimum
(Nemhauser, Wolsey, Fisher 1978), and value plus the k largest gains left bounds the optimum. A similarity below 0
counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.compiled import in_chunks
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints
from repmatch.selectors.greedy import Progress, Searched, State, solve
from repmatch.selectors.kernels import DEFAULT_LIMIT, FactorKernel, Floats, Kernel, as_kernel
from repmatch.selectors.objectives import Coverage
from repmatch.selectors.pruning import ENTRY, above, expected_entries
from repmatch.selectors.selection import Selection
from repmatch.selectors.sparse import SparseKernel, enough_neighbours

Algorithm = Literal["auto", "incremental", "pruned", "lazy", "stochastic", "sparse", "partitioned"]
BATCH = 256  # columns that the lazy algorithm computes at a time
BATCH_BYTES = 256 << 20
KEPT = 16  # leading columns kept until the pick is made
FIRST_LOOK = 8  # picks before a pruned pass is thought of, and between two such thoughts
NO_PRICES = np.empty(0)
MOST_PAIRS = 5e9  # pairs of one pass that an exact algorithm is chosen for


def facility_location(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    represented: Factors | ArrayLike | None = None,
    constraints: Constraints | None = None,
    algorithm: Algorithm = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Select k instances by greedy facility location, exact; ties go to the lowest position.

    Args:
        kernel: a kernel, factors, or an (n, n) array of similarities; entry (i, j) says how well j stands for i.
        k: how many to pick, 0 to n.
        represented: what the selection should stand for: factors, (r,) positions, or an (r, n) array of similarities;
            every instance by default.
        constraints: quotas that the picks must respect.
        algorithm: exact, with the same picks: "incremental" keeps every gain up to date in a whole kernel; "pruned" is
            lazy for the first picks and then keeps only the entries that can still gain, from one pass; "lazy"
            computes columns where they are needed, in memory of O(n) and one block of columns. Not exact: "sparse"
            keeps the nearest candidates of each instance only, at least 4 n/k of them; "partitioned" works in parts;
            "stochastic" looks at a sample of candidates a pick. "auto" takes incremental where the kernel fits its
            memory limit, else pruned up to 5e9 pairs, else partitioned.
        seed: for the stochastic algorithm.
        progress: called after each pick with picks made and wanted. KeyboardInterrupt ends the run early.

    Returns:
        The selection.

    Raises:
        SelectionError: a kernel, size or quota that can't be used.
    """
    given = as_kernel(kernel, represented)
    if constraints is not None and constraints.apart is not None and constraints.apart_by is None:
        constraints = replace(constraints, apart_by=given)  # whatever an algorithm keeps of it
    (constraints or Constraints()).tracker(given.shape[1], k)  # refuse what can't be met before anything is computed
    if algorithm not in get_args(Algorithm):
        raise SelectionError(f"there is no algorithm {algorithm!r}: expected one of {', '.join(get_args(Algorithm))}")
    chosen, reason = _choose(given, constraints) if algorithm == "auto" else (algorithm, "")
    if chosen == "partitioned":
        from repmatch.selectors.large import partitioned

        found = partitioned(given, k, constraints=constraints, seed=seed, progress=progress)
    else:
        make = _maker(given, k, chosen, seed)
        found = solve(make, k, strategy="facility-location", constraints=constraints, progress=progress)
    return replace(found, reason=reason, seed=seed if chosen in ("stochastic", "partitioned") else None)


def _choose(kernel: Kernel, constraints: Constraints | None) -> tuple[Algorithm, str]:
    """Return the algorithm for a kernel of this size, and why."""
    rows, n = kernel.shape
    if isinstance(kernel, SparseKernel):
        return "sparse", "the kernel is sparse"
    limit = kernel.memory_limit if isinstance(kernel, FactorKernel) else DEFAULT_LIMIT
    if kernel.dense() is not None:
        return "incremental", f"the whole kernel of {rows:,} × {n:,} fits in memory"
    from repmatch.selectors.large import unsplittable

    if rows * n <= MOST_PAIRS or unsplittable(kernel, constraints):
        return "pruned", f"the whole kernel of {rows:,} × {n:,} exceeds {limit / 2**30:.1f} GiB"
    return "partitioned", f"{rows:,} × {n:,} pairs are more than an exact pass is made over unless asked for"


def _maker(kernel: Kernel, k: int, algorithm: Algorithm, seed: int) -> Callable[[], State]:
    """Return what makes the state of an algorithm."""
    if algorithm == "stochastic":
        return lambda: Searched(Coverage(kernel), "stochastic", k=k, seed=seed)
    if algorithm == "lazy":
        return lambda: _Lazy(kernel)
    if isinstance(kernel, SparseKernel):
        return lambda: _Neighbours(kernel)
    if algorithm == "sparse":
        kept = SparseKernel.nearest(kernel, enough_neighbours(kernel.shape[1], k))
        return lambda: _Neighbours(kept)
    if algorithm == "pruned":
        limit = kernel.memory_limit if isinstance(kernel, FactorKernel) else DEFAULT_LIMIT
        return lambda: _Pruned(kernel, limit)
    whole = kernel.dense()
    if whole is None:
        raise SelectionError(f"a kernel of shape {kernel.shape} exceeds its memory limit: use algorithm='pruned'")
    return lambda: _Incremental(kernel, whole)


class _Cover(State):
    """How well each represented instance is covered, and what each candidate would still add.

    Attributes:
        cover: (rows,) float64, similarity with the best pick so far, at least 0.
        gains: (n,) float64, gains or upper bounds on them.
        representative: (rows,) int64, position of that pick, -1 for none or one chosen before.
    """

    def __init__(self, kernel: Kernel) -> None:
        from repmatch.selectors import _loops

        self.loops = _loops
        self.kernel: Kernel = kernel
        self.n = kernel.shape[1]
        self.cover = np.zeros(kernel.shape[0])
        self.representative = np.full(kernel.shape[0], -1, np.int64)
        self.gains = np.zeros(self.n)

    def upper(self) -> NDArray[np.float64]:
        return self.gains

    def gain(self, index: int) -> float:
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
        known = self.representative >= 0
        return self.representative, np.where(known, self.cover, 0.0).astype(np.float32)

    def raise_cover(self, column: Floats, position: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Note a pick; return the rows that it covers better and their cover before."""
        raised = np.flatnonzero(column > self.cover)
        old = self.cover[raised]
        self.cover[raised] = column[raised]
        self.representative[raised] = position
        return raised, old


class _Incremental(_Cover):
    """Every gain is kept up to date: a pick raises few rows' cover, and only those rows lower the gains."""

    name = "incremental"

    def __init__(self, kernel: Kernel, whole: Floats) -> None:
        super().__init__(kernel)
        self.whole = whole
        in_chunks(lambda lo, hi: self.loops.add_columns(whole, lo, hi, self.gains), self.gains.size, least=1024)
        self.exact = np.zeros(self.gains.size, np.bool_)
        self.scale = float(self.gains.max(initial=0.0))
        self.steps = self.cover.size

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
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

    def gain(self, index: int) -> float:
        return float(self.loops.exact_gain(self.whole, index, self.kernel.symmetric, self.cover))

    def add(self, index: int, position: int) -> None:
        column = self.whole[index] if self.kernel.symmetric else self.whole[:, index]
        raised, old = self.raise_cover(column, position)
        before = self.gains.copy()
        self.lower(raised, old, self.cover[raised])
        self.exact &= self.gains == before
        self.steps += len(raised) + 1

    def lower(self, raised: NDArray[np.int64], old: NDArray[np.float64], new: NDArray[np.float64]) -> None:
        """Take from all gains what the raised rows no longer give."""
        in_chunks(
            lambda lo, hi: self.loops.lower_gains(self.whole, raised, old, new, lo, hi, self.gains),
            self.gains.size,
            least=max(1024, 1_000_000 // max(1, len(raised))),
        )


class _Neighbours(_Incremental):
    """Incremental on a kernel that keeps some entries of each row only."""

    name = "sparse"

    def __init__(self, kernel: SparseKernel, start: _Cover | None = None) -> None:
        super().__init__(kernel, np.zeros((0, kernel.shape[1]), np.float32))
        self.sparse = kernel
        if start is not None:
            self.cover, self.representative = start.cover, start.representative
        self.loops.add_sparse(kernel.starts, kernel.neighbours, kernel.values, self.cover, self.gains)
        self.scale = float(self.gains.max(initial=0.0))

    def gain(self, index: int) -> float:
        rows, values = self.sparse.column(index)
        return float(self.loops.exact_gain(values[:, None], 0, False, self.cover[rows]))

    def add(self, index: int, position: int) -> None:
        rows, values = self.sparse.column(index)
        better = values > self.cover[rows]
        raised, new = rows[better].astype(np.int64), values[better].astype(np.float64)
        old, before = self.cover[raised], self.gains.copy()
        self.cover[raised], self.representative[raised] = new, position
        entries = self.sparse
        self.loops.lower_sparse(entries.starts, entries.neighbours, entries.values, raised, old, new, self.gains)
        self.exact &= self.gains == before
        self.steps += len(raised) + 1

    def ceiling(self) -> float:
        """Return Σ_i max_j K_ij over the kept candidates."""
        kept = np.diff(self.sparse.starts) > 0
        best = np.maximum.reduceat(self.sparse.values, self.sparse.starts[:-1][kept]) if kept.any() else np.zeros(0)
        return float(np.maximum(best, 0.0).sum(dtype=np.float64))


class _Lazy(_Cover):
    """Gains only fall, so old ones bound new ones: only candidates whose bound leads are computed (Minoux 1978)."""

    name = "lazy"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        sums = kernel.sums()
        self.gains = np.full(kernel.shape[1], np.inf) if sums is None else sums
        self.fresh = np.zeros(kernel.shape[1], np.bool_)
        # Sums are rounded, and so are entries that are products of floats: a bound that is below by less still leads.
        self.slack = kernel.resolution + 4.0 * np.finfo(np.float64).eps * (kernel.shape[0] + 1)
        self.width = max(1, min(BATCH, BATCH_BYTES // (16 * max(1, kernel.shape[0]))))
        self.last: dict[int, Floats] = {}

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        candidates = np.flatnonzero(allowed)
        price = np.ones(len(candidates)) if costs is None else costs[candidates]
        while True:
            rates, done = self.gains[candidates] / price, self.fresh[candidates]
            top = float(rates[done].max(initial=-np.inf))
            tie = top * (1.0 - self.kernel.resolution) if done.any() else -np.inf
            waiting = np.flatnonzero(~done & (rates * (1.0 + self.slack) >= tie))
            if not len(waiting):
                winner = int(candidates[done & (rates >= tie)][0])
                return winner, float(self.gains[winner])
            if len(waiting) > self.width:
                waiting = np.sort(waiting[np.argsort(-rates[waiting], kind="stable")[: self.width]])
            self._compute(candidates[waiting], price[waiting], top)

    def _compute(self, batch: NDArray[np.int64], price: NDArray[np.float64], top: float) -> None:
        columns = np.ascontiguousarray(self.kernel.columns(batch))
        sums = np.zeros(len(batch))
        in_chunks(lambda lo, hi: self.loops.column_gains(columns, self.cover, lo, hi, sums), len(batch), least=32)
        for c in np.argsort(-sums / price, kind="stable"):
            if sums[c] / price[c] * (1.0 + self.slack) < top:
                break
            sums[c] = self.loops.exact_gain(columns, c, False, self.cover)
            top = max(top, sums[c] / price[c])
            if len(self.last) < KEPT:
                self.last[int(batch[c])] = columns[:, c].copy()
        self.gains[batch] = sums
        self.fresh[batch] = True

    def add(self, index: int, position: int) -> None:
        column = self.last.get(index)
        if column is None:
            column = self.kernel.columns(np.array([index], np.int64))[:, 0]
        raised, _ = self.raise_cover(column, position)
        self.last.clear()
        if len(raised):
            self.fresh[:] = False


class _Pruned(State):
    """Lazy for the first picks; then one pass keeps what still exceeds its row's cover, and incremental goes on.

    What does not exceed a row's cover never gains anything in that row again, so the picks are those of exact greedy.
    After t picks about one entry in t + 1 is left, whatever the data: the chance that one draw exceeds t others.
    """

    name = "pruned"

    def __init__(self, kernel: Kernel, limit: int) -> None:
        self.kernel, self.n, self.entries = kernel, kernel.shape[1], limit // ENTRY
        self.inner: _Cover = _Lazy(kernel)
        self.picks, self.next_look = 0, FIRST_LOOK

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        if isinstance(self.inner, _Lazy) and self.picks >= self.next_look:
            self.next_look = self.picks + FIRST_LOOK
            kernel = self.inner.kernel
            if expected_entries(kernel, self.inner.cover) <= self.entries:
                self.inner = _Neighbours(above(kernel, self.inner.cover), self.inner)
        return self.inner.best(allowed, costs)

    def add(self, index: int, position: int) -> None:
        self.inner.add(index, position)
        self.picks += 1

    def gain(self, index: int) -> float:
        return self.inner.gain(index)

    def upper(self) -> NDArray[np.float64]:
        return self.inner.upper()

    def ceiling(self) -> float:
        return self.inner.ceiling()

    def represented(self, picks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self.inner.represented(picks)
