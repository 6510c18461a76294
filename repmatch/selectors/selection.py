"""What every strategy returns: an ordered selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Selection:
    """An ordered selection of k out of n instances.

    Attributes:
        indices: (k,) int64 positions in pick order.
        gains: (k,) float64, what each pick added to the objective.
        value: the objective of the whole selection.
        bound: no selection of k instances (within the budget) can exceed this (Nemhauser et al. 1978: value plus the k
            largest gains left); None where the objective gives no such certificate. k is the number of picks; of a run
            that was interrupted, the number that was wanted.
        representative: (n,) int64, for each represented instance the position in `indices` of the pick most similar to
            it, the earliest of equals; -1 where no pick has a similarity above 0, and everywhere where the run was
            stopped before this was known, as `notes` say: then `similarity` is 0 and so are all weights.
        similarity: (n,) float32, similarity of each represented instance with that pick; 0 where there is none.
        strategy: name of the strategy.
        algorithm: name of the algorithm that made it.
        notes: what the user should know: quotas that could not be met, a run that was stopped.
        complete: False where the run was stopped early; its picks are those that the whole run begins with, all of them
            where it was stopped after the last; `notes` say where. Of swaps, those made by then.
        reason: why this algorithm, where it was chosen automatically.
        cost: what the picks cost together, None without costs.
        seed: of the strategies that draw, None for the others.
        base: what was reached before the first pick by what was given; `value` and `bound` include it.
    """

    indices: NDArray[np.int64]
    gains: NDArray[np.float64]
    value: float
    bound: float | None
    representative: NDArray[np.int64]
    similarity: NDArray[np.float32]
    strategy: str
    algorithm: str
    notes: tuple[str, ...] = ()
    complete: bool = True
    reason: str = ""
    cost: float | None = None
    seed: int | None = None
    base: float = 0.0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def weights(self) -> NDArray[np.int64]:
        """(k,) int64, how many instances each pick represents."""
        kept = self.representative[self.representative >= 0]
        return np.bincount(kept, minlength=len(self.indices)).astype(np.int64)

    @property
    def cumulative(self) -> NDArray[np.float64]:
        """(k,) float64, the objective after each pick: every prefix is a coreset of its own."""
        return np.asarray(self.base + np.cumsum(self.gains), np.float64)

    @property
    def certainty(self) -> float | None:
        """Value divided by bound, both without what was given: this share of the optimum is certain; None: no bound."""
        if self.bound is None:
            return None
        most = self.bound - self.base
        return 1.0 if most <= 0.0 else min(1.0, (self.value - self.base) / most)
