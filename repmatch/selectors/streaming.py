"""Facility location from a stream: every candidate is seen once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.kernels import DenseKernel
from repmatch.selectors.selection import Selection


def sieve_streaming(
    blocks: Iterable[ArrayLike], k: int, *, epsilon: float = 0.1, strategy: str = "facility-location"
) -> Selection:
    """Select k instances from a stream, each seen once, in memory of O(k log(k)/ε) columns' covers.

    Badanidiyuru et al. 2014: for every guess of the optimum, keep an instance if it gains enough for the guess; the
    best guess reaches at least 1/2 − ε of the optimum.

    Args:
        blocks: arrays (r, c): similarities of the same r represented instances with the next c candidates.
        k: how many to pick at most.
        epsilon: ε, above 0 and below 1; the smaller, the more guesses are kept.
        strategy: its name, for the result.

    Returns:
        The selection, possibly of fewer than k; positions count candidates in the order of the stream. The bound is
        the smaller of k times the best single gain and the sum of every row's largest similarity.

    Raises:
        SelectionError: k below 0, ε out of range, or blocks of different heights.
    """
    if k < 0 or not 0.0 < epsilon < 1.0:
        raise SelectionError(f"k = {k}, epsilon = {epsilon}: expected k of at least 0 and epsilon between 0 and 1")
    sieves: dict[int, _Sieve] = {}
    best, seen, ceiling = 0.0, 0, np.zeros(0)
    for block in blocks:
        columns = np.maximum(DenseKernel(block, rectangular=True).array.astype(np.float64), 0.0)
        if not len(ceiling):
            ceiling = np.zeros(len(columns))
        if len(columns) != len(ceiling):
            raise SelectionError(f"a block has {len(columns)} rows after blocks of {len(ceiling)}: expected the same")
        ceiling = np.maximum(ceiling, columns.max(axis=1, initial=0.0))
        for column in columns.T:
            best = max(best, float(column.sum()))
            if best > 0.0 and k:
                low = int(np.ceil(np.log(best) / np.log1p(epsilon)))
                high = int(np.floor(np.log(2.0 * k * best) / np.log1p(epsilon)))
                sieves = {g: sieves.get(g) or _Sieve(len(ceiling)) for g in range(low, high + 1)}
                for guess, sieve in sieves.items():
                    sieve.offer(column, seen, (1.0 + epsilon) ** guess, k)
            seen += 1
    winner = max(sieves.values(), key=lambda s: s.value, default=_Sieve(len(ceiling)))
    bound = max(winner.value, min(k * best, float(ceiling.sum())))
    return Selection(
        indices=np.array(winner.picks, np.int64),
        gains=np.array(winner.gains, np.float64),
        value=winner.value,
        bound=bound,
        representative=winner.representative,
        similarity=winner.cover.astype(np.float32),
        strategy=strategy,
        algorithm="sieve-streaming",
        notes=(f"{len(sieves)} guesses of the optimum kept, {seen} candidates seen once",),
    )


class _Sieve:
    """The picks kept for one guess of the optimum."""

    def __init__(self, rows: int) -> None:
        self.cover = np.zeros(rows)
        self.representative = np.full(rows, -1, np.int64)
        self.picks: list[int] = []
        self.gains: list[float] = []
        self.value = 0.0

    def offer(self, column: NDArray[np.float64], index: int, guess: float, k: int) -> None:
        """Keep a candidate if it gains its share of half the guess."""
        if len(self.picks) >= k:
            return
        gain = float(np.maximum(column - self.cover, 0.0).sum())
        if gain >= (guess / 2.0 - self.value) / (k - len(self.picks)) and gain > 0.0:
            raised = column > self.cover
            self.representative[raised] = len(self.picks)
            self.cover[raised] = column[raised]
            self.picks.append(index)
            self.gains.append(gain)
            self.value += gain
