"""The same rows in several spaces (models, ranks, starts, targets): do they see the same?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.study.nearest import QUERIES
from repmatch.errors import SelectionError, UsageError
from repmatch.similarity import kernel_block

if TYPE_CHECKING:
    from repmatch.store import Store

NEAR = 10


@dataclass(frozen=True)
class SpaceStudy:
    """How far the kernels of several datasets agree on the rows that they share.

    Attributes:
        names: the datasets, s of them.
        rows: shared rows looked at.
        differences: pair of positions -> the fields in which their spaces differ.
        alignment: (s, s) float64, centred kernel alignment, 1 for the same kernel up to scale (Kornblith et al. 2019,
            equation 4).
        nearest: (s, s) float64, mean share of an instance's ten nearest that are the same.
        rank: (s, s) float64, Spearman's correlation of the instances' mean similarity with all others.
        nearest_chance: `nearest` for neighbours drawn by chance.
    """

    names: tuple[str, ...]
    rows: int
    differences: dict[tuple[int, int], tuple[str, ...]]
    alignment: NDArray[np.float64]
    nearest: NDArray[np.float64]
    rank: NDArray[np.float64]
    nearest_chance: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "names": list(self.names),
            "rows": self.rows,
            "differences": [
                {"names": [self.names[i], self.names[j]], "fields": list(f)} for (i, j), f in self.differences.items()
            ],
            "alignment": self.alignment.round(6).tolist(),
            "nearest": self.nearest.round(6).tolist(),
            "rank": self.rank.round(6).tolist(),
            "nearest_chance": self.nearest_chance,
        }

    def verdict(self) -> list[str]:
        """Say in words which spaces can stand in for each other."""
        said = []
        for (i, j), fields in self.differences.items():
            what = ", ".join(fields) or "nothing"
            share, rank = self.nearest[i, j], self.rank[i, j]
            if share > 0.7 and rank > 0.9:
                word = "see the same"
            elif share < 3 * self.nearest_chance:
                word = "have next to nothing in common"
            else:
                word = "see related things"
            said.append(
                f"{self.names[i]} and {self.names[j]} {word}: {share:.0%} of the ten nearest are shared (by chance "
                f"{self.nearest_chance:.1%}), alignment {self.alignment[i, j]:.2f}, ranks correlate {rank:.2f}; they "
                f"differ in {what}"
            )
        return said


def study_spaces(store: Store, names: Sequence[str], *, seed: int = 0) -> SpaceStudy:
    """Compare spaces on the rows that their datasets share by id and content.

    Args:
        store: the store.
        names: two datasets or more.
        seed: of the draw of rows, where more than 1,000 are shared.

    Returns:
        The study.

    Raises:
        UsageError: fewer than two names.
        SelectionError: too few shared rows.
    """
    if len(set(names)) < 2:
        raise UsageError("name two datasets or more that hold the same rows in different spaces.")
    hashes = [{row.id: row.task_hash for row in store.tasks(name)} for name in names]
    whole = [set(store.factors(name).ids) for name in names]
    shared = [i for i in hashes[0] if all(i in w for w in whole) and len({h.get(i) for h in hashes}) == 1]
    if len(shared) <= 2 * NEAR:
        raise SelectionError(
            f"the datasets {', '.join(map(repr, names))} share {len(shared)} rows of the same id, text and label; "
            f"expected more than {2 * NEAR}. Ingest the same file into each, with other options."
        )
    if len(shared) > QUERIES:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(shared))[:QUERIES])
        shared = [shared[i] for i in chosen.tolist()]
    kernels = [_kernel(store, name, shared) for name in names]
    n, count = len(shared), len(names)
    centred = [k - k.mean(axis=0) - k.mean(axis=1)[:, None] + k.mean() for k in kernels]
    near = [_nearest(k) for k in kernels]
    means = [(k.sum(axis=1) - np.diag(k)) / (n - 1) for k in kernels]
    alignment, nearest, rank = np.eye(count), np.eye(count), np.eye(count)
    spaces = [store.space(store.factors(name, ids=shared[:1]).space_id) for name in names]
    differences = {}
    for i, j in combinations(range(count), 2):
        size = np.linalg.norm(centred[i]) * np.linalg.norm(centred[j])
        alignment[i, j] = alignment[j, i] = (centred[i] * centred[j]).sum() / size if size > 0 else 0.0
        same = [len(np.intersect1d(a, b)) / NEAR for a, b in zip(near[i], near[j], strict=True)]
        nearest[i, j] = nearest[j, i] = np.mean(same)
        rank[i, j] = rank[j, i] = _spearman(means[i], means[j])
        differences[i, j] = tuple(spaces[i].differences(spaces[j]))
    return SpaceStudy(tuple(names), n, differences, alignment, nearest, rank, NEAR / (n - 1))


def _kernel(store: Store, name: str, ids: Sequence[str]) -> NDArray[np.float64]:
    factors = store.factors(name, ids=ids)
    return kernel_block(factors, factors).astype(np.float64)


def _nearest(kernel: NDArray[np.float64]) -> NDArray[np.int64]:
    others = kernel.copy()
    np.fill_diagonal(others, -np.inf)
    return np.argpartition(-others, NEAR - 1, axis=1)[:, :NEAR]


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the correlation of ranks; ties get their mean rank."""

    def ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
        _, place, sizes = np.unique(x, return_inverse=True, return_counts=True)
        ends = np.cumsum(sizes)
        mean: NDArray[np.float64] = (ends - (sizes - 1) / 2)[place]
        return mean

    left, right = ranks(a), ranks(b)
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
