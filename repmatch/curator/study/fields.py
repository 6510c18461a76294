"""Do instances that share a column's value lie together?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.curator.ensemble import with_others
from repmatch.curator.study.nearest import expected, precision
from repmatch.errors import SelectionError
from repmatch.similarity import chance, kernel_block, mean_similarity

if TYPE_CHECKING:
    from repmatch.store import Store

MOST_VALUES = 100


@dataclass(frozen=True)
class FieldStudy:
    """How a column's values lie in the RepMatch kernel.

    Attributes:
        dataset: its name.
        field: the column.
        values: its values, by falling number of instances.
        counts: instances of each.
        similarity: (v, v) float64, mean kernel between instances of two values; on the diagonal between different
            instances of one value (NaN where there is only one).
        within: mean over pairs that share a value.
        between: mean over pairs that do not.
        nearest: mean share of an instance's ten nearest that have its value.
        nearest_embeddings: the same by mean-pooled embeddings of the base model; None where not asked for.
        nearest_chance: the same for neighbours drawn by chance.
        chance: kernel to expect of unrelated directions.
    """

    dataset: str
    field: str
    values: tuple[str, ...]
    counts: tuple[int, ...]
    similarity: NDArray[np.float64]
    within: float
    between: float
    nearest: float
    nearest_embeddings: float | None
    nearest_chance: float
    chance: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        table = [[None if np.isnan(x) else round(float(x), 6) for x in row] for row in self.similarity]
        return {
            "dataset": self.dataset,
            "field": self.field,
            "values": list(self.values),
            "counts": list(self.counts),
            "similarity": table,
            "within": self.within,
            "between": self.between,
            "nearest": self.nearest,
            "nearest_embeddings": self.nearest_embeddings,
            "nearest_chance": self.nearest_chance,
            "chance": self.chance,
        }

    def verdict(self) -> list[str]:
        """Say in words what the numbers mean, signs of failure included."""
        said = []
        ratio = self.within / self.between if self.between > 0 else float("inf")
        if ratio < 1.02:
            said.append(
                f"instances that share {self.field} are no more alike than others ({self.within:.4f} within, "
                f"{self.between:.4f} between): these factors do not see it. Try a warm start or other layers; values "
                "that differ in sign only show in signed searches"
            )
        else:
            said.append(
                f"instances that share {self.field} are {ratio:.1f} times as alike as others ({self.within:.4f} "
                f"within, {self.between:.4f} between, {self.chance:.4f} by chance)"
            )
        other = ""
        if self.nearest_embeddings is not None:
            other = f", of the nearest by embeddings {self.nearest_embeddings:.0%}"
        said.append(f"of the ten nearest {self.nearest:.0%} share it{other}, by chance {self.nearest_chance:.0%}")
        if self.nearest > 0.995 and self.nearest_chance < 0.9:
            said.append(
                f"the factors all but read {self.field} back; if it is the label, a warm start shows more of the text"
            )
        return said


def study_field(
    store: Store,
    dataset: str,
    field: str,
    embed: Callable[[tuple[str, ...]], NDArray[np.float32]] | None = None,
    *,
    ensemble: Sequence[str] = (),
) -> FieldStudy:
    """Study a column.

    Args:
        store: the store.
        dataset: the dataset's name.
        field: a column with 2 to 100 values; rows without one are left out.
        embed: gives (n, d) unit rows for ids, to compare with; None: no comparison.
        ensemble: datasets that hold the same ids from other starts; likeness is the mean over all of them.

    Returns:
        The study.

    Raises:
        UnknownNameError: no such column.
        SelectionError: fewer than two values, or too many.
        UsageError: a dataset of the ensemble lacks an id or cannot be put beside the others.
    """
    held = dict(zip(store.ids(dataset), store.column(dataset, field), strict=True))
    factors = with_others(store, dataset, store.factors(dataset), ensemble)
    kept = [i for i, name in enumerate(factors.ids) if held[name] is not None]
    factors = take(factors, kept)
    column = np.asarray([str(held[name]) for name in factors.ids], dtype=object).astype(str)
    values, counts = np.unique(column, return_counts=True)
    if not 2 <= len(values) <= MOST_VALUES:
        raise SelectionError(
            f"the column {field!r} of {dataset!r} has {len(values)} different values; expected 2 to {MOST_VALUES}."
        )
    order = np.lexsort((values, -counts))
    values, counts = values[order], counts[order]
    members = [np.flatnonzero(column == value) for value in values]
    means = np.stack([mean_similarity(factors, take(factors, at)) for at in members], axis=1).astype(np.float64)
    similarity, within, between = _means(means, members, (factors.norms != 0).mean(axis=1))
    nearest = precision(lambda at: kernel_block(take(factors, at), factors), column.tolist())
    other = None
    if embed is not None:
        rows = embed(factors.ids)
        other = precision(lambda at: rows[at] @ rows.T, column.tolist())
    return FieldStudy(
        dataset,
        field,
        tuple(values.tolist()),
        tuple(counts.tolist()),
        similarity,
        within,
        between,
        nearest,
        other,
        expected(column.tolist()),
        chance(factors.layout),
    )


def _means(
    means: NDArray[np.float64], members: list[NDArray[np.int64]], own: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float, float]:
    """Bring (n, v) means of instances with groups together; `own` is each instance's kernel with itself."""
    count = len(members)
    sizes = np.array([len(at) for at in members], np.float64)
    similarity = np.full((count, count), np.nan)
    totals = np.zeros((2, 2))  # sums and numbers of pairs, within and between
    for g, at in enumerate(members):
        sums = (means[at] * sizes).sum(axis=0)
        for h in range(count):
            total, pairs = float(sums[h]), sizes[g] * sizes[h]
            if g == h:
                total, pairs = total - float(own[at].sum()), sizes[g] * (sizes[g] - 1)
            if pairs:
                similarity[g, h] = total / pairs
            totals[int(g != h)] += (total, pairs)
    return similarity, totals[0, 0] / max(1.0, totals[0, 1]), totals[1, 0] / max(1.0, totals[1, 1])
