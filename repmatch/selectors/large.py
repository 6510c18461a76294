"""Facility location where even one pass over all pairs is too much: in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.baselines import represent_or_stop
from repmatch.selectors.constraints import Constraints, Positions
from repmatch.selectors.facility import Algorithm, facility_location
from repmatch.selectors.greedy import Progress
from repmatch.selectors.kernels import DEFAULT_LIMIT, DenseKernel, FactorKernel, Kernel, among_candidates, as_kernel
from repmatch.selectors.selection import Selection
from repmatch.selectors.tracker import Partition

PART = 10_000  # instances of a part by default
PROPOSALS = 3_000  # candidates of the second round, where k is small
MOST_PAIRS = 1e10  # pairs that the second round looks at


@dataclass(frozen=True)
class Part:
    """What one part of a partitioned selection is asked.

    Attributes:
        kernel: of its members with each other.
        wanted: how many to propose.
        rules: for them.
        means: (n,) mean similarity of its members with the target, where the strategy needs them.
    """

    kernel: Kernel
    wanted: int
    rules: Constraints
    means: NDArray[np.float64] | None = None


Workers = Callable[[Iterator[Part]], Iterator[NDArray[np.int64]]]


@dataclass(frozen=True)
class Rounds:
    """What both rounds of a partitioned selection share."""

    kernel: Kernel
    k: int
    rules: Constraints
    parts: int
    oversample: float
    quotas: Partition | None

    def asked(self, members: NDArray[np.int64]) -> tuple[NDArray[np.int64], int, Constraints]:
        """Return what is asked of one part: the members it chooses from, how many, under which rules."""
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
            least = float(costs.min(initial=0.0))
            if self.quotas is not None and rules.at_least:
                own = replace(self.quotas, groups=groups, lower=quota)
                least = max(least, own.cheapest(np.ones(len(members), np.bool_), costs)[0])
            rules = replace(rules, costs=costs, budget=max(factor * self.rules.budget, least))
        return members, wanted, rules

    def first(self, members: NDArray[np.int64], progress: Progress | None) -> NDArray[np.int64]:
        """Return what one part proposes."""
        members, wanted, rules = self.asked(members)
        return members[propose(split(self.kernel, members, members), wanted, rules, progress)]

    def elsewhere(
        self, order: NDArray[np.int64], workers: Workers, tell: Told, means: NDArray[np.float64] | None = None
    ) -> list[NDArray[np.int64]]:
        """Return what all parts propose, as workers find it; a part is made when a worker is free for it."""
        asked = [self.asked(np.sort(part)) for part in np.array_split(order, self.parts)]
        made = (
            Part(split(self.kernel, members, members), wanted, rules, None if means is None else means[members])
            for members, wanted, rules in asked
        )
        out: list[NDArray[np.int64]] = []
        for (members, wanted, _), found in zip(asked, workers(made), strict=True):
            out.append(members[found])
            tell.done(wanted)
        return out

    def pool(self, proposed: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the candidates of the second round: all proposals, what must be there, and enough of every group."""
        forced = [np.asarray(v, np.int64) for v in (self.rules.include, self.rules.given)]
        out = np.unique(np.concatenate((proposed, *forced)))
        if self.quotas is None:
            return out
        closed = np.asarray(self.rules.exclude, np.int64)
        for g, low in enumerate(self.quotas.lower.tolist()):
            if low and self.rules.costs is not None:  # what a budget can pay for must be there
                own = np.flatnonzero((self.quotas.groups == g) & ~np.isin(np.arange(len(order)), [*closed, *forced[1]]))
                costs = np.asarray(self.rules.costs, np.float64)[own]
                out = np.union1d(out, own[np.argsort(costs, kind="stable")[:low]])
            missing = low - int((self.quotas.groups[np.setdiff1d(out, forced[1])] == g).sum())
            if missing > 0:
                spare = order[(self.quotas.groups[order] == g) & ~np.isin(order, np.concatenate((out, closed)))]
                out = np.union1d(out, spare[:missing])
        return out

    def within(self, pool: NDArray[np.int64]) -> tuple[int, Constraints]:
        """Return how many to pick among the pool and under which rules; they speak of positions in it."""
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
        return min(self.k, len(pool) - len(rules.given)), within

    def second(self, pool: NDArray[np.int64], rows: NDArray[np.int64], progress: Progress | None) -> Selection:
        """Select among the pool; indices are positions in it."""
        k, within = self.within(pool)
        kernel = split(self.kernel, rows, pool)
        limit = kernel.memory_limit if isinstance(kernel, FactorKernel) else DEFAULT_LIMIT
        algorithm: Algorithm = "incremental" if 4 * len(rows) * len(pool) <= limit else "sparse"
        return facility_location(kernel, k, constraints=within, algorithm=algorithm, progress=progress)


def propose(kernel: Kernel, wanted: int, rules: Constraints, progress: Progress | None = None) -> NDArray[np.int64]:
    """Return the picks of one part, by facility location on its kernel.

    Args:
        kernel: of the part's members with each other.
        wanted: how many.
        rules: for them.
        progress: called with picks made and wanted.

    Returns:
        Positions among the members.

    Raises:
        KeyboardInterrupt: it was interrupted: proposals of some parts only are no selection.
    """
    algorithm: Algorithm = "incremental" if kernel.dense() is not None else "pruned"
    found = facility_location(kernel, wanted, constraints=rules, algorithm=algorithm, progress=progress)
    if not found.complete:
        raise KeyboardInterrupt
    return found.indices


