"""The order of ids, in which selections look at instances: ties go to the lowest id, however rows were ingested."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.datamodels import Factors
from repmatch.selectors.kernels import DEFAULT_LIMIT

_DIGITS = re.compile("([0-9]+)")


def natural_key(name: str) -> tuple[str, str]:
    """Return what an id is sorted by: runs of the digits 0 to 9 count as numbers, all else by code point.

    Args:
        name: the id.

    Returns:
        The key; "row-9" comes before "row-10", and "07" before "7", which are equal numbers.
    """
    parts = _DIGITS.split(name)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = f"0{chr(min(len(digits), 0xFFFF))}{digits}"  # longer numbers are larger ones
    return "".join(parts), name


def id_order(ids: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the positions of ids in their natural order.

    Args:
        ids: n ids.

    Returns:
        (n,) int64; None where they are in order already.
    """
    if all(a <= b for a, b in pairwise(map(natural_key, ids))):
        return None
    keys = [natural_key(name) for name in ids]
    return np.array(sorted(range(len(ids)), key=keys.__getitem__), np.int64)


def in_id_order(factors: Factors, *, limit: int = DEFAULT_LIMIT) -> tuple[Factors, NDArray[np.int64], bool]:
    """Return factors in the natural order of their ids.

    Where they are in that order already nothing is copied: they may be a view of the store's file. Otherwise they are
    gathered in memory, unless that takes more than the limit.

    Args:
        factors: n instances.
        limit: bytes that a copy may take; by default a quarter of the machine's memory, 4 GiB at most.

    Returns:
        The factors, (n,) int64 where each of them lay before, and whether they are in order of ids now.
    """
    order = id_order(factors.ids)
    kept = factors.flat if factors.bits is None else factors.bits
    if order is None or kept is None or kept.nbytes > limit:
        return factors, np.arange(len(factors)), order is None
    return take(factors, order), order, True
