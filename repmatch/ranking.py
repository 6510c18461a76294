"""The best of many scores: exact top-k on arrays, equal scores in order of their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.datamodels import Factors
from repmatch.errors import InputError, UsageError
from repmatch.similarity import Blocks, against, mean_scores

ROWS = 1 << 16  # instances scored at a time
TIE = 4e-6  # float32 scores closer than this are compared in float64


def top_k(
    query: int | Factors | Blocks,
    factors: Factors,
    k: int,
    *,
    signed: bool = False,
    exclude: Sequence[int] | NDArray[np.integer[Any]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the k instances most similar to a query, exact, best first.

    Args:
        query: a position in `factors`, one instance's factors, or an adapter as `score_against` (signed: as
            `signed_against`) takes it.
        factors: n instances.
        k: how many; all of them where k exceeds what is left.
        signed: by the cosine of the two ΔW in place of the RepMatch score.
        exclude: positions that must not be returned; the query itself is returned unless named here.

    Returns:
        (k,) int64 positions and (k,) float32 scores, mean over matrices; equal scores in order of their ids.
    """
    if isinstance(query, int | np.integer):
        if not 0 <= query < len(factors):
            raise UsageError(f"query {query} is out of range: expected 0 to {len(factors) - 1}")
        query = take(factors, slice(int(query), int(query) + 1))
    parts = []
    for lo in range(0, len(factors), ROWS):
        piece = take(factors, slice(lo, min(len(factors), lo + ROWS)))
        if isinstance(query, Factors) and len(query) == 1:
            parts.append(mean_scores(query, piece, signed=signed)[0])
        else:
            parts.append(against(query, piece, signed=signed).mean(axis=1))
    means = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if factors.bits is None and len(means):  # float32 products of equal rows may differ in their last bit: settle ties
        close, _ = best_k(means, factors.ids, k, exclude=exclude)
        last = means[close].min(initial=np.float32(np.inf))
        near = np.flatnonzero(means >= last - TIE)
        for lo in range(0, len(near), ROWS):
            rows = near[lo : lo + ROWS]
            means[rows] = against(query, take(factors, rows), signed=signed, exact=True).mean(axis=1)
    return best_k(means, factors.ids, k, exclude=exclude)


def best_k(
    scores: NDArray[np.float32],
    ids: Sequence[str],
    k: int,
    *,
    exclude: Sequence[int] | NDArray[np.integer[Any]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the k highest scores, best first; equal scores in order of their ids.

    Args:
        scores: (n,) float32.
        ids: n ids.
        k: how many; all of them where k exceeds what is left.
        exclude: positions that must not be returned.

    Returns:
        (k,) int64 positions and (k,) float32 scores.

    Raises:
        InputError: a score is not a number.
        UsageError: k is negative.
    """
    if k < 0:
        raise UsageError(f"k = {k} is negative: expected 0 or more")
    if not np.isfinite(scores).all():
        raise InputError(f"the score of {ids[int(np.argmin(np.isfinite(scores)))]!r} is not a finite number")
    allowed = np.ones(len(scores), np.bool_)
    if exclude is not None:
        allowed[np.asarray(exclude, np.int64)] = False
    places = np.flatnonzero(allowed)
    k = min(k, len(places))
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    last = np.partition(scores[places], len(places) - k)[len(places) - k]
    above = places[scores[places] > last]
    tied = sorted(places[scores[places] == last].tolist(), key=lambda i: ids[i])[: k - len(above)]
    order = sorted(above.tolist(), key=lambda i: (-scores[i], ids[i])) + tied
    picked = np.asarray(order, np.int64)
    return picked, scores[picked]
