"""Selections that look at no pairs: the highest scores, and chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints, check_size, demand, positions
from repmatch.selectors.kernels import Kernel, report
from repmatch.selectors.selection import Selection
from repmatch.selectors.spacing import Spacing
from repmatch.selectors.tracker import Tracker

CROWDED = 2.0  # picks crowd where two of them are this many times as similar as two instances
FEW, MANY = 5, 2000  # picks that such a comparison needs, and that it looks at
UNKNOWN = "interrupted while instances were compared with the picks: which pick represents which is not known"
Represented: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]


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
    _refuse(rules, ("coverage",))
    tracker = rules.tracker(len(values), k)
    picked, notes = _in_order(np.argsort(-values, kind="stable"), rules, tracker, k, kernel)
    if rules.min_gain is not None:
        enough = values[picked] >= rules.min_gain
        if tracker.turning:  # who has no turn any more ends the run for all
            enough = np.logical_and.accumulate(enough)
        picked = picked[_worth(enough, picked, rules)]
    gains = values[picked]
    value = float(gains.sum())
    notes += _crowded(kernel, picked)
    representative, similarity, cut = represent_or_stop(kernel, picked, len(values))
    one = len(tracker.parts) < 2 and not tracker.turning
    alone = one and tracker.costs is None and not len(rules.include) and rules.apart is None
    return Selection(
        picked,
        gains,
        value,
        value if alone else None,
        representative,
        similarity,
        "top",
        "sort",
        (*notes, *cut),
        complete=not cut,
        cost=tracker.cost(picked),
    )


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
    _refuse(rules, ("coverage", "min_gain"))
    tracker = rules.tracker(n, k)
    picked, notes = _in_order(np.random.default_rng(seed).permutation(n), rules, tracker, k, kernel)
    representative, similarity, cut = represent_or_stop(kernel, picked, n)
    return Selection(
        picked,
        np.zeros(len(picked)),
        0.0,
        None,
        representative,
        similarity,
        "random",
        "permutation",
        (*notes, *cut),
        complete=not cut,
        cost=tracker.cost(picked),
        seed=seed,
    )


def represent(kernel: Kernel | None, indices: NDArray[np.int64], n: int) -> Represented:
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
        report(kernel, "representing", min(lo + step, len(indices)), len(indices))
    return representative, similarity


def represent_or_stop(
    kernel: Kernel | None, indices: NDArray[np.int64], n: int, find: Callable[[], Represented] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32], tuple[str, ...]]:
    """Do what `represent` does; where that is interrupted, keep nothing of it: the picks are there already.

    Part of it would be worse than nothing: the first picks would seem to represent all instances.

    Args:
        kernel: the similarities, or None.
        indices: (k,) picks.
        n: instances, where there is no kernel.
        find: a faster way to the same, where there is one.

    Returns:
        What `represent` returns, and no notes; or -1 and 0 everywhere, and a note.
    """
    try:
        return *(represent(kernel, indices, n) if find is None else find()), ()
    except KeyboardInterrupt:
        rows = n if kernel is None else kernel.shape[0]
        return np.full(rows, -1, np.int64), np.zeros(rows, np.float32), (UNKNOWN,)


def _crowded(kernel: Kernel | None, picks: NDArray[np.int64]) -> tuple[str, ...]:
    """Say so where picks resemble each other far more than instances do on average: they tell one thing many times."""
    if kernel is None or kernel.shape[0] != kernel.shape[1] or len(picks) < FEW:
        return ()
    some = picks[:MANY]
    among = np.asarray(kernel.columns(some)[some], np.float64)
    pairs = len(some) * (len(some) - 1)
    inside = float(among.sum() - np.trace(among)) / pairs
    n = kernel.shape[0]
    whole = float(kernel.means().sum() * n - kernel.diagonal().sum()) / (n * (n - 1))
    if not inside > CROWDED * max(whole, 0.0):
        return ()
    return (
        f"the picks crowd: two of them resemble each other by {inside:.3g} on average, two instances of the whole by "
        f"{whole:.3g}; facility-location spreads them, and apart (--apart) keeps near copies out",
    )


def _in_order(
    order: NDArray[np.int64], rules: Constraints, tracker: Tracker, k: int, kernel: Kernel | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    spacing = Spacing(kernel, rules, tracker)
    for index in positions(rules.given, len(order), "given").tolist():
        spacing.close(index)
    picked: list[int] = []
    forced = positions(rules.include, len(order), "include").tolist()
    for rank, index in enumerate(chain(forced, _by_turns(order, tracker) if tracker.turning else order.tolist())):
        if len(picked) == k:
            break
        if tracker.allowed[index] or rank < len(forced):  # a forced pick that is ruled out is refused with the reason
            tracker.add(index)
            spacing.close(index)
            picked.append(index)
    notes = tracker.notes
    if len(picked) < k:
        notes += demand(rules, tracker, len(picked), k)
    return np.array(picked, np.int64), notes


def _by_turns(order: NDArray[np.int64], tracker: Tracker) -> Iterator[int]:
    """Yield the first in order that may be picked now, as long as there is one; the caller picks it."""
    while (free := tracker.allowed[order]).any():
        yield int(order[free.argmax()])


def _worth(enough: NDArray[np.bool_], picked: NDArray[np.int64], rules: Constraints) -> NDArray[np.bool_]:
    """Return which picks stay: those that gain enough, what must be there, and the best that a minimum asks for."""
    stays = enough | (np.arange(len(picked)) < len(rules.include))
    if rules.at_least and rules.groups is not None:
        labels = np.asarray(list(rules.groups), object)[picked]
        for label, low in rules.at_least.items():
            own = labels == label
            missing = low - int((stays & own).sum())
            stays[np.flatnonzero(own & ~stays)[: max(0, missing)]] = True
    return stays


def _refuse(rules: Constraints, names: tuple[str, ...]) -> None:
    for name in names:
        if name in rules.names():
            raise SelectionError(f"{name} needs an objective: use facility-location or another that maximises one")
