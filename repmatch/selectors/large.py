"""Facility location where even one pass over all pairs is too much: in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.baselines import represent
from repmatch.selectors.constraints import Constraints, Partition, Positions
from repmatch.selectors.facility import Algorithm, facility_location
from repmatch.selectors.greedy import Progress
from repmatch.selectors.kernels import DEFAULT_LIMIT, DenseKernel, FactorKernel, Kernel, among_candidates, as_kernel
from repmatch.selectors.selection import Selection

PART = 10_000  # instances of a part by default
MOST_PAIRS = 1e10  # pairs that the second round looks at


@dataclass(frozen=True)
class _Rounds:
    """What both rounds of a partitioned selection share."""

    kernel: Kernel
    k: int
    rules: Constraints
    parts: int
    oversample: float
    quotas: Partition | None

    def first(self, members: NDArray[np.int64], progress: Progress | None) -> NDArray[np.int64]:
        """Return what one part proposes."""
        closed = np.concatenate((np.asarray(self.rules.exclude, np.int64), np.asarray(self.rules.given, np.int64)))
        members = np.setdiff1d(members, closed)
        factor = self.oversample / self.parts
        wanted, rules = min(len(members), math.ceil(factor * self.k)), Constraints()
        if self.quotas is not None:
            groups = self.quotas.groups[members]
            sizes = np.bincount(groups, minlength=len(self.quotas.names))
            asked = np.maximum(self.quotas.lower, np.where(self.quotas.upper < self.k, self.quotas.upper, 0))
            quota = np.minimum(np.ceil(factor * asked).astype(np.int64), sizes)
            rules = Constraints(groups=groups, at_least={g: q for g, q in enumerate(quota.tolist()) if q})
            wanted = min(len(members), max(wanted, int(quota.sum())))
        if self.rules.costs is not None and self.rules.budget is not None:
            costs = np.asarray(self.rules.costs, np.float64)[members]
            rules = replace(rules, costs=costs, budget=max(factor * self.rules.budget, float(costs.min(initial=0.0))))
        part = split(self.kernel, members, members)
        algorithm: Algorithm = "incremental" if part.dense() is not None else "pruned"
        found = facility_location(part, wanted, constraints=rules, algorithm=algorithm, progress=progress)
        if not found.complete:  # proposals of some parts only are no selection
            raise KeyboardInterrupt
        return members[found.indices]

    def pool(self, proposed: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the candidates of the second round: all proposals, what must be there, and enough of every group."""
        forced = [np.asarray(v, np.int64) for v in (self.rules.include, self.rules.given)]
        out = np.unique(np.concatenate((proposed, *forced)))
        if self.quotas is None:
            return out
        closed = np.asarray(self.rules.exclude, np.int64)
        for g, low in enumerate(self.quotas.lower.tolist()):
            missing = low - int((self.quotas.groups[np.setdiff1d(out, forced[1])] == g).sum())
            if missing > 0:
                spare = order[(self.quotas.groups[order] == g) & ~np.isin(order, np.concatenate((out, closed)))]
                out = np.union1d(out, spare[:missing])
        return out

    def second(self, pool: NDArray[np.int64], rows: NDArray[np.int64], progress: Progress | None) -> Selection:
        """Select among the pool; indices are positions in it."""
        rules = self.rules

        def place(values: Positions) -> NDArray[np.int64]:
            return np.searchsorted(pool, np.asarray(values, np.int64))

        within = Constraints(include=place(rules.include), given=place(rules.given), apart=rules.apart)
        if rules.apart is not None:
            within = replace(within, apart_by=split(among_candidates(rules.apart_by or self.kernel), pool, pool))
        if self.quotas is not None:
            both = zip(self.quotas.lower.tolist(), self.quotas.upper.tolist(), strict=True)
            present = np.unique(self.quotas.groups[pool]).tolist()
            bounds = {g: pair for g, pair in enumerate(both) if g in present}
            within = replace(
                within,
                groups=self.quotas.groups[pool],
                at_least={g: low for g, (low, _) in bounds.items()},
                at_most={g: high for g, (_, high) in bounds.items()},
            )
        if rules.costs is not None:
            within = replace(within, costs=np.asarray(rules.costs, np.float64)[pool], budget=rules.budget)
        k = min(self.k, len(pool) - len(rules.given))
        kernel = split(self.kernel, rows, pool)
        limit = kernel.memory_limit if isinstance(kernel, FactorKernel) else DEFAULT_LIMIT
        algorithm: Algorithm = "incremental" if 4 * len(rows) * len(pool) <= limit else "sparse"
        return facility_location(kernel, k, constraints=within, algorithm=algorithm, progress=progress)


