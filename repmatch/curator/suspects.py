"""Suspects: instances that the start gets wrong and whose gradient opposes their neighbours': likely label errors.

Unsigned RepMatch cannot see a wrong label: flip it and the gradient flips, and the subspace stays. So the neighbours
are found by RepMatch, and the signed cosine tells whether they pull the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.curator.ensemble import with_others
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError, UsageError
from repmatch.similarity import mean_scores

if TYPE_CHECKING:
    import polars as pl

    from repmatch.store import Store

NEAR = 20  # neighbours that are asked
REFERENCE = 20_000  # instances that neighbours are looked for among, at most
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Suspects:
    """The most suspect instances, worst first, ties by id.

    Attributes:
        dataset: the dataset's name.
        ids: the user's ids.
        suspicion: (k,) float64 in [0, 1]: the mean of the instance's rank by loss and its rank by opposition among all.
        losses: (k,) float64, loss at the shared start.
        agreement: (k,) float32 in [−1, 1], mean signed cosine with the 20 nearest instances by RepMatch.
        conflicts: for each, the id of the instance that opposes it most; None where none opposes it.
        opposition: (k,) float32, the signed cosine with that one; 0 where there is none.
        warm: whether the factors come from a warm start; from a cold one they say little about single labels.
    """

    dataset: str
    ids: tuple[str, ...]
    suspicion: NDArray[np.float64]
    losses: NDArray[np.float64]
    agreement: NDArray[np.float32]
    conflicts: tuple[str | None, ...]
    opposition: NDArray[np.float32]
    warm: bool

    def to_polars(self) -> pl.DataFrame:
        """Return the suspects as a frame: rank, id, suspicion, loss, agreement, conflict, opposition."""
        import polars as pl

        return pl.DataFrame(
            {
                "rank": range(1, len(self.ids) + 1),
                "id": self.ids,
                "suspicion": self.suspicion,
                "loss": self.losses,
                "agreement": self.agreement,
                "conflict": self.conflicts,
                "opposition": self.opposition,
            },
            schema_overrides={"conflict": pl.String},
        )


@dataclass(frozen=True)
class Opposition:
    """What the neighbours of every instance say.

    Attributes:
        agreement: (n,) float32, mean signed cosine with the nearest by RepMatch; 0 for an instance without gradient.
        conflict: (n,) int64, position of the instance with the lowest signed cosine.
        cosine: (n,) float32, that cosine.
    """

    agreement: NDArray[np.float32]
    conflict: NDArray[np.int64]
    cosine: NDArray[np.float32]


def oppose(factors: Factors, *, near: int = NEAR, seed: int = 0) -> Opposition:
    """Ask every instance's nearest neighbours by RepMatch whether their ΔW points the same way.

    All pairs are looked at, in blocks; of more than 20,000 instances, every instance with 20,000 drawn at random.

    Args:
        factors: n instances, two or more.
        near: neighbours that are asked, at most n − 1.
        seed: of that draw.

    Returns:
        Agreement and conflict of each.

    Raises:
        UsageError: fewer than two instances.
    """
    n = len(factors)
    if n < 2:
        raise UsageError(f"neighbours are other instances: expected two or more, got {n}.")
    places = np.arange(n)
    if n > REFERENCE:
        places = np.sort(np.random.default_rng(seed).permutation(n)[:REFERENCE])
    others = factors if len(places) == n else take(factors, places)
    position = np.full(n, -1, np.int64)
    position[places] = np.arange(len(places))
    near = min(near, len(places) - 1)
    agreement, conflict = np.zeros(n, np.float32), np.zeros(n, np.int64)
    cosine = np.zeros(n, np.float32)
    step = max(1, _BLOCK_BYTES // (8 * len(places)))
    for lo in range(0, n, step):
        hi = min(n, lo + step)
        queries = take(factors, slice(lo, hi))
        score, signed = mean_scores(queries, others), mean_scores(queries, others, signed=True)
        rows = np.flatnonzero(position[lo:hi] >= 0)
        score[rows, position[lo:hi][rows]] = -np.inf  # never its own neighbour
        nearest = np.argpartition(-score, near - 1, axis=1)[:, :near]
        agreement[lo:hi] = np.take_along_axis(signed, nearest, axis=1).mean(axis=1)
        worst = signed.argmin(axis=1)
        conflict[lo:hi], cosine[lo:hi] = places[worst], signed[np.arange(hi - lo), worst]
    return Opposition(agreement, conflict, cosine)


def suspicion(losses: NDArray[np.float64], agreement: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean of the ranks by loss and by opposition, which needs no scale of either.

    Args:
        losses: (n,) loss of each instance.
        agreement: (n,) agreement with its neighbours.

    Returns:
        (n,) float64 in [0, 1], 1 for the instance that leads both; equal values share their mean rank.
    """
    return (_ranks(losses) + _ranks(-np.asarray(agreement, np.float64))) / 2


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    ranks: NDArray[np.float64] = (ends - (sizes + 1) / 2)[place] / max(1, len(values) - 1)
    return ranks


def suspects(store: Store, dataset: str, *, k: int = 20, ensemble: Sequence[str] = ()) -> Suspects:
    """Find likely label errors and conflicts, each with the instance that opposes it most.

    Args:
        store: the store.
        dataset: the dataset's name; its factors should come from a warm start.
        k: how many; all of them where k exceeds the dataset.
        ensemble: datasets that hold the same ids from other starts: losses and cosines are means over all of them.

    Returns:
        The suspects, worst first.

    Raises:
        UsageError: k is below 1, or a dataset of the ensemble lacks an id or cannot be put beside the others.
        SelectionError: the dataset has fewer than two factors.
    """
    if k < 1:
        raise UsageError(f"-k {k} is out of range; expected 1 or more.")
    factors = store.factors(dataset)
    if len(factors) < 2:
        raise SelectionError(f"the dataset {dataset!r} has {len(factors)} factors; suspects are told from two or more.")
    both = with_others(store, dataset, factors, ensemble)
    losses = np.mean([_losses(store, name, factors.ids) for name in (dataset, *ensemble)], axis=0)
    asked = oppose(both)
    found = suspicion(losses, asked.agreement)
    worst = sorted(range(len(found)), key=lambda i: (-found[i], factors.ids[i]))[:k]
    opposed = asked.cosine[worst] < 0
    conflicts = [factors.ids[asked.conflict[i]] if o else None for i, o in zip(worst, opposed, strict=True)]
    return Suspects(
        dataset,
        tuple(factors.ids[i] for i in worst),
        found[worst],
        losses[worst],
        asked.agreement[worst],
        tuple(conflicts),
        np.where(opposed, asked.cosine[worst], np.float32(0.0)),
        store.space(factors.space_id).warm_start is not None,
    )


def _losses(store: Store, dataset: str, ids: Sequence[str]) -> NDArray[np.float64]:
    frame = store.sql("SELECT id, loss FROM instances WHERE dataset = ? AND loss IS NOT NULL", [dataset])
    held = dict(zip(frame["id"].to_list(), frame["loss"].to_list(), strict=True))
    return np.array([held[name] for name in ids], np.float64)
