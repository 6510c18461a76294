"""How often an instance's nearest share its value of a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError

QUERIES = 1000  # instances whose nearest are looked at; more change the share by less than a point
_BLOCK = 128


def precision(
    block: Callable[[NDArray[np.int64]], NDArray[np.float32]], values: Sequence[str], *, k: int = 10, seed: int = 0
) -> float:
    """Return the mean share of the k nearest that have the query's value.

    Args:
        block: gives the similarities of some instances (q positions) with all, (q, n).
        values: n values.
        k: neighbours of each query.
        seed: of the draw of queries, where there are more than `QUERIES` instances.

    Returns:
        A number in [0, 1]; compare it with `expected`.

    Raises:
        SelectionError: not more than k instances.
    """
    if len(values) <= k:
        raise SelectionError(f"the nearest {k} are told from more than {k} instances, got {len(values)}")
    codes = np.unique(np.asarray(values, dtype=object).astype(str), return_inverse=True)[1]
    shares = []
    for queries in _queries(len(values), seed):
        similarity = block(queries).copy()
        similarity[np.arange(len(queries)), queries] = -np.inf
        near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        shares.append((codes[near] == codes[queries][:, None]).mean(axis=1))
    return float(np.concatenate(shares).mean())


def _queries(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    chosen = np.arange(n) if n <= QUERIES else np.sort(np.random.default_rng(seed).permutation(n)[:QUERIES])
    for lo in range(0, len(chosen), _BLOCK):
        yield chosen[lo : lo + _BLOCK].astype(np.int64)


def expected(values: Sequence[str]) -> float:
    """Return the precision of neighbours drawn by chance: the chance that two different instances share a value.

    Args:
        values: n values, two or more.

    Returns:
        A number in [0, 1].
    """
    n = len(values)
    return sum(c * (c - 1) for c in Counter(values).values()) / (n * (n - 1))
