"""What may still be picked: quotas of one partition, and the running account of size, quotas and budget."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError

# A budget is kept but for rounding: 0.1 three times is 0.30000000000000004, and a user means 0.3.
ROUNDING = 1.0 + 1e-12


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
        assert self.turns is not None, "these groups take no turns"
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
        budget: what all picks together may cost, and a rounding more: three times 0.1 are within 0.3.
        spent: what they cost so far.
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
        self.k, self.parts, self.costs, self.notes = k, parts, costs, notes
        self.budget, self._given = budget * ROUNDING, budget
        self.spent = self._rest = 0.0
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
            self._spend(float(self.costs[index]))
        for part in self.parts:
            g = part.groups[index]
            part.upper[g] -= 1
            part.lower[g] = max(0, part.lower[g] - 1)
            part.taken[g] += 1
        self._close()

    def _spend(self, cost: float) -> None:
        """Add a cost and, with the next one, what rounding took from the sum (Kahan 1965)."""
        wanted = cost + self._rest
        total = self.spent + wanted
        self._rest = wanted - (total - self.spent)
        self.spent = total

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
        """Return what picks cost together, the budget where only rounding exceeds it; None without costs.

        Args:
            picks: their positions.
        """
        if self.costs is None:
            return None
        found = math.fsum(self.costs[picks])
        return self._given if self._given < found <= self.budget else found

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
                if part.lower.any():  # what is owed must stay affordable
                    owed, dearest = part.cheapest(self.open, self.costs)
                    beside = np.maximum(self.costs - dearest[part.groups], 0.0)
                    self.open &= self.spent + owed + beside <= self.budget
        self._turn()

    @property
    def turning(self) -> list[Partition]:
        """The partitions whose groups take turns."""
        return [part for part in self.parts if part.turns is not None]

    def _turn(self) -> None:
        self.allowed = self.open  # without turns one mask serves as both
        for part in self.turning:
            self.allowed = self.allowed & part.turn(self.open)


def check_minimums(
    parts: list[Partition], closed: NDArray[np.bool_], costs: NDArray[np.float64], budget: float
) -> None:
    """Check that a budget allows for the minimums of every partition.

    Args:
        parts: the partitions.
        closed: (n,) bool, True where no pick may be made.
        costs: (n,) costs.
        budget: what all picks may cost.

    Raises:
        SelectionError: the cheapest picks that meet the minimums cost more.
    """
    for part in parts:
        least = part.cheapest(~closed, costs)[0]
        if least > budget * ROUNDING:
            raise SelectionError(
                f"{part.kind}: the minimums cost {least:g} at the least, more than the budget {budget:g}"
            )
