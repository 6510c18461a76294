"""What a selection must respect: quotas, musts and must-nots, a budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError, SelectionUsageError
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.quotas import Labels, equal_quotas, group, proportional_quotas
from repmatch.selectors.tracker import Partition, Tracker, check_minimums

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
            check_minimums(parts, closed, costs, float(self.budget))
        return Tracker(k, closed, parts, costs, np.inf if self.budget is None else float(self.budget), notes)

    def _check_limits(self) -> None:
        if self.coverage is not None and not 0.0 <= self.coverage <= 1.0:
            raise SelectionUsageError(f"coverage = {self.coverage}: expected a share from 0 to 1")
        for name, value in (("min_gain", self.min_gain), ("apart", self.apart)):
            if value is not None and not np.isfinite(value):
                raise SelectionUsageError(f"{name} = {value}: expected a finite number")

    def _partitions(self, n: int, k: int, closed: NDArray[np.bool_]) -> tuple[list[Partition], tuple[str, ...]]:
        if self.balance is not None and self.stratify is not None:
            raise SelectionUsageError("balance and stratify exclude each other: give one of them")
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
                raise SelectionUsageError("at_least and at_most need groups: pass the labels they speak of")
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
            raise SelectionUsageError("costs and budget belong together: give both or neither")
        if self.costs is None or self.budget is None:
            return None
        costs = np.asarray(self.costs, np.float64)
        if costs.shape != (n,):
            raise SelectionError(f"costs have shape {costs.shape}: expected ({n},)")
        if not (np.isfinite(costs).all() and (costs > 0).all()):
            place = int(np.argmin(np.isfinite(costs) & (costs > 0)))
            raise SelectionError(f"the cost at {place} is {costs[place]}: expected a finite number above 0")
        if not self.budget >= 0:
            raise SelectionUsageError(f"the budget is {self.budget}: expected 0 or more")
        return costs


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
