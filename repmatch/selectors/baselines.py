"""Selections that look at no pairs: the highest scores, and chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints, Tracker, check_size, positions
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.selection import Selection


def top(
    scores: ArrayLike, k: int, *, constraints: Constraints | None = None, kernel: Kernel | None = None
) -> Selection:
    """Select the k highest scores; ties go to the lowest position.

    Args:
        scores: (n,) floats.
        k: how many to pick, 0 to n.
        constraints: quotas that the picks must respect.
        kernel: for the representatives only; without it every pick stands for itself alone.

    Returns:
        The selection; gains are the scores, value is their sum. Under quotas too no other picks sum to more; under a
        budget or several rules at once it is the greedy one, without a bound.

    Raises:
        SelectionError: scores that are not finite or not one a line, a size or quota that can't be met.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1:
        raise SelectionError(f"scores have shape {values.shape}: expected (n,)")
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise SelectionError(f"the score at {place} is {values[place]}: every score must be finite")
    rules = constraints or Constraints()
    tracker = rules.tracker(len(values), k)
    picked = _in_order(np.argsort(-values, kind="stable"), rules, tracker, k)
    gains = values[picked]
    value = float(gains.sum())
    representative, similarity = represent(kernel, picked, len(values))
    bound = value if tracker.costs is None and len(tracker.parts) < 2 and not len(rules.include) else None
    return Selection(picked, gains, value, bound, representative, similarity, "top", "sort", tracker.notes)


def random(
    n: int, k: int, seed: int = 0, *, constraints: Constraints | None = None, kernel: Kernel | None = None
) -> Selection:
    """Select k of n instances by chance.

    Args:
        n: instances.
        k: how many to pick, 0 to n.
        seed: the same seed gives the same picks.
        constraints: quotas that the picks must respect; within them every instance of a group is equally likely.
        kernel: for the representatives only; without it every pick stands for itself alone.

    Returns:
        The selection; gains are 0 and there is no bound, for nothing was maximised.

    Raises:
        SelectionError: a size or quota that can't be met.
    """
    check_size(n, k)
    rules = constraints or Constraints()
    tracker = rules.tracker(n, k)
    picked = _in_order(np.random.default_rng(seed).permutation(n), rules, tracker, k)
    representative, similarity = represent(kernel, picked, n)
    return Selection(
        picked, np.zeros(len(picked)), 0.0, None, representative, similarity, "random", "permutation", tracker.notes
    )


def represent(
    kernel: Kernel | None, indices: NDArray[np.int64], n: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the pick most similar to each represented instance.

    Args:
        kernel: the similarities, or None: then every pick stands for itself alone.
        indices: (k,) picks.
        n: instances, where there is no kernel.

    Returns:
        (rows,) int64 positions in `indices`, the earliest of equals, -1 where no similarity is above 0; and (rows,)
        float32 similarities.
    """
    if kernel is None:
        representative = np.full(n, -1, np.int64)
        representative[indices] = np.arange(len(indices))
        return representative, (representative >= 0).astype(np.float32)
    rows = kernel.shape[0]
    representative, similarity = np.full(rows, -1, np.int64), np.zeros(rows, np.float32)
    step = max(1, min(256, (64 << 20) // (4 * max(1, rows))))
    for lo in range(0, len(indices), step):
        block = kernel.columns(indices[lo : lo + step])
        best = block.argmax(axis=1)
        reached = block[np.arange(rows), best]
        better = reached > similarity
        representative[better], similarity[better] = lo + best[better], reached[better]
    return representative, similarity


def _in_order(order: NDArray[np.int64], rules: Constraints, tracker: Tracker, k: int) -> NDArray[np.int64]:
    picked: list[int] = []
    for index in positions(rules.include, len(order), "include").tolist():
        tracker.add(index)  # refuses what the other rules don't allow: an instance that must be picked is never skipped
        picked.append(index)
    for index in order:
        if len(picked) == k:
            break
        if tracker.allowed[index]:
            tracker.add(int(index))
            picked.append(int(index))
    if len(picked) < k and tracker.costs is None:
        owed = "; still owed: " + ", ".join(tracker.owed()) if tracker.owed() else ""
        raise SelectionError(f"the rules together allow only {len(picked)} of {k} picks{owed}")
    return np.array(picked, np.int64)