def partitioned(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    parts: int | None = None,
    oversample: float = 3.0,
    represented: int | None = None,
    constraints: Constraints | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Select k instances in two rounds: greedy within random parts, then greedy among all their picks.

    GreeDi (Mirzasoleiman et al. 2013). Work of n²/parts + n · oversample · k in place of n².

    Args:
        kernel: factors, a kernel of factors, or an (n, n) array.
        k: how many to pick.
        parts: how many parts; by default such that a part has about 10,000 instances.
        oversample: all parts together pick this many times k for the second round.
        represented: the second round counts a random sample of this many instances; by default as many as 1e10 pairs
            allow, and all where there are fewer.
        constraints: every rule but min_gain and coverage; balance or stratify not together with groups.
        seed: for the parts and the sample.
        progress: called with picks made and wanted, both rounds together. KeyboardInterrupt in the second round leaves
            its picks so far; in the first it is raised, for there is nothing yet.

    Returns:
        The selection; value and gains are estimates from the sample where there are more instances than `represented`,
        scaled to all of them. There is no bound.

    Raises:
        SelectionError: a size that can't be met, or a kernel or rule that can't be split.
    """
    whole, rules = as_kernel(kernel), constraints or Constraints()
    reason = unsplittable(whole, rules)
    if reason:
        raise SelectionError(f"{reason} can't be selected from in parts: use another algorithm")
    n = whole.shape[1]
    tracker = rules.tracker(n, k)
    parts = max(1, -(-n // PART)) if parts is None else parts
    if not 1 <= parts <= max(1, n) or not oversample >= 1.0:
        raise SelectionError(f"parts = {parts}, oversample = {oversample}: expected 1 to {n} parts, at least 1 times k")
    quotas = tracker.parts[0] if tracker.parts else None
    if quotas is not None and (rules.balance is not None or rules.stratify is not None):
        quotas = replace(quotas, lower=quotas.upper)
    rounds = _Rounds(whole, k, rules, parts, oversample, quotas)
    generator = np.random.default_rng(seed)
    order = generator.permutation(n)
    proposed: list[NDArray[np.int64]] = []
    tell = _Told(progress, parts * math.ceil(oversample * k / parts) + k)
    for part in np.array_split(order, parts):
        proposed.append(rounds.first(np.sort(part), tell.next()))
    pool = rounds.pool(np.concatenate(proposed), order)
    most = int(MOST_PAIRS / max(1, len(pool))) if represented is None else represented
    rows = np.arange(n) if n <= most else np.sort(generator.choice(n, most, replace=False))
    final = rounds.second(pool, rows, tell.next())
    picks = pool[final.indices]
    scale = n / max(1, len(rows))
    representative, similarity = represent(whole, picks, n)
    note = f"{parts} parts, {len(pool)} candidates in the second round, {len(rows)} of {n} instances counted"
    return replace(
        final,
        indices=picks,
        gains=final.gains * scale,
        value=final.value * scale,
        bound=None,
        representative=representative,
        similarity=similarity,
        strategy="facility-location",
        algorithm="partitioned",
        notes=(*tracker.notes, *final.notes, note),
        seed=seed,
    )


def unsplittable(kernel: Kernel, constraints: Constraints | None) -> str:
    """Return what of a problem parts can't keep, in words; empty where they can.

    Args:
        kernel: the kernel.
        constraints: the rules.
    """
    rules = constraints or Constraints()
    for name in ("min_gain", "coverage"):
        if getattr(rules, name) is not None:
            return f"a selection with {name}"
    if (rules.balance is not None or rules.stratify is not None) and (rules.at_least or rules.at_most):
        return "a selection with quotas of two kinds"
    if isinstance(kernel, FactorKernel | DenseKernel) and kernel.shape[0] == kernel.shape[1] and kernel.symmetric:
        return ""
    return "a kernel that is neither factors nor a symmetric array"


class _Told:
    """One progress over several runs."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.before, self.now = progress, total, 0, 0

    def next(self) -> Progress | None:
        """Return the progress of the next run."""
        self.before, tell = self.before + self.now, self.progress
        if tell is None:
            return None
        self.now, start = 0, self.before

        def on(done: int, _: int) -> None:
            self.now = done
            tell(min(start + done, self.total), self.total)

        return on


def split(kernel: Kernel, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Kernel:
    """Return the kernel between some instances and some candidates.

    Args:
        kernel: factors or a square array.
        rows: positions of the represented instances.
        columns: positions of the candidates.

    Returns:
        Their kernel.

    Raises:
        SelectionError: another kernel.
    """
    same = len(rows) == len(columns) and bool((rows == columns).all())
    if isinstance(kernel, FactorKernel) and kernel.symmetric:
        return kernel.part(columns, None if same else rows)
    if isinstance(kernel, DenseKernel) and kernel.shape[0] == kernel.shape[1]:
        return DenseKernel(kernel.array[np.ix_(rows, columns)], rectangular=not same)
    raise SelectionError("only factors and square arrays can be selected from in parts")
