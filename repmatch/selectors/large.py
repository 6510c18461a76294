"""Facility location where even one pass over all pairs is too much: in parts, and from a stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.blocks import take
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.baselines import represent
from repmatch.selectors.constraints import check_size
from repmatch.selectors.facility import facility_location
from repmatch.selectors.kernels import DenseKernel, FactorKernel, Kernel, as_kernel
from repmatch.selectors.selection import Selection

PART = 10_000  # instances of a part by default


def partitioned(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    parts: int | None = None,
    oversample: float = 3.0,
    represented: int = 20_000,
    seed: int = 0,
) -> Selection:
    """Select k instances in two rounds: greedy within random parts, then greedy among all their picks.

    GreeDi (Mirzasoleiman et al. 2013). Work of n²/parts in place of n².

    Args:
        kernel: factors, a kernel of factors, or an (n, n) array.
        k: how many to pick.
        parts: how many parts; by default such that a part has about 10,000 instances.
        oversample: all parts together pick this many times k for the second round.
        represented: the second round counts a random sample of this many instances; all where there are fewer.
        seed: for the parts and the sample.

    Returns:
        The selection; value and gains are estimates from the sample where there are more instances than `represented`,
        scaled to all of them. There is no bound.

    Raises:
        SelectionError: a size that can't be met, or a kernel that can't be split.
    """
    whole = as_kernel(kernel)
    n = whole.shape[1]
    check_size(n, k)
    if parts is None:
        parts = max(1, -(-n // PART))
    if not 1 <= parts <= max(1, n) or not oversample >= 1.0:
        raise SelectionError(f"parts = {parts}, oversample = {oversample}: expected 1 to {n} parts, at least 1 times k")
    generator = np.random.default_rng(seed)
    order = generator.permutation(n)
    pool: list[NDArray[np.int64]] = []
    for part in np.array_split(order, parts):
        members = np.sort(part)
        wanted = min(len(members), -(-int(np.ceil(oversample * k)) // parts))
        pool.append(members[facility_location(_part(whole, members, members), wanted).indices])
    candidates = np.sort(np.concatenate(pool))
    rows = np.arange(n) if n <= represented else np.sort(generator.choice(n, represented, replace=False))
    final = facility_location(_part(whole, rows, candidates), k)
    picks = candidates[final.indices]
    scale = n / max(1, len(rows))
    representative, similarity = represent(whole, picks, n)
    note = f"{parts} parts, {len(candidates)} candidates in the second round, {len(rows)} of {n} instances counted"
    return replace(
        final,
        indices=picks,
        gains=final.gains * scale,
        value=final.value * scale,
        bound=None,
        representative=representative,
        similarity=similarity,
        algorithm="partitioned",
        notes=(*final.notes, note),
    )


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


def _part(kernel: Kernel, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Kernel:
    """Return the kernel between some instances and some candidates."""
    same = len(rows) == len(columns) and bool((rows == columns).all())
    if isinstance(kernel, FactorKernel) and kernel.symmetric:
        members = take(kernel.factors, columns)
        others = None if same else take(kernel.factors, rows)
        return FactorKernel(members, represented=others, memory_limit=kernel.memory_limit)
    if isinstance(kernel, DenseKernel) and kernel.shape[0] == kernel.shape[1]:
        return DenseKernel(kernel.array[np.ix_(rows, columns)], rectangular=not same)
    raise SelectionError("only factors and square arrays can be selected from in parts")
