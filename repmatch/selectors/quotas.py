"""How many picks each group gets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError

Labels = Sequence[Hashable] | NDArray[Any]


def group(labels: Labels, n: int, name: str) -> tuple[list[Hashable], NDArray[np.int64]]:
    """Number the labels.

    Args:
        labels: n labels.
        n: instances.
        name: the argument's name, for the message.

    Returns:
        The distinct labels in order of their text, and (n,) int64 numbers into them.

    Raises:
        SelectionError: another number of labels than instances.
    """
    values: list[Hashable] = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if len(values) != n:
        raise SelectionError(f"{name} has {len(values)} labels for {n} instances: expected one each")
    names = sorted(set(values), key=str)
    number = {label: i for i, label in enumerate(names)}
    return names, np.fromiter((number[v] for v in values), np.int64, n)


def equal_quotas(
    names: Sequence[Hashable], sizes: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Share k equally among groups; what a small group can't give, the others do.

    Args:
        names: the groups' labels.
        sizes: (g,) instances of each group.
        k: picks wanted, at most the sum of sizes.

    Returns:
        (g,) int64 quotas summing to k, and a note for each group that is smaller than its equal share. Where k does not
        divide evenly, larger groups get one more, in order of size, then label.
    """
    quotas = np.zeros(len(sizes), np.int64)
    free = np.argsort(-sizes, kind="stable")
    left, small = k, []
    while len(free):
        share = left // len(free)
        full = free[sizes[free] <= share] if left else free[:0]
        if not len(full):
            quotas[free] = share
            quotas[free[: left - share * len(free)]] += 1
            break
        quotas[full] = sizes[full]
        small += full.tolist()
        left -= int(sizes[full].sum())
        free = np.setdiff1d(free, full, assume_unique=True)
        free = free[np.argsort(-sizes[free], kind="stable")]
    equal = -(-k // max(1, len(sizes)))
    notes = tuple(
        f"{names[g]!r} has only {sizes[g]} instances, fewer than its equal share of {equal}: all taken, others fill up"
        for g in sorted(small)
        if sizes[g] < k / len(sizes)
    )
    return quotas, notes


def proportional_quotas(sizes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Share k in proportion to the groups' sizes by largest remainder.

    Args:
        sizes: (g,) instances of each group.
        k: picks wanted, at most the sum of sizes.

    Returns:
        (g,) int64 quotas summing to k; equal remainders go to the larger group, then to the first label.
    """
    n = int(sizes.sum())
    if n == 0:
        return np.zeros(len(sizes), np.int64)
    quotas, remainder = np.divmod(sizes.astype(np.int64) * k, n)
    order = np.lexsort((np.arange(len(sizes)), -sizes, -remainder))
    quotas[order[: k - int(quotas.sum())]] += 1
    return quotas.astype(np.int64)
