"""Suspects: instances whose gradient opposes that of their dataset, so likely label errors and conflicts.

Unsigned RepMatch cannot see them: flip a label and the gradient flips, and the subspace stays. The signed cosine can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import dense_block, row_blocks, take
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError, UsageError
from repmatch.similarity import score_instance

if TYPE_CHECKING:
    import polars as pl

    from repmatch.store import Store


@dataclass(frozen=True)
class Suspects:
    """The instances that agree least with their dataset, worst first, ties by id.

    Attributes:
        dataset: the dataset's name.
        ids: the user's ids.
        agreement: (k,) float32 in [−1, 1], mean signed cosine of the instance's ΔW with those of all the others.
        conflicts: for each, the id of the instance that opposes it most; None where none opposes it.
        opposition: (k,) float32, the signed cosine with that one; 0 where there is none.
        warm: whether the factors come from a warm start; from a cold one they say little about single labels.
        mean: mean agreement of the whole dataset.
    """

    dataset: str
    ids: tuple[str, ...]
    agreement: NDArray[np.float32]
    conflicts: tuple[str | None, ...]
    opposition: NDArray[np.float32]
    warm: bool
    mean: float

    def to_polars(self) -> pl.DataFrame:
        """Return the suspects as a frame: rank, id, agreement, conflict, opposition."""
        import polars as pl

        return pl.DataFrame(
            {
                "rank": range(1, len(self.ids) + 1),
                "id": self.ids,
                "agreement": self.agreement,
                "conflict": self.conflicts,
                "opposition": self.opposition,
            },
            schema_overrides={"conflict": pl.String},
        )


def agreement(factors: Factors) -> NDArray[np.float32]:
    """Return each instance's mean signed cosine with all the others, in one pass over the factors.

    Σ_j cos(ΔW_i, ΔW_j) = ⟨d_i, Σ_j d_j⟩ per matrix with d the unit ΔW (rank above 1: in the space's basis of the rows
    of A), so the cost grows with n alone. The mean is taken over the other instances and over the matrices.

    Args:
        factors: n instances, two or more.

    Returns:
        (n,) float32 in [−1, 1]; 0 for an instance without gradient.

    Raises:
        UsageError: fewer than two instances, or rank above 1 without cores.
    """
    n, layout = len(factors), factors.layout
    if n < 2:
        raise UsageError(f"agreement is between instances: expected two or more, got {n}.")
    if layout.rank > 1 and factors.cores is None:
        raise UsageError(f"agreement at rank {layout.rank} needs cores, and these factors have none.")
    total = np.zeros(n)
    for m, d in enumerate(layout.dims):
        summed = np.zeros((d, layout.rank))
        for _, _, block in _unit_steps(factors, m):
            summed += block.sum(axis=0, dtype=np.float64)
        for lo, hi, block in _unit_steps(factors, m):
            own = np.einsum("ndr,ndr->n", block, block, dtype=np.float64)  # 1, or 0 without gradient
            total[lo:hi] += (np.einsum("ndr,dr->n", block, summed) - own) / (n - 1)
    return np.clip(total / len(layout.dims), -1.0, 1.0).astype(np.float32)


def _unit_steps(factors: Factors, m: int) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Yield (lo, hi, (hi − lo, d_out, r) unit ΔW of one matrix), zeros for zero factors."""
    for lo, hi in row_blocks(factors, m):
        block = dense_block(factors, m, lo, hi)
        if factors.cores is not None:
            block = np.matmul(block, factors.cores[lo:hi, m])
        length = np.linalg.norm(block, axis=(1, 2), keepdims=True)
        block = np.divide(block, length, out=np.zeros_like(block), where=length > 0)
        block[factors.norms[lo:hi, m] == 0] = 0.0
        yield lo, hi, block


def suspects(store: Store, dataset: str, *, k: int = 20) -> Suspects:
    """Find the instances whose gradients oppose their dataset, each with the instance it conflicts with most.

    Args:
        store: the store.
        dataset: the dataset's name; its factors should come from a warm start.
        k: how many; all of them where k exceeds the dataset.

    Returns:
        The suspects, worst first.

    Raises:
        UsageError: k is below 1.
        SelectionError: the dataset has fewer than two factors.
    """
    if k < 1:
        raise UsageError(f"-k {k} is out of range; expected 1 or more.")
    factors = store.factors(dataset)
    if len(factors) < 2:
        raise SelectionError(f"the dataset {dataset!r} has {len(factors)} factors; suspects are told from two or more.")
    agreed = agreement(factors)
    worst = sorted(np.argpartition(agreed, min(k, len(agreed)) - 1)[: min(k, len(agreed))].tolist())
    limit = agreed[worst].max()
    tied = np.flatnonzero(agreed <= limit).tolist()  # ties at the edge are settled by id, not by place
    worst = sorted(tied, key=lambda i: (agreed[i], factors.ids[i]))[:k]
    conflicts: list[str | None] = []
    opposition = np.zeros(len(worst), np.float32)
    for at, place in enumerate(worst):
        cosines = score_instance(factors, take(factors, [place]), signed=True).mean(axis=1)
        other = int(cosines.argmin())
        opposed = bool(cosines[other] < 0)
        conflicts.append(factors.ids[other] if opposed else None)
        opposition[at] = cosines[other] if opposed else 0.0
    warm = store.space(factors.space_id).warm_start is not None
    return Suspects(
        dataset,
        tuple(factors.ids[i] for i in worst),
        agreed[worst],
        tuple(conflicts),
        opposition,
        warm,
        float(agreed.mean()),
    )