def partitioned(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    parts: int | None = None,
    oversample: float | None = None,
    represented: int | None = None,
    constraints: Constraints | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Selection:
    """Select k instances in two rounds: greedy within random parts, then greedy among all their picks.

    GreeDi (Mirzasoleiman et al. 2013). Work of n²/parts + n · oversample · k in place of n².

    Args:
        kernel: factors, a kernel of factors, or an (n, n) array.
        k: how many to pick.
        parts: how many parts; by default such that a part has about 10,000 instances.
        oversample: all parts together pick this many times k for the second round; by default 3, and more where k is
            small: at least 3,000 proposals, if no part has to make more than k.
        represented: the second round counts a random sample of this many instances; by default as many as 1e10 pairs
            allow, and all where there are fewer.
        constraints: every rule but min_gain and coverage; balance or stratify not together with groups or a budget.
        seed: for the parts and the sample.
        progress: called with picks made and wanted, both rounds together. KeyboardInterrupt in the second round leaves
            its picks so far; in the first it is raised, for there is nothing yet.
        workers: do the first round elsewhere: given the parts, yield what each proposes, in order. The picks are the
            same.

    Returns:
        The selection; value and gains are estimates from the sample where there are more instances than `represented`,
        scaled to all of them. There is no bound.

    Raises:
        SelectionError: a size that can't be met, or a kernel or rule that can't be split.
    """
    whole = as_kernel(kernel)
    n = whole.shape[1]
    parts = parts_of(n) if parts is None else parts
    rounds, notes = opened(
        whole, k, constraints or Constraints(), parts, enough(k, parts) if oversample is None else oversample
    )
    generator = np.random.default_rng(seed)
    order = generator.permutation(n)
    proposed: list[NDArray[np.int64]] = []
    tell = Told(progress, parts * math.ceil(rounds.oversample * k / parts) + k)
    if workers is not None:
        proposed = rounds.elsewhere(order, workers, tell)
    else:
        for part in np.array_split(order, parts):
            proposed.append(rounds.first(np.sort(part), tell.next()))
    pool = rounds.pool(np.concatenate(proposed), order)
    most = int(MOST_PAIRS / max(1, len(pool))) if represented is None else represented
    rows = np.arange(n) if n <= most else np.sort(generator.choice(n, most, replace=False))
    final = rounds.second(pool, rows, tell.next())
    picks = pool[final.indices]
    scale = n / max(1, len(rows))
    representative, similarity, cut = represent_or_stop(whole, picks, n)
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
        notes=(*notes, *final.notes, note, *cut),
        complete=final.complete and not cut,
        seed=seed,
    )


def opened(kernel: Kernel, k: int, rules: Constraints, parts: int, oversample: float) -> tuple[Rounds, tuple[str, ...]]:
    """Check what both rounds rest on.

    Args:
        kernel: of all instances.
        k: how many to pick.
        rules: for the picks.
        parts: how many parts.
        oversample: all parts together propose this many times k.

    Returns:
        The rounds, and what a person should know.

    Raises:
        SelectionError: a size that can't be met, or a kernel or rule that can't be split.
    """
    reason = unsplittable(kernel, rules)
    if reason:
        raise SelectionError(f"{reason} can't be selected from in parts: use one machine and another algorithm")
    n = kernel.shape[1]
    tracker = rules.tracker(n, k)
    if not 1 <= parts <= max(1, n) or not oversample >= 1.0:
        raise SelectionError(f"parts = {parts}, oversample = {oversample}: expected 1 to {n} parts, at least 1 times k")
    quotas = tracker.parts[0] if tracker.parts else None
    if quotas is not None and (rules.balance is not None or rules.stratify is not None):
        quotas = replace(quotas, lower=quotas.upper)
    return Rounds(kernel, k, rules, parts, oversample, quotas), tracker.notes


def parts_of(n: int) -> int:
    """Return how many parts n instances are split into by default."""
    return max(1, -(-n // PART))


def enough(k: int, parts: int) -> float:
    """Return how many times k all parts together should propose.

    Args:
        k: picks wanted.
        parts: how many parts.

    Returns:
        3, and more where k is small; a part never needs to propose more than k.
    """
    return max(min(3.0, parts), min(PROPOSALS / max(1, k), parts))


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
    if rules.balance is not None or rules.stratify is not None:
        if rules.at_least or rules.at_most:
            return "a selection with quotas of two kinds"
        if rules.costs is not None:
            return "a selection with a budget whose labels take turns"
    if isinstance(kernel, FactorKernel | DenseKernel) and kernel.shape[0] == kernel.shape[1] and kernel.symmetric:
        return ""
    return "a kernel that is neither factors nor a symmetric array"


class Told:
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

    def done(self, count: int) -> None:
        """Note a run that was done elsewhere.

        Args:
            count: its picks.
        """
        self.before += count
        if self.progress is not None:
            self.progress(min(self.before, self.total), self.total)


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
