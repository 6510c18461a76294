"""Slow, literal versions of what repmatch.selectors computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np


def coverage(kernel: np.ndarray, picks: Sequence[int]) -> float:
    """Facility location's f(S) in float64."""
    if not len(picks):
        return 0.0
    return math.fsum(np.maximum(kernel[:, list(picks)].astype(np.float64), 0.0).max(axis=1).tolist())


def greedy(
    value: Callable[[list[int]], float], n: int, k: int, allowed: Callable[[list[int], int], bool] | None = None
) -> list[int]:
    """Plain greedy over any set function: the largest f(S + j) wins, ties go to the lowest position."""
    picks: list[int] = []
    while len(picks) < k:
        best, winner = -math.inf, -1
        for j in range(n):
            if j in picks or (allowed is not None and not allowed(picks, j)):
                continue
            reached = value([*picks, j])
            if reached > best:
                best, winner = reached, j
        if winner < 0:
            break
        picks.append(winner)
    return picks


def facility_greedy(kernel: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """Literal float64 greedy for facility location, gains summed exactly."""
    kernel = kernel.astype(np.float64)
    cover = np.zeros(len(kernel))
    picks: list[int] = []
    gains: list[float] = []
    for _ in range(k):
        best, winner = -1.0, -1
        for j in range(kernel.shape[1]):
            if j in picks:
                continue
            gain = math.fsum(np.maximum(kernel[:, j] - cover, 0.0).tolist())
            if gain > best:
                best, winner = gain, j
        picks.append(winner)
        gains.append(best)
        cover = np.maximum(cover, kernel[:, winner])
    return picks, gains


def optimum(
    value: Callable[[list[int]], float], n: int, k: int, allowed: Callable[[list[int]], bool] | None = None
) -> float:
    """The best value of any k of n, by trying all."""
    subsets = (list(s) for s in combinations(range(n), k))
    return max(value(s) for s in subsets if allowed is None or allowed(s))


def squared_cosines(n: int, d: int = 6, *, seed: int = 0, dtype: str = "float32", clusters: int = 4) -> np.ndarray:
    """A symmetric kernel of clustered unit vectors."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((clusters, d))[rng.integers(0, clusters, n)] + 0.6 * rng.standard_normal((n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = ((x @ x.T) ** 2).astype(dtype)
    return np.maximum(kernel, kernel.T)


class Scipy:
    """What a sparse matrix of scipy's looks like, for a test without scipy."""

    def __init__(self, array: np.ndarray) -> None:
        rows, self.indices = np.nonzero(array)
        self.data, self.shape, self.dtype = array[rows, self.indices], array.shape, array.dtype
        self.indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(array)))))

    def tocsr(self) -> Scipy:
        return self

    def copy(self) -> Scipy:
        return self

    def sum_duplicates(self) -> None:
        pass
