"""What a selection must respect: quotas, musts and must-nots, a budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.quotas import Labels, equal_quotas, group, proportional_quotas

Positions = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Constraints:
    """Rules for a selection. All of them hold together.

    Attributes:
        balance: (n,) labels; every label gets the same number of picks. A label with fewer instances gives all of
            them and the others share the rest. Where a budget, min_gain or coverage ends the run nobody knows when,
            labels take turns; one that can't be afforded any more is passed over.
        stratify: (n,) labels; every label gets the share it has in the dataset (largest remainder; where nobody knows
            the end, the label that lags most behind its share has its turn).
        groups: (n,) labels that `at_least` and `at_most` speak of.
        at_least: label -> fewest picks, whatever they gain; a budget must allow for them.
        at_most: label -> most picks.
        include: positions that are picked first, in this order; they count towards k.
        exclude: positions that are never picked.
        costs: (n,) what each instance costs, above 0, in any unit (tokens, seconds, money).
        budget: what all picks together may cost; never exceeded.
        given: positions chosen before, an initial coreset: the selection adds to what they already give. They are
            neither returned nor counted nor paid for.
        min_gain: stop before a pick that gains less, once `at_least` is met.
        coverage: stop once the value reaches this share of what all instances together reach, 0 to 1, and `at_least` is
            met.
        apart: no two picks, nor a pick and one given, are more similar than this; fewer than k where no more fit.
        apart_by: the similarities that `apart` speaks of; those that the picks are chosen by, unless given.
    """

    balance: Labels | None = None
    stratify: Labels | None = None
    groups: Labels | None = None
    at_least: Mapping[Hashable, int] = field(default_factory=dict)
    at_most: Mapping[Hashable, int] = field(default_factory=dict)
    include: Positions = ()
    exclude: Positions = ()
    costs: ArrayLike | None = None
    budget: float | None = None
    given: Positions = ()
    min_gain: float | None = None
    coverage: float | None = None
    apart: float | None = None
    apart_by: Kernel | None = None

    def names(self) -> tuple[str, ...]:
        """Return the names of the rules that are set."""
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        return tuple(n for n, v in found if n != "apart_by" and v is not None and (not hasattr(v, "__len__") or len(v)))

    def tracker(self, n: int, k: int) -> Tracker:
        """Return the rules as a tracker of what may still be picked.

        Args:
            n: instances.
            k: picks wanted.

        Returns:
            A fresh tracker.

        Raises:
            SelectionError: rules that can't be met, or labels of another length.
        """
        check_size(n, k)
        closed = np.zeros(n, np.bool_)
        self._check_limits()
        closed[positions(self.exclude, n, "exclude")] = True
        closed[positions(self.given, n, "given")] = True
        include = positions(self.include, n, "include")
        if closed[include].any():
            raise SelectionError(f"position {include[closed[include]][0]} is to be picked and excluded: choose one")
        if len(include) > k:
            raise SelectionError(f"{len(include)} instances must be included, more than k = {k}")
        parts, notes = self._partitions(n, k, closed)
        costs = self._costs(n)
        free = n - int(closed.sum())
        if costs is None and k > free:
            raise SelectionError(f"k = {k} exceeds the {free} instances that are left after exclusion")
        for part in parts:
            part.check(k, closed, exact=costs is None)
        if costs is not None and self.budget is not None:
            _check_minimums(parts, closed, costs, float(self.budget))
        return Tracker(k, closed, parts, costs, np.inf if self.budget is None else float(self.budget), notes)

    def _check_limits(self) -> None:
        if self.coverage is not None and not 0.0 <= self.coverage <= 1.0:
            raise SelectionError(f"coverage = {self.coverage}: expected a share from 0 to 1")
        for name, value in (("min_gain", self.min_gain), ("apart", self.apart)):
            if value is not None and not np.isfinite(value):
                raise SelectionError(f"{name} = {value}: expected a finite number")

    def _partitions(self, n: int, k: int, closed: NDArray[np.bool_]) -> tuple[list[Partition], tuple[str, ...]]:
        if self.balance is not None and self.stratify is not None:
            raise SelectionError("balance and stratify exclude each other: give one of them")
        parts: list[Partition] = []
        notes: tuple[str, ...] = ()
        labels = self.stratify if self.balance is None else self.balance
        if labels is not None:
            kind = "stratify" if self.balance is None else "balance"
            names, numbers = group(labels, n, kind)
            sizes = np.bincount(numbers[~closed], minlength=len(names)).astype(np.int64)
            if kind == "balance":
                quotas, notes = equal_quotas(names, sizes, min(k, int(sizes.sum())))
            else:
                quotas = proportional_quotas(sizes, min(k, int(sizes.sum())))
            turns = None
            if self.costs is not None or self.min_gain is not None or self.coverage is not None:
                turns = np.maximum(sizes, 1.0) if kind == "stratify" else np.ones(len(sizes))
            parts.append(Partition(kind, names, numbers, quotas, np.zeros_like(quotas), turns))
        if self.at_least or self.at_most:
            if self.groups is None:
                raise SelectionError("at_least and at_most need groups: pass the labels they speak of")
            names, numbers = group(self.groups, n, "groups")
            unknown = [v for v in (*self.at_least, *self.at_most) if v not in names]
            if unknown:
                raise SelectionError(f"no instance has the label {unknown[0]!r} that a minimum or maximum names")
            upper = np.array([self.at_most.get(v, n) for v in names], np.int64)
            lower = np.array([self.at_least.get(v, 0) for v in names], np.int64)
            parts.append(Partition("groups", names, numbers, upper, lower))
        return parts, notes

    def _costs(self, n: int) -> NDArray[np.float64] | None:
        if (self.costs is None) != (self.budget is None):
            raise SelectionError("costs and budget belong together: give both or neither")
        if self.costs is None or self.budget is None:
            return None
        costs = np.asarray(self.costs, np.float64)
        if costs.shape != (n,):
            raise SelectionError(f"costs have shape {costs.shape}: expected ({n},)")
        if not (np.isfinite(costs).all() and (costs > 0).all()):
            place = int(np.argmin(np.isfinite(costs) & (costs > 0)))
            raise SelectionError(f"the cost at {place} is {costs[place]}: expected a finite number above 0")
        if not self.budget >= 0:
            raise SelectionError(f"the budget is {self.budget}: expected 0 or more")
        return costs


@dataclass
class Partition:
    """Groups with the most and the fewest picks that are still open in each.

    Attributes:
        kind: the rule it comes from, for messages.
        names: the groups' labels.
        groups: (n,) int64, each instance's group.
        upper: (g,) int64, picks still possible.
        lower: (g,) int64, picks still owed.
        turns: (g,) float64, shares by which groups take turns; None: they don't.
        taken: (g,) int64, picks made, where groups take turns.
    """

    kind: str
    names: list[Hashable]
    groups: NDArray[np.int64]
    upper: NDArray[np.int64]
    lower: NDArray[np.int64]
    turns: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Start without picks."""
        self.taken = np.zeros(len(self.names), np.int64)

    def turn(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return (n,) which instances are of a group whose turn it is, among the groups that can still be picked from.

        Args:
            allowed: (n,) bool, what can be picked.
        """
        if self.turns is None:
            return np.ones(len(allowed), np.bool_)
        there = np.bincount(self.groups[allowed], minlength=len(self.names)) > 0
        level = np.where(there, (self.taken + 0.5) / self.turns, np.inf)  # as Webster shares out seats
        return np.asarray((level <= level.min(initial=np.inf))[self.groups])

    def cheapest(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return what the picks still owed cost at the least, and the dearest of them by group, 0 where none is owed.

        Args:
            allowed: (n,) bool, what can be picked.
            costs: (n,) float64.
        """
        total, dearest = 0.0, np.zeros(len(self.names))
        for g in np.flatnonzero(self.lower):
            cheap = np.sort(costs[allowed & (self.groups == g)])[: self.lower[g]]
            total += float(cheap.sum())
            dearest[g] = cheap.max(initial=0.0)
        return total, dearest

    def check(self, k: int, closed: NDArray[np.bool_], *, exact: bool) -> None:
        """Refuse quotas that can't be met.

        Args:
            k: picks wanted.
            closed: (n,) bool, what can't be picked.
            exact: exactly k picks must be possible.
        """
        sizes = np.bincount(self.groups[~closed], minlength=len(self.names))
        for name, size, low, high in zip(self.names, sizes, self.lower, self.upper, strict=True):
            if low > size:
                raise SelectionError(f"{self.kind}: at least {low} of {name!r} are asked for, but only {size} exist")
            if low > high:
                raise SelectionError(f"{self.kind}: {name!r} is to get at least {low} and at most {high}")
        if self.lower.sum() > k:
            raise SelectionError(f"{self.kind}: the minimums sum to {self.lower.sum()}, more than k = {k}")
        most = int(np.minimum(sizes, self.upper).sum())
        if exact and most < k:
            raise SelectionError(f"{self.kind}: the maximums allow {most} picks, fewer than k = {k}")


class Tracker:
    """What may still be picked: a mask that closes as picks are made.

    Attributes:
        open: (n,) bool, True where a pick is still possible, now or later.
        allowed: (n,) bool, True where the next pick may be made.
        costs: (n,) float64 or None.
        budget: what all picks together may cost.
        spent: what they cost so far, added up in their order as a reader would.
        notes: what the user should know about the quotas.
    """

    def __init__(
        self,
        k: int,
        closed: NDArray[np.bool_],
        parts: list[Partition],
        costs: NDArray[np.float64] | None,
        budget: float,
        notes: tuple[str, ...],
    ) -> None:
        self.k, self.parts, self.costs, self.budget, self.notes = k, parts, costs, budget, notes
        self.spent = 0.0
        self.open = ~closed
        self._close()

    def add(self, index: int) -> None:
        """Note a pick.

        Args:
            index: its position.

        Raises:
            SelectionError: the rules don't allow it.
        """
        if not self.open[index]:
            raise SelectionError(
                f"position {index} can't be picked: the size, a quota or the budget is used up, or a pick too similar"
            )
        self.open[index] = False
        self.k -= 1
        if self.costs is not None:
            self.spent += float(self.costs[index])
        for part in self.parts:
            g = part.groups[index]
            part.upper[g] -= 1
            part.lower[g] = max(0, part.lower[g] - 1)
            part.taken[g] += 1
        self._close()

    def close(self, mask: NDArray[np.bool_]) -> None:
        """Rule out more instances.

        Args:
            mask: (n,) bool, True where no pick may be made any more.
        """
        self.open &= ~mask
        self._turn()

    def only_owed(self) -> bool:
        """Leave open only what a minimum still asks for.

        Returns:
            Whether that leaves anything.
        """
        for part in self.parts:
            if part.lower.any():
                self.close((part.lower == 0)[part.groups])
                return bool(self.allowed.any())
        return False

    def cost(self, picks: NDArray[np.int64]) -> float | None:
        """Return what picks cost together, added up in their order as the budget is; None without costs.

        Args:
            picks: their positions.
        """
        if self.costs is None:
            return None
        return float(np.add.accumulate(self.costs[picks])[-1]) if len(picks) else 0.0

    def owed(self) -> list[str]:
        """Return what the minimums still ask for, in words."""
        return [
            f"{p.kind}: {low} more of {name!r}"
            for p in self.parts
            for name, low in zip(p.names, p.lower, strict=True)
            if low > 0
        ]

    def _close(self) -> None:
        if self.k <= 0:
            self.open[:] = False
        for part in self.parts:
            open_groups = part.upper > 0
            if part.lower.sum() >= self.k:  # every pick left is owed to some group
                open_groups &= part.lower > 0
            if not open_groups.all():
                self.open &= open_groups[part.groups]
        if self.costs is not None:
            self.open &= self.spent + self.costs <= self.budget
            for part in self.parts:
                if part.lower.any():  # what is owed must stay affordable; sums in another order round otherwise
                    owed, dearest = part.cheapest(self.open, self.costs)
                    beside = np.maximum(self.costs - dearest[part.groups], 0.0)
                    self.open &= self.spent + owed + beside <= self.budget * (1.0 + 1e-12)
        self._turn()

    def _turn(self) -> None:
        self.allowed = self.open.copy()
        for part in self.parts:
            self.allowed &= part.turn(self.open)


def _check_minimums(
    parts: list[Partition], closed: NDArray[np.bool_], costs: NDArray[np.float64], budget: float
) -> None:
    for part in parts:
        least = part.cheapest(~closed, costs)[0]
        if least > budget * (1.0 + 1e-12):
            raise SelectionError(
                f"{part.kind}: the minimums cost {least:g} at the least, more than the budget {budget:g}"
            )


def demand(rules: Constraints, tracker: Tracker, made: int, k: int) -> tuple[str, ...]:
    """Refuse a result that misses what was asked for: rules that exclude each other only show along the way.

    Args:
        rules: the rules.
        tracker: after the picks.
        made: picks made.
        k: picks wanted.

    Returns:
        A note where `apart` left fewer picks than wanted, which is no failure.

    Raises:
        SelectionError: other rules did.
    """
    owed = tracker.owed()
    if made >= k or (tracker.costs is not None and not owed):
        return ()
    missing = "; still owed: " + ", ".join(owed) if owed else ""
    if rules.apart is None:
        raise SelectionError(f"the rules together allow only {made} of {k} picks{missing}")
    return (f"only {made} of {k} picks: every other instance is more similar than {rules.apart} to a pick{missing}",)


def check_size(n: int, k: int) -> None:
    """Refuse sizes that can't be meant.

    Args:
        n: instances.
        k: picks wanted.

    Raises:
        SelectionError: k is not a whole number, negative, or above n.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise SelectionError(f"k = {k!r} is not a whole number: expected 0 to {n}")
    if k < 0:
        raise SelectionError(f"k = {k} is negative: expected 0 to {n}")
    if k > n:
        raise SelectionError(f"k = {k} exceeds the {n} instances there are: expected at most {n}")


def share(n: int, part: float) -> int:
    """Return a share of n as a number of picks, rounded to the nearest, at least 1 of a share above 0.

    Args:
        n: instances.
        part: 0 to 1.

    Returns:
        k.

    Raises:
        SelectionError: the share is not between 0 and 1.
    """
    if not 0.0 <= part <= 1.0:
        raise SelectionError(f"a share of {part} is not possible: expected 0 to 1")
    return min(n, max(1, int(part * n + 0.5))) if part > 0 and n else 0


def positions(values: Positions, n: int, name: str) -> NDArray[np.int64]:
    """Check positions.

    Args:
        values: positions of instances.
        n: instances.
        name: the argument's name, for the message.

    Returns:
        (c,) int64 in the order given.

    Raises:
        SelectionError: out of range, or one twice.
    """
    out = np.asarray(values)
    if out.size == 0:
        return np.empty(0, np.int64)
    if out.ndim != 1 or out.dtype.kind not in "iu" or out.min() < 0 or out.max() >= n:
        raise SelectionError(f"{name} holds something other than positions from 0 to {n - 1}")
    if len(np.unique(out)) < len(out):
        raise SelectionError(f"{name} holds a position twice")
    return out.astype(np.int64)
