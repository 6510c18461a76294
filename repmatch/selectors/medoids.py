"""k-medoids: facility location improved by swaps of a pick for an instance that was left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints
from repmatch.selectors.facility import facility_location
from repmatch.selectors.greedy import Progress
from repmatch.selectors.kernels import Kernel, as_kernel
from repmatch.selectors.quotas import group
from repmatch.selectors.selection import Selection
from repmatch.similarity.pairs import Floats

BATCH = 256


def k_medoids(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    constraints: Constraints | None = None,
    passes: int = 20,
    progress: Progress | None = None,
) -> Selection:
    """Select k instances by facility location, then swap as long as a swap helps (Schubert and Rousseeuw 2021).

    Each pass looks at every instance once and swaps as soon as that helps, in O(n) an instance. The result can't be
    improved by any one swap, unless `passes` ran out.

    Args:
        kernel: a kernel, factors, or an (n, n) array; entry (i, j) says how well j stands for i.
        k: how many to pick.
        constraints: balance, stratify, include and exclude; swaps stay within a group.
        passes: most passes over the instances.
        progress: called after each greedy pick with picks made and wanted. KeyboardInterrupt ends greedy early, or the
            swaps.

    Returns:
        The selection; value is at least greedy facility location's. Gains are what each pick adds to those before it.

    Raises:
        SelectionError: rules that swaps can't keep.
    """
    given, rules = as_kernel(kernel), constraints or Constraints()
    lost = [name for name in rules.names() if name not in ("balance", "stratify", "include", "exclude")]
    if lost:
        raise SelectionError(f"swaps can't keep {lost[0]}: k-medoids takes balance, stratify, include and exclude")
    start = facility_location(given, k, constraints=constraints, progress=progress)
    if not start.complete or k == 0:
        return replace(start, strategy="k-medoids")
    labels = rules.stratify if rules.balance is None else rules.balance
    groups = np.zeros(given.shape[1], np.int64) if labels is None else group(labels, given.shape[1], "labels")[1]
    closed = np.zeros(given.shape[1], np.bool_)
    closed[np.asarray(rules.exclude, np.int64)] = True
    end, cut = f"; stopped after {passes} passes", False
    swaps: _Swaps | None = None
    try:
        swaps = _Swaps(given, start.indices, groups, np.asarray(rules.include, np.int64))
        for _ in range(passes):
            before = swaps.made
            for lo in range(0, given.shape[1], BATCH):
                batch = np.arange(lo, min(given.shape[1], lo + BATCH))
                batch = batch[~closed[batch]]
                if len(batch):
                    swaps.improve(batch, given.columns(batch))
            if swaps.made == before:
                end = ""
                break
    except KeyboardInterrupt:
        end, cut = "; interrupted, so that more may help", True
    made = 0 if swaps is None else swaps.made
    notes = (*start.notes, f"{made} swaps after greedy{end}")
    found = start if swaps is None or not made else _finish(swaps, start)
    return replace(
        found, strategy="k-medoids", algorithm="greedy, then swaps", notes=notes, complete=not cut, reason=""
    )


def _finish(swaps: _Swaps, start: Selection) -> Selection:
    cover, gains = np.zeros(len(swaps.columns)), []
    for column in swaps.columns.T:
        gains.append(float(np.maximum(column - cover, 0.0).sum()))
        cover = np.maximum(cover, column)
    nearest = swaps.columns.argmax(axis=1)
    representative = np.where(cover > 0.0, nearest, -1).astype(np.int64)
    value = float(cover.sum())
    return replace(
        start,
        indices=swaps.picks,
        gains=np.array(gains),
        value=value,
        bound=None if start.bound is None else max(value, start.bound),
        representative=representative,
        similarity=cover.astype(np.float32),
    )


class _Swaps:
    """The picks, and every row's best and second-best similarity among them."""

    def __init__(
        self, kernel: Kernel, picks: NDArray[np.int64], groups: NDArray[np.int64], fixed: NDArray[np.int64]
    ) -> None:
        from repmatch.selectors import _loops

        self.loops, self.kernel, self.picks, self.groups, self.made = _loops, kernel, picks.copy(), groups, 0
        self.movable = ~np.isin(picks, fixed)
        self.columns = np.maximum(np.asarray(kernel.columns(self.picks), np.float64), 0.0)
        self._rank()

    def _rank(self) -> None:
        rows = np.arange(len(self.columns))
        self.nearest = self.columns.argmax(axis=1)
        self.first = self.columns[rows, self.nearest]
        rest = self.columns.copy()
        rest[rows, self.nearest] = 0.0
        self.second = rest.max(axis=1, initial=0.0)
        lost = np.bincount(self.nearest, self.first - self.second, minlength=len(self.picks))
        self.loss = np.asarray(lost, np.float64)

    def improve(self, batch: NDArray[np.int64], columns: Floats) -> None:
        """Try each candidate of a batch, and swap where that helps."""
        chosen = set(self.picks.tolist())
        for c, j in enumerate(batch.tolist()):
            if j in chosen:
                continue
            column = np.ascontiguousarray(columns[:, c])
            change = np.negative(self.loss)
            self.loops.swap_gains(column, self.first, self.second, self.nearest, change)
            change[~self.movable | (self.groups[self.picks] != self.groups[j])] = -np.inf
            p = int(change.argmax())
            if change[p] > 1e-9 * float(self.first.sum()):
                chosen.remove(int(self.picks[p]))
                chosen.add(j)
                self.columns[:, p], self.picks[p] = np.maximum(column, 0.0), j  # together, whenever it is interrupted
                self.made += 1
                self._rank()
