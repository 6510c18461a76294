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
from repmatch.selectors.cover import BATCH, Cover, Handing, Neighbours
from repmatch.selectors.greedy import Progress, Searched, State, solve
from repmatch.selectors.kernels import DEFAULT_LIMIT, FactorKernel, Kernel, as_kernel
from repmatch.selectors.objectives import Coverage
from repmatch.selectors.pruning import ENTRY, above, expected_entries
from repmatch.selectors.selection import Selection
from repmatch.selectors.sparse import SparseKernel, enough_neighbours
from repmatch.selectors.whole import Whole
from repmatch.similarity.pairs import Floats

Algorithm = Literal["auto", "incremental", "pruned", "lazy", "stochastic", "sparse", "partitioned"]
BATCH_BYTES = 256 << 20
KEPT = 16  # leading columns kept until the pick is made
FIRST_LOOK = 8  # picks before a pruned pass is thought of, and between two such thoughts
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
    given = as_kernel(kernel, represented, survey=True)
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
        return lambda: Neighbours(kernel)
    if algorithm == "sparse":
        kept = SparseKernel.nearest(kernel, enough_neighbours(kernel.shape[1], k))
        return lambda: Neighbours(kept)
    if algorithm == "pruned":
        limit = kernel.memory_limit if isinstance(kernel, FactorKernel) else DEFAULT_LIMIT
        return lambda: _Pruned(kernel, limit)
    whole = kernel.dense()
    if whole is None:
        raise SelectionError(f"a kernel of shape {kernel.shape} exceeds its memory limit: use algorithm='pruned'")
    return lambda: Whole(kernel, whole, k)


class _Lazy(Cover):
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
        raised, _, _ = self.raise_cover(np.ascontiguousarray(column), position)
        self.last.clear()
        if len(raised):
            self.fresh[:] = False


class _Pruned(Handing):
    """Lazy for the first picks; then one pass keeps what still exceeds its row's cover, and incremental goes on.

    What does not exceed a row's cover never gains anything in that row again, so the picks are those of exact greedy.
    After t picks about one entry in t + 1 is left, whatever the data: the chance that one draw exceeds t others.
    """

    name = "pruned"

    def __init__(self, kernel: Kernel, limit: int) -> None:
        super().__init__(kernel, _Lazy(kernel))
        self.entries = limit // ENTRY
        self.next_look = FIRST_LOOK

    def settle(self) -> None:
        """Keep what can still gain, once that fits."""
        if isinstance(self.inner, _Lazy) and self.picks >= self.next_look:
            self.next_look = self.picks + FIRST_LOOK
            kernel = self.inner.kernel
            if expected_entries(kernel, self.inner.cover) <= self.entries:
                self.inner = Neighbours(above(kernel, self.inner.cover), self.inner)
